// What a CUtensorMap describes, as the runtime here writes it, and a bulk copy under way.
#pragma once

#include <cstdint>

namespace lminf::interpreter {

struct Instruction;

constexpr int kMostRank = 5;
constexpr uint32_t kTensorMapMagic = 0x54a9c0de;

// In the 128 opaque bytes of a CUtensorMap. The innermost dimension comes first.
struct TensorMapBits {
  uint32_t magic;
  uint8_t rank, element_bytes, swizzle;  // swizzle: 0 none, 1, 2, 3: 32, 64, 128 bytes
  uint64_t base;
  uint32_t last[kMostRank];        // size - 1
  uint64_t stride[kMostRank - 1];  // bytes, from the second dimension on
  uint16_t box[kMostRank];

  uint32_t box_bytes() const {
    uint32_t bytes = element_bytes;
    for (int k = 0; k < rank; ++k) bytes *= box[k];
    return bytes;
  }
};
static_assert(sizeof(TensorMapBits) <= 128, "fits a CUtensorMap");

// Of a box of a tensor, or of bytes in a row.
struct BulkCopy {
  bool is_tensor = true;
  TensorMapBits map;
  int32_t first[kMostRank] = {};  // coordinates
  uint64_t global = 0;            // address, of bytes in a row
  uint32_t shared = 0, bytes = 0;
  uint32_t mbarrier = 0;   // of a load
  int warp = 0, lane = 0;  // who started it
  const Instruction* instruction = nullptr;
};

}  // namespace lminf::interpreter
