// What TMA covers. Plain C++, for plans too; the descriptions themselves are made in
// ptx/tensor_map.h.
#pragma once

#include <cstdint>

namespace lminf::cuda {

// How 16-byte chunks trade places within rows of that many bytes (ptx/sm90.cuh).
enum class Swizzle { kNone, k32, k64, k128 };

constexpr int swizzle_bytes(Swizzle swizzle) {
  return swizzle == Swizzle::kNone ? 16
         : swizzle == Swizzle::k32 ? 32
         : swizzle == Swizzle::k64 ? 64
                                   : 128;
}

// A tensor of 16-bit elements, innermost dimension first: (dim, row, head, batch). The innermost is
// contiguous; the other strides, in elements, come in any order. `box`: what one copy moves.
struct TensorMapShape {
  const void* base;
  int64_t size[4];
  int64_t stride[4];
  int box[4];
  Swizzle swizzle;
};

// What keeps TMA from covering such a tensor, or null. A dimension of size 1 may have any stride.
inline const char* tensor_map_problem(const TensorMapShape& shape) {
  if (reinterpret_cast<uintptr_t>(shape.base) % 16 != 0) return "not aligned to 16 bytes";
  if (shape.stride[0] != 1 && shape.size[0] != 1) return "innermost dimension not contiguous";
  for (int i = 0; i < 4; ++i) {
    if (shape.size[i] < 1 || shape.size[i] > int64_t{1} << 31) return "size not in [1, 2^31]";
    if (shape.box[i] < 1 || shape.box[i] > 256) return "box side not in [1, 256]";
    if (i == 0 || shape.size[i] == 1) continue;
    if (shape.stride[i] < 8 || shape.stride[i] % 8 != 0 || shape.stride[i] >= int64_t{1} << 39) {
      return "stride not a positive multiple of 16 bytes below 2^40";
    }
  }
  const int row_bytes = 2 * shape.box[0];
  if (row_bytes % 16 != 0) return "box row not a multiple of 16 bytes";
  if (shape.swizzle != Swizzle::kNone && row_bytes != swizzle_bytes(shape.swizzle)) {
    return "box row not as long as the swizzle's span";
  }
  return nullptr;
}

}  // namespace lminf::cuda
