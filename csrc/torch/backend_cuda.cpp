// The ops on CUDA tensors: the current stream, memory for the workspace, and the launchers.
// Compiled only into builds with CUDA kernels.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include <optional>
#include <stdexcept>

#include "../cuda/launchers.h"
#include "backend.h"
#include "ops.h"

// A CPU-only torch has no such function: weak, so that a module built there, or for there, loads.
extern "C" __attribute__((weak)) AOTITorchError
aoti_torch_get_current_cuda_stream(int32_t device_index, void** ret_stream);

STABLE_TORCH_LIBRARY_IMPL(lminf, CUDA, m) {
  m.impl("lambda_attn", TORCH_BOX(&lminf::binding::lambda_attn));
  m.impl("lambda_decode", TORCH_BOX(&lminf::binding::lambda_decode));
  m.impl("clamped_rope", TORCH_BOX(&lminf::binding::clamped_rope));
  m.impl("middle_topk", TORCH_BOX(&lminf::binding::middle_topk));
}

namespace lminf::binding {
namespace {

// Makes `device` the current one for the guard's life, and knows its current stream.
class CudaContext {
 public:
  explicit CudaContext(const Device& device) : guard_(device.index()), device_(device) {
    if (aoti_torch_get_current_cuda_stream(device.index(), &stream_) != 0) {
      throw std::runtime_error("lminf: the current CUDA stream cannot be had from PyTorch");
    }
  }

  cuda::Stream stream() const { return stream_; }

  Tensor workspace(int64_t bytes) const {
    return torch::stable::empty({bytes}, ScalarType::Byte, std::nullopt, device_);
  }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  Device device_;
  void* stream_ = nullptr;
};

}  // namespace

void run_cuda(const LambdaAttnParams& params, const Device& device) {
  const CudaContext context(device);
  const cuda::DeviceFacts facts = cuda::device_facts(device.index());
  Tensor workspace = context.workspace(cuda::lambda_attn_plan(params, facts).workspace_bytes);
  cuda::lambda_attn(params, facts, workspace.mutable_data_ptr(), context.stream());
}

void run_cuda(const LambdaDecodeParams& params, const Device& device) {
  const CudaContext context(device);
  const cuda::DeviceFacts facts = cuda::device_facts(device.index());
  Tensor workspace = context.workspace(cuda::lambda_decode_plan(params, facts).workspace_bytes);
  cuda::lambda_decode(params, facts, workspace.mutable_data_ptr(), context.stream());
}

void run_cuda(const ClampedRopeParams& params, const Device& device) {
  const CudaContext context(device);
  cuda::clamped_rope(params, context.stream());
}

void run_cuda(const MiddleTopkParams& params, const Device& device) {
  const CudaContext context(device);
  const cuda::DeviceFacts facts = cuda::device_facts(device.index());
  Tensor workspace = context.workspace(cuda::middle_topk_plan(params, facts).workspace_bytes);
  cuda::middle_topk(params, facts, workspace.mutable_data_ptr(), context.stream());
}

}  // namespace lminf::binding
