// The CUDA kernels' front: every launcher there is. Plain C++: no CUDA header is needed to call
// them, nor torch. A launcher throws std::invalid_argument for parameters no kernel covers and
// std::runtime_error for a launch the runtime refuses; it never synchronises.
#pragma once

#include <cstdint>

#include "../params.h"

namespace lminf::cuda {

using Stream = void*;  // a cudaStream_t

// Of one device; asking for them takes no time and no synchronisation.
int multiprocessors(int device);

// Which kernel a forward runs.
enum class AttnKernel : int32_t {
  kTensorCore,  // mma.sync: bf16 and fp16, D a multiple of 8 up to 256, rows aligned to 16 bytes
  kPlain,       // float32 arithmetic on ordinary cores: everything else with D up to 384
};
const char* name_of(AttnKernel kernel);

AttnKernel lambda_attn_kernel(const LambdaAttnParams& params);
AttnKernel lambda_decode_kernel(const LambdaDecodeParams& params);

// Bytes of device memory, aligned to 256, that the forward needs while it runs: keys rotated once.
int64_t lambda_attn_workspace(const LambdaAttnParams& params);
void lambda_attn(const LambdaAttnParams& params, void* workspace, Stream stream);

// The same for one decoding step: partial results of the splits. `multiprocessors` of the device
// decide how many splits there are; the positions in device memory do not, so that a captured
// launch stays right as they grow.
int64_t lambda_decode_workspace(const LambdaDecodeParams& params, int multiprocessors);
void lambda_decode(const LambdaDecodeParams& params, int multiprocessors, void* workspace,
                   Stream stream);

void clamped_rope(const ClampedRopeParams& params, Stream stream);

}  // namespace lminf::cuda
