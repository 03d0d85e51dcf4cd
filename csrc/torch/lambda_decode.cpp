#include "op.h"
#include "options.h"

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

Call<LambdaDecodeParams> prepare(const Tensor& q, const Tensor& k, const Tensor& v,
                                 const Tensor& ring_k, const Tensor& ring_v, const Tensor& global_k,
                                 const Tensor& global_v, const Tensor& positions, int64_t window,
                                 std::optional<int64_t> max_distance, const RotaryOptions& rotary,
                                 const ScoreOptions& score) {
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

  Call<LambdaDecodeParams> call;
  LambdaDecodeParams& params = call.params;
  params.rope = rope_params(kOp, rotary, "q", q, call.copies);
  params.score = score_params(kOp, score, q, {max_distance.value_or(window)}, call.copies);
  const Tensor& row_positions = call.copies.contiguous(positions);
  check_position_values(row_positions);

  params.dtype = dtype_of(q);
  add_attention_outputs(call, q);
  read_from(call.copies.dense(q), params.q, params.q_stride);
  read_from(call.copies.dense(k), params.k, params.k_stride);
  read_from(call.copies.dense(v), params.v, params.v_stride);
  write_to(ring_k, params.ring_k, params.ring_k_stride);
  write_to(ring_v, params.ring_v, params.ring_v_stride);
  write_to(global_k, params.global_k, params.global_k_stride);
  write_to(global_v, params.global_v, params.global_v_stride);
  params.positions = data_of<int64_t>(row_positions);
  params.batch = batch;
  params.heads_q = heads_q;
  params.heads_kv = heads_kv;
  params.head_dim = head_dim;
  params.capacity = capacity;
  params.n_global = n_global;
  params.window = window;
  params.max_distance = max_distance.value_or(window);
  return call;
}

LMINF_REGISTER(kOp, Op<prepare>::run_forward_only<kOp>)
LMINF_REGISTER("lambda_decode_plan", Op<prepare>::plan)

}  // namespace
}  // namespace lminf::binding
