// Runs a CUDA kernel on the CPU, to test it where there is no GPU: one fiber per CUDA thread, one
// block after another, warp and block collectives as rendezvous.
//
// What makes a passing run mean something:
//   - shared memory is all ones at the start of a block: NaN in float, bf16 and fp16;
//   - asynchronous copies land at the wait that covers them, no sooner (in a seeded schedule some
//     land at once instead, so that a copy into memory still being read shows as well); the engines
//     of sm_90a likewise (ptx_sm90.h);
//   - every access through the wrappers is checked against its allocation;
//   - a thread that waits for ever, or at another barrier than its block, ends the launch with a
//     report of who waits where;
//   - a seed other than 0 runs threads and blocks in another order;
//   - built with -fsanitize=thread, a missing barrier is a reported data race.
// This header is plain C++ with no CUDA in it; device.h gives the CUDA names on top.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <stdexcept>
#include <string>
#include <vector>

namespace lminf::emulation {

struct Index3 {
  unsigned x, y, z;
};

// Where a thread waits, for reports.
struct Site {
  const char* what;
  const char* file;
  int line;
};

// A kernel did what no kernel may do. The message names kernel, block and thread.
class Fault : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// Order in which threads and blocks run: 0 in turn, anything else a shuffled order of that seed.
void set_schedule_seed(uint64_t seed);

// The device that launch plans are told of: sm_80 with few multiprocessors, so that decoding in the
// tests is cut into several splits, but not into dozens.
struct Device {
  int capability = 80;
  int multiprocessors = 4;
  bool has_sm90a = true;  // whether the build is taken to hold code for sm_90a
  bool has_sm90 = true;   // and any for sm_90 or later
};
Device device();
void set_device(Device device);
inline int current_device() { return 0; }

// Runs `body` once per thread. Throws Fault. `overlaps`: the launch may start as soon as all blocks
// of the one before it have called grid_launch_dependents or ended, and that is sure of nothing
// that any kernel since the last launch without it has written, be it before or after that call.
// So until a thread has called grid_wait, or has met one that did at a barrier, reading such memory
// is a fault, and so is every write: those kernels may still read there. Some thread of each block
// must call grid_wait.
void launch(const char* kernel, Index3 grid, Index3 block, size_t shared_bytes, bool overlaps,
            const std::function<void()>& body);

// What was launched, for tests that ask whether launches overlap.
struct LaunchRecord {
  std::string kernel;
  bool overlaps;
  uint64_t blocks;
  uint64_t triggered;  // blocks that called grid_launch_dependents
};
// The launches since the last call of this.
std::vector<LaunchRecord> take_launches();

// --- What the running thread may ask, inside a launch ---

Index3 thread_index();
Index3 block_index();
Index3 block_dim();
Index3 grid_dim();
unsigned lane_id();

unsigned char* shared_memory();
uint32_t shared_address(const void* pointer);  // checked: inside this block's shared memory
// The bytes at a shared address, checked: inside the allocation and aligned to their size.
unsigned char* shared_bytes(uint32_t address, size_t bytes, const char* what);

[[noreturn]] void fault(const std::string& message);
[[noreturn]] void index_fault(const char* what, int64_t index, int64_t size);

// All threads of the block; every one must come from the same line.
void sync_threads(Site site);
// Named barrier: `threads` of them, from anywhere; `waits` false: bar.arrive.
void named_barrier(Site site, unsigned id, unsigned threads, bool waits = true);
void grid_wait();
void grid_launch_dependents();

// A warp collective: each lane gives `n_in` words; when all 32 have come, `complete` turns all
// lanes' words into all lanes' results; each lane takes `n_out` words back. Orders no memory.
constexpr int kMaxWords = 12;
using WarpWords = uint32_t[32][kMaxWords];
using WarpFunction = void (*)(const WarpWords& in, WarpWords& out);
void warp_collective(Site site, uint32_t mask, const uint32_t* in, int n_in, uint32_t* out,
                     int n_out, WarpFunction complete);
// Shuffle: {value, source lane} -> {value}. Ballot: {predicate} -> {bits}.
void shuffle_words(const WarpWords& in, WarpWords& out);
void ballot_words(const WarpWords& in, WarpWords& out);
// The collective that does order memory among its lanes.
void sync_warp(Site site, uint32_t mask);

// Asynchronous copy to shared memory: `valid` bytes of `source`, the rest of `bytes` zeros.
void copy_async(uint32_t shared_address, const void* source, uint32_t bytes, uint32_t valid);
void copy_async_commit();
void copy_async_wait(int newest_groups_left);

// Tells ThreadSanitizer of an access that uninstrumented code makes for the running thread.
void announce_shared_read(const void* address, size_t bytes);
void announce_shared_write(void* address, size_t bytes);

// A point where a seeded schedule may run another thread first.
void maybe_yield();

// --- What instructions are made of that have more state than one collective ---

unsigned thread_number();  // in the block, from 0
unsigned block_threads();
size_t shared_size();
// One time in two in a seeded schedule, never otherwise.
bool chance();
uint64_t random_below(uint64_t n);  // 0 in a schedule without a seed

// Threads that wait for the same thing.
struct WaitList {
  std::vector<unsigned> threads;
};
void wait_on(WaitList& list, Site site);
void wake(WaitList& list);

// Ends the launch for what `thread` did, from where nothing can be thrown.
void fail(unsigned thread, const std::string& message);
std::string show(Site site);

// What came before a release is seen by who acquires the same token later. A token starts a block
// as 0.
void release(char* token);
void acquire(char* token);

// ThreadSanitizer takes no notice of what the running thread does while one of these lives: its
// bookkeeping is not the kernel's.
class Unwatched {
 public:
  Unwatched();
  ~Unwatched();
  Unwatched(const Unwatched&) = delete;
  Unwatched& operator=(const Unwatched&) = delete;
};

// Someone other than a thread who reads and writes memory, to ThreadSanitizer: knows what its maker
// knew when it made it. `finish` frees it.
class Agent {
 public:
  void make();
  void release(void* token);
  void read(const void* address, size_t bytes);
  void write(void* address, size_t bytes);
  void finish();

 private:
  void* fiber_ = nullptr;
};

// Checked global memory: with at least one allocation registered, an access through the wrappers
// must lie inside one of them.
void register_global(const void* begin, size_t bytes, const char* name);
void clear_globals();
void check_global(const void* address, size_t bytes, const char* what, bool writes = false);

}  // namespace lminf::emulation
