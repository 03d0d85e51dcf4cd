// Runs calls on the device that holds their tensors: on a CPU by the kernels of the best
// instruction set, on a CUDA device in builds with CUDA kernels (LMINF_WITH_CUDA).
#pragma once

#include <torch/csrc/stable/accelerator.h>

#include <functional>
#include <optional>
#include <stdexcept>

#include "../cpu/kernels.h"
#include "../cuda/launchers.h"
#include "call.h"

#if defined(LMINF_WITH_CUDA)
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
// A CPU-only torch has no such function: weak, so that a module built there, or for there, loads.
extern "C" __attribute__((weak)) AOTITorchError
aoti_torch_get_current_cuda_stream(int32_t device_index, void** ret_stream);
#endif

namespace lminf::binding {

// PyTorch's own thread pool, so that torch.set_num_threads holds for these kernels too.
inline cpu::Threads torch_threads() {
  cpu::Threads threads;
  threads.count = static_cast<int>(torch::stable::get_num_threads());
  threads.parallel_for = [](int64_t n, const std::function<void(int64_t, int64_t)>& body) {
    torch::stable::parallel_for(0, n, 1, body);
  };
  return threads;
}

#if defined(LMINF_WITH_CUDA)
template <typename Params>
void run_on_cuda(const Params& params, const torch::stable::Device& device) {
  const torch::stable::accelerator::DeviceGuard guard(device.index());
  void* stream = nullptr;
  if (aoti_torch_get_current_cuda_stream(device.index(), &stream) != 0) {
    throw std::runtime_error("lminf: the current CUDA stream cannot be had from PyTorch");
  }
  const cuda::DeviceFacts facts = cuda::device_facts(device.index());
  const int64_t bytes = cuda::plan_of(params, facts).workspace_bytes;
  std::optional<Tensor> workspace;
  if (bytes > 0) {
    workspace = torch::stable::empty({bytes}, ScalarType::Byte, std::nullopt, device);
  }
  cuda::run_op(params, facts, workspace ? workspace->mutable_data_ptr() : nullptr, stream);
}
#endif

template <typename Params, typename Arguments>
void run(const Call<Params>& call, const Arguments&) {
#if defined(LMINF_WITH_CUDA)
  const Tensor& out = call.outputs.front();
  if (out.is_cuda()) return run_on_cuda(call.params, out.device());
#endif
  cpu::run_op(call.params, torch_threads());
}

// For the tensors' own device, or for the CUDA device that is described.
template <typename Params>
KernelPlan plan(const Call<Params>& call, const std::optional<cuda::DeviceFacts>& described) {
  if (described) return cuda::plan_of(call.params, *described);
#if defined(LMINF_WITH_CUDA)
  const Tensor& out = call.outputs.front();
  if (out.is_cuda()) {
    return cuda::plan_of(call.params, cuda::device_facts(out.get_device_index()));
  }
#endif
  return cpu::plan_of(call.params, torch_threads().count);
}

}  // namespace lminf::binding
