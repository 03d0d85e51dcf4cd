// A tile of 16-bit elements in shared memory, its 16-byte chunks swizzled so that the eight rows an
// ldmatrix reads at one column stand in eight different bank groups.
#pragma once

#include "../ptx/sm80.cuh"
#include "device.cuh"
#include "rotary.cuh"

namespace lminf::cuda {

template <typename T, int kRows_, int kDim_>
class SharedTile {
 public:
  using Element = T;
  static constexpr int kRows = kRows_;
  static constexpr int kDim = kDim_;
  static constexpr int kChunk = kChunkElements<T>;  // 8
  static constexpr int kChunks = kDim / kChunk;     // of a row
  static constexpr int kBytes = kRows * kDim * static_cast<int>(sizeof(T));
  static_assert(sizeof(T) == 2 && kDim % 16 == 0, "16-bit elements, whole mma steps");

  // `start`: in bytes from the start of the block's shared memory. A tile costs one register.
  LMINF_DEVICE explicit SharedTile(int start) : start_(start) {}

  // Shared address of a chunk.
  LMINF_DEVICE uint32_t address(int row, int chunk) const {
    return shared_address(shared_memory()) + static_cast<uint32_t>(start_ + offset(row, chunk));
  }

  LMINF_DEVICE T& element(int row, int dim) const {
    return reinterpret_cast<T*>(shared_memory() + start_ + offset(row, dim / kChunk))[dim % kChunk];
  }

  // Two neighbours, the first at an even dim.
  LMINF_DEVICE uint32_t& pair(int row, int dim) const {
    return *reinterpret_cast<uint32_t*>(&element(row, dim));
  }

  LMINF_DEVICE Chunk& chunk(int row, int chunk) const {
    return *reinterpret_cast<Chunk*>(shared_memory() + start_ + offset(row, chunk));
  }

 private:
  // Rows of 128 bytes start in the same bank: eight chunks trade places by row. Rows of 64 (mod
  // 128) bytes do so every second row, of 32 every fourth.
  LMINF_DEVICE static int swizzled(int row, int chunk) {
    if constexpr (kChunks % 8 == 0) {
      return chunk ^ (row & 7);
    } else if constexpr (kChunks % 4 == 0) {
      return chunk ^ ((row >> 1) & 3);
    } else {
      return chunk ^ ((row >> 2) & 1);
    }
  }

  LMINF_DEVICE static int offset(int row, int chunk) {
#if defined(LMINF_EMULATION)
    if (row < 0 || row >= kRows) emulation::index_fault("shared tile row", row, kRows);
    if (chunk < 0 || chunk >= kChunks) emulation::index_fault("shared tile chunk", chunk, kChunks);
#endif
    return (row * kChunks + swizzled(row, chunk)) * 16;
  }

  int start_;
};

LMINF_DEVICE void exchange(float& a, float& b) {
  const float old = a;
  a = b;
  b = old;
}

// Rotates rows [first_row, first_row + rows) of a tile in place, by a whole warp that alone uses
// them. Row r of them stands at max(first_position + r, least_position). A lane owns kPairs
// neighbouring pairs of dims, two of them in 32-bit words: it reduces their angles once and steps
// them from row to row, which over 32 rows drifts by 2e-6 rad.
template <int kPairs, typename Tile>
LMINF_DEVICE void rotate_tile_pairs(const Tile& tile, const RopeParams& rope, int first_row,
                                    int rows, int64_t first_position, int64_t least_position,
                                    int lane) {
  using T = typename Tile::Element;
  // Rows at least_position before the first that has moved on.
  const int waiting = static_cast<int>(max64(min64(least_position - first_position, rows), 0));
  for (int t = kPairs * lane; t < rope.rotary_dim / 2; t += kPairs * kWarpSize) {
    CosSin angle[kPairs], step[kPairs];
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
      const double frequency = load_frequency(rope, t + i);
      step[i] = rotation(1, frequency);
      angle[i] = rotation(max64(first_position, least_position), frequency);
      angle[i].cos *= rope.scaling;
      angle[i].sin *= rope.scaling;
    }
    const PairDims dims = pair_dims(t, rope.rotary_dim, rope.interleaved);
#pragma unroll 2
    for (int r = 0; r < rows; ++r) {
      if constexpr (kPairs == 1) {
        T& first = tile.element(first_row + r, dims.first);
        T& second = tile.element(first_row + r, dims.second);
        float a = to_float(first), b = to_float(second);
        rotate_pair(angle[0], a, b);
        first = from_float<T>(a);
        second = from_float<T>(b);
      } else {
        // A word of each half, or where pairs are neighbours, a word of each pair.
        uint32_t& first = tile.pair(first_row + r, dims.first);
        uint32_t& second = tile.pair(first_row + r, rope.interleaved ? 2 * t + 2 : dims.second);
        float a[2], b[2];
        unpack<T>(first, a[0], a[1]);
        unpack<T>(second, b[0], b[1]);
        if (rope.interleaved) exchange(a[1], b[0]);
        rotate_pair(angle[0], a[0], b[0]);
        rotate_pair(angle[1], a[1], b[1]);
        if (rope.interleaved) exchange(a[1], b[0]);
        first = pack<T>(a[0], a[1]);
        second = pack<T>(b[0], b[1]);
      }
      if (r < waiting) continue;
#pragma unroll
      for (int i = 0; i < kPairs; ++i) angle[i] = compose(angle[i], step[i]);
    }
  }
}

// The same, two pairs at a time where their words are aligned.
template <typename Tile>
LMINF_DEVICE void rotate_tile_rows(const Tile& tile, const RopeParams& rope, int first_row,
                                   int rows, int64_t first_position, int64_t least_position,
                                   int lane) {
  if (rope.rotary_dim % 4 == 0) {
    rotate_tile_pairs<2>(tile, rope, first_row, rows, first_position, least_position, lane);
  } else {
    rotate_tile_pairs<1>(tile, rope, first_row, rows, first_position, least_position, lane);
  }
}

}  // namespace lminf::cuda
