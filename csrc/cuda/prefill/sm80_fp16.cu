// The tensor-core prefill for fp16.
#include "sm80.cuh"

namespace lminf::cuda {

void lambda_attn_sm80_fp16(AttnSources sources, Stream stream) {
  run_lambda_attn_sm80<fp16>(sources, stream);
}

}  // namespace lminf::cuda
