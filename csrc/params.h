// What every kernel is handed, on every backend: plain structs, no torch. Shapes stand beside the
// pointers.
//
// B batch, Hq query heads, Hkv key heads (Hq a multiple of Hkv), Sq queries, Sk keys, D head dim,
// R rotary dim (R <= D, even), G = n_global. Positions and counts are int64; strides are in
// elements. The caller has checked everything; a kernel may assume that what stands here is
// consistent.
#pragma once

#include <cstdint>

#include "core/common.h"

namespace lminf {

enum class DType : int32_t { kFloat32, kBFloat16, kFloat16 };

// Element strides of a [batch, head, sequence, dim] tensor whose last dimension is contiguous.
struct Strides {
  int64_t batch = 0;
  int64_t head = 0;
  int64_t seq = 0;
};

// A row of a tensor with elements of T.
template <typename T, typename Data>
LMINF_HD T* row_at(Data* data, const Strides& stride, int64_t batch, int64_t head,
                   int64_t row = 0) {
  return static_cast<T*>(data) + batch * stride.batch + head * stride.head + row * stride.seq;
}

// Rotary embedding. rotary_dim == 0 means none, and inv_freq is then null.
struct RopeParams {
  const void* inv_freq = nullptr;   // [R/2] float or double, see inv_freq_is_double
  bool inv_freq_is_double = false;  // float64 frequencies are kept as they are
  bool interleaved = false;         // pairs (2t, 2t+1) instead of (t, t + R/2)
  int32_t rotary_dim = 0;           // R
  float scaling = 1.0f;             // multiplies the R rotated dims of q and of k alike
};

// The score of one visible pair, before the softmax (docs/design.md section 2).
struct ScoreParams {
  float scale = 1.0f;
  float softcap = 0.0f;                 // 0: none
  const float* alibi_slopes = nullptr;  // [Hq] or null
  const float* sink_logits = nullptr;   // [Hq] or null
  // [Hq, n_distances] or null: what is added at distance d is entry min(d, n_distances - 1), and
  // -inf hides the keys there. n_distances is max_distance + 1, and more than `distance` in
  // middle_topk.
  const float* distance_bias = nullptr;
  int64_t n_distances = 0;
  bool has_table() const { return distance_bias != nullptr; }
};

// torch.ops.lminf.lambda_attn: prefill and any other multi-query forward.
struct LambdaAttnParams {
  DType dtype = DType::kFloat32;   // of q, k, v, global_k, global_v and out
  const void* q = nullptr;         // [B, Hq, Sq, D] un-rotated
  const void* k = nullptr;         // [B, Hkv, Sk, D] un-rotated, except the first k_rotated keys
  const void* v = nullptr;         // [B, Hkv, Sk, D]
  const void* global_k = nullptr;  // [B, Hkv, G, D] un-rotated, or null: the global keys stand in k
  const void* global_v = nullptr;  // [B, Hkv, G, D] or null
  void* out = nullptr;             // [B, Hq, Sq, D]
  float* lse = nullptr;            // [B, Hq, Sq] contiguous, natural log
  Strides q_stride, k_stride, v_stride, global_k_stride, global_v_stride, out_stride;

  const int64_t* k_start = nullptr;     // [B] position of key 0 of each row, or null: 0
  const int32_t* cu_seqlens = nullptr;  // [n_sequences + 1] or null; then B == 1 and Sq == Sk
  int64_t n_sequences = 0;

  int64_t batch = 0;     // B
  int64_t heads_q = 0;   // Hq
  int64_t heads_kv = 0;  // Hkv
  int64_t seqlen_q = 0;  // Sq
  int64_t seqlen_k = 0;  // Sk; the queries are the last Sq of the Sk positions
  int64_t head_dim = 0;  // D

  int64_t n_global = 0;
  int64_t window = 1;
  int64_t max_distance = 1;  // >= window
  int64_t k_rotated = 0;  // so many leading keys of k already carry their rotation and rope scaling

  RopeParams rope;
  ScoreParams score;
};

// torch.ops.lminf.lambda_attn_backward: `out` and `lse` are as the forward left them, and only
// read.
struct LambdaAttnBackwardParams : LambdaAttnParams {
  const void* grad_out = nullptr;   // [B, Hq, Sq, D]
  const float* grad_lse = nullptr;  // [B, Hq, Sq] contiguous, or null: 0
  void* grad_q = nullptr;           // [B, Hq, Sq, D]
  void* grad_k = nullptr;           // [B, Hkv, Sk, D]
  void* grad_v = nullptr;           // [B, Hkv, Sk, D]
  void* grad_global_k = nullptr;    // [B, Hkv, G, D], or null where there is no global_k
  void* grad_global_v = nullptr;    // [B, Hkv, G, D]
  float* grad_sinks = nullptr;      // [Hq], or null where there are no sink_logits
  float* grad_biases = nullptr;     // [Hq, n_distances] contiguous, or null without distance_bias
  Strides grad_out_stride, grad_q_stride, grad_k_stride, grad_v_stride, grad_global_k_stride,
      grad_global_v_stride;
};

// torch.ops.lminf.lambda_decode: one token of each row over the fixed cache. Token at position p of
// row b: its key is rotated and written to ring slot p % C, its raw key to global slot p when p <
// G, then it attends.
struct LambdaDecodeParams {
  DType dtype = DType::kFloat32;  // of q, k, v, the caches and out
  const void* q = nullptr;        // [B, Hq, 1, D] un-rotated
  const void* k = nullptr;        // [B, Hkv, 1, D] un-rotated
  const void* v = nullptr;        // [B, Hkv, 1, D]
  void* ring_k = nullptr;         // [B, Hkv, C, D] rotated to its own position; slot = position % C
  void* ring_v = nullptr;         // [B, Hkv, C, D]
  void* global_k = nullptr;       // [B, Hkv, G, D] un-rotated; slot = position
  void* global_v = nullptr;       // [B, Hkv, G, D]
  void* out = nullptr;            // [B, Hq, 1, D]
  float* lse = nullptr;           // [B, Hq, 1] contiguous
  Strides q_stride, k_stride, v_stride, ring_k_stride, ring_v_stride, global_k_stride,
      global_v_stride, out_stride;

  const int64_t* positions = nullptr;  // [B] position of each row's new token; < 0: the row is idle

  int64_t batch = 0;
  int64_t heads_q = 0;
  int64_t heads_kv = 0;
  int64_t head_dim = 0;
  int64_t capacity = 0;  // C >= window
  int64_t n_global = 0;  // G
  int64_t window = 1;
  int64_t max_distance = 1;

  RopeParams rope;
  ScoreParams score;
};

// torch.ops.lminf.middle_topk: of the keys that Λ attention does not show to one query of each row,
// the top_k with the largest score at one distance join its softmax.
struct MiddleTopkParams {
  DType dtype = DType::kFloat32;      // of q, k, v, lambda_out and out
  const void* q = nullptr;            // [B, Hq, 1, D] un-rotated
  const void* k = nullptr;            // [B, Hkv, Sk, D] un-rotated
  const void* v = nullptr;            // [B, Hkv, Sk, D]
  const void* lambda_out = nullptr;   // [B, Hq, 1, D] the query's Λ attention
  const float* lambda_lse = nullptr;  // [B, Hq, 1] contiguous
  void* out = nullptr;                // [B, Hq, 1, D]
  float* lse = nullptr;               // [B, Hq, 1] contiguous
  int64_t* chosen = nullptr;          // [B, Hq, K] contiguous: positions, the largest score first
  Strides q_stride, k_stride, v_stride, lambda_out_stride, out_stride;

  const int64_t* positions = nullptr;  // [B] position of each row's query; < 0: the row is idle
  const int64_t* k_start = nullptr;    // [B] position of key 0 of each row, or null: 0

  int64_t batch = 0;
  int64_t heads_q = 0;
  int64_t heads_kv = 0;
  int64_t seqlen_k = 0;
  int64_t head_dim = 0;
  int64_t n_global = 0;
  int64_t window = 1;
  int64_t top_k = 1;     // K
  int64_t distance = 0;  // at which the query meets them all

  RopeParams rope;
  ScoreParams score;
};

// torch.ops.lminf.clamped_rope.
struct ClampedRopeParams {
  DType dtype = DType::kFloat32;
  const void* x = nullptr;  // [B, H, S, D]
  void* out = nullptr;      // [B, H, S, D]
  Strides x_stride, out_stride;
  const int64_t* position_ids = nullptr;  // [S] or [B, S]
  int64_t position_batch_stride = 0;      // 0 for [S]
  int64_t batch = 0;
  int64_t heads = 0;
  int64_t seqlen = 0;
  int64_t head_dim = 0;
  bool has_max_position = false;
  int64_t max_position = 0;
  RopeParams rope;
};

// Every op, by what its kernels take.
template <typename... Params>
struct OpList {};
using Ops = OpList<LambdaAttnParams, LambdaAttnBackwardParams, LambdaDecodeParams, MiddleTopkParams,
                   ClampedRopeParams>;

}  // namespace lminf
