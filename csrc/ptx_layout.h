// Where elements of tiles and fragments stand, by the PTX ISA: for the emulation and for the
// interpreter, which each check and run the instructions in their own way. Plain C++.
#pragma once

#include <cstdint>

namespace lminf::ptx_layout {

// The address of the byte that the swizzle of `span` bytes puts in place of the one at `address`:
// 16-byte chunks change places by the row of the pattern. 16: no swizzle.
inline uint32_t swizzled(uint32_t address, uint32_t span) {
  return address ^ (address >> 3 & (span - 16));
}

// An operand of wgmma in shared memory. Layouts of 16-byte units:
//   K-major   no swizzle: ((8, n), 2) : ((1, stride), leading)
//             of span s:  ((8, n), 2) : ((s, stride), 1)
//   MN-major  no swizzle: ((1, n), (8, k)) : ((., stride), (1, leading))
//             of span s:  ((s, n), (8, k)) : ((1, leading), (s, stride))
struct MatrixDescriptor {
  uint32_t start, leading, stride;  // bytes
  uint32_t span, base_offset;
  bool mn_major;

  MatrixDescriptor(uint64_t bits, bool is_mn_major)
      : start(field(bits, 0)),
        leading(field(bits, 16)),
        stride(field(bits, 32)),
        span(bits >> 62 == 0 ? 16 : 256u >> (bits >> 62)),
        base_offset(bits >> 49 & 7),
        mn_major(is_mn_major) {}

  // Of the eight elements in a row that (mn, k) is the first of: along k, or along mn.
  uint32_t address(uint32_t mn, uint32_t k) const {
    uint32_t a = start;
    if (!mn_major) {
      a += mn % 8 * span + mn / 8 * stride + (span == 16 ? k / 8 * leading : 2 * k);
    } else if (span == 16) {
      a += mn / 8 * stride + k % 8 * 16 + k / 8 * leading;
    } else {
      a += 2 * (mn % (span / 2)) + mn / (span / 2) * leading + k % 8 * span + k / 8 * stride;
    }
    return swizzled(a, span);
  }

 private:
  static uint32_t field(uint64_t bits, int at) {
    return static_cast<uint32_t>(bits >> at & 0x3fff) << 4;
  }
};

// Calls f(first row, first k) for each eight elements in a row of `rows` rows and 16 k.
template <typename F>
void for_chunks(bool mn_major, int rows, F f) {
  if (mn_major) {
    for (int k = 0; k < 16; ++k) {
      for (int row = 0; row < rows; row += 8) f(row, k);
    }
  } else {
    for (int row = 0; row < rows; ++row) {
      for (int k = 0; k < 16; k += 8) f(row, k);
    }
  }
}

// What a tensor map describes. The innermost dimension comes first.
struct TensorMap {
  static constexpr int kMostRank = 5;
  uint32_t magic;
  uint8_t rank, element_bytes, span;  // span: of the swizzle, 16 with none
  uint64_t base;
  uint64_t size[kMostRank];
  uint64_t stride[kMostRank - 1];  // bytes, from the second dimension on
  uint16_t box[kMostRank];

  uint32_t box_bytes() const {
    uint32_t bytes = element_bytes;
    for (int k = 0; k < rank; ++k) bytes *= box[k];
    return bytes;
  }
  // Whether an index is inside the tensor.
  bool holds(int dimension, int64_t index) const {
    return index >= 0 && static_cast<uint64_t>(index) < size[dimension];
  }
};
static_assert(sizeof(TensorMap) <= 128, "fits a CUtensorMap");

// Calls f(shared address, global address or 0, bytes) for each 16 bytes of the box at `first`,
// whose rows stand one after another from `shared` on; 0: outside the tensor. Where only a part of
// them is inside, for each element.
template <typename F>
void for_pieces(const TensorMap& map, const int32_t* first, uint32_t shared, F f) {
  const uint32_t row_bytes = static_cast<uint32_t>(map.box[0]) * map.element_bytes;
  const int per_piece = 16 / map.element_bytes;
  int index[TensorMap::kMostRank] = {};
  for (;;) {
    bool inside = true;
    uint64_t row = map.base;
    for (int k = 1; k < map.rank; ++k) {
      const int64_t at = int64_t{first[k]} + index[k];
      inside &= map.holds(k, at);
      row += static_cast<uint64_t>(at) * map.stride[k - 1];
    }
    for (uint32_t byte = 0; byte < row_bytes; byte += 16) {
      const int64_t column = int64_t{first[0]} + byte / map.element_bytes;
      const uint32_t to = swizzled(shared + byte, map.span);
      const uint64_t from = row + static_cast<uint64_t>(column * map.element_bytes);
      if (inside && map.holds(0, column) && map.holds(0, column + per_piece - 1)) {
        f(to, from, 16u);
        continue;
      }
      for (int e = 0; e < per_piece; ++e) {
        const auto step = static_cast<uint32_t>(e * map.element_bytes);
        f(to + step, inside && map.holds(0, column + e) ? from + step : 0,
          uint32_t{map.element_bytes});
      }
    }
    shared += row_bytes;
    int k = 1;
    while (k < map.rank && ++index[k] == map.box[k]) index[k++] = 0;
    if (k == map.rank) return;
  }
}

// What a lane holds of a warp's fragments, by its register.
struct Position {
  int row, column;
};

// mma's and wgmma's C and D, float32; of wgmma the warp's own 16 rows.
inline Position accumulator(int lane, int r) {
  return {lane / 4 + r / 2 % 2 * 8, r / 4 * 8 + lane % 4 * 2 + r % 2};
}

// mma's and wgmma's A [16, 16], 16 bits: the first of two in a row.
inline Position a_pair(int lane, int r) { return {lane / 4 + r % 2 * 8, lane % 4 * 2 + r / 2 * 8}; }

// mma's B [16, 8]: the first of two in a column.
inline Position b_pair(int lane, int r) { return {lane % 4 * 2 + r * 8, lane / 4}; }

}  // namespace lminf::ptx_layout
