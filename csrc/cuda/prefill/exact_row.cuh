// One row of the prefill, worked out again key by key, for rows that a hidden value has spoilt: on
// tensor cores a weight of 0 times an infinite value is NaN, also where the row does not see the
// key. Only visible keys are touched here. Called at most, at a tile's end, for rows whose softmax
// is sound and whose output is not finite.
#pragma once

#include "../common/score.cuh"
#include "sources.cuh"

namespace lminf::cuda {

// By one warp: out[n] is dim lane + 32 n of row `row` of a tile of queries, for head dims up to
// 32 * kOwn. kBias: whether there may be a distance_bias.
template <typename T, bool kBias, int kOwn>
LMINF_DEVICE void exact_row(const AttnSources& sources, QueryTile t, int row, float (&out)[kOwn]) {
  const LambdaAttnParams& p = sources.p;
  const int lane = recomputed(static_cast<int>(threadIdx.x)) % kWarpSize;
  const int head_dim = recomputed(static_cast<int>(p.head_dim));
  t.first_row += row;
  t.positions = {t.positions.lo + row, t.positions.lo + row + 1};
  t.rows = 1;
  const int64_t i = t.positions.lo;
  const T* q_row = static_cast<const T*>(p.q) + t.batch * p.q_stride.batch +
                   t.head * p.q_stride.head + t.first_row * p.q_stride.seq;
  auto load = [&](const T* from, int dim) {
    return dim < head_dim ? to_float(load_global(from + dim)) : 0.0f;
  };

  float q[kOwn];
#pragma unroll
  for (int n = 0; n < kOwn; ++n) {
    q[n] = load(q_row, lane + kWarpSize * n);
    out[n] = 0.0f;
  }
  const Scoring scoring(p.score);
  const float slope = alibi_slope(p.score, t.head);
  SoftmaxState state = empty_softmax();
#pragma unroll 1
  for (int branch = kFar; branch < kBranches; ++branch) {
    if (branch == kNear && p.rope.rotary_dim > 0) {
      const int half = p.rope.rotary_dim / 2;
#pragma unroll
      for (int n = 0; n < kOwn; ++n) {
        const int dim = lane + kWarpSize * n;
        if (dim >= p.rope.rotary_dim) continue;
        const int pair = p.rope.interleaved ? dim / 2 : dim % half;
        const PairDims dims = pair_dims(pair, p.rope.rotary_dim, p.rope.interleaved);
        float first = load(q_row, dims.first), second = load(q_row, dims.second);
        rotate_pair(rotation(i, load_frequency(p.rope, pair)), first, second);
        // Rounded, as the kernel's own rotated queries are.
        q[n] = to_float(from_float<T>((dim == dims.first ? first : second) * p.rope.scaling));
      }
    }
    const BranchPlan<T> plan = branch_plan<T>(sources, t, branch, 1);
#pragma unroll 1
    for (int64_t j = plan.visible.lo; j < plan.visible.hi; ++j) {
      const T* k_row = plan.k + (j - plan.k_origin) * plan.k_stride;
      const T* v_row = plan.v + (j - plan.v_origin) * plan.v_stride;
      const float bias = kBias ? distance_bias_at(p.score, t.head, i - j, 0) : 0.0f;
      if (bias == minus_infinity()) continue;  // hidden
      float product = 0.0f;
#pragma unroll
      for (int n = 0; n < kOwn; ++n) {
        product = fmaf(q[n], load(k_row, lane + kWarpSize * n), product);
      }
      product = warp_sum(product);
      const float distance = static_cast<float>(clamped_distance(i - j, p.max_distance));
      const float s = scoring.only_scales() ? product * scoring.exponent_unit()
                                            : scoring.score<false>(product, slope, distance, bias);
      const SoftmaxMerge both = merge(state, {s, 1.0f});
#pragma unroll
      for (int n = 0; n < kOwn; ++n) {
        out[n] = out[n] * both.weight_a + both.weight_b * load(v_row, lane + kWarpSize * n);
      }
      state = both.state;
    }
  }

  const bool has_sink = p.score.sink_logits != nullptr;
  const float sink = has_sink ? load_global(p.score.sink_logits + t.head) : 0.0f;
  const SoftmaxEnd end = finish(state, has_sink, sink);
#pragma unroll
  for (int n = 0; n < kOwn; ++n) out[n] *= end.out_scale;
}

// The same for block number `block`, to global memory once the tile is there: a call, so that it
// costs the kernel's loop no register.
template <typename T>
LMINF_DEVICE_CALL void attend_exactly(const AttnSources& sources, int64_t block, int tile_rows,
                                      int row) {
  constexpr int kMaxHeadDim = 256;
  const LambdaAttnParams& p = sources.p;
  const QueryTile t = query_tile(sources, block, tile_rows);
  float out[kMaxHeadDim / kWarpSize];
  exact_row<T, true>(sources, t, row, out);
  T* out_row = static_cast<T*>(p.out) + t.batch * p.out_stride.batch + t.head * p.out_stride.head +
               (t.first_row + row) * p.out_stride.seq;
#pragma unroll
  for (int n = 0; n < kMaxHeadDim / kWarpSize; ++n) {
    const int dim = static_cast<int>(threadIdx.x) % kWarpSize + kWarpSize * n;
    if (dim < p.head_dim) store_global(out_row + dim, from_float<T>(out[n]));
  }
}

// The rows of a warp that this is for: a bit each, of the rows that State::row_index counts.
// `spoilt[r]` says it of this lane's part of its row r.
template <typename State>
LMINF_DEVICE uint32_t spoilt_rows(const bool (&spoilt)[State::kRows]) {
  uint32_t rows = 0;
#pragma unroll
  for (int r = 0; r < State::kRows; ++r) {
    const uint32_t lanes = __ballot_sync(kFullWarp, spoilt[r]);
    if (lanes == 0) continue;
    for (int lane = 0; lane < kWarpSize; ++lane) {
      if (lanes >> lane & 1) rows |= 1u << State::row_index(r, lane);
    }
  }
  return rows;
}

}  // namespace lminf::cuda
