// Between the dispatcher (prefill/launch.cu) and the prefill kernels: each takes the sources made
// ready by the pre-pass.
#pragma once

#include "../common/plan.h"
#include "sources.cuh"

namespace lminf::cuda {

// bf16 and fp16 on tensor cores; one source file an element type, so that they build in parallel.
void lambda_attn_sm80_bf16(AttnSources sources, Stream stream);
void lambda_attn_sm80_fp16(AttnSources sources, Stream stream);

// The same on Hopper, by as many blocks as there are multiprocessors. False, and nothing is
// launched, where the driver refuses to describe one of the tensors to TMA.
bool lambda_attn_sm90_bf16(AttnSources sources, int multiprocessors, Stream stream);
bool lambda_attn_sm90_fp16(AttnSources sources, int multiprocessors, Stream stream);

void lambda_attn_plain(AttnSources sources, Stream stream);

}  // namespace lminf::cuda
