// Scores of visible pairs: scale, ALiBi, distance_bias and softcap in the definition's order, in
// units of log2.
#pragma once

#include "../../core/lambda_mask.h"
#include "../../core/online_softmax.h"
#include "../ptx/sm80.cuh"
#include "device.cuh"

namespace lminf::cuda {

// A quotient to about two units in the last place, with no call for the rare operands.
LMINF_DEVICE float fast_divide(float x, float y) {
#if defined(LMINF_EMULATION)
  return x / y;
#else
  return __fdividef(x, y);
#endif
}

// tanh by one exponential: its absolute error of 1e-7 is far below a 16-bit score's.
LMINF_DEVICE float fast_tanh(float x) {
  return 1.0f - fast_divide(2.0f, ptx::exp2_approx(2.0f * kLog2e * x) + 1.0f);
}

// What a kernel does to a product <q, k>.
struct Scoring {
  float scale, softcap;
  bool alibi, biased;

  LMINF_DEVICE explicit Scoring(const ScoreParams& p)
      : scale(p.scale),
        softcap(p.softcap),
        alibi(p.alibi_slopes != nullptr),
        biased(p.distance_bias != nullptr) {}

  // Nothing but a positive factor, which leaves the order of scores alone: then it is folded into
  // the exponent, and products stay as they are.
  LMINF_DEVICE bool only_scales() const {
    return softcap == 0.0f && !alibi && !biased && scale > 0.0f;
  }

  LMINF_DEVICE float exponent_unit() const { return only_scales() ? scale * kLog2e : 1.0f; }

  // The whole score times log2(e), when there is more than a factor. `distance` is clamped, `bias`
  // the entry of distance_bias there. kCalls: rare operands of the quotient may take a call, which
  // a kernel with wgmma cannot have, and which keeps ptxas from gathering the look-ups of many
  // elements in registers.
  template <bool kExact, bool kCalls = kExact>
  LMINF_DEVICE float score(float product, float slope, float distance, float bias) const {
    return after_scale<kExact, kCalls>(product * scale, slope, distance, bias);
  }

  // The same of a product that has its scale.
  template <bool kExact, bool kCalls = kExact>
  LMINF_DEVICE float after_scale(float s, float slope, float distance, float bias) const {
    if (alibi) s -= slope * distance;
    if (biased) s += bias;
    if (softcap != 0.0f) {
      const float x = kCalls ? s / softcap : fast_divide(s, softcap);
      s = softcap * (kExact ? tanhf(x) : fast_tanh(x));
    }
    return biased && bias == minus_infinity() ? bias : s * kLog2e;
  }
};

// The entry of distance_bias for one head at distance corner + offset, clamped to the table at both
// ends: a key ahead of its query is masked later. 0 without a table. |offset| stays below a tile's
// size; a table has at most 2^30 distances, so that indices are ints.
LMINF_DEVICE float bias_at(const ScoreParams& p, int64_t head, int64_t corner, int offset) {
  if (p.distance_bias == nullptr) return 0.0f;
  const int last = static_cast<int>(p.n_distances - 1);
  const int distance = static_cast<int>(min64(corner, (1 << 30) + (1 << 20))) + offset;
  const int index = distance < 0 ? 0 : distance > last ? last : distance;
  return load_global(p.distance_bias + head * p.n_distances + index);
}

LMINF_DEVICE float alibi_slope(const ScoreParams& p, int64_t head) {
  return p.alibi_slopes != nullptr ? load_global(p.alibi_slopes + head) : 0.0f;
}

// A head's learned logit in the denominator, -inf where there is none.
struct Sink {
  bool there;
  float logit;

  LMINF_DEVICE Sink(const ScoreParams& p, int64_t head)
      : there(p.sink_logits != nullptr),
        logit(there ? load_global(p.sink_logits + head) : minus_infinity()) {}

  LMINF_DEVICE SoftmaxEnd finish(SoftmaxState state) const {
    return lminf::finish(state, there, logit);
  }
};

// core's clamped_distance from row to column of a tile whose corner is at distance `corner`, in
// float32: as right as a product with a slope can be, and a register where an int64_t takes two.
LMINF_DEVICE float clamped_distance_in_tile(float corner, int row, int column, float max_distance) {
  return fminf(corner + static_cast<float>(row - column), max_distance);
}

// Columns of a key tile, relative to its first, that the query at position i sees.
struct ColumnRange {
  int lo, hi;
};

LMINF_DEVICE ColumnRange visible_columns(const Branch& branch, int64_t i, int64_t first_position,
                                         int columns) {
  const Range keys = branch.visible_keys({i, i + 1});
  return {static_cast<int>(min64(max64(keys.lo - first_position, 0), columns)),
          static_cast<int>(min64(max64(keys.hi - first_position, 0), columns))};
}

}  // namespace lminf::cuda
