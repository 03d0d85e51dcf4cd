// Rotary embedding: which dims form a pair, and the angle of a pair at a position.
//
// The angle position * inv_freq is taken and reduced modulo 2π in float64 and only then rounded, so
// it is right at any position below 2^31 (float32 angles are off by 0.03 rad at a million tokens).
#pragma once

#include <cmath>
#include <cstdint>

#include "common.h"

namespace lminf {

struct CosSin {
  float cos, sin;
};

// position * inv_freq in (-π, π].
LMINF_HD double reduced_angle(int64_t position, double inv_freq) {
  constexpr double kInvTwoPi = 0.15915494309189535;
  constexpr double kTwoPiHigh = 6.283185307179586;
  constexpr double kTwoPiLow = 2.4492935982947064e-16;
  const double angle = static_cast<double>(position) * inv_freq;
  const double turns = rint(angle * kInvTwoPi);
  return fma(-turns, kTwoPiLow, fma(-turns, kTwoPiHigh, angle));
}

LMINF_HD CosSin rotation_at(int64_t position, double inv_freq) {
  const float angle = static_cast<float>(reduced_angle(position, inv_freq));
  return {cosf(angle), sinf(angle)};
}

// The two dims of pair t of R/2.
struct PairDims {
  int first, second;
};

LMINF_HD PairDims pair_dims(int t, int rotary_dim, bool interleaved) {
  return interleaved ? PairDims{2 * t, 2 * t + 1} : PairDims{t, t + rotary_dim / 2};
}

// Rotates the pair (a, b) by the angle of `r`, in place.
LMINF_HD void rotate_pair(CosSin r, float& a, float& b) {
  const float a_rot = a * r.cos - b * r.sin;
  b = b * r.cos + a * r.sin;
  a = a_rot;
}

// The angle a + b: lets a table of small offsets serve every base position.
LMINF_HD CosSin compose(CosSin a, CosSin b) {
  return {a.cos * b.cos - a.sin * b.sin, a.sin * b.cos + a.cos * b.sin};
}

}  // namespace lminf
