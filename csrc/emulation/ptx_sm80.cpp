// Built without -fsanitize=thread, like runtime.cpp.
#include "ptx_sm80.h"

#include <cuda_fp16.h>

#include <cmath>
#include <cstring>
#include <limits>

#include "runtime.h"

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

// in: {d[4], a[4], b0, b1}
template <float (*kDecode)(uint32_t)>
void multiply(const WarpWords& in, WarpWords& out) {
  float a[16][16], b[8][16];  // b by column
  for (int lane = 0; lane < 32; ++lane) {
    const int g = lane / 4, c = lane % 4;
    for (int r = 0; r < 4; ++r) {
      const int row = g + 8 * (r % 2), k = 2 * c + 8 * (r / 2);
      a[row][k] = kDecode(in[lane][4 + r] & 0xffffu);
      a[row][k + 1] = kDecode(in[lane][4 + r] >> 16);
    }
    for (int r = 0; r < 2; ++r) {
      b[g][2 * c + 8 * r] = kDecode(in[lane][8 + r] & 0xffffu);
      b[g][2 * c + 8 * r + 1] = kDecode(in[lane][8 + r] >> 16);
    }
  }
  for (int lane = 0; lane < 32; ++lane) {
    const int g = lane / 4, c = lane % 4;
    for (int e = 0; e < 4; ++e) {
      const float* row = a[g + 8 * (e / 2)];
      const float* column = b[2 * c + e % 2];
      float sum = 0.0f;
      for (int k = 0; k < 16; ++k) sum += row[k] * column[k];
      out[lane][e] = as_bits(as_float(in[lane][e]) + sum);
    }
  }
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

void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, bool is_bf16) {
  const uint32_t in[10] = {
      as_bits(d[0]), as_bits(d[1]), as_bits(d[2]), as_bits(d[3]), a[0], a[1], a[2], a[3], b0, b1};
  uint32_t out[4];
  warp_collective({"mma", __FILE__, __LINE__}, 0xffffffffu, in, 10, out, 4,
                  is_bf16 ? multiply<decode_bf16> : multiply<decode_fp16>);
  for (int e = 0; e < 4; ++e) d[e] = as_float(out[e]);
}

float exp2_flushed(float x) {
  const float y = std::exp2(x);
  return y < std::numeric_limits<float>::min() ? 0.0f : y;
}

}  // namespace lminf::emulation
