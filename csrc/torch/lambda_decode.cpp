#include "backend.h"
#include "convert.h"
#include "derivatives.h"
#include "ops.h"

namespace lminf::binding {
namespace {

constexpr char kOp[] = "lambda_decode";

void check_position_values(const Tensor& positions) {
  if (!positions.is_cpu()) return;
  const auto* position = static_cast<const int64_t*>(positions.const_data_ptr());
  for (int64_t b = 0; b < positions.size(0); ++b) {
    LMINF_CHECK(kOp, position[b] < kPositionLimit, "positions[", b, "] is ", position[b],
                ", but must be below 2^31 (a negative one marks an idle row)");
  }
}

}  // namespace

std::tuple<Tensor, Tensor> lambda_decode(
    const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& ring_k, const Tensor& ring_v,
    const Tensor& global_k, const Tensor& global_v, const Tensor& positions, int64_t window,
    std::optional<int64_t> max_distance, const std::optional<Tensor>& inv_freq, double rope_scaling,
    bool rope_interleaved, const std::optional<Tensor>& alibi_slopes,
    const std::optional<Tensor>& sink_logits, std::optional<double> scale, double softcap,
    const std::optional<Tensor>& distance_bias) {
  if (aoti_torch_grad_mode_is_enabled()) {
    refuse_derivatives(kOp, {q, k, v, ring_k, ring_v, global_k, global_v},
                       {&inv_freq, &alibi_slopes, &sink_logits, &distance_bias});
  }
  check_rank(kOp, "q", q, 4, "[B, Hq, 1, D]");
  check_rank(kOp, "k", k, 4, "[B, Hkv, 1, D]");
  check_rank(kOp, "ring_k", ring_k, 4, "[B, Hkv, C, D]");
  check_rank(kOp, "global_k", global_k, 4, "[B, Hkv, G, D]");
  check_attention_dtype(kOp, "q", q);
  check_like(kOp, "k", k, "q", q);
  check_like(kOp, "v", v, "q", q);
  check_like(kOp, "ring_k", ring_k, "q", q);
  check_like(kOp, "ring_v", ring_v, "q", q);
  check_like(kOp, "global_k", global_k, "q", q);
  check_like(kOp, "global_v", global_v, "q", q);
  const int64_t batch = q.size(0), heads_q = q.size(1), head_dim = q.size(3);
  const int64_t heads_kv = k.size(1), capacity = ring_k.size(2), n_global = global_k.size(2);
  check_head_dim(kOp, "q", head_dim);
  check_shape(kOp, "q", q, {batch, heads_q, 1, head_dim}, "[B, Hq, 1, D], one new token a row");
  check_shape(kOp, "k", k, {batch, heads_kv, 1, head_dim}, "[B, Hkv, 1, D] with q's B and D");
  check_shape(kOp, "v", v, {batch, heads_kv, 1, head_dim}, "the shape of k");
  check_shape(kOp, "ring_k", ring_k, {batch, heads_kv, capacity, head_dim}, "[B, Hkv, C, D]");
  check_shape(kOp, "ring_v", ring_v, {batch, heads_kv, capacity, head_dim}, "the shape of ring_k");
  check_shape(kOp, "global_k", global_k, {batch, heads_kv, n_global, head_dim}, "[B, Hkv, G, D]");
  check_shape(kOp, "global_v", global_v, {batch, heads_kv, n_global, head_dim},
              "the shape of global_k");
  check_heads(kOp, heads_q, heads_kv);
  check_window(kOp, window, max_distance);
  LMINF_CHECK(kOp, capacity >= window, "ring_k has ", capacity,
              " slots, but must have at least window of them, which is ", window);
  check_writable_cache(kOp, "ring_k", ring_k);
  check_writable_cache(kOp, "ring_v", ring_v);
  check_writable_cache(kOp, "global_k", global_k);
  check_writable_cache(kOp, "global_v", global_v);
  check_shape(kOp, "positions", positions, {batch}, "[B]");
  check_dtype(kOp, "positions", positions, ScalarType::Long, "int64");
  check_same_device(kOp, "positions", positions, "q", q);

  const Tensor q_dense = with_dense_last_dim(q);
  const Tensor k_dense = with_dense_last_dim(k);
  const Tensor v_dense = with_dense_last_dim(v);
  const Tensor row_positions = as_contiguous(positions);
  const auto frequency = frequencies(kOp, inv_freq, "q", q);
  const auto slopes = per_head(kOp, "alibi_slopes", alibi_slopes, q);
  const auto sinks = per_head(kOp, "sink_logits", sink_logits, q);
  const auto biases = bias_by_distance(kOp, distance_bias, q, max_distance.value_or(window));
  check_position_values(row_positions);

  LambdaDecodeParams params;
  params.score = score_params(kOp, scale, softcap, slopes, sinks, biases, head_dim);
  params.rope = rope_params(kOp, "rope_scaling", frequency, rope_scaling, rope_interleaved);

  Tensor out = empty_output_like(q);
  Tensor lse = empty_lse(q);
  if (lse.numel() == 0) return {out, lse};

  params.dtype = dtype_of(q);
  params.q = q_dense.const_data_ptr();
  params.k = k_dense.const_data_ptr();
  params.v = v_dense.const_data_ptr();
  params.ring_k = ring_k.mutable_data_ptr();
  params.ring_v = ring_v.mutable_data_ptr();
  params.global_k = global_k.mutable_data_ptr();
  params.global_v = global_v.mutable_data_ptr();
  params.out = out.mutable_data_ptr();
  params.lse = static_cast<float*>(lse.mutable_data_ptr());
  params.q_stride = strides_of(q_dense);
  params.k_stride = strides_of(k_dense);
  params.v_stride = strides_of(v_dense);
  params.ring_k_stride = strides_of(ring_k);
  params.ring_v_stride = strides_of(ring_v);
  params.global_k_stride = strides_of(global_k);
  params.global_v_stride = strides_of(global_v);
  params.out_stride = strides_of(out);
  params.positions = static_cast<const int64_t*>(row_positions.const_data_ptr());
  params.batch = batch;
  params.heads_q = heads_q;
  params.heads_kv = heads_kv;
  params.head_dim = head_dim;
  params.capacity = capacity;
  params.n_global = n_global;
  params.window = window;
  params.max_distance = max_distance.value_or(window);

  run(params, q.device());
  return {out, lse};
}

}  // namespace lminf::binding
