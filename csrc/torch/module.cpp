// The Python module lminf_cuda._C: importing it registers the kernels with PyTorch. Only the stable
// parts of Python's and of PyTorch's ABI are used, so one build serves later versions of both.
#include <Python.h>
#include <torch/csrc/stable/library.h>

#include <exception>

#include "../cpu/kernels.h"
#include "../cpu/scratch.h"
#include "backend.h"
#include "ops.h"

STABLE_TORCH_LIBRARY_IMPL(lminf, CPU, m) {
  m.impl("lambda_attn", TORCH_BOX(&lminf::binding::lambda_attn));
  m.impl("lambda_decode", TORCH_BOX(&lminf::binding::lambda_decode));
  m.impl("clamped_rope", TORCH_BOX(&lminf::binding::clamped_rope));
  m.impl("middle_topk", TORCH_BOX(&lminf::binding::middle_topk));
}

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

// plan(call, capability, multiprocessors): what the attention op that `call` calls would run, as a
// dict, or None where the op has nothing to do. With capability 0, on the tensors' own device.
PyObject* plan(PyObject*, PyObject* args) {
  PyObject* call;
  lminf::cuda::DeviceFacts facts;
  if (!PyArg_ParseTuple(args, "Oii", &call, &facts.capability, &facts.multiprocessors)) {
    return nullptr;
  }
  std::optional<lminf::cuda::DeviceFacts> device;
  if (facts.capability != 0) device = facts;
  const lminf::binding::Planning planning(device);
  PyObject* result = PyObject_CallNoArgs(call);
  if (result == nullptr) return nullptr;
  Py_DECREF(result);
  if (!planning.plan) Py_RETURN_NONE;
  const lminf::KernelPlan& p = *planning.plan;
  return Py_BuildValue("{sssLsLsLsOsLsLsLsL}", "kernel", p.kernel, "block_m", (long long)p.block_m,
                       "block_n", (long long)p.block_n, "splits", (long long)p.splits, "overlaps",
                       p.overlaps ? Py_True : Py_False, "blocks", (long long)p.blocks, "threads",
                       (long long)p.threads, "shared_bytes", (long long)p.shared_bytes,
                       "workspace_bytes", (long long)p.workspace_bytes);
}

PyMethodDef methods[] = {
    {"cpu_isa", cpu_isa, METH_NOARGS,
     "The instruction set that the CPU kernels use on this machine (see LMINF_CPU_ISA)."},
    {"cpu_scratch_bytes", cpu_scratch_bytes, METH_NOARGS,
     "The most scratch memory that a CPU kernel has held on one thread since the last call."},
    {"plan", plan, METH_VARARGS, "What the attention op that a function calls would run."},
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
