// mbarrier: init, arrive, arrive.expect_tx, try_wait.parity.
#include "mbarrier.h"

#include "decode.h"
#include "memory.h"

namespace lminf::interpreter {
namespace {

constexpr uint32_t kBytes = 8;
constexpr int64_t kMostCount = (1 << 20) - 1;

std::string place(uint32_t address) {
  return "mbarrier at shared address " + std::to_string(shared_offset(address));
}

uint32_t address_of(Warp& warp, const Instruction& i, int lane) {
  return static_cast<uint32_t>(warp.row(i.address.row)[lane] +
                               static_cast<uint64_t>(i.address.offset));
}

// A phase is over when all have arrived and all bytes have come.
void complete(const Site& site, uint32_t address, Mbarrier& b) {
  if (b.pending > 0 || b.bytes != 0) return;
  Block& block = *site.warp.block;
  for (const BulkCopy& copy : block.loads) {
    if (copy.mbarrier == address) {
      fault(site.warp, site.instruction, site.lane,
            place(address) + ": its phase is over while a copy to it (PTX line " +
                std::to_string(copy.instruction->line) + ") is under way");
    }
  }
  b.completed[b.phase] = block.order->finished(std::move(b.gathered));
  b.gathered = nullptr;
  b.phase ^= 1;
  b.pending = b.expected;
}

void init(Warp& warp, const Instruction& i, LaneMask lanes) {
  Block& block = *warp.block;
  for_lanes(lanes, [&](int lane) {
    const Site site{warp, i, lane};
    const uint32_t address = address_of(warp, i, lane);
    shared_bytes(site, address, kBytes);
    if (address % kBytes != 0) fault(warp, i, lane, place(address) + " not aligned to 8 bytes");
    const auto count = static_cast<int64_t>(static_cast<uint32_t>(warp.row(i.in[0])[lane]));
    if (count < 1 || count > kMostCount) {
      fault(warp, i, lane, "count is " + std::to_string(count) + ", must be in [1, 2^20 - 1]");
    }
    // An ordinary write of the lane until it is told of.
    block.order->write(site, shared_offset(address), kBytes);
    const auto [at, is_new] = block.mbarriers.try_emplace(address);
    const int index = is_new ? static_cast<int>(block.mbarriers.size()) - 1 : at->second.index;
    Mbarrier b;
    b.expected = b.pending = static_cast<uint32_t>(count);
    b.index = index;
    b.init_thread = block.order->thread(warp, lane);
    b.init_tick = warp.order.tick;
    at->second = b;
    ++block.progress;
  });
}

void arrive(Warp& warp, const Instruction& i, LaneMask lanes) {
  Block& block = *warp.block;
  for_lanes(lanes, [&](int lane) {
    const Site site{warp, i, lane};
    const uint32_t address = address_of(warp, i, lane);
    Mbarrier& b = mbarrier_at(site, address);
    if (i.flag) {
      b.bytes += static_cast<int32_t>(warp.row(i.in[0])[lane]);
      if (b.bytes > kMostCount || b.bytes < -kMostCount) {
        fault(warp, i, lane, place(address) + ": " + std::to_string(b.bytes) + " bytes expected");
      }
    }
    if (b.pending == 0) {
      fault(warp, i, lane, place(address) + ": more arrivals than the phase expects");
    }
    --b.pending;
    block.order->release(warp, 1u << lane, b.gathered);
    complete(site, address, b);
    ++block.progress;
  });
}

// True once the phase of that parity is over; before the first one, parity 1 is.
void try_wait(Warp& warp, const Instruction& i, LaneMask lanes) {
  uint64_t* done = warp.row(i.out[0]);
  warp.is_spinning = false;
  for_lanes(lanes, [&](int lane) {
    const Mbarrier& b = mbarrier_at({warp, i, lane}, address_of(warp, i, lane));
    const auto parity = static_cast<uint32_t>(warp.row(i.in[0])[lane]);
    if (parity > 1) fault(warp, i, lane, "parity is " + std::to_string(parity));
    done[lane] = b.phase != parity;
    if (done[lane] != 0) {
      warp.block->order->acquire(warp, 1u << lane, b.completed[parity]);
    } else {
      warp.has_spun = warp.is_spinning = true;
    }
  });
}

// --- Decoding ---

void decode_mbarrier(Decoder& d, const Spelling& s, Instruction& i) {
  d.allow(s, {"init", "arrive", "expect_tx", "try_wait", "parity", "shared", "shared::cta",
              "release", "acquire", "cta"});
  if (s.has("init")) {
    d.expect_operands(s, 2, 2);
    i.address = d.address(s.operands[0]);
    i.in = {d.row(s.operands[1])};
    i.execute = init;
  } else if (s.has("arrive")) {
    i.flag = s.has("expect_tx");
    d.expect_operands(s, i.flag ? 3 : 2, i.flag ? 3 : 2);
    if (s.operands[0] != "_") d.refuse("the state is not known");
    i.address = d.address(s.operands[1]);
    if (i.flag) i.in = {d.row(s.operands[2])};
    i.execute = arrive;
  } else if (s.has("try_wait") && s.has("parity")) {
    d.expect_operands(s, 3, 3);
    i.out = {d.row(s.operands[0])};
    i.address = d.address(s.operands[1]);
    i.in = {d.row(s.operands[2])};
    i.execute = try_wait;
    i.flow = Flow::kSpin;
  } else {
    d.refuse("this operation on an mbarrier is not known");
  }
}

}  // namespace

Mbarrier& mbarrier_at(const Site& site, uint32_t address) {
  Block& block = *site.warp.block;
  const auto found = block.mbarriers.find(address);
  if (found == block.mbarriers.end()) {
    fault(site.warp, site.instruction, site.lane,
          "there is no mbarrier at shared address " + std::to_string(shared_offset(address)));
  }
  Mbarrier& b = found->second;
  if (!block.order->knows(site.warp, site.lane, b.init_thread, b.init_tick)) {
    fault(site.warp, site.instruction, site.lane,
          "race: " + place(address) + " is used here, and nothing orders this after its init");
  }
  return b;
}

void bytes_came(const Site& site, uint32_t address, uint32_t bytes, uint32_t engine,
                uint32_t tick) {
  Block& block = *site.warp.block;
  Mbarrier& b = block.mbarriers.at(address);
  b.bytes -= bytes;
  if (b.pending == 0 && b.bytes < 0) {
    fault(site.warp, site.instruction, site.lane,
          place(address) + ": " + std::to_string(-b.bytes) + " bytes more than its phase expects");
  }
  block.order->release(engine, tick, b.gathered);
  complete(site, address, b);
  ++block.progress;
}

void add_mbarrier(OpcodeTable& table) { table["mbarrier"] = decode_mbarrier; }

}  // namespace lminf::interpreter
