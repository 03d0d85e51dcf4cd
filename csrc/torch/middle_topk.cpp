#include "op.h"
#include "options.h"

namespace lminf::binding {
namespace {

constexpr char kOp[] = "middle_topk";

void check_position_values(const char* name, const Tensor& positions) {
  if (!positions.is_cpu()) return;
  const auto* position = static_cast<const int64_t*>(positions.const_data_ptr());
  for (int64_t b = 0; b < positions.size(0); ++b) {
    LMINF_CHECK(kOp, position[b] > -kPositionLimit && position[b] < kPositionLimit, name, "[", b,
                "] is ", position[b], ", but positions must stay within +-2^31");
  }
}

Call<MiddleTopkParams> prepare(const Tensor& q, const Tensor& k, const Tensor& v,
                               const Tensor& lambda_out, const Tensor& lambda_lse,
                               const Tensor& positions, int64_t n_global, int64_t window,
                               int64_t top_k, int64_t distance, const RotaryOptions& rotary,
                               const ScoreOptions& score, const std::optional<Tensor>& k_start) {
  check_rank(kOp, "q", q, 4, "[B, Hq, 1, D]");
  check_rank(kOp, "k", k, 4, "[B, Hkv, Sk, D]");
  check_attention_dtype(kOp, "q", q);
  check_like(kOp, "k", k, "q", q);
  check_like(kOp, "v", v, "q", q);
  check_like(kOp, "lambda_out", lambda_out, "q", q);
  const int64_t batch = q.size(0), heads_q = q.size(1), head_dim = q.size(3);
  const int64_t heads_kv = k.size(1), seqlen_k = k.size(2);
  check_head_dim(kOp, "q", head_dim);
  check_shape(kOp, "q", q, {batch, heads_q, 1, head_dim}, "[B, Hq, 1, D], one query a row");
  check_shape(kOp, "k", k, {batch, heads_kv, seqlen_k, head_dim}, "[B, Hkv, Sk, D]");
  check_shape(kOp, "v", v, {batch, heads_kv, seqlen_k, head_dim}, "the shape of k");
  check_shape(kOp, "lambda_out", lambda_out, {batch, heads_q, 1, head_dim}, "the shape of q");
  check_shape(kOp, "lambda_lse", lambda_lse, {batch, heads_q, 1}, "[B, Hq, 1]");
  check_dtype(kOp, "lambda_lse", lambda_lse, ScalarType::Float, "float32");
  check_same_device(kOp, "lambda_lse", lambda_lse, "q", q);
  check_heads(kOp, heads_q, heads_kv);
  LMINF_CHECK(kOp, n_global >= 0, "n_global is ", n_global, ", but must be at least 0");
  check_window(kOp, window, std::nullopt);
  LMINF_CHECK(kOp, top_k >= 1, "top_k is ", top_k, ", but must be at least 1");
  LMINF_CHECK(kOp, distance >= 0 && distance < kPositionLimit, "distance is ", distance,
              ", but must be at least 0 and below 2^31");
  check_shape(kOp, "positions", positions, {batch}, "[B]");
  check_dtype(kOp, "positions", positions, ScalarType::Long, "int64");
  check_same_device(kOp, "positions", positions, "q", q);
  if (k_start) {
    check_shape(kOp, "k_start", *k_start, {batch}, "[B]");
    check_dtype(kOp, "k_start", *k_start, ScalarType::Long, "int64");
    check_same_device(kOp, "k_start", *k_start, "q", q);
  }

  Call<MiddleTopkParams> call;
  MiddleTopkParams& params = call.params;
  params.rope = rope_params(kOp, rotary, "q", q, call.copies);
  params.score = score_params(kOp, score, q, {distance, /*alone=*/true}, call.copies);
  const Tensor& row_positions = call.copies.contiguous(positions);
  check_position_values("positions", row_positions);
  if (k_start) {
    const Tensor& first_positions = call.copies.contiguous(*k_start);
    check_position_values("k_start", first_positions);
    params.k_start = data_of<int64_t>(first_positions);
  }

  params.dtype = dtype_of(q);
  add_attention_outputs(call, q);
  call.outputs.push_back(torch::stable::new_empty(positions, {batch, heads_q, top_k}));
  params.chosen = static_cast<int64_t*>(call.outputs[2].mutable_data_ptr());
  read_from(call.copies.dense(q), params.q, params.q_stride);
  read_from(call.copies.dense(k), params.k, params.k_stride);
  read_from(call.copies.dense(v), params.v, params.v_stride);
  read_from(call.copies.dense(lambda_out), params.lambda_out, params.lambda_out_stride);
  params.lambda_lse = data_of<float>(call.copies.contiguous(lambda_lse));
  params.positions = data_of<int64_t>(row_positions);
  params.batch = batch;
  params.heads_q = heads_q;
  params.heads_kv = heads_kv;
  params.seqlen_k = seqlen_k;
  params.head_dim = head_dim;
  params.n_global = n_global;
  params.window = window;
  params.top_k = top_k;
  params.distance = distance;
  return call;
}

LMINF_REGISTER(kOp, Op<prepare>::run)

}  // namespace
}  // namespace lminf::binding
