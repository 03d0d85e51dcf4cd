// ld, st, cvta, prefetch: addresses, checks, ordinary loads and stores.
#include "memory.h"

#include <map>
#include <string>

#include "decode.h"

namespace lminf::interpreter {
namespace {

struct Region {
  size_t bytes;
  std::string name;
};

std::map<uint64_t, Region>& regions() {
  static std::map<uint64_t, Region> all;
  return all;
}

// The region of the last access, which is mostly that of the next one.
uint64_t last_begin = 0, last_end = 0;

bool find_region(uint64_t address, uint32_t bytes) {
  if (address >= last_begin && address + bytes <= last_end) return true;
  auto it = regions().upper_bound(address);
  if (it == regions().begin()) return false;
  --it;
  if (address + bytes > it->first + it->second.bytes) return false;
  last_begin = it->first;
  last_end = it->first + it->second.bytes;
  return true;
}

std::string nearest_region(uint64_t address) {
  auto it = regions().upper_bound(address);
  if (it != regions().begin()) {
    const auto before = std::prev(it);
    const uint64_t end = before->first + before->second.bytes;
    return "'" + before->second.name + "' before it ends at " + hex(end);
  }
  if (it != regions().end())
    return "'" + it->second.name + "' after it begins at " + hex(it->first);
  return "no tensor is known";
}

}  // namespace

void register_region(const void* begin, size_t bytes, const char* name) {
  if (bytes == 0) return;
  last_begin = last_end = 0;
  uint64_t first = reinterpret_cast<uint64_t>(begin), end = first + bytes;
  std::string names = name;
  // Regions never overlap: views of one tensor become one region.
  auto it = regions().upper_bound(first);
  if (it != regions().begin() && std::prev(it)->first + std::prev(it)->second.bytes > first) --it;
  while (it != regions().end() && it->first < end) {
    first = std::min(first, it->first);
    end = std::max(end, it->first + it->second.bytes);
    if (it->second.name != names) names = it->second.name + ", " + names;
    it = regions().erase(it);
  }
  regions()[first] = {end - first, names};
}

void clear_regions() {
  regions().clear();
  last_begin = last_end = 0;
}

unsigned char* shared_bytes(const Site& site, uint64_t address, uint32_t bytes) {
  Block& block = *site.warp.block;
  const uint64_t size = block.shared.size();
  if (address < kSharedBase || address + bytes > kSharedBase + size) {
    fault(site.warp, site.instruction, site.lane,
          "shared address " + std::to_string(static_cast<int64_t>(address) - kSharedBase) + " (+" +
              std::to_string(bytes) + ") outside the block's " + std::to_string(size) + " bytes");
  }
  return &block.shared[address - kSharedBase];
}

unsigned char* global_bytes(const Site& site, uint64_t address, uint32_t bytes, bool writes) {
  if (!find_region(address, bytes)) {
    fault(site.warp, site.instruction, site.lane,
          "global address " + hex(address) + " (+" + std::to_string(bytes) +
              ") outside every tensor: " + nearest_region(address));
  }
  const Block& block = *site.warp.block;
  if (block.launch->overlaps &&
      !block.order->knows(site.warp, site.lane, block.order->launch_before(), 1)) {
    fault(site.warp, site.instruction, site.lane,
          std::string(writes ? "writes" : "reads") +
              " global memory, and no griddepcontrol.wait comes before it in a launch that may "
              "overlap the one before it");
  }
  if (const char* done = block.launch->global_order.access(address, bytes, writes, block.number)) {
    fault(site.warp, site.instruction, site.lane,
          std::string("race: ") + (writes ? "writes" : "reads") + " global memory at " +
              hex(address) + ", which another block of this launch " + done);
  }
  return reinterpret_cast<unsigned char*>(address);
}

const unsigned char* parameter_bytes(const Site& site, uint64_t offset, uint32_t bytes) {
  const auto& parameters = site.warp.block->launch->parameters;
  if (offset + bytes > parameters.size()) {
    fault(site.warp, site.instruction, site.lane,
          "parameter offset " + std::to_string(offset) + " (+" + std::to_string(bytes) +
              ") outside the kernel's " + std::to_string(parameters.size()) + " bytes");
  }
  return parameters.data() + offset;
}

namespace {

// Of an access by a load or store, order included; a load may be of several lanes.
unsigned char* accessed(const Site& site, LaneMask lanes, uint64_t address, uint32_t bytes,
                        bool writes) {
  if (address % bytes != 0) {
    fault(site.warp, site.instruction, site.lane,
          "address " + hex(address) + " not aligned to " + std::to_string(bytes) + " bytes");
  }
  Space space = site.instruction.space;
  if (space == Space::kGeneric) {
    const uint64_t window = address & kWindowMask;
    space = window == kSharedWindow  ? Space::kShared
            : window == kParamWindow ? Space::kParam
                                     : Space::kGlobal;
    if (space != Space::kGlobal) address &= ~kWindowMask;
  }
  switch (space) {
    case Space::kShared: {
      const auto at = static_cast<uint32_t>(address);
      const auto& mbarriers = site.warp.block->mbarriers;
      if (const auto next = mbarriers.upper_bound(at + bytes - 1);
          next != mbarriers.begin() && std::prev(next)->first + 8 > at) {
        fault(site.warp, site.instruction, site.lane,
              "an ordinary access to the mbarrier at shared address " +
                  std::to_string(shared_offset(std::prev(next)->first)));
      }
      unsigned char* memory = shared_bytes(site, at, bytes);
      Order& order = *site.warp.block->order;
      if (writes) {
        order.write(site, shared_offset(at), bytes);
      } else {
        order.read(site, lanes, shared_offset(at), bytes);
      }
      return memory;
    }
    case Space::kParam:
      if (writes) fault(site.warp, site.instruction, site.lane, "writes a parameter");
      return const_cast<unsigned char*>(
          parameter_bytes(site, static_cast<uint32_t>(address), bytes));
    default:
      return global_bytes(site, address, bytes, writes);
  }
}

void load(Warp& warp, const Instruction& i, LaneMask lanes) {
  const auto bytes = static_cast<uint32_t>(bytes_of(i.type));
  const auto count = static_cast<uint32_t>(i.out.size());
  const uint64_t* base = warp.row(i.address.row);
  uint64_t addresses[kLanes];  // a loaded register may be the address
  const int first = first_lane(lanes);
  bool is_one = i.space == Space::kShared;
  for_lanes(lanes, [&](int lane) {
    addresses[lane] = base[lane] + static_cast<uint64_t>(i.address.offset);
    is_one &= addresses[lane] == addresses[first];
  });
  const auto value_at = [&](const unsigned char* from, uint32_t k) {
    uint64_t value = 0;
    std::memcpy(&value, from + bytes * k, bytes);
    if (!is_signed(i.type)) return value;
    const int unused = 64 - 8 * static_cast<int>(bytes);
    return static_cast<uint64_t>(static_cast<int64_t>(value << unused) >> unused);
  };
  if (is_one) {  // a broadcast
    const unsigned char* from =
        accessed({warp, i, first}, lanes, addresses[first], bytes * count, false);
    for (uint32_t k = 0; k < count; ++k) {
      if (i.out[k] < 0) continue;
      uint64_t* to = warp.row(i.out[k]);
      const uint64_t value = value_at(from, k);
      for_lanes(lanes, [&](int lane) { to[lane] = value; });
    }
    return;
  }
  for_lanes(lanes, [&](int lane) {
    const unsigned char* from =
        accessed({warp, i, lane}, 1u << lane, addresses[lane], bytes * count, false);
    for (uint32_t k = 0; k < count; ++k) {
      if (i.out[k] >= 0) warp.row(i.out[k])[lane] = value_at(from, k);
    }
  });
}

void store(Warp& warp, const Instruction& i, LaneMask lanes) {
  const auto bytes = static_cast<uint32_t>(bytes_of(i.type));
  const auto count = static_cast<uint32_t>(i.in.size());
  const uint64_t* base = warp.row(i.address.row);
  for_lanes(lanes, [&](int lane) {
    unsigned char* to =
        accessed({warp, i, lane}, 1u << lane, base[lane] + static_cast<uint64_t>(i.address.offset),
                 bytes * count, true);
    for (uint32_t k = 0; k < count; ++k)
      std::memcpy(to + bytes * k, &warp.row(i.in[k])[lane], bytes);
  });
}

// To and from a function's parameter, which is a register here.
void move_parameter(Warp& warp, const Instruction& i, LaneMask lanes) {
  uint64_t* to = warp.row(i.out[0]);
  const uint64_t* from = warp.row(i.in[0]);
  for_lanes(lanes, [&](int lane) { to[lane] = from[lane]; });
}

void to_space(Warp& warp, const Instruction& i, LaneMask lanes) {
  uint64_t* to = warp.row(i.out[0]);
  const uint64_t* from = warp.row(i.in[0]);
  const uint64_t window = i.space == Space::kShared ? kSharedWindow : 0;
  for_lanes(lanes, [&](int lane) {
    if ((from[lane] & kWindowMask) != window) {
      fault(warp, i, lane, hex(from[lane]) + " is no generic address of that space");
    }
    to[lane] = from[lane] & ~kWindowMask;
  });
}

void from_space(Warp& warp, const Instruction& i, LaneMask lanes) {
  uint64_t* to = warp.row(i.out[0]);
  const uint64_t* from = warp.row(i.in[0]);
  const uint64_t window = i.space == Space::kShared  ? kSharedWindow
                          : i.space == Space::kParam ? kParamWindow
                                                     : 0;
  for_lanes(lanes, [&](int lane) { to[lane] = from[lane] | window; });
}

void nothing(Warp&, const Instruction&, LaneMask) {}

// --- Decoding ---

Space space_of(const Decoder& d, const Spelling& s) {
  if (s.has("global")) return Space::kGlobal;
  if (s.has_any({"shared", "shared::cta"})) return Space::kShared;
  if (s.has("param")) return Space::kParam;
  if (s.has("local")) d.refuse("local memory is not interpreted: the kernel spills");
  return Space::kGeneric;
}

// Cache operators change nothing here; `volatile` and orders stronger than weak are not known.
void allow_access(const Decoder& d, const Spelling& s) {
  d.allow(s, {"global", "shared", "shared::cta", "param", "v2", "v4", "nc", "ca", "cg", "cs", "wb",
              "weak", "L1::no_allocate", "L2::128B", "L2::256B"});
  if (s.types.size() != 1) d.refuse("one type is needed");
}

size_t vector_length(const Spelling& s) { return s.has("v4") ? 4 : s.has("v2") ? 2 : 1; }

void decode_load(Decoder& d, const Spelling& s, Instruction& i) {
  i.space = space_of(d, s);
  allow_access(d, s);
  d.expect_operands(s, 2, 2);
  i.out = d.rows(s.operands[0]);
  if (i.out.size() != vector_length(s)) d.refuse("length of the vector");
  bool in_registers = false;
  i.address = d.address(s.operands[1], nullptr, &in_registers);
  i.execute = load;
  if (i.space == Space::kParam && in_registers) {
    if (i.address.offset != 0 || i.out.size() != 1) d.refuse("part of a parameter");
    i.in = {i.address.row};
    i.execute = move_parameter;
  }
}

void decode_store(Decoder& d, const Spelling& s, Instruction& i) {
  i.space = space_of(d, s);
  allow_access(d, s);
  d.expect_operands(s, 2, 2);
  i.in = d.rows(s.operands[1]);
  if (i.in.size() != vector_length(s)) d.refuse("length of the vector");
  bool in_registers = false;
  i.address = d.address(s.operands[0], nullptr, &in_registers);
  i.execute = store;
  if (i.space == Space::kParam) {
    if (!in_registers || i.address.offset != 0 || i.in.size() != 1) d.refuse("part of a parameter");
    i.out = {i.address.row};
    i.execute = move_parameter;
  }
}

void decode_cvta(Decoder& d, const Spelling& s, Instruction& i) {
  d.allow(s, {"to", "global", "shared", "param"});
  d.plain_operands(s, i, 1, 1);
  i.space = space_of(d, s);
  i.execute = s.has("to") ? to_space : from_space;
}

void decode_prefetch(Decoder& d, const Spelling& s, Instruction& i) {
  d.allow(s, {"global", "L1", "L2", "tensormap"});
  d.expect_operands(s, 1, 1);
  i.address = d.address(s.operands[0]);
  i.execute = nothing;
}

}  // namespace

void add_memory(OpcodeTable& table) {
  table["ld"] = decode_load;
  table["st"] = decode_store;
  table["cvta"] = decode_cvta;
  table["prefetch"] = decode_prefetch;
}

}  // namespace lminf::interpreter
