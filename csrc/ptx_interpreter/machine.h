// A block in execution: its warps, their registers, its shared memory and barriers.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <map>
#include <random>
#include <vector>

#include "fault.h"
#include "global_order.h"
#include "order.h"
#include "program.h"
#include "tensor_copy.h"

namespace lminf::interpreter {

struct Size3 {
  uint32_t x = 1, y = 1, z = 1;
  uint64_t count() const { return uint64_t{x} * y * z; }
};

// One launch of a kernel.
struct Launch {
  const Function* function = nullptr;
  Size3 grid, block;
  uint32_t shared_bytes = 0;
  std::vector<unsigned char> parameters;
  bool overlaps = false;   // may start before the launch before it is done
  uint64_t triggered = 0;  // blocks that called griddepcontrol.launch_dependents
  uint64_t instructions = 0;
  GlobalOrder global_order;
};

// Sixteen bytes or less on their way to shared memory (cp.async).
struct ElementCopy {
  uint32_t target = 0;  // shared address
  uint64_t source = 0;
  uint32_t bytes = 0, valid = 0;  // the rest is zeros
  const Instruction* instruction = nullptr;
  bool has_landed = false;
};

struct Lane {
  std::vector<ElementCopy> open_copies;
  std::vector<std::vector<ElementCopy>> copy_groups;
  std::vector<BulkCopy> open_stores;
  std::vector<std::vector<BulkCopy>> store_groups;
};

// The wgmmas of a warp, and which registers and bytes of shared memory they still use.
struct MatrixState {
  struct Read {
    uint32_t offset, bytes;
  };
  bool used = false;
  uint32_t committed = 0, done = 0;   // groups
  std::vector<uint32_t> busy_until;   // [rows]: the last group that uses a register, from 1
  std::vector<uint64_t> touched_at;   // [rows]: by something else than wgmma
  uint64_t clock = 1, fenced_at = 0;  // wgmma.fence
  std::vector<Read> open_reads;
  std::vector<std::vector<Read>> reads;  // of each group that is not done
};

struct Frame {
  const Function* function = nullptr;
  std::vector<uint64_t> registers;  // [rows][32]
  int pc[kLanes] = {};
  LaneMask alive = 0, waiting = 0;
};

struct Block;

struct Warp {
  Block* block = nullptr;
  int index = 0;
  LaneMask present = 0;
  std::vector<Frame> frames;  // the last one runs
  bool is_done = false;
  bool has_spun = false;     // a wait failed, in this turn
  bool is_spinning = false;  // and since then none has succeeded
  int waits_at = -1;         // a barrier of the block
  int maximum_registers = 0;
  Lane lanes[kLanes];
  WarpOrder order;
  MatrixState matrix;

  Frame& frame() { return frames.back(); }
  const Frame& frame() const { return frames.back(); }
  uint64_t* row(int r) { return &frames.back().registers[static_cast<size_t>(r) * kLanes]; }
};

// bar.sync and bar.arrive.
struct NamedBarrier {
  uint32_t arrived = 0, expected = 0;  // threads
  uint32_t warps = 0;                  // a bit for each that has arrived
  Gathered gathered;
};

// An mbarrier object. Its eight bytes of shared memory are opaque to a kernel.
struct Mbarrier {
  uint32_t phase = 0, expected = 0, pending = 0;
  int64_t bytes = 0;  // that are still to come; negative: came before they were expected
  int index = 0;      // of the block's
  uint32_t init_thread = 0, init_tick = 0;
  bool init_fenced = false;  // fence.mbarrier_init
  Gathered gathered;
  KnowledgePtr completed[2];  // what the last phase of each parity hands on
};

struct Block {
  Launch* launch = nullptr;
  uint64_t number = 0;  // in the grid
  Size3 index;
  std::vector<unsigned char> shared;
  std::vector<Warp> warps;
  NamedBarrier barriers[16];
  std::map<uint32_t, Mbarrier> mbarriers;  // by shared address
  std::vector<BulkCopy> loads;             // TMA copies under way
  Order* order = nullptr;
  std::mt19937_64 random;
  bool lands_late = true;  // copies land at their wait; otherwise some do at once
  bool has_triggered = false, has_waited = false;  // griddepcontrol
  uint64_t progress = 0;                           // counts what a spinning warp may wait for

  Size3 thread(int warp, int lane) const;
};

template <typename F>
inline void for_lanes(LaneMask lanes, F f) {
  if (lanes == kAllLanes) {
    for (int lane = 0; lane < kLanes; ++lane) f(lane);
  } else {
    for (; lanes != 0; lanes &= lanes - 1) f(__builtin_ctz(lanes));
  }
}
inline int first_lane(LaneMask lanes) { return __builtin_ctz(lanes); }

// A register's low bytes as a value.
template <typename T>
inline T get(uint64_t bits) {
  T value;
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}
template <typename T>
inline void put(uint64_t& bits, T value) {
  uint64_t wide = 0;
  std::memcpy(&wide, &value, sizeof(T));
  bits = wide;
}

inline float from_bf16(uint16_t bits) { return get<float>(uint64_t{bits} << 16); }
inline float from_f16(uint16_t bits) {
  _Float16 value;
  std::memcpy(&value, &bits, 2);
  return static_cast<float>(value);
}
uint16_t to_bf16(float value);
uint16_t to_f16(float value);

}  // namespace lminf::interpreter
