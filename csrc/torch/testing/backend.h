// What runs the ops' calls in the libraries that are built for tests (op.h): the CUDA kernels
// without a GPU, as C++ in the emulation (LMINF_EMULATION) or as PTX in csrc/ptx_interpreter.
#pragma once

#include <cstdint>
#include <cstring>
#include <optional>
#include <string>
#include <vector>

#include "../../cuda/launchers.h"
#include "../arguments.h"
#include "../call.h"
#if defined(LMINF_EMULATION)
#include "../../emulation/runtime.h"
namespace machine = lminf::emulation;
#else
#include "../../ptx_interpreter/control.h"
namespace machine = lminf::interpreter;
#endif

namespace lminf::binding {

// Of the tensor by this name only the first half counts as there (GlobalMemory).
inline std::string shortened;

// While one lives, an access outside of all that it holds is a fault.
class GlobalMemory {
 public:
  GlobalMemory() { machine::clear_globals(); }
  ~GlobalMemory() { machine::clear_globals(); }
  GlobalMemory(const GlobalMemory&) = delete;
  GlobalMemory& operator=(const GlobalMemory&) = delete;

  void add(const Tensor& tensor, const std::string& name) {
    if (tensor.numel() == 0) return;
    size_t elements = 1;
    for (int64_t i = 0; i < tensor.dim(); ++i) elements += (tensor.size(i) - 1) * tensor.stride(i);
    const size_t bytes = elements * tensor.element_size();
    machine::register_global(tensor.const_data_ptr(), name == shortened ? bytes / 2 : bytes,
                             name.c_str());
  }

  // Holds NaN until it is written.
  void* add_workspace(int64_t bytes) {
    constexpr size_t kAlignment = 256;
    workspace_.assign(bytes + kAlignment, 0xFF);
    const auto at = reinterpret_cast<uintptr_t>(workspace_.data());
    unsigned char* begin = workspace_.data() + (kAlignment - at % kAlignment) % kAlignment;
    machine::register_global(begin, bytes, "workspace");
    return begin;
  }

 private:
  std::vector<unsigned char> workspace_;
};

template <typename Params, typename Arguments>
void run(const Call<Params>& call, const Arguments& arguments) {
  GlobalMemory memory;
  const auto add_all = [&](const char* kind) {
    return [&memory, kind, n = 0](const Tensor& tensor) mutable {
      memory.add(tensor, std::string(kind) + " " + std::to_string(n++));
    };
  };
  auto add_argument = add_all("argument"), add_output = add_all("output"),
       add_copy = add_all("copy");
  each_tensor(arguments, add_argument);
  for (const Tensor& tensor : call.outputs) add_output(tensor);
  for (const Tensor& tensor : call.copies.all()) add_copy(tensor);
  const cuda::DeviceFacts device = cuda::device_facts(machine::current_device());
  void* workspace = memory.add_workspace(cuda::plan_of(call.params, device).workspace_bytes);
  cuda::run_op(call.params, device, workspace, nullptr);
}

template <typename Params>
KernelPlan plan(const Call<Params>& call, const std::optional<cuda::DeviceFacts>& described) {
  return cuda::plan_of(call.params,
                       described.value_or(cuda::device_facts(machine::current_device())));
}

}  // namespace lminf::binding
