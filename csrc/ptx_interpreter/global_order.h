// Which block of a launch has read and written which bytes of global memory. Nothing orders blocks
// (no kernel here has atomics): what one writes no other may touch before the launch is over.
#pragma once

#include <cstdint>
#include <memory>
#include <unordered_map>

namespace lminf::interpreter {

class GlobalOrder {
 public:
  // Null, or what another block has done with one of these bytes.
  const char* access(uint64_t address, uint32_t bytes, bool writes, uint64_t block);

 private:
  static constexpr uint64_t kPageBytes = 4096, kCellBytes = 2;
  static constexpr uint32_t kNobody = 0, kSeveral = 0xffffffffu;
  struct Cell {
    uint32_t writer = kNobody, reader = kNobody;  // block + 1
  };
  struct Page {
    Cell cells[kPageBytes / kCellBytes];
  };

  std::unordered_map<uint64_t, std::unique_ptr<Page>> pages_;
  Page* last_page_ = nullptr;  // that of the last access, mostly the next one's
  uint64_t last_number_ = ~uint64_t{0};
};

}  // namespace lminf::interpreter
