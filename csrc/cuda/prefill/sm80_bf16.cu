// The tensor-core prefill for bf16.
#include "sm80.cuh"

namespace lminf::cuda {

void lambda_attn_sm80_bf16(AttnSources sources, Stream stream) {
  run_lambda_attn_sm80<bf16>(sources, stream);
}

}  // namespace lminf::cuda
