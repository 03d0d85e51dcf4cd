// What lambda_attn and its backward are given alike: checked, and read into the params.
#pragma once

#include <cstdint>
#include <optional>

#include "call.h"
#include "options.h"

namespace lminf::binding {

// Values can be read where they stand in host memory; elsewhere they are the caller's promise.
inline void check_start_values(const char* op, const Tensor& k_start, int64_t seqlen_k) {
  if (!k_start.is_cpu()) return;
  const auto* start = data_of<int64_t>(k_start);
  for (int64_t b = 0; b < k_start.size(0); ++b) {
    LMINF_CHECK(op, start[b] > -kPositionLimit && start[b] <= kPositionLimit - seqlen_k, "k_start[",
                b, "] is ", start[b], ", but with ", seqlen_k,
                " keys it must be above -2^31 and at most ", kPositionLimit - seqlen_k,
                ": every position must stay within +-2^31");
  }
}

inline void check_packed(const char* op, const Tensor& cu_seqlens, const Tensor& q, const Tensor& k,
                         bool has_other_start) {
  check_rank(op, "cu_seqlens", cu_seqlens, 1, "[n + 1]");
  check_dtype(op, "cu_seqlens", cu_seqlens, ScalarType::Int, "int32");
  check_same_device(op, "cu_seqlens", cu_seqlens, "q", q);
  LMINF_CHECK(op, cu_seqlens.size(0) >= 2, "cu_seqlens has ", cu_seqlens.size(0),
              " entries, but must have one more than there are sequences, so at least 2");
  LMINF_CHECK(op, !has_other_start,
              "cu_seqlens is given together with k_start, global_k or k_rotated, but packed "
              "sequences each start at position 0 and hold all their keys; leave the others out");
  LMINF_CHECK(op, q.size(0) == 1 && q.size(2) == k.size(2), "cu_seqlens is given with q of shape ",
              shape_of(q), " and k of shape ", shape_of(k),
              ", but packed sequences need batch size 1 and as many queries as keys");
}

inline void check_packed_values(const char* op, const Tensor& cu_seqlens, int64_t seqlen) {
  if (!cu_seqlens.is_cpu()) return;
  const auto* offset = static_cast<const int32_t*>(cu_seqlens.const_data_ptr());
  const int64_t last = cu_seqlens.size(0) - 1;
  LMINF_CHECK(op, offset[0] == 0, "cu_seqlens[0] is ", offset[0], ", but must be 0");
  LMINF_CHECK(op, offset[last] == seqlen, "cu_seqlens ends with ", offset[last],
              ", but must end with the length of q, which is ", seqlen);
  for (int64_t i = 0; i < last; ++i) {
    LMINF_CHECK(op, offset[i] <= offset[i + 1], "cu_seqlens goes down from ", offset[i], " to ",
                offset[i + 1], " at entry ", i + 1, ", but must never decrease");
  }
}

inline void check_global(const char* op, const std::optional<Tensor>& global_k,
                         const std::optional<Tensor>& global_v, const Tensor& q, const Tensor& k,
                         int64_t n_global) {
  LMINF_CHECK(
      op, global_k.has_value() == global_v.has_value(),
      global_k ? "global_k is given without global_v" : "global_v is given without global_k",
      "; give both or neither");
  if (!global_k) return;
  for (const auto& [name, tensor] : {std::pair{"global_k", &*global_k}, {"global_v", &*global_v}}) {
    check_like(op, name, *tensor, "q", q);
    check_shape(op, name, *tensor, {k.size(0), k.size(1), n_global, k.size(3)},
                "[B, Hkv, n_global, D]");
  }
}

// `op` names the op in errors.
inline void read_inputs(const char* op, LambdaAttnParams& params, Copies& copies, const Tensor& q,
                        const Tensor& k, const Tensor& v, int64_t n_global, int64_t window,
                        std::optional<int64_t> max_distance, const RotaryOptions& rotary,
                        const ScoreOptions& score, const std::optional<Tensor>& k_start,
                        const std::optional<Tensor>& global_k,
                        const std::optional<Tensor>& global_v,
                        const std::optional<Tensor>& cu_seqlens, int64_t k_rotated) {
  check_rank(op, "q", q, 4, "[B, Hq, Sq, D]");
  check_rank(op, "k", k, 4, "[B, Hkv, Sk, D]");
  check_attention_dtype(op, "q", q);
  check_like(op, "k", k, "q", q);
  check_like(op, "v", v, "q", q);
  const int64_t batch = q.size(0), heads_q = q.size(1), seqlen_q = q.size(2), head_dim = q.size(3);
  const int64_t heads_kv = k.size(1), seqlen_k = k.size(2);
  check_head_dim(op, "q", head_dim);
  check_shape(op, "k", k, {batch, heads_kv, seqlen_k, head_dim},
              "[B, Hkv, Sk, D] with q's B and D");
  check_shape(op, "v", v, {batch, heads_kv, seqlen_k, head_dim}, "the shape of k");
  check_heads(op, heads_q, heads_kv);
  LMINF_CHECK(op, seqlen_q <= seqlen_k, "q has ", seqlen_q, " queries and k has ", seqlen_k,
              " keys, but the queries are the last of the keys' positions, so there must be at "
              "least as many keys");
  LMINF_CHECK(op, n_global >= 0, "n_global is ", n_global, ", but must be at least 0");
  check_window(op, window, max_distance);
  check_global(op, global_k, global_v, q, k, n_global);
  LMINF_CHECK(op, k_rotated >= 0 && k_rotated <= seqlen_k, "k_rotated is ", k_rotated,
              ", but must be from 0 to the number of keys, which is ", seqlen_k);
  LMINF_CHECK(op, k_rotated == 0 || rotary.inv_freq, "k_rotated is ", k_rotated,
              ", but without inv_freq nothing is rotated; give inv_freq or leave k_rotated at 0");
  LMINF_CHECK(op, k_rotated == 0 || n_global == 0 || global_k, "k_rotated is ", k_rotated,
              ", but with n_global ", n_global,
              " the global keys are needed un-rotated; give them as global_k and global_v");
  if (k_start) {
    check_shape(op, "k_start", *k_start, {batch}, "[B]");
    check_dtype(op, "k_start", *k_start, ScalarType::Long, "int64");
    check_same_device(op, "k_start", *k_start, "q", q);
  }
  if (cu_seqlens) {
    check_packed(op, *cu_seqlens, q, k, k_start || global_k || k_rotated > 0);
  }

  params.rope = rope_params(op, rotary, "q", q, copies);
  params.score = score_params(op, score, q, {max_distance.value_or(window)}, copies);
  LMINF_CHECK(op, seqlen_k < kPositionLimit, "k has ", seqlen_k,
              " keys, but positions must stay below 2^31");
  if (k_start) {
    const Tensor& start = copies.contiguous(*k_start);
    check_start_values(op, start, seqlen_k);
    params.k_start = data_of<int64_t>(start);
  }
  if (cu_seqlens) {
    const Tensor& offsets = copies.contiguous(*cu_seqlens);
    check_packed_values(op, offsets, seqlen_q);
    params.cu_seqlens = data_of<int32_t>(offsets);
    params.n_sequences = offsets.size(0) - 1;
  }

  params.dtype = dtype_of(q);
  read_from(copies.dense(q), params.q, params.q_stride);
  read_from(copies.dense(k), params.k, params.k_stride);
  read_from(copies.dense(v), params.v, params.v_stride);
  if (global_k) {
    read_from(copies.dense(*global_k), params.global_k, params.global_k_stride);
    read_from(copies.dense(*global_v), params.global_v, params.global_v_stride);
  }
  params.batch = batch;
  params.heads_q = heads_q;
  params.heads_kv = heads_kv;
  params.seqlen_q = seqlen_q;
  params.seqlen_k = seqlen_k;
  params.head_dim = head_dim;
  params.n_global = n_global;
  params.window = window;
  params.max_distance = max_distance.value_or(window);
  params.k_rotated = k_rotated;
}

}  // namespace lminf::binding
