// Online softmax over tiles of scores, in base 2: scores are multiplied by log2(e) once and exp2 is
// used throughout. A state holds the running maximum and the running sum; a row that has seen no
// key, or keys with score -inf only, has sum == 0 and ends as out = 0, lse = -inf.
#pragma once

#include <cmath>
#include <limits>

#include "common.h"

namespace lminf {

constexpr float kLog2e = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;

LMINF_HD constexpr float minus_infinity() { return -std::numeric_limits<float>::infinity(); }

// Up to here the rounding of a score in base 2 is small beside 1. Beyond it a fused multiply-add
// would leave a score and its rounded maximum many powers of 2 apart, so scores are multiplied
// first and rounded as the maximum was.
constexpr float kFusedMax = 1 << 20;

struct SoftmaxState {
  float max;  // of the scores seen so far, in units of log2
  float sum;  // of exp2(score - max)
};

LMINF_HD SoftmaxState empty_softmax() { return {minus_infinity(), 0.0f}; }

// What the scores of a row are relative to. A row that has seen no key yet keeps its maximum -inf;
// against 0 its weights come out 0.
LMINF_HD float softmax_base(float max) { return max == minus_infinity() ? 0.0f : max; }

// What a sum taken relative to `old_max` must be multiplied by to be relative to `new_max`.
LMINF_HD float rescale_factor(float old_max, float new_max) {
  return old_max == new_max ? 1.0f : exp2f(old_max - new_max);
}

// Two results over disjoint keys. weight_a and weight_b multiply the two *unnormalised* outputs.
struct SoftmaxMerge {
  SoftmaxState state;
  float weight_a, weight_b;
};

LMINF_HD SoftmaxMerge merge(SoftmaxState a, SoftmaxState b) {
  const float m = a.max > b.max ? a.max : b.max;
  if (m == minus_infinity()) return {empty_softmax(), 0.0f, 0.0f};
  const float wa = rescale_factor(a.max, m), wb = rescale_factor(b.max, m);
  return {{m, a.sum * wa + b.sum * wb}, wa, wb};
}

// What the unnormalised output is multiplied by, and the row's natural-log lse. The sink logit is a
// term of the denominator only: it is in `out_scale` and not in `lse`.
struct SoftmaxEnd {
  float out_scale;
  float lse;
};

LMINF_HD SoftmaxEnd finish(SoftmaxState s, bool has_sink, float sink_logit) {
  if (s.sum == 0.0f) return {0.0f, minus_infinity()};
  const float lse = (s.max + log2f(s.sum)) * kLn2;
  if (!has_sink) return {1.0f / s.sum, lse};
  // Relative to the larger of the two, so that neither overflows.
  const float sink = sink_logit * kLog2e;
  const float m = s.max > sink ? s.max : sink;
  const float w = rescale_factor(s.max, m);
  return {w / (s.sum * w + exp2f(sink - m)), lse};
}

}  // namespace lminf
