#include "global_order.h"

namespace lminf::interpreter {

const char* GlobalOrder::access(uint64_t address, uint32_t bytes, bool writes, uint64_t block) {
  const auto self = static_cast<uint32_t>(block + 1);
  for (uint64_t at = address / kCellBytes; at <= (address + bytes - 1) / kCellBytes; ++at) {
    const uint64_t number = at * kCellBytes / kPageBytes;
    if (number != last_number_) {
      auto& page = pages_[number];
      if (page == nullptr) page = std::make_unique<Page>();
      last_page_ = page.get();
      last_number_ = number;
    }
    Cell& cell = last_page_->cells[at % (kPageBytes / kCellBytes)];
    if (cell.writer != kNobody && cell.writer != self) return "has written";
    if (writes) {
      if (cell.reader != kNobody && cell.reader != self) return "has read";
      cell.writer = self;
    } else if (cell.reader != self) {
      cell.reader = cell.reader == kNobody ? self : kSeveral;
    }
  }
  return nullptr;
}

}  // namespace lminf::interpreter
