// cp.async, and the bulk copies of the copy engine: cp.async.bulk and cp.async.bulk.tensor (TMA).
#include "copies.h"

#include <algorithm>

#include "decode.h"
#include "mbarrier.h"
#include "memory.h"

namespace lminf::interpreter {
namespace {

// --- cp.async: sixteen bytes or less by the thread itself, done at its wait or sooner ---

void land(const Site& site, ElementCopy& copy) {
  if (copy.has_landed) return;
  copy.has_landed = true;
  unsigned char* to = shared_bytes(site, copy.target, copy.bytes);
  if (copy.valid > 0) {
    std::memcpy(to, global_bytes(site, copy.source, copy.valid, false), copy.valid);
  }
  std::memset(to + copy.valid, 0, copy.bytes - copy.valid);
}

void copy_async(Warp& warp, const Instruction& i, LaneMask lanes) {
  Block& block = *warp.block;
  const uint64_t *target = warp.row(i.address.row), *source = warp.row(i.other.row);
  for_lanes(lanes, [&](int lane) {
    const Site site{warp, i, lane};
    ElementCopy copy;
    copy.target = static_cast<uint32_t>(target[lane] + static_cast<uint64_t>(i.address.offset));
    copy.source = source[lane] + static_cast<uint64_t>(i.other.offset);
    copy.bytes = copy.valid = static_cast<uint32_t>(i.number);
    copy.instruction = &i;
    if (!i.in.empty()) copy.valid = static_cast<uint32_t>(warp.row(i.in[0])[lane]);
    if (copy.valid > copy.bytes) {
      fault(
          warp, i, lane,
          "source size is " + std::to_string(copy.valid) + ", over " + std::to_string(copy.bytes));
    }
    if (copy.target % copy.bytes != 0 || copy.source % copy.bytes != 0) {
      fault(warp, i, lane, "an address is not aligned to " + std::to_string(copy.bytes) + " bytes");
    }
    shared_bytes(site, copy.target, copy.bytes);
    if (copy.valid > 0) global_bytes(site, copy.source, copy.valid, false);
    block.order->begin_write(site, block.order->thread(warp, lane), Proxy::kGeneric,
                             shared_offset(copy.target), copy.bytes);
    if (!block.lands_late && block.random() % 2 == 0) land(site, copy);
    warp.lanes[lane].open_copies.push_back(copy);
  });
}

void commit_copies(Warp& warp, const Instruction&, LaneMask lanes) {
  for_lanes(lanes, [&](int lane) {
    Lane& l = warp.lanes[lane];
    l.copy_groups.push_back(std::move(l.open_copies));
    l.open_copies.clear();
  });
}

void wait_copies(Warp& warp, const Instruction& i, LaneMask lanes) {
  Order& order = *warp.block->order;
  for_lanes(lanes, [&](int lane) {
    auto& groups = warp.lanes[lane].copy_groups;
    while (static_cast<int>(groups.size()) > i.number) {
      for (ElementCopy& copy : groups.front()) {
        land({warp, *copy.instruction, lane}, copy);
        order.end_write(order.thread(warp, lane), warp.order.tick, shared_offset(copy.target),
                        copy.bytes);
      }
      groups.erase(groups.begin());
    }
  });
}

// --- Bulk copies ---

constexpr uint32_t kTensorAlignment = 128;

// Calls f(shared address, global address or 0 outside the tensor, bytes) for all that is copied.
template <typename F>
void for_pieces(const BulkCopy& copy, F f) {
  if (!copy.is_tensor) return f(copy.shared, copy.global, copy.bytes);
  ptx_layout::for_pieces(copy.map, copy.first, copy.shared, f);
}

TensorMap map_at(const Site& site, uint64_t address) {
  constexpr uint32_t kBytes = 128;
  TensorMap map;
  if (address % 64 != 0) {
    fault(site.warp, site.instruction, site.lane, "tensor map not aligned to 64 bytes");
  }
  const uint64_t window = address & kWindowMask;
  if (window == kSharedWindow) {
    fault(site.warp, site.instruction, site.lane, "a tensor map in shared memory");
  }
  const unsigned char* at = window == kParamWindow
                                ? parameter_bytes(site, address & ~kWindowMask, kBytes)
                                : global_bytes(site, address, kBytes, false);
  std::memcpy(&map, at, sizeof(map));
  if (map.magic != kTensorMapMagic) {
    fault(site.warp, site.instruction, site.lane, "no tensor map at " + hex(address));
  }
  return map;
}

// A tensor copy as its operands say: i.other holds the map, i.address the shared address.
BulkCopy tensor_copy(const Site& site) {
  Warp& warp = site.warp.block->warps[static_cast<size_t>(site.warp.index)];
  const Instruction& i = site.instruction;
  BulkCopy copy;
  copy.map = map_at(site, warp.row(i.other.row)[site.lane] + static_cast<uint64_t>(i.other.offset));
  if (i.coordinates.size() != copy.map.rank) {
    fault(site.warp, i, site.lane, "the tensor map has rank " + std::to_string(copy.map.rank));
  }
  for (size_t k = 0; k < i.coordinates.size(); ++k) {
    copy.first[k] = static_cast<int32_t>(warp.row(i.coordinates[k])[site.lane]);
  }
  copy.shared = static_cast<uint32_t>(warp.row(i.address.row)[site.lane] +
                                      static_cast<uint64_t>(i.address.offset));
  copy.bytes = copy.map.box_bytes();
  // A pattern of eight rows of the swizzle, which exchanges bits of the address itself.
  const uint32_t pattern = std::max<uint32_t>(kTensorAlignment, 8 * copy.map.span);
  if (copy.shared % pattern != 0) {
    fault(site.warp, i, site.lane,
          "shared address " + std::to_string(copy.shared - kSharedBase) + " not aligned to " +
              std::to_string(pattern) + " bytes");
  }
  shared_bytes(site, copy.shared, copy.bytes);
  copy.warp = site.warp.index;
  copy.lane = site.lane;
  copy.instruction = &i;
  return copy;
}

void start_load(const Site& site, const BulkCopy& copy) {
  Block& block = *site.warp.block;
  const Mbarrier& b = mbarrier_at(site, copy.mbarrier);
  if (!b.init_fenced) {
    fault(site.warp, site.instruction, site.lane,
          "no fence.mbarrier_init came after the init of the mbarrier that this copy completes");
  }
  block.order->begin_write(site, block.order->copy_engine(b.index), Proxy::kAsync,
                           shared_offset(copy.shared), copy.bytes);
  block.loads.push_back(copy);
  ++block.progress;
}

void load_tensor(Warp& warp, const Instruction& i, LaneMask lanes) {
  for_lanes(lanes, [&](int lane) {
    BulkCopy copy = tensor_copy({warp, i, lane});
    copy.mbarrier = static_cast<uint32_t>(warp.row(i.in[0])[lane]);
    start_load({warp, i, lane}, copy);
  });
}

void load_bytes(Warp& warp, const Instruction& i, LaneMask lanes) {
  for_lanes(lanes, [&](int lane) {
    const Site site{warp, i, lane};
    BulkCopy copy;
    copy.is_tensor = false;
    copy.shared = static_cast<uint32_t>(warp.row(i.address.row)[lane] +
                                        static_cast<uint64_t>(i.address.offset));
    copy.global = warp.row(i.other.row)[lane] + static_cast<uint64_t>(i.other.offset);
    copy.bytes = static_cast<uint32_t>(warp.row(i.in[0])[lane]);
    copy.mbarrier = static_cast<uint32_t>(warp.row(i.in[1])[lane]);
    copy.warp = warp.index;
    copy.lane = lane;
    copy.instruction = &i;
    if (copy.shared % 16 != 0 || copy.global % 16 != 0 || copy.bytes % 16 != 0) {
      fault(warp, i, lane, "an address or the size is not a multiple of 16 bytes");
    }
    shared_bytes(site, copy.shared, copy.bytes);
    start_load(site, copy);
  });
}

void store_tensor(Warp& warp, const Instruction& i, LaneMask lanes) {
  Order& order = *warp.block->order;
  for_lanes(lanes, [&](int lane) {
    const Site site{warp, i, lane};
    const BulkCopy copy = tensor_copy(site);
    order.begin_read(site, order.thread(warp, lane), shared_offset(copy.shared), copy.bytes);
    warp.lanes[lane].open_stores.push_back(copy);
  });
}

void commit_stores(Warp& warp, const Instruction&, LaneMask lanes) {
  for_lanes(lanes, [&](int lane) {
    Lane& l = warp.lanes[lane];
    l.store_groups.push_back(std::move(l.open_stores));
    l.open_stores.clear();
  });
}

// With .read the source is free; here its bytes have arrived as well.
void wait_stores(Warp& warp, const Instruction& i, LaneMask lanes) {
  Order& order = *warp.block->order;
  for_lanes(lanes, [&](int lane) {
    auto& groups = warp.lanes[lane].store_groups;
    while (static_cast<int>(groups.size()) > i.number) {
      for (const BulkCopy& copy : groups.front()) {
        const Site site{warp, *copy.instruction, lane};
        for_pieces(copy, [&](uint32_t from, uint64_t to, uint32_t bytes) {
          if (to == 0) return;
          std::memcpy(global_bytes(site, to, bytes, true), shared_bytes(site, from, bytes), bytes);
        });
        order.end_read(order.thread(warp, lane), warp.order.tick, shared_offset(copy.shared),
                       copy.bytes);
      }
      groups.erase(groups.begin());
    }
  });
}

// --- Decoding ---

void decode_bulk(Decoder& d, const Spelling& s, Instruction& i) {
  d.allow(s, {"async", "bulk", "tensor", "1d", "2d", "3d", "4d", "5d", "shared::cluster",
              "shared::cta", "global", "tile", "mbarrier::complete_tx::bytes", "bulk_group",
              "commit_group", "wait_group", "read"});
  const auto& o = s.operands;
  if (s.has("commit_group")) {
    d.expect_operands(s, 0, 0);
    i.execute = commit_stores;
  } else if (s.has("wait_group")) {
    d.expect_operands(s, 1, 1);
    i.number = d.number(o[0]);
    i.execute = wait_stores;
  } else if (s.has("bulk_group")) {
    if (!s.has("tensor")) d.refuse("a bulk store that is not of a tensor");
    d.expect_operands(s, 2, 2);
    i.other = d.address(o[0], &i.coordinates);
    i.address = d.address(o[1]);
    i.execute = store_tensor;
  } else {
    const bool tensor = s.has("tensor");
    d.expect_operands(s, tensor ? 3 : 4, tensor ? 3 : 4);
    if (!s.has("mbarrier::complete_tx::bytes")) d.refuse("no mbarrier is told of it");
    i.address = d.address(o[0]);
    i.other = d.address(o[1], tensor ? &i.coordinates : nullptr);
    if (!tensor) i.in.push_back(d.row(o[2]));
    const Address mbarrier = d.address(o.back());
    if (mbarrier.offset != 0) d.refuse("an offset in the mbarrier's address");
    i.in.push_back(mbarrier.row);
    i.execute = tensor ? load_tensor : load_bytes;
  }
}

void decode_copy(Decoder& d, const Spelling& s, Instruction& i) {
  if (s.has("bulk")) return decode_bulk(d, s, i);
  d.allow(s, {"async", "ca", "cg", "shared", "shared::cta", "global", "L2::128B", "L2::256B",
              "commit_group", "wait_group", "wait_all"});
  const auto& o = s.operands;
  if (s.has("commit_group")) {
    d.expect_operands(s, 0, 0);
    i.execute = commit_copies;
  } else if (s.has("wait_group")) {
    d.expect_operands(s, 1, 1);
    i.number = d.number(o[0]);
    i.execute = wait_copies;
  } else {
    if (s.has("wait_all")) d.refuse("wait_all");
    d.expect_operands(s, 3, 4);
    i.address = d.address(o[0]);
    i.other = d.address(o[1]);
    i.number = d.number(o[2]);
    const bool known = i.number == 16 || (!s.has("cg") && (i.number == 4 || i.number == 8));
    if (!known) d.refuse("so many bytes at a time");
    if (o.size() > 3) i.in = {d.row(o[3])};
    i.execute = copy_async;
  }
}

}  // namespace

void land_load(Block& block, size_t index) {
  const BulkCopy copy = block.loads[index];
  block.loads.erase(block.loads.begin() + static_cast<std::ptrdiff_t>(index));
  const Site site{block.warps[static_cast<size_t>(copy.warp)], *copy.instruction, copy.lane};
  for_pieces(copy, [&](uint32_t to, uint64_t from, uint32_t bytes) {
    unsigned char* memory = shared_bytes(site, to, bytes);
    if (from == 0) {
      std::memset(memory, 0, bytes);
    } else {
      std::memcpy(memory, global_bytes(site, from, bytes, false), bytes);
    }
  });
  Order& order = *block.order;
  const uint32_t engine = order.copy_engine(block.mbarriers.at(copy.mbarrier).index);
  const uint32_t tick = order.tick_of(engine);
  order.end_write(engine, tick, shared_offset(copy.shared), copy.bytes);
  bytes_came(site, copy.mbarrier, copy.bytes, engine, tick);
}

void add_copies(OpcodeTable& table) { table["cp"] = decode_copy; }

}  // namespace lminf::interpreter
