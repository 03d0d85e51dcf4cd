// The Hopper prefill for bf16.
#include "sm90.cuh"

namespace lminf::cuda {

bool lambda_attn_sm90_bf16(AttnSources sources, int multiprocessors, Stream stream) {
  return run_lambda_attn_sm90<bf16>(sources, multiprocessors, stream);
}

}  // namespace lminf::cuda
