// Rotating the rows of a [batch, head, row, D] tensor, each by its own position: the clamped_rope
// op, and the pre-pass that rotates the keys of a forward once.
#pragma once

#include <cstdint>
#include <limits>

#include "../../params.h"
#include "../launchers.h"

namespace lminf::cuda {

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
  int64_t copied_rows = 0;  // so many leading rows are copied as they are
  int64_t first_row = 0;    // row 0 of x and out is so many rows behind its sequence's start

  // Position of row n of batch entry b: position_ids[b * stride + n] when given, else
  // fixed_position when has_fixed_position, else n counted from its sequence's start
  // (cu_seqlens), else start[b] + first_row + n, or the one that rows_are_positions names. Then
  // clamped to at most max_position.
  const int64_t* position_ids = nullptr;
  int64_t position_batch_stride = 0;
  bool has_fixed_position = false;
  int64_t fixed_position = 0;
  const int32_t* cu_seqlens = nullptr;
  int64_t n_sequences = 0;
  const int64_t* start = nullptr;
  int64_t max_position = std::numeric_limits<int64_t>::max();

  // Row n of out is position n + max(start[b], 0), so row n - min(start[b], 0) of x; or position n
  // of sequence b of cu_seqlens (then x has one batch entry). Rows that x lacks are left alone.
  // When false, row n of out is row n of x.
  bool rows_are_positions = false;
};

void rotate_rows(const RotateParams& params, Stream stream);

}  // namespace lminf::cuda
