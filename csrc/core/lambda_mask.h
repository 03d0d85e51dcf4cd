// The Λ predicate and its tile ranges, written once for every kernel.
//
// Query at position i, key at position j, distance d = i - j:
//   visible(i, j) := d >= 0 and (d < window or j < n_global),   d' := min(d, max_distance)
//
// The visible pairs split into three disjoint branches, each a band of distances over a range of
// keys:
//   window : 0 <= d < window            keys of k            met at their true distance
//   near   : window <= d < max_distance keys j < n_global    met at their true distance
//   far    : max_distance <= d          keys j < n_global    met at distance max_distance
// With max_distance == window the near branch is empty. A kernel walks the branches; everything it
// needs to know of a tile (skip it, mask it, or run it bare) follows from the band alone. All
// ranges are half-open.
#pragma once

#include <cstdint>

#include "common.h"

namespace lminf {

// Larger than any distance between two positions; keeps the sums below far from overflow.
constexpr int64_t kUnbounded = int64_t{1} << 40;

LMINF_HD int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }
LMINF_HD int64_t max64(int64_t a, int64_t b) { return a > b ? a : b; }
LMINF_HD int64_t floor_div(int64_t a, int64_t b) { return a / b - (a % b < 0); }
LMINF_HD int64_t ceil_div(int64_t a, int64_t b) { return -floor_div(-a, b); }

struct Range {
  int64_t lo, hi;
  LMINF_HD bool empty() const { return lo >= hi; }
};

LMINF_HD Range intersect(Range a, Range b) { return {max64(a.lo, b.lo), min64(a.hi, b.hi)}; }

// The definition itself. Keys at negative positions are padding.
LMINF_HD bool visible(int64_t i, int64_t j, int64_t n_global, int64_t window) {
  const int64_t d = i - j;
  return j >= 0 && d >= 0 && (d < window || j < n_global);
}

LMINF_HD int64_t clamped_distance(int64_t d, int64_t max_distance) {
  return min64(d, max_distance);
}

// A band of distances over a range of key positions.
struct Branch {
  Range distance;  // visible iff distance.lo <= i - j < distance.hi ...
  Range keys;      // ... and keys.lo <= j < keys.hi

  LMINF_HD bool sees(int64_t i, int64_t j) const {
    const int64_t d = i - j;
    return d >= distance.lo && d < distance.hi && j >= keys.lo && j < keys.hi;
  }

  LMINF_HD bool empty() const { return distance.empty() || keys.empty(); }

  // The same branch without the keys that none of the queries sees.
  LMINF_HD Branch seen_by(Range queries) const { return {distance, visible_keys(queries)}; }

  // Keys that at least one query of a non-empty tile sees.
  LMINF_HD Range visible_keys(Range queries) const {
    if (distance.empty()) return {0, 0};
    return intersect({queries.lo - distance.hi + 1, queries.hi - distance.lo}, keys);
  }

  // Keys that every query of the tile sees: no mask is needed there.
  LMINF_HD Range full_keys(Range queries) const {
    return intersect({queries.hi - distance.hi, queries.lo - distance.lo + 1}, keys);
  }

  // Queries that see at least one key of a tile.
  LMINF_HD Range visible_queries(Range tile) const {
    const Range k = intersect(tile, keys);
    if (k.empty() || distance.empty()) return {0, 0};
    return {k.lo + distance.lo, k.hi - 1 + distance.hi};
  }

  // Queries that see every key of a tile.
  LMINF_HD Range full_queries(Range tile) const {
    if (tile.lo < keys.lo || tile.hi > keys.hi) return {0, 0};
    return {tile.hi - 1 + distance.lo, tile.lo + distance.hi};
  }
};

// `keys`: the positions that k holds. Negative positions are padding.
LMINF_HD Branch window_branch(Range keys, int64_t window) {
  return {{0, min64(window, kUnbounded)}, {max64(keys.lo, 0), keys.hi}};
}

// `keys`: the positions at hand for the global branch, [0, n_global) of global_k, or what k holds.
LMINF_HD Branch near_branch(Range keys, int64_t n_global, int64_t window, int64_t max_distance) {
  return {{min64(window, kUnbounded), min64(max_distance, kUnbounded)},
          {max64(keys.lo, 0), min64(keys.hi, n_global)}};
}

LMINF_HD Branch far_branch(Range keys, int64_t n_global, int64_t max_distance) {
  return {{min64(max_distance, kUnbounded), kUnbounded},
          {max64(keys.lo, 0), min64(keys.hi, n_global)}};
}

// The keys between the global tokens and the window of the query at position i, which no branch
// shows to it.
LMINF_HD Range middle_keys(Range keys, int64_t i, int64_t n_global, int64_t window) {
  return intersect({max64(n_global, 0), i - min64(window, kUnbounded) + 1},
                   {max64(keys.lo, 0), keys.hi});
}

// The tiles that one tile of the other side meets, by index from `origin` on: [begin, end) are
// visited, of these [full_begin, full_end) need no mask. Everything outside [begin, end) is
// skipped.
struct TileRanges {
  int64_t begin, full_begin, full_end, end;
  LMINF_HD bool full(int64_t tile) const { return tile >= full_begin && tile < full_end; }
};

LMINF_HD TileRanges tile_ranges(Range visible, Range full, int64_t origin, int64_t tile_size) {
  if (visible.empty()) return {0, 0, 0, 0};
  TileRanges t;
  t.begin = floor_div(visible.lo - origin, tile_size);
  t.end = ceil_div(visible.hi - origin, tile_size);
  t.full_begin = ceil_div(full.lo - origin, tile_size);
  t.full_end = floor_div(full.hi - origin, tile_size);
  if (full.empty() || t.full_begin >= t.full_end) t.full_begin = t.full_end = t.begin;
  return t;
}

// Forward: the key tiles that a tile of queries meets.
LMINF_HD TileRanges key_tiles(const Branch& branch, Range queries, int64_t origin,
                              int64_t tile_size) {
  return tile_ranges(branch.visible_keys(queries), branch.full_keys(queries), origin, tile_size);
}

// Backward: the query tiles, counted from queries.lo on, that a tile of keys meets.
LMINF_HD TileRanges query_tiles(const Branch& branch, Range keys, Range queries,
                                int64_t tile_size) {
  return tile_ranges(intersect(branch.visible_queries(keys), queries),
                     intersect(branch.full_queries(keys), queries), queries.lo, tile_size);
}

}  // namespace lminf
