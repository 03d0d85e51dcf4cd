// Where the ops hand over: each overload runs one filled params struct on the device that holds its
// tensors, and throws for a device without kernels.
#pragma once

#include <optional>

#include "../cuda/launchers.h"
#include "../params.h"
#include "../plan.h"
#include "checks.h"

namespace lminf::binding {

using torch::stable::Device;

void run(const LambdaAttnParams& params, const Device& device);
void run(const LambdaDecodeParams& params, const Device& device);
void run(const ClampedRopeParams& params, const Device& device);
void run(const MiddleTopkParams& params, const Device& device);

// While one of these lives, the attention ops called on its thread run nothing: it gets the plan of
// the last of them, for the tensors' own device or for the CUDA device that `device` describes.
class Planning {
 public:
  explicit Planning(std::optional<cuda::DeviceFacts> device);
  ~Planning();
  Planning(const Planning&) = delete;
  Planning& operator=(const Planning&) = delete;

  std::optional<cuda::DeviceFacts> device;
  std::optional<KernelPlan> plan;
};

// The same for a CUDA device, in builds with CUDA kernels (LMINF_WITH_CUDA).
void run_cuda(const LambdaAttnParams& params, const Device& device);
void run_cuda(const LambdaDecodeParams& params, const Device& device);
void run_cuda(const ClampedRopeParams& params, const Device& device);
void run_cuda(const MiddleTopkParams& params, const Device& device);

}  // namespace lminf::binding
