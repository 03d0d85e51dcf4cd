// The Hopper prefill for fp16.
#include "sm90.cuh"

namespace lminf::cuda {

bool lambda_attn_sm90_fp16(AttnSources sources, int multiprocessors, Stream stream) {
  return run_lambda_attn_sm90<fp16>(sources, multiprocessors, stream);
}

}  // namespace lminf::cuda
