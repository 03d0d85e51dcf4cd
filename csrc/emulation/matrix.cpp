// Matrices held by a warp: ldmatrix, stmatrix, mma; and elect.sync.
// Built without -fsanitize=thread, like launch.cpp.
#include <cuda_fp16.h>

#include <cmath>
#include <cstring>
#include <limits>

#include "engines.h"
#include "ptx_sm80.h"

namespace lminf::emulation {
namespace {

float as_float(uint32_t bits) {
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}

uint32_t as_bits(float f) {
  uint32_t bits;
  std::memcpy(&bits, &f, 4);
  return bits;
}

float decode_bf16(uint32_t half) { return as_float(half << 16); }

float decode_fp16(uint32_t half) {
  const __half_raw raw{static_cast<unsigned short>(half)};
  return __half2float(__half(raw));
}

// in: the lane's row of 8 elements. Register r of lane 4g + c is elements (g; 2c, 2c+1) of matrix
// r.
void distribute(const WarpWords& in, WarpWords& out) {
  for (int lane = 0; lane < 32; ++lane) {
    for (int r = 0; r < 4; ++r) out[lane][r] = in[8 * r + lane / 4][lane % 4];
  }
}

// As above of the transposed matrices: elements (2c, 2c+1; g).
void distribute_transposed(const WarpWords& in, WarpWords& out) {
  auto element = [&](int matrix, int row, int column) {
    return in[8 * matrix + row][column / 2] >> (16 * (column % 2)) & 0xffffu;
  };
  for (int lane = 0; lane < 32; ++lane) {
    const int g = lane / 4, c = lane % 4;
    for (int r = 0; r < 4; ++r) {
      out[lane][r] = element(r, 2 * c, g) | element(r, 2 * c + 1, g) << 16;
    }
  }
}

// in: a lane's four registers, of matrix 0 to 3. out: the lane's row of 8 elements.
void collect(const WarpWords& in, WarpWords& out) {
  for (int lane = 0; lane < 32; ++lane) {
    for (int c = 0; c < 4; ++c) out[lane][c] = in[4 * (lane % 8) + c][lane / 8];
  }
}

void collect_transposed(const WarpWords& in, WarpWords& out) {
  for (int lane = 0; lane < 32; ++lane) {
    const int matrix = lane / 8, row = lane % 8;
    // Element (row, column) of the stored matrix is (column, row) of the registers' one.
    auto element = [&](int column) {
      return in[4 * column + row / 2][matrix] >> (16 * (row % 2)) & 0xFFFF;
    };
    for (int c = 0; c < 4; ++c) out[lane][c] = element(2 * c) | element(2 * c + 1) << 16;
  }
}

// in: {d[4], a[4], b0, b1}
template <float (*kDecode)(uint32_t)>
void multiply(const WarpWords& in, WarpWords& out) {
  float a[16][16], b[8][16];  // b by column
  for (int lane = 0; lane < 32; ++lane) {
    const auto keep = [](uint32_t pair, float* to) {
      to[0] = kDecode(pair & 0xffffu);
      to[1] = kDecode(pair >> 16);
    };
    for (int r = 0; r < 4; ++r) {
      const auto at = ptx_layout::a_pair(lane, r);
      keep(in[lane][4 + r], &a[at.row][at.column]);
    }
    for (int r = 0; r < 2; ++r) {
      const auto at = ptx_layout::b_pair(lane, r);
      keep(in[lane][8 + r], &b[at.column][at.row]);
    }
  }
  for (int lane = 0; lane < 32; ++lane) {
    for (int e = 0; e < 4; ++e) {
      const auto at = ptx_layout::accumulator(lane, e);
      const float *row = a[at.row], *column = b[at.column];
      float sum = 0.0f;
      for (int k = 0; k < 16; ++k) sum += row[k] * column[k];
      out[lane][e] = as_bits(as_float(in[lane][e]) + sum);
    }
  }
}

void elect(const WarpWords&, WarpWords& out) {
  for (unsigned lane = 0; lane < 32; ++lane) out[lane][0] = lane == state.elected ? 1 : 0;
}

}  // namespace

void load_matrices(uint32_t (&r)[4], uint32_t row_address, bool transposed) {
  maybe_yield();
  const unsigned char* row = shared_bytes(row_address, 16, "ldmatrix");
  announce_shared_read(row, 16);
  uint32_t words[4];
  std::memcpy(words, row, 16);
  warp_collective({"ldmatrix", __FILE__, __LINE__}, 0xffffffffu, words, 4, r, 4,
                  transposed ? distribute_transposed : distribute);
}

void store_matrices(uint32_t row_address, const uint32_t (&r)[4], bool transposed) {
  maybe_yield();
  unsigned char* row = shared_bytes(row_address, 16, "stmatrix");
  uint32_t words[4];
  warp_collective({"stmatrix", __FILE__, __LINE__}, 0xffffffffu, r, 4, words, 4,
                  transposed ? collect_transposed : collect);
  announce_shared_write(row, 16);
  const Unwatched unwatched;
  std::memcpy(row, words, 16);
}

void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, bool is_bf16) {
  const uint32_t in[10] = {
      as_bits(d[0]), as_bits(d[1]), as_bits(d[2]), as_bits(d[3]), a[0], a[1], a[2], a[3], b0, b1};
  uint32_t out[4];
  warp_collective({"mma", __FILE__, __LINE__}, 0xffffffffu, in, 10, out, 4,
                  is_bf16 ? multiply<decode_bf16> : multiply<decode_fp16>);
  for (int e = 0; e < 4; ++e) d[e] = as_float(out[e]);
}

bool elect_one(Site site) {
  const Unwatched unwatched;
  engines_in_use();
  uint32_t mine;
  warp_collective(site, 0xffffffffu, nullptr, 0, &mine, 1, elect);
  return mine != 0;
}

float exp2_flushed(float x) {
  const float y = std::exp2(x);
  return y < std::numeric_limits<float>::min() ? 0.0f : y;
}

}  // namespace lminf::emulation
