// What the kernels share about rotation: frequencies from device memory, and the sequence that a
// packed row belongs to.
#pragma once

#include "../../core/lambda_mask.h"
#include "../../core/rotation.h"
#include "device.cuh"

namespace lminf::cuda {

LMINF_DEVICE double load_frequency(const RopeParams& rope, int t) {
  return rope.inv_freq_is_double
             ? load_global(static_cast<const double*>(rope.inv_freq) + t)
             : static_cast<double>(load_global(static_cast<const float*>(rope.inv_freq) + t));
}

// core's rotation_at, with a sine and cosine that need no local memory on a GPU: sincospif has no
// slow path, and the reduced angle fits it.
LMINF_DEVICE CosSin rotation(int64_t position, double inv_freq) {
#if defined(LMINF_EMULATION)
  return rotation_at(position, inv_freq);
#else
  constexpr double kInvPi = 0.3183098861837907;
  CosSin r;
  sincospif(static_cast<float>(reduced_angle(position, inv_freq) * kInvPi), &r.sin, &r.cos);
  return r;
#endif
}

// Element `dim`, one of the rotated ones, of an un-rotated query or key at `position`.
template <typename T>
LMINF_DEVICE float rotated_element(const RopeParams& rope, const T* from, int dim,
                                   int64_t position) {
  const int t = rope.interleaved ? dim / 2 : dim % (rope.rotary_dim / 2);
  const PairDims dims = pair_dims(t, rope.rotary_dim, rope.interleaved);
  float first = to_float(load_global(from + dims.first));
  float second = to_float(load_global(from + dims.second));
  rotate_pair(rotation(position, load_frequency(rope, t)), first, second);
  return (dim == dims.first ? first : second) * rope.scaling;
}

// The sequence s of [0, n) with start(s) <= x < start(s + 1), for a non-decreasing `start` with
// start(0) <= x: the last one when several start there.
template <typename Start>
LMINF_DEVICE int64_t find_sequence(int64_t n, int64_t x, Start start) {
  int64_t lo = 0, hi = n;
  while (hi - lo > 1) {
    const int64_t middle = (lo + hi) / 2;
    if (start(middle) <= x) {
      lo = middle;
    } else {
      hi = middle;
    }
  }
  return lo;
}

}  // namespace lminf::cuda
