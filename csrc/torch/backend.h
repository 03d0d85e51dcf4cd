// Where the ops hand over: each overload runs one filled params struct on the device that holds its
// tensors, and throws for a device without kernels.
#pragma once

#include "../params.h"
#include "checks.h"

namespace lminf::binding {

using torch::stable::Device;

void run(const LambdaAttnParams& params, const Device& device);
void run(const LambdaDecodeParams& params, const Device& device);
void run(const ClampedRopeParams& params, const Device& device);
void run(const MiddleTopkParams& params, const Device& device);

// The same for a CUDA device, in builds with CUDA kernels (LMINF_WITH_CUDA).
void run_cuda(const LambdaAttnParams& params, const Device& device);
void run_cuda(const LambdaDecodeParams& params, const Device& device);
void run_cuda(const ClampedRopeParams& params, const Device& device);

}  // namespace lminf::binding
