// Who knows of whose accesses to shared memory: the happens-before order of a block.
//
// Every actor (a thread, or an engine that works beside the threads) has a clock that ticks when it
// tells others what it did. An access is stamped with actor and tick. What an actor knows of the
// others is a tick for each of them; barriers, mbarriers and bar.warp.sync hand this on. Two
// accesses of which one writes are a fault unless the later one's actor knows of the earlier one,
// in whatever order they happened to run. What the generic proxy wrote is also to be known of
// through a fence.proxy.async before the async proxy may touch it, somewhere on the way.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "program.h"

namespace lminf::interpreter {

enum class Proxy : uint8_t { kGeneric, kAsync };

struct Knowledge {
  std::vector<uint32_t> seen;    // [actors]: everything up to this tick
  std::vector<uint32_t> fenced;  // [actors]: the same for the async proxy
  std::vector<uint32_t> least;   // [actors / 32]: of a warp's 32 in `seen`
};
using KnowledgePtr = std::shared_ptr<const Knowledge>;
// What several actors hand in, before anyone takes it; null: nothing yet.
using Gathered = std::shared_ptr<Knowledge>;

// A lane's access, or one that it starts for an engine.
struct Site {
  const Warp& warp;
  const Instruction& instruction;
  int lane;
};

// What a warp's lanes know. One clock for all of them.
struct WarpOrder {
  uint32_t tick = 1;
  KnowledgePtr lanes[kLanes];
  uint32_t own_fenced[kLanes] = {};  // own writes that fence.proxy.async has covered
};

class Order {
 public:
  // For a block of so many warps, whose shared memory has so many bytes.
  void start(int warps, uint32_t shared_bytes);

  uint32_t thread(const Warp& warp, int lane) const;
  uint32_t matrix_engine(const Warp& warp) const;  // whose reads are wgmma's
  uint32_t copy_engine(int mbarrier) const;        // whose writes are TMA's
  uint32_t launch_before() const;  // ticks once, when griddepcontrol.wait has waited for it

  // --- Shared memory; offsets from its beginning ---
  void read(const Site& site, uint32_t offset, uint32_t bytes);
  // By several lanes of the site's warp, the site's own among them.
  void read(const Site& site, LaneMask lanes, uint32_t offset, uint32_t bytes);
  void write(const Site& site, uint32_t offset, uint32_t bytes);
  // Asynchronous: whatever touches the bytes before the end is a fault.
  void begin_write(const Site& site, uint32_t actor, Proxy proxy, uint32_t offset, uint32_t bytes);
  void end_write(uint32_t actor, uint32_t tick, uint32_t offset, uint32_t bytes);
  void begin_read(const Site& site, uint32_t actor, uint32_t offset, uint32_t bytes);
  void end_read(uint32_t actor, uint32_t tick, uint32_t offset, uint32_t bytes);
  uint32_t tick_of(uint32_t engine) { return ++engine_ticks_[engine - engines_]; }

  // --- Handing on ---
  void release(Warp& warp, LaneMask lanes, Gathered& into);
  void release(uint32_t engine, uint32_t tick, Gathered& into);
  KnowledgePtr finished(Gathered&& gathered) const;
  void acquire(Warp& warp, LaneMask lanes, const KnowledgePtr& from);
  void sync_lanes(Warp& warp, LaneMask lanes);
  void fence_async(Warp& warp, LaneMask lanes);
  bool knows(const Warp& warp, int lane, uint32_t actor, uint32_t tick) const;

 private:
  static constexpr uint32_t kNobody = 0xffffffffu;
  static constexpr uint32_t kPending = 0xffffffffu;  // a tick that nobody knows of
  static constexpr uint32_t kChunk = 16;             // bytes
  static constexpr uint32_t kCells = 8;              // of a chunk, at most: two bytes each
  static constexpr uint32_t kCopyEngines = 63;

  struct Reads {
    uint32_t group;  // actors / 32
    LaneMask lanes;
    uint32_t tick;
    uint32_t pending;  // asynchronous ones under way
    int line;
  };
  struct Cell {
    uint32_t writer = kNobody, write_tick = 0;
    int write_line = 0;
    Proxy write_proxy = Proxy::kGeneric;
    std::vector<Reads> reads;
  };
  // Bytes that are accessed together share a cell: a chunk is one, four, or eight.
  struct Chunk {
    uint32_t generation = 0, cells = 1;
  };

  // `overwrites`: all cells of a chunk are alike afterwards.
  template <typename F>
  void for_cells(uint32_t offset, uint32_t bytes, bool overwrites, F f);
  void check_write_seen(const Site& site, Proxy proxy, const Cell& cell, bool writes,
                        uint32_t offset) const;
  void check_reads_seen(const Site& site, const Cell& cell, uint32_t offset) const;
  void add_read(const Site& site, Cell& cell, uint32_t group, LaneMask lanes, bool pending) const;
  std::string name_of(const Site& site, uint32_t actor) const;
  Gathered nothing() const;
  static void join(Knowledge& into, const Knowledge& from);

  int warps_ = 0;
  uint32_t engines_ = 0, actors_ = 0, generation_ = 0;
  std::vector<uint32_t> engine_ticks_;
  std::vector<Chunk> chunks_;
  std::vector<Cell> cells_;  // kCells for each chunk
};

}  // namespace lminf::interpreter
