// The Python module lminf_cuda._C: importing it registers the ops that
// the other files here hold with PyTorch. Only the stable
// parts of Python's and of PyTorch's ABI are used, so one build serves later versions of both.
#include <Python.h>

#include <exception>

#include "../cpu/kernels.h"
#include "../cpu/scratch.h"

namespace {

PyObject* cpu_isa(PyObject*, PyObject*) {
  try {
    return PyUnicode_FromString(lminf::cpu::kernels().isa);
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_ValueError, error.what());
    return nullptr;
  }
}

PyObject* cpu_scratch_bytes(PyObject*, PyObject*) {
  return PyLong_FromSize_t(lminf::cpu::Scratch::largest().exchange(0));
}

PyMethodDef methods[] = {
    {"cpu_isa", cpu_isa, METH_NOARGS,
     "The instruction set that the CPU kernels use on this machine (see LMINF_CPU_ISA)."},
    {"cpu_scratch_bytes", cpu_scratch_bytes, METH_NOARGS,
     "The most scratch memory that a CPU kernel has held on one thread since the last call."},
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef module_definition = {
    PyModuleDef_HEAD_INIT,
    "_C",
    "Compiled kernels of lminf_cuda.",
    -1,
    methods,
    nullptr,
    nullptr,
    nullptr,
    nullptr,
};

}  // namespace

PyMODINIT_FUNC PyInit__C(void) { return PyModule_Create(&module_definition); }
