// The Python module of a library for tests: importing it registers the ops that it is linked with,
// torch.ops.lminf_emulated or torch.ops.lminf_ptx; its functions are what tests ask of the machine
// that runs them.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>

#include "backend.h"

#define LMINF_MODULE(name, m) PYBIND11_MODULE(name, m)

namespace py = pybind11;

LMINF_MODULE(LMINF_LIBRARY, m) {
  using machine::Device;
  m.doc() = "The CUDA kernels, run on the CPU";
  m.def("set_schedule_seed", &machine::set_schedule_seed, py::arg("seed"));
  m.def(
      "set_device",
      [](int capability, int multiprocessors, bool has_sm90a, bool has_sm90) {
        machine::set_device({capability, multiprocessors, has_sm90a, has_sm90});
      },
      py::arg("capability") = Device().capability,
      py::arg("multiprocessors") = Device().multiprocessors,
      py::arg("has_sm90a") = Device().has_sm90a, py::arg("has_sm90") = Device().has_sm90);
  m.def(
      "shorten", [](const std::string& name) { lminf::binding::shortened = name; },
      "Of the tensor by this name (\"argument 0\", \"output 1\") only the first half is there.");
  m.def(
      "take_launches",
      [] {
        py::list all;
        for (const machine::LaunchRecord& launch : machine::take_launches()) {
          py::dict one(py::arg("kernel") = launch.kernel, py::arg("overlaps") = launch.overlaps,
                       py::arg("blocks") = launch.blocks, py::arg("triggered") = launch.triggered);
#if !defined(LMINF_EMULATION)
          one["name"] = launch.name;
          one["target"] = launch.target;
          one["instructions"] = launch.instructions;
#endif
          all.append(one);
        }
        return all;
      },
      "The launches since the last call of this.");
#if !defined(LMINF_EMULATION)
  m.def(
      "kernel_texts",
      [] {
        py::list all;
        for (const machine::KernelText& text : machine::kernel_texts()) {
          all.append(py::make_tuple(text.target, text.name, text.body));
        }
        return all;
      },
      "Of every kernel in the build: target, name as in the PTX, body.");
  m.def(
      "replace_kernel_text",
      [](const std::string& target, const std::string& name, const std::string& body) {
        machine::replace_kernel_text({target, name, body});
      },
      "Another body for a kernel, until restore_kernel_texts.");
  m.def("restore_kernel_texts", &machine::restore_kernel_texts);
  m.def("decode_all", &machine::decode_all, "Raises at the first instruction that is not known.");
  m.def("forget_context", &machine::forget_context, "As on a thread before its first CUDA work.");
  m.def("refuse_tensor_maps", &machine::refuse_tensor_maps, py::arg("calls"), py::arg("after"));
  m.def("hide_entry_points", &machine::hide_entry_points, py::arg("calls"));
#endif
}
