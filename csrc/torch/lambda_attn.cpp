#include "lambda_attn.h"

#include "op.h"

namespace lminf::binding {
namespace {

constexpr char kOp[] = "lambda_attn";

Call<LambdaAttnParams> prepare(const Tensor& q, const Tensor& k, const Tensor& v, int64_t n_global,
                               int64_t window, std::optional<int64_t> max_distance,
                               const RotaryOptions& rotary, const ScoreOptions& score,
                               const std::optional<Tensor>& k_start,
                               const std::optional<Tensor>& global_k,
                               const std::optional<Tensor>& global_v,
                               const std::optional<Tensor>& cu_seqlens, int64_t k_rotated) {
  Call<LambdaAttnParams> call;
  read_inputs(kOp, call.params, call.copies, q, k, v, n_global, window, max_distance, rotary, score,
              k_start, global_k, global_v, cu_seqlens, k_rotated);
  add_attention_outputs(call, q);
  return call;
}

LMINF_REGISTER(kOp, Op<prepare>::run)
LMINF_REGISTER("lambda_attn_plan", Op<prepare>::plan)

}  // namespace
}  // namespace lminf::binding
