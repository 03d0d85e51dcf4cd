// Where a tile of queries finds its keys, for every prefill kernel: which rows it holds, at which
// positions, and for each of the three branches (core/lambda_mask.h) the keys it meets, rotated as
// that branch wants them.
#pragma once

#include "../../core/walk.h"
#include "../common/device.cuh"
#include "../common/rotary.cuh"
#include "../rope/rotate_rows.h"

namespace lminf::cuda {

// Rows of keys that stand ready for a branch.
struct KeyTensor {
  const void* data = nullptr;
  Strides stride;
  int64_t rows = 0;  // of one batch entry and head
  RowPositions positions;
};

struct AttnSources {
  LambdaAttnParams p;
  KeyTensor k[kBranches];      // rotated by position, those of the far branch by -max_distance
  bool ready[kBranches] = {};  // else no query has keys there
  int64_t query_tiles = 0;     // of one batch entry and head
};

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

// A branch, and where its keys are: the key at position j stands at k + (j - k_origin) * k_stride,
// its value at v + (j - v_origin) * v_stride.
template <typename T>
struct BranchKeys : BranchWalk {
  const T* k;
  const T* v;
  int64_t k_stride, v_stride;
  int64_t k_origin, v_origin;
};

template <typename T>
LMINF_DEVICE BranchKeys<T> branch_keys(const AttnSources& s, const QueryTile& t, int index,
                                       int tile_keys) {
  const LambdaAttnParams& p = s.p;
  const bool own = p.global_k != nullptr && index != kWindow;  // from global_k, global_v
  const Branch branch = branch_at(index, t.keys, own ? Range{0, p.n_global} : t.keys, p.n_global,
                                  p.window, p.max_distance);
  BranchKeys<T> b;
  static_cast<BranchWalk&>(b) =
      branch_walk(branch, s.ready[index] ? t.positions : Range{0, 0}, branch.keys.lo, tile_keys);
  const KeyTensor& k = s.k[index];
  const RowPositions& rows = k.positions;
  const bool as_keys = rows.kind == RowPositions::kAsKeys;
  b.k = row_at<const T>(k.data, k.stride,
                        rows.kind == RowPositions::kBySequence ? t.sequence : t.batch, t.kv_head,
                        as_keys ? t.first_key_row : 0);
  b.k_stride = k.stride.seq;
  b.k_origin = as_keys ? t.keys.lo + rows.first : own ? 0 : max64(t.keys.lo, 0);
  const Strides& v_stride = own ? p.global_v_stride : p.v_stride;
  b.v = row_at<const T>(own ? p.global_v : p.v, v_stride, t.batch, t.kv_head,
                        own ? 0 : t.first_key_row);
  b.v_stride = v_stride.seq;
  b.v_origin = own ? 0 : t.keys.lo;
  return b;
}

// What every thread of a block needs to know now and then, in shared memory: registers are scarce.
template <typename T>
struct BlockWalk {
  QueryTile tile;
  BranchKeys<T> branches[kBranches];
  Visits visits;

  // By a whole warp, of which lane 0 then knows all.
  LMINF_DEVICE void fill(const AttnSources& sources, int64_t block, int tile_rows, int global_keys,
                         int window_keys, int lane) {
    if (lane == 0) tile = query_tile(sources, block, tile_rows);
    __syncwarp();
    if (lane < kBranches) {
      branches[lane] =
          branch_keys<T>(sources, tile, lane, lane == kWindow ? window_keys : global_keys);
    }
    __syncwarp();
    if (lane == 0) {
      visits = visits_of(branches[kFar].tiles, branches[kNear].tiles, branches[kWindow].tiles);
    }
  }

  LMINF_DEVICE const BranchKeys<T>& branch_of(int visit) const {
    return branches[visits.branch(visit)];
  }
  // Counted as the branch counts its tiles.
  LMINF_DEVICE int64_t tile_of(int visit) const {
    return branch_of(visit).tiles.begin + visits.earlier(visit);
  }
};

}  // namespace lminf::cuda
