// Where a tile of queries finds its keys, for every prefill kernel: which rows it holds, at which
// positions, and for each of the three branches (core/lambda_mask.h) the keys it meets, rotated as
// that branch wants them.
#pragma once

#include "../../core/lambda_mask.h"
#include "../common/device.cuh"
#include "../common/rotary.cuh"

namespace lminf::cuda {

// Rows of keys that stand ready for a branch.
struct KeyTensor {
  const void* data = nullptr;
  Strides stride;
  int64_t rows = 0;          // of one batch entry and head
  bool by_position = false;  // row n stands at position n + max(k_start, 0); else as in params.k
  bool by_sequence = false;  // the batch index is the sequence of cu_seqlens
  int64_t first = 0;         // row 0 is this one of params.k, unless by position
};

struct AttnSources {
  LambdaAttnParams p;
  KeyTensor window_k;       // rotated by position
  KeyTensor near_k;         // rotated by position
  KeyTensor far_k;          // rotated by -max_distance
  bool has_near = false;    // whether near_k stands ready: else no query has keys there
  bool has_far = false;     // the same of far_k
  int64_t query_tiles = 0;  // of one batch entry and head
};

enum BranchIndex { kFar = 0, kNear = 1, kWindow = 2, kBranches = 3 };

// One block's queries.
struct QueryTile {
  int64_t batch, head, kv_head;
  int64_t first_row;  // in q
  int64_t rows;       // 0: nothing to do
  Range positions;
  int64_t sequence;       // of cu_seqlens, else batch
  int64_t first_key_row;  // the sequence's first row in k
  Range keys;             // positions that k holds
};

// Blocks are numbered so that the query tiles and heads that read one key head follow each other,
// latest queries (the longest work) first.
LMINF_DEVICE QueryTile query_tile(const AttnSources& s, int64_t block, int tile_rows) {
  const LambdaAttnParams& p = s.p;
  const int64_t group = p.heads_q / p.heads_kv;
  QueryTile t;
  const int64_t in_group = block % group;
  block /= group;
  const int64_t tile = s.query_tiles - 1 - block % s.query_tiles;
  block /= s.query_tiles;
  t.kv_head = block % p.heads_kv;
  t.head = t.kv_head * group + in_group;
  t.batch = block / p.heads_kv;

  if (p.cu_seqlens == nullptr) {
    const int64_t start = p.k_start != nullptr ? load_global(p.k_start + t.batch) : 0;
    t.sequence = t.batch;
    t.first_key_row = 0;
    t.first_row = tile * tile_rows;
    t.rows = min64(tile_rows, p.seqlen_q - t.first_row);
    t.positions.lo = start + p.seqlen_k - p.seqlen_q + t.first_row;
    t.keys = {start, start + p.seqlen_k};
  } else {
    // Sequence n has the tiles from offset[n] / tile_rows + n on: never fewer than it needs.
    t.sequence = find_sequence(p.n_sequences, tile, [&](int64_t n) {
      return load_global(p.cu_seqlens + n) / tile_rows + n;
    });
    t.first_key_row = load_global(p.cu_seqlens + t.sequence);
    const int64_t end = load_global(p.cu_seqlens + t.sequence + 1);
    t.positions.lo = (tile - (t.first_key_row / tile_rows + t.sequence)) * tile_rows;
    t.first_row = t.first_key_row + t.positions.lo;
    t.rows = max64(0, min64(tile_rows, end - t.first_row));
    t.keys = {0, end - t.first_key_row};
  }
  t.positions.hi = t.positions.lo + t.rows;
  return t;
}

// One branch as a tile of queries meets it. The key at position j stands at k + (j - k_origin) *
// k_stride, its value at v + (j - v_origin) * v_stride.
template <typename T>
struct BranchPlan {
  Branch branch;
  Range visible;     // positions that at least one of the queries sees
  TileRanges tiles;  // counted from position `origin` on
  int64_t origin;
  const T* k;
  const T* v;
  int64_t k_stride, v_stride;
  int64_t k_origin, v_origin;
};

template <typename T>
LMINF_DEVICE BranchPlan<T> branch_plan(const AttnSources& s, const QueryTile& t, int index,
                                       int tile_keys) {
  const LambdaAttnParams& p = s.p;
  const bool own_globals = p.global_k != nullptr;
  const Range globals = own_globals ? Range{0, p.n_global} : t.keys;
  BranchPlan<T> plan;
  KeyTensor k;
  switch (index) {
    case kWindow:
      plan.branch = window_branch(t.keys, p.window);
      k = s.window_k;
      break;
    case kNear:
      plan.branch = near_branch(globals, p.n_global, p.window, p.max_distance);
      k = s.near_k;
      break;
    default:
      plan.branch = far_branch(globals, p.n_global, p.max_distance);
      k = s.far_k;
  }
  const bool ready = index == kWindow || (index == kNear ? s.has_near : s.has_far);
  plan.visible = !ready || plan.branch.empty() || t.rows == 0
                     ? Range{0, 0}
                     : plan.branch.visible_keys(t.positions);
  plan.origin = plan.branch.keys.lo;
  plan.tiles = plan.visible.empty() ? TileRanges{0, 0, 0, 0}
                                    : key_tiles(plan.branch, t.positions, plan.origin, tile_keys);

  const int64_t k_batch = k.by_sequence ? t.sequence : t.batch;
  plan.k = static_cast<const T*>(k.data) + k_batch * k.stride.batch + t.kv_head * k.stride.head;
  plan.k_stride = k.stride.seq;
  plan.k_origin = k.by_position ? (own_globals ? 0 : max64(t.keys.lo, 0)) : t.keys.lo + k.first;
  if (!k.by_position) plan.k += t.first_key_row * k.stride.seq;

  const bool v_from_globals = own_globals && index != kWindow;
  const Strides& v = v_from_globals ? p.global_v_stride : p.v_stride;
  plan.v = static_cast<const T*>(v_from_globals ? p.global_v : p.v) + t.batch * v.batch +
           t.kv_head * v.head;
  plan.v_stride = v.seq;
  plan.v_origin = v_from_globals ? 0 : t.keys.lo;
  if (!v_from_globals) plan.v += t.first_key_row * v.seq;
  return plan;
}

}  // namespace lminf::cuda
