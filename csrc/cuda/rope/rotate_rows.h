// Rotating the rows of a [batch, head, row, D] tensor, each by its own position: the clamped_rope
// op, and the pre-pass that rotates the keys of a forward once.
#pragma once

#include <cstdint>
#include <limits>

#include "../../params.h"
#include "../launchers.h"

namespace lminf::cuda {

// Where the rows of a batch entry b stand, and which row of the tensor they are rotated from row n
// comes from. Rows that it lacks are left alone.
struct RowPositions {
  enum Kind {
    kGiven,       // ids[b * ids_stride + n]; row n
    kAsKeys,      // as in k, from row `first` of it on: row n + first
    kByPosition,  // n + max(start[b], 0); that position's row in k
    kBySequence,  // n, in sequence b of cu_seqlens; that position's row in k, of one batch entry
  };
  Kind kind = kAsKeys;
  const int64_t* ids = nullptr;
  int64_t ids_stride = 0;
  int64_t first = 0;
  const int64_t* start = nullptr;  // [B] position of row 0 of k, or null: 0
  const int32_t* cu_seqlens = nullptr;
  int64_t n_sequences = 0;
};

struct RotateParams {
  DType dtype = DType::kFloat32;
  const void* x = nullptr;  // [batch, heads, x_rows, D]
  void* out = nullptr;      // [batch, heads, rows, D]
  Strides x_stride, out_stride;
  int64_t batch = 0;
  int64_t heads = 0;
  int64_t rows = 0;
  int64_t x_rows = 0;
  int64_t head_dim = 0;
  RopeParams rope;
  RowPositions positions;
  // Positions are clamped to these; where both are one, all rows stand there.
  int64_t least_position = std::numeric_limits<int64_t>::min();
  int64_t max_position = std::numeric_limits<int64_t>::max();
  int64_t copied_rows = 0;  // so many leading rows of x are copied as they are
};

void rotate_rows(const RotateParams& params, Stream stream);

}  // namespace lminf::cuda
