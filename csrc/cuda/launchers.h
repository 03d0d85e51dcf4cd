// The CUDA kernels' front: for each op's params a plan and a launcher, which its own folder
// specializes (the plans of the attention ops: common/plan.cpp). Plain C++: no CUDA header is
// needed to call them, nor torch. A launcher throws std::invalid_argument for parameters no kernel
// covers and std::runtime_error for a launch the runtime refuses; it never synchronises.
#pragma once

#include <cstdint>

#include "../params.h"
#include "../plan.h"

namespace lminf::cuda {

using Stream = void*;  // a cudaStream_t

// What plans depend on.
struct DeviceFacts {
  int capability = 80;  // ten times the compute capability: 80, 86, 89, 90, 100, 120
  int multiprocessors = 1;
  bool has_sm90a = true;  // there is code for sm_90a. device_facts answers for this build; a device
                          // that is only described is taken to be served by a build that has it
  bool has_sm90 = true;   // whether the code that it runs was compiled for 9.0 or later

  // Programmatic dependent launch: the device has it, and so has the code.
  bool overlaps_launches() const { return capability >= 90 && has_sm90; }
};
// Of one device; asking for them takes no time and no synchronisation.
DeviceFacts device_facts(int device);

// Which kernel runs.
enum class AttnKernel : int32_t {
  kSm90,   // wgmma and TMA, on compute capability 9.0: prefill of what kSm80 covers in
           // tensors that TMA covers, without cu_seqlens and biases by distance, and without
           // global_k where the window is below 16
  kSm80,   // mma.sync: bf16 and fp16, D a multiple of 8 up to 256, rows aligned to 16 bytes
  kPlain,  // float32 arithmetic on ordinary cores: everything else with D up to 2048
};
const char* name_of(AttnKernel kernel);

AttnKernel lambda_attn_kernel(const LambdaAttnParams& params, const DeviceFacts& device);
AttnKernel lambda_decode_kernel(const LambdaDecodeParams& params);

// How a call is cut, and the device memory that it needs while it runs: keys rotated once, or the
// partial results of splits. Neither these nor the kernel depend on what stands in device
// memory, so that a captured launch stays right as positions grow. They throw what the launchers
// throw; no device is asked.
template <typename Params>
KernelPlan plan_of(const Params& params, const DeviceFacts& device);

// `workspace` is aligned to 256 bytes and holds the plan's workspace_bytes.
template <typename Params>
void run_op(const Params& params, const DeviceFacts& device, void* workspace, Stream stream);

}  // namespace lminf::cuda
