// The rows of a block of queries against one tile of keys: for both kernels on tensor cores.
#pragma once

#include "../common/score.cuh"
#include "sources.cuh"

namespace lminf::cuda {

// The rows of a tile of queries against a tile of keys. kBias: whether there may be a
// table of biases, whose look-ups cost registers.
template <bool kBias>
struct QueryRows {
  const ScoreParams& params;
  const int64_t& head;
  float slope;
  const Branch& branch;
  int64_t first_query;   // position of the warp's first row
  int64_t key_position;  // position of the tile's first key
  int64_t max_distance;
  int keys;

  LMINF_DEVICE Scoring scoring() const { return Scoring(params); }
  LMINF_DEVICE float score(float product, int, int row, int column) const {
    const float corner = static_cast<float>(first_query - key_position);
    return scoring().template score<false, kBias>(
        product, slope,
        clamped_distance_in_tile(corner, row, column, static_cast<float>(max_distance)),
        kBias ? bias_at(params, head, first_query - key_position, row - column) : 0.0f);
  }
  LMINF_DEVICE ColumnRange columns(int row) const {
    return visible_columns(branch, first_query + row, key_position, keys);
  }
};

}  // namespace lminf::cuda
