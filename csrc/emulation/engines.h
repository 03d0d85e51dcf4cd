// What the copy engine, the tensor cores of Hopper and its mbarriers hold of the running block. One
// launch runs at a time on a thread, one block after another, so that it stands here.
#pragma once

#include <cstdint>
#include <deque>
#include <string>
#include <vector>

#include "ptx_sm90.h"

namespace lminf::emulation {

constexpr unsigned kWarpgroup = 128;
constexpr uint32_t kChunk = 16;  // bytes; what is tracked as one
constexpr unsigned char kPoison = 0xFF;

struct Mbarrier {
  uint32_t address = 0;
  unsigned maker = 0;
  bool fenced = false;
  int count = 0, pending = 0;  // arrivals
  int64_t transactions = 0;    // bytes expected and not yet there
  uint64_t phase = 0;
  WaitList waiting;
  char tokens[2] = {};
};

// A box of a tensor and where it stands in shared memory, its rows one after another.
struct Box {
  TensorMap map;
  Coordinates first;
  uint32_t shared;

  uint32_t bytes() const { return map.box_bytes(); }
};

struct Load {
  Site site{};
  unsigned thread = 0;
  Mbarrier* barrier = nullptr;
  uint64_t phase = 0;
  uint32_t target = 0, bytes = 0;
  const unsigned char* source = nullptr;  // of a bulk copy; null: a box
  Box box{};
  Agent agent;
};

struct Store {
  Site site{};
  Box box{};
  uint64_t group = 0;
  bool read = false;
  std::vector<unsigned char> data;  // of the elements inside the tensor
  Agent agent;
  char token = 0;
};

// Accumulators of a warpgroup that one or more wgmmas are adding to.
struct Accumulators {
  int n = 0;
  std::vector<float> values;  // [64, n]
  float* registers[kWarpgroup] = {};
  bool landed[kWarpgroup] = {};
  uint64_t last_group[kWarpgroup] = {};  // that adds to them
  unsigned n_landed = 0;
};

struct Multiply {
  Site site{};
  int n = 0;
  uint64_t a = 0, b = 0;
  bool a_in_registers = false, a_mn_major = false, b_mn_major = false, accumulate = false;
  bool is_bf16 = false;
  uint64_t group = 0;
  Accumulators* d = nullptr;
  unsigned issued = 0;  // by so many threads
  bool done = false;
  const uint32_t* a_registers[kWarpgroup] = {};
  uint32_t a_values[kWarpgroup][4] = {};
  std::vector<uint32_t> a_chunks, b_chunks;  // shared addresses, in `chunks_of`'s order
  Agent agents[4];                           // a warp each
  char done_token = 0;
};

struct Warpgroup {
  std::deque<Multiply> multiplies;  // the oldest is number `first`
  uint64_t first = 0;
  uint64_t issued[kWarpgroup] = {}, waited[kWarpgroup] = {};  // numbers: the next ones
  uint64_t open_group[kWarpgroup] = {};
  bool fenced[kWarpgroup] = {};
  std::deque<Accumulators> accumulators;
  WaitList waiting;
};

struct PerThread {
  std::deque<Store> stores;
  uint64_t open_group = 0;
};

struct Engines {
  std::deque<Mbarrier> barriers;
  std::deque<Load> loads;  // in flight, in the order of issue
  std::deque<Warpgroup> warpgroups;
  std::vector<PerThread> threads;
  std::vector<unsigned char> async_view;
  // By chunk of shared memory: what is under way there.
  std::vector<uint16_t> loading, multiplying, storing;
  unsigned elected = 0;
  bool used = false;  // by this block, up to now
};

inline thread_local Engines state;

// Sized when the block first uses an engine: most kernels never do.
Engines& engines_in_use();

void check_shared(Site site, uint32_t address, uint64_t bytes, uint32_t alignment);
// That nothing of what is under way in `busy` touches a chunk of shared memory.
void check_idle(Site site, const std::vector<uint16_t>& busy, uint32_t chunk_address,
                const char* what);
void check_not_loading(Site site, uint32_t chunk_address);
void check_published(Site site, uint32_t chunk_address);

// --- mbarrier.cpp ---

Mbarrier& barrier_at(Site site, uint32_t address);
// What is wrong with the barrier's counts, or null. Completes the phase where that is due.
const char* settle(Mbarrier& b);
std::string complaint(const Mbarrier& b, const char* what);

// --- tma.cpp ---

void land(Load& load);
void write_target(Store& store);

// --- wgmma.cpp ---

// The one that ends next, or null: they end in order, each adds to what those before it left.
Multiply* oldest(Warpgroup& w);
void compute(Multiply& m);

}  // namespace lminf::emulation
