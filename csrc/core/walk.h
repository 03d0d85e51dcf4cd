// How a tile of queries walks its keys, for every kernel: branch after branch, far, near, window,
// and of each the key tiles that at least one of its queries sees.
#pragma once

#include "lambda_mask.h"

namespace lminf {

enum BranchIndex { kFar = 0, kNear = 1, kWindow = 2, kBranches = 3 };

// One of the three. `keys`: the positions that k holds; `globals`: those at hand for the others.
LMINF_HD Branch branch_at(int index, Range keys, Range globals, int64_t n_global, int64_t window,
                          int64_t max_distance) {
  return index == kWindow ? window_branch(keys, window)
         : index == kNear ? near_branch(globals, n_global, window, max_distance)
                          : far_branch(globals, n_global, max_distance);
}

// One branch as a tile of queries meets it.
struct BranchWalk {
  Branch branch;
  Range visible;     // positions that at least one of the queries sees
  TileRanges tiles;  // counted from position `origin` on
  int64_t origin;
  int64_t tile_keys;

  // Of a tile's first key.
  LMINF_HD int64_t position(int64_t tile) const { return origin + tile * tile_keys; }
};

LMINF_HD BranchWalk branch_walk(const Branch& branch, Range queries, int64_t origin,
                                int64_t tile_keys) {
  BranchWalk walk = {branch, {0, 0}, {0, 0, 0, 0}, origin, tile_keys};
  if (branch.empty() || queries.empty()) return walk;
  walk.visible = branch.visible_keys(queries);
  walk.tiles = key_tiles(branch, queries, origin, tile_keys);
  return walk;
}

// The tiles of all branches in one row: visits [0, far_end) are far tiles, [far_end, near_end) near
// ones, [near_end, end) window tiles.
struct Visits {
  int far_end, near_end, end;

  LMINF_HD int branch(int visit) const {
    return visit >= near_end ? kWindow : visit >= far_end ? kNear : kFar;
  }

  // How many tiles of its branch come before it.
  LMINF_HD int earlier(int visit) const {
    return visit >= near_end ? visit - near_end : visit >= far_end ? visit - far_end : visit;
  }
};

LMINF_HD Visits visits_of(const TileRanges& far, const TileRanges& near, const TileRanges& window) {
  auto count = [](const TileRanges& tiles) { return static_cast<int>(tiles.end - tiles.begin); };
  Visits v;
  v.far_end = count(far);
  v.near_end = v.far_end + count(near);
  v.end = v.near_end + count(window);
  return v;
}

}  // namespace lminf
