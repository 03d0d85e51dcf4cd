// What a CUtensorMap describes, as the runtime here writes it, and a bulk copy under way.
#pragma once

#include <cstdint>

#include "../ptx_layout.h"

namespace lminf::interpreter {

struct Instruction;

// Stands in the 128 opaque bytes of a CUtensorMap.
using ptx_layout::TensorMap;
constexpr uint32_t kTensorMapMagic = 0x54a9c0de;

// Of a box of a tensor, or of bytes in a row.
struct BulkCopy {
  bool is_tensor = true;
  TensorMap map;
  int32_t first[TensorMap::kMostRank] = {};  // coordinates
  uint64_t global = 0;                       // address, of bytes in a row
  uint32_t shared = 0, bytes = 0;
  uint32_t mbarrier = 0;   // of a load
  int warp = 0, lane = 0;  // who started it
  const Instruction* instruction = nullptr;
};

}  // namespace lminf::interpreter
