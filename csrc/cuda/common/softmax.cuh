// Online softmax in a kernel: scores become weights, in place, relative to the largest score that
// their row has met so far (core/online_softmax.h). A group of lanes shares a row: 4 where a tensor
// core lays it down, 16 or 32 where a lane takes a key.
#pragma once

#include "../../core/online_softmax.h"
#include "../ptx/sm80.cuh"
#include "device.cuh"

namespace lminf::cuda {

// What a lane knows of the rows that it has a part of.
template <int kRows_, int kLanes_>
struct RowStates {
  static constexpr int kRows = kRows_;
  static constexpr int kLanes = kLanes_;  // neighbours that share a row
  float max[kRows];                       // of the scores so far, base 2
  float sum[kRows];                       // this lane's share

  LMINF_DEVICE RowStates() {
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      max[r] = minus_infinity();
      sum[r] = 0.0f;
    }
  }

  // Row r over all its columns.
  LMINF_DEVICE SoftmaxState row(int r) const { return {max[r], group_sum<kLanes>(sum[r])}; }
};

// Row r of a lane among the 16 of each tile that a tensor core lays down.
LMINF_DEVICE int tile_row(int r, int lane) { return 16 * (r / 2) + lane / 4 + 8 * (r % 2); }

// `score(r, n)` is the n-th of this lane's kColumns scores of row r, base 2 once multiplied by
// `unit`, which is positive; it becomes its weight. `factor` is what belongs to a row's old maximum
// must be multiplied by; false when that is 1 for all rows of the warp.
template <int kColumns, typename States, typename Score>
LMINF_DEVICE bool to_weights(const Score& score, States& state, float unit,
                             float (&factor)[States::kRows]) {
  bool changed = false, far = false;
#pragma unroll
  for (int r = 0; r < States::kRows; ++r) {
    float m = minus_infinity();
#pragma unroll
    for (int n = 0; n < kColumns; ++n) m = fmaxf(m, score(r, n));
    const float new_max = fmaxf(state.max[r], group_max<States::kLanes>(m) * unit);
    changed |= new_max != state.max[r];
    factor[r] = ptx::exp2_approx(state.max[r] - softmax_base(new_max));
    state.max[r] = new_max;
    far |= fabsf(softmax_base(new_max)) > kFusedMax;
  }
  if (far) {
#pragma unroll
    for (int r = 0; r < States::kRows; ++r) {
#pragma unroll
      for (int n = 0; n < kColumns; ++n) score(r, n) *= unit;
    }
    unit = 1.0f;
  }
#pragma unroll
  for (int r = 0; r < States::kRows; ++r) {
    const float base = softmax_base(state.max[r]);
    float sum = 0.0f;
#pragma unroll
    for (int n = 0; n < kColumns; ++n) {
      float& x = score(r, n);
      x = ptx::exp2_approx(fmaf(x, unit, -base));
      sum += x;
    }
    state.sum[r] = state.sum[r] * factor[r] + sum;
  }
  return __any_sync(kFullWarp, changed);
}

}  // namespace lminf::cuda
