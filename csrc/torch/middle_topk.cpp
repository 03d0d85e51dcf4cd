#include "backend.h"
#include "convert.h"
#include "ops.h"

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

// distance_bias [Hq, more than `distance`] of any floating dtype, as float32.
std::optional<Tensor> bias_at_distance(const std::optional<Tensor>& distance_bias, const Tensor& q,
                                       int64_t distance) {
  if (!distance_bias) return std::nullopt;
  check_rank(kOp, "distance_bias", *distance_bias, 2, "[Hq, max_distance + 1]");
  LMINF_CHECK(kOp, distance_bias->size(0) == q.size(1) && distance_bias->size(1) > distance,
              "distance_bias has shape ", shape_of(*distance_bias), ", but must have ", q.size(1),
              " rows, one a head, and more than distance columns, which is ", distance);
  check_table_length(kOp, *distance_bias);
  return as_float(kOp, "distance_bias", *distance_bias, q);
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> middle_topk(
    const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& lambda_out,
    const Tensor& lambda_lse, const Tensor& positions, int64_t n_global, int64_t window,
    int64_t top_k, int64_t distance, const std::optional<Tensor>& inv_freq, double rope_scaling,
    bool rope_interleaved, const std::optional<Tensor>& alibi_slopes,
    const std::optional<Tensor>& sink_logits, std::optional<double> scale, double softcap,
    const std::optional<Tensor>& k_start, const std::optional<Tensor>& distance_bias) {
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

  const Tensor q_dense = with_dense_last_dim(q);
  const Tensor k_dense = with_dense_last_dim(k);
  const Tensor v_dense = with_dense_last_dim(v);
  const Tensor lambda_out_dense = with_dense_last_dim(lambda_out);
  const Tensor lambda_lse_dense = as_contiguous(lambda_lse);
  const Tensor row_positions = as_contiguous(positions);
  const auto frequency = frequencies(kOp, inv_freq, "q", q);
  const auto slopes = per_head(kOp, "alibi_slopes", alibi_slopes, q);
  const auto sinks = per_head(kOp, "sink_logits", sink_logits, q);
  const auto biases = bias_at_distance(distance_bias, q, distance);
  check_position_values("positions", row_positions);

  MiddleTopkParams params;
  params.score = score_params(kOp, scale, softcap, slopes, sinks, biases, head_dim);
  params.rope = rope_params(kOp, "rope_scaling", frequency, rope_scaling, rope_interleaved);
  std::optional<Tensor> first_positions;
  if (k_start) {
    first_positions = as_contiguous(*k_start);
    check_position_values("k_start", *first_positions);
    params.k_start = static_cast<const int64_t*>(first_positions->const_data_ptr());
  }

  Tensor out = empty_output_like(q);
  Tensor lse = empty_lse(q);
  Tensor chosen = torch::stable::new_empty(positions, {batch, heads_q, top_k});
  if (lse.numel() == 0) return {out, lse, chosen};

  params.dtype = dtype_of(q);
  params.q = q_dense.const_data_ptr();
  params.k = k_dense.const_data_ptr();
  params.v = v_dense.const_data_ptr();
  params.lambda_out = lambda_out_dense.const_data_ptr();
  params.lambda_lse = static_cast<const float*>(lambda_lse_dense.const_data_ptr());
  params.out = out.mutable_data_ptr();
  params.lse = static_cast<float*>(lse.mutable_data_ptr());
  params.chosen = static_cast<int64_t*>(chosen.mutable_data_ptr());
  params.q_stride = strides_of(q_dense);
  params.k_stride = strides_of(k_dense);
  params.v_stride = strides_of(v_dense);
  params.lambda_out_stride = strides_of(lambda_out_dense);
  params.out_stride = strides_of(out);
  params.positions = static_cast<const int64_t*>(row_positions.const_data_ptr());
  params.batch = batch;
  params.heads_q = heads_q;
  params.heads_kv = heads_kv;
  params.seqlen_k = seqlen_k;
  params.head_dim = head_dim;
  params.n_global = n_global;
  params.window = window;
  params.top_k = top_k;
  params.distance = distance;

  run(params, q.device());
  return {out, lse, chosen};
}

}  // namespace lminf::binding
