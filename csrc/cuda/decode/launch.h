// What the decode kernels share: how a row's keys are cut into splits, and where partial results
// meet.
//
// The keys of a row at position p, in the order they are walked:
//   global  positions of global_k at distance >= window, un-rotated; key j is met as if at
//           max(j, p - max_distance), which gives it the distance min(p - j, max_distance)
//   window  the last `window` positions, in the ring, rotated; the newest is the token itself
#pragma once

#include "../../core/lambda_mask.h"
#include "../../core/online_softmax.h"
#include "../common/device.cuh"
#include "../common/plan.h"
#include "../common/rotary.cuh"
#include "../common/score.cuh"
#include "../ptx/sm80.cuh"

namespace lminf::cuda {

struct DecodeLaunch {
  LambdaDecodeParams p;
  int64_t splits = 1;
  int64_t head_tiles = 1;                 // tiles of query heads per key head
  int64_t group = 1;                      // query heads per key head
  float* partial_out = nullptr;           // [B, Hq, splits, D] not yet divided by the sum
  SoftmaxState* partial_state = nullptr;  // [B, Hq, splits]
};

// One block's share.
struct DecodeBlock {
  int64_t batch, kv_head, head_tile, split;
  int64_t position;       // of the new token; negative: the row is idle
  Range globals, window;  // positions of its visible keys
  int64_t global_tiles;
  Range tiles;   // this split's; global tiles come first
  bool appends;  // writes the new token's slots
};

// The slot of a position. In 32 bits, which hold every position: a division in 64 takes several
// times as long, and all keys wait for it.
LMINF_DEVICE int64_t ring_slot(const LambdaDecodeParams& p, int64_t position) {
  if (position < p.capacity) return position;
  return static_cast<uint32_t>(position) % static_cast<uint32_t>(p.capacity);
}

LMINF_DEVICE DecodeBlock decode_block(const DecodeLaunch& l, uint32_t block) {
  const LambdaDecodeParams& p = l.p;
  // The next digit of the block's number; a launch has below 2^31 blocks.
  auto digit = [&](int64_t base) {
    const uint32_t last = block % static_cast<uint32_t>(base);
    block /= static_cast<uint32_t>(base);
    return last;
  };
  DecodeBlock d;
  d.split = digit(l.splits);
  d.head_tile = digit(l.head_tiles);
  d.kv_head = digit(p.heads_kv);
  d.batch = block;
  d.position = load_global(p.positions + d.batch);
  d.globals = d.window = d.tiles = {0, 0};
  d.global_tiles = 0;
  d.appends = false;
  if (d.position < 0) return d;
  const Range self = {d.position, d.position + 1};
  // Every global key past the window, whatever its distance: near and far meet here as one.
  const Branch globals = near_branch({0, p.n_global}, p.n_global, p.window, kUnbounded);
  if (!globals.empty()) d.globals = globals.visible_keys(self);
  if (d.globals.empty()) d.globals = {0, 0};
  d.window = window_branch({0, d.position + 1}, p.window).visible_keys(self);
  d.global_tiles = ceil_div(d.globals.hi - d.globals.lo, kDecodeTileKeys);
  const int64_t tiles = d.global_tiles + ceil_div(d.window.hi - d.window.lo, kDecodeTileKeys);
  const auto each = static_cast<uint32_t>(tiles) / static_cast<uint32_t>(l.splits);
  const int64_t one_more = tiles - each * l.splits;  // so many splits, the first ones
  d.tiles.lo = each * d.split + min64(d.split, one_more);
  d.tiles.hi = d.tiles.lo + each + (d.split < one_more ? 1 : 0);
  d.appends = d.split == l.splits - 1 && d.head_tile == 0;
  return d;
}

// A tile of keys: `keys` of them from position `first` on.
struct DecodeTile {
  bool global;
  int64_t first;
  int keys;
};

LMINF_DEVICE DecodeTile decode_tile(const DecodeBlock& d, int64_t tile) {
  const bool global = tile < d.global_tiles;
  const Range& range = global ? d.globals : d.window;
  const int64_t first = range.lo + (global ? tile : tile - d.global_tiles) * kDecodeTileKeys;
  return {global, first, static_cast<int>(min64(kDecodeTileKeys, range.hi - first))};
}

// Where a global key, of position j, is met.
LMINF_DEVICE int64_t met_at(const LambdaDecodeParams& p, const DecodeBlock& d, int64_t j) {
  return max64(j, d.position - min64(p.max_distance, kUnbounded));
}

// Many results over disjoint keys in one. `weights` multiply their *unnormalised* outputs. Without
// the branches of core's merge, so that no weight waits for another.
template <int kCount>
LMINF_DEVICE SoftmaxState merge_all(const SoftmaxState (&states)[kCount],
                                    float (&weights)[kCount]) {
  SoftmaxState total = {states[0].max, 0.0f};
#pragma unroll
  for (int n = 1; n < kCount; ++n) total.max = fmaxf(total.max, states[n].max);
#pragma unroll
  for (int n = 0; n < kCount; ++n) {
    // Where both are infinite, their difference is no number.
    const float weight = ptx::exp2_approx(states[n].max - total.max);
    weights[n] = states[n].max == total.max ? 1.0f : weight;
    total.sum = fmaf(states[n].sum, weights[n], total.sum);
  }
  return total;
}

// One query head's result over this block's keys: final when there is one split, else partial.
// Element `dim` of `out` is not yet divided by the sum.
template <typename T>
LMINF_DEVICE void store_decoded(const DecodeLaunch& l, const DecodeBlock& d, int64_t head, int dim,
                                float out, SoftmaxState state) {
  const LambdaDecodeParams& p = l.p;
  const int64_t row = d.batch * p.heads_q + head;
  if (l.splits > 1) {
    store_global(l.partial_out + (row * l.splits + d.split) * p.head_dim + dim, out);
    if (dim == 0) store_global(l.partial_state + row * l.splits + d.split, state);
    return;
  }
  const SoftmaxEnd end = Sink(p.score, head).finish(state);
  store_global(row_at<T>(p.out, p.out_stride, d.batch, head) + dim,
               from_float<T>(out * end.out_scale));
  if (dim == 0) store_global(p.lse + row, end.lse);
}

void lambda_decode_sm80(const DecodeLaunch& launch, Stream stream);
void lambda_decode_plain(const DecodeLaunch& launch, Stream stream);

}  // namespace lminf::cuda
