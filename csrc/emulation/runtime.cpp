// Built without -fsanitize=thread even in a ThreadSanitizer build: its own bookkeeping is shared by
// all fibers on one thread. What a wrapper reads or writes for a kernel is announced by hand.
#include "runtime.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <memory>
#include <random>
#include <sstream>
#include <utility>
#include <vector>

#include "fiber.h"
#include "ptx_sm90.h"

#if defined(LMINF_THREAD_SANITIZER)
#include <sanitizer/tsan_interface.h>
extern "C" void __tsan_read_range(void* address, unsigned long bytes);
extern "C" void __tsan_write_range(void* address, unsigned long bytes);
// Reads and writes, for all its name.
extern "C" void AnnotateIgnoreReadsBegin(const char* file, int line);
extern "C" void AnnotateIgnoreReadsEnd(const char* file, int line);
#endif

namespace lminf::emulation {
namespace {

constexpr unsigned kWarpSize = 32;
constexpr unsigned kNamedBarriers = 16;
constexpr unsigned char kPoison = 0xFF;

void happens_before([[maybe_unused]] void* token) {
#if defined(LMINF_THREAD_SANITIZER)
  __tsan_release(token);
#endif
}

void happens_after([[maybe_unused]] void* token) {
#if defined(LMINF_THREAD_SANITIZER)
  __tsan_acquire(token);
#endif
}

void announce_read([[maybe_unused]] const void* p, [[maybe_unused]] size_t bytes) {
#if defined(LMINF_THREAD_SANITIZER)
  __tsan_read_range(const_cast<void*>(p), bytes);
#endif
}

void announce_write([[maybe_unused]] void* p, [[maybe_unused]] size_t bytes) {
#if defined(LMINF_THREAD_SANITIZER)
  __tsan_write_range(p, bytes);
#endif
}

// Copies without calling memcpy, which ThreadSanitizer would take for the kernel's own access.
void copy_words(uint32_t* to, const uint32_t* from, int n) {
  volatile uint32_t* target = to;
  for (int i = 0; i < n; ++i) target[i] = from[i];
}

// A queue of fixed capacity: memory that fibers share is allocated before they run, because
// ThreadSanitizer takes an allocation for an access of the fiber that makes it.
template <typename T>
class Queue {
 public:
  void reserve(size_t capacity) {
    if (items_.size() < capacity) items_.resize(capacity);
    clear();
  }
  void clear() { head_ = size_ = 0; }
  bool empty() const { return size_ == 0; }
  bool full() const { return size_ == items_.size(); }
  size_t size() const { return size_; }
  T& operator[](size_t i) { return items_[(head_ + i) % items_.size()]; }
  void push(const T& item) { (*this)[size_++] = item; }
  T pop() {
    T item = (*this)[0];
    head_ = (head_ + 1) % items_.size();
    --size_;
    return item;
  }

 private:
  std::vector<T> items_;
  size_t head_ = 0, size_ = 0;
};

constexpr size_t kMaxCopiesInFlight = 512;  // of one thread

// What ThreadSanitizer synchronises by. Set once a thread past grid_wait has released it in the
// running block: who acquires it then is past grid_wait too.
using Token = char;

struct AsyncCopy {
  unsigned char* target;
  const unsigned char* source;
  uint32_t bytes, valid;
  uint64_t group;
};

enum class State : uint8_t { kReady, kWaiting, kDone };

struct Thread {
  Fiber fiber;
  Index3 index{};
  unsigned linear = 0;
  State state = State::kReady;
  Site site{};
  Queue<AsyncCopy> copies;
  uint64_t open_group = 0;
  bool past_grid_wait = true;
};

// `tokens` alternate, so that a thread that leaves late does not see what others did after it.
struct Barrier {
  Queue<Thread*> waiting;
  unsigned expected = 0;
  unsigned arrived = 0;  // without waiting
  uint64_t phase = 0;
  Token tokens[2] = {};
};

struct Warp {
  Queue<Thread*> waiting;
  Site site{};
  uint64_t phase = 0;
  WarpWords in[2], out[2];
  Token tokens[2] = {};
};

struct Global {
  uintptr_t begin, end;
  std::string name;
};

struct Span {
  uintptr_t begin, end;
};

// Sorts, and makes one of those that touch.
void join(std::vector<Span>& spans) {
  std::sort(spans.begin(), spans.end(),
            [](const Span& a, const Span& b) { return a.begin < b.begin; });
  size_t kept = 0;
  for (const Span& span : spans) {
    if (kept > 0 && span.begin <= spans[kept - 1].end) {
      spans[kept - 1].end = std::max(spans[kept - 1].end, span.end);
    } else {
      spans[kept++] = span;
    }
  }
  spans.resize(kept);
}

struct Free {
  void operator()(unsigned char* p) const { std::free(p); }
};
using Bytes = std::unique_ptr<unsigned char, Free>;

std::string show(Index3 i) {
  std::ostringstream out;
  out << '(' << i.x << ',' << i.y << ',' << i.z << ')';
  return out.str();
}

struct Launch {
  const char* kernel = nullptr;
  Index3 grid{}, block{}, block_index{};
  unsigned n_threads = 0;
  const std::function<void()>* body = nullptr;
  std::deque<Thread>* threads = nullptr;
  std::vector<Warp> warps;
  Barrier block_barrier;
  Barrier named[kNamedBarriers];
  Queue<Thread*> ready;
  Thread* running = nullptr;
  Fiber caller;
  unsigned n_done = 0;  // threads of the running block
  bool overlaps = false;
  bool waited_for_grid = false, triggered = false;  // by the running block
  std::vector<Span> written;                        // global memory
  bool shuffled = false;
  std::mt19937_64 random;
  std::vector<Bytes> shared;  // the running block's last; earlier ones kept for ThreadSanitizer
  size_t shared_bytes = 0;
  std::string error;
  char end_token = 0;

  unsigned char* shared_base() { return shared.back().get(); }

  // Threads come first: the engines work when none can run, in a shuffled order at any time.
  Thread* take_next() {
    if (shuffled && error.empty() && random() % 8 == 0) engines::step();
    while (ready.empty() && n_done < n_threads && error.empty() && engines::step()) {
    }
    if (ready.empty() || !error.empty()) return nullptr;
    if (shuffled) std::swap(ready[0], ready[random() % ready.size()]);
    return ready.pop();
  }

  void wake(Queue<Thread*>& waiting) {
    while (!waiting.empty()) {
      Thread* t = waiting.pop();
      t->state = State::kReady;
      ready.push(t);
    }
  }

  // Leaves the running thread for the next one that can run, or for the caller.
  void switch_away(bool last) {
    Thread* self = running;
    Thread* next = take_next();
    if (next == self) return;
    running = next;
    Fiber::switch_to(self->fiber, next ? next->fiber : caller, last);
  }

  void wait(Site site) {
    running->state = State::kWaiting;
    running->site = site;
    switch_away(false);
  }

  std::string where(const Thread& t) const {
    return std::string("kernel ") + kernel + ", block " + show(block_index) + ", thread " +
           show(t.index);
  }

  // Who waits where, neighbours in one line.
  std::string waiting_report() const {
    std::ostringstream out;
    auto label = [](const Thread& t) {
      return t.state == State::kDone ? std::string("finished") : "waits at " + show(t.site);
    };
    for (unsigned i = 0; i < n_threads;) {
      unsigned end = i + 1;
      while (end < n_threads && label((*threads)[end]) == label((*threads)[i])) ++end;
      out << "\n  thread" << (end - i > 1 ? "s " : " ") << i;
      if (end - i > 1) out << " to " << end - 1;
      out << ": " << label((*threads)[i]);
      i = end;
    }
    return out.str();
  }

  void land(const AsyncCopy& c) {
    announce_read(c.source, c.valid);
    announce_write(c.target, c.bytes);
    volatile unsigned char* target = c.target;
    for (uint32_t i = 0; i < c.bytes; ++i) target[i] = i < c.valid ? c.source[i] : 0;
  }
};

thread_local Launch* current = nullptr;
thread_local std::deque<Thread> pool;
uint64_t schedule_seed = 0;
Device the_device;
std::vector<Global> globals;
std::vector<Span> in_flight;  // what kernels that may still run have written, joined
std::vector<LaunchRecord> records;

Launch& here() {
  if (current == nullptr || current->running == nullptr) {
    throw Fault("a device function was called outside a kernel launch");
  }
  return *current;
}

// Unwinds a faulty fiber back to its entry.
struct Abandoned {};

void thread_entry() {
  Fiber::entered();
  Launch& l = *current;
  try {
    (*l.body)();
    l.running->state = State::kDone;
    ++l.n_done;
  } catch (const Abandoned&) {
    l.ready.clear();  // so that the launch's caller comes next
  } catch (const std::exception& error) {
    l.error = l.where(*l.running) + ": " + error.what();
    l.ready.clear();
  }
  happens_before(&l.end_token);
  l.switch_away(true);
  std::abort();  // a finished fiber is never resumed
}

void run_block(Launch& l, Index3 index) {
  l.block_index = index;
#if !defined(LMINF_THREAD_SANITIZER)
  l.shared.clear();
#endif
  void* memory = nullptr;
  if (posix_memalign(&memory, 1024, std::max<size_t>(l.shared_bytes, 1)) != 0) {
    throw std::bad_alloc();
  }
  std::memset(memory, kPoison, l.shared_bytes);
  l.shared.emplace_back(static_cast<unsigned char*>(memory));
  for (Warp& w : l.warps) {
    w.waiting.clear();
    w.phase = 0;
  }
  auto reset = [](auto& tokens) { tokens[0] = tokens[1] = 0; };
  for (Warp& w : l.warps) reset(w.tokens);
  l.block_barrier.waiting.clear();
  reset(l.block_barrier.tokens);
  for (Barrier& b : l.named) {
    b.waiting.clear();
    b.arrived = 0;
    reset(b.tokens);
  }
  l.ready.clear();
  l.n_done = 0;
  l.waited_for_grid = l.triggered = false;
  engines::start_block();
  for (unsigned i = 0; i < l.n_threads; ++i) {
    Thread& t = (*l.threads)[i];
    t.linear = i;
    t.index = {i % l.block.x, i / l.block.x % l.block.y, i / (l.block.x * l.block.y)};
    t.state = State::kReady;
    t.copies.clear();
    t.open_group = 0;
    t.past_grid_wait = !l.overlaps;
    t.fiber.prepare(thread_entry);
    l.ready.push(&t);
  }
  Thread* first = l.take_next();
  l.running = first;
  Fiber::switch_to(l.caller, first->fiber, false);
  l.running = nullptr;
  if (!l.error.empty()) return;

  for (unsigned i = 0; i < l.n_threads; ++i) {
    const Thread& t = (*l.threads)[i];
    if (t.state == State::kWaiting) {
      l.error = "deadlock in " + l.where(t) + ":" + l.waiting_report() + engines::report();
      return;
    }
    if (!t.copies.empty()) {
      l.error = l.where(t) + " ended with asynchronous copies that no wait covers";
      return;
    }
  }
  for (unsigned id = 0; id < kNamedBarriers; ++id) {
    if (l.named[id].arrived > 0) {
      l.error = l.where((*l.threads)[0]) + ": named barrier " + std::to_string(id) + " was left " +
                "with " + std::to_string(l.named[id].arrived) + " threads arrived";
      return;
    }
  }
  if (l.overlaps && !l.waited_for_grid) {
    l.error = l.where((*l.threads)[0]) + ": launched to overlap the kernel before it, but no " +
              "thread of the block called grid_wait";
    return;
  }
  engines::end_block();
}

}  // namespace

void set_schedule_seed(uint64_t seed) { schedule_seed = seed; }

Device device() { return the_device; }
void set_device(Device device) { the_device = device; }

void launch(const char* kernel, Index3 grid, Index3 block, size_t shared_bytes, bool overlaps,
            const std::function<void()>& body) {
  if (current != nullptr) throw Fault("a kernel cannot launch a kernel here");
  Launch l;
  l.kernel = kernel;
  l.grid = grid;
  l.block = block;
  l.n_threads = block.x * block.y * block.z;
  l.body = &body;
  l.shared_bytes = shared_bytes;
  l.overlaps = overlaps;
  l.shuffled = schedule_seed != 0;
  l.random.seed(schedule_seed);
  const uint64_t n_blocks = uint64_t{grid.x} * grid.y * grid.z;
  if (l.n_threads == 0 || l.n_threads > 1024 || n_blocks == 0 || grid.y > 65535 || grid.z > 65535 ||
      grid.x > 2147483647u) {
    throw Fault(std::string("kernel ") + kernel + ": grid " + show(grid) + " of blocks " +
                show(block) + " is no launch a GPU accepts");
  }
  if (overlaps && (the_device.capability < 90 || !the_device.has_sm90)) {
    throw Fault(std::string("kernel ") + kernel +
                ": launches overlap on compute capability 9.0 and up, in code for it");
  }
  l.warps = std::vector<Warp>((l.n_threads + kWarpSize - 1) / kWarpSize);
  while (pool.size() < l.n_threads) pool.emplace_back();
  for (Thread& t : pool) t.copies.reserve(kMaxCopiesInFlight);
  l.ready.reserve(l.n_threads + 1);
  l.block_barrier.waiting.reserve(l.n_threads);
  for (Barrier& b : l.named) b.waiting.reserve(l.n_threads);
  for (Warp& w : l.warps) w.waiting.reserve(kWarpSize);
  l.threads = &pool;
  l.caller.adopt_caller();

  std::vector<uint64_t> order(n_blocks);
  for (uint64_t i = 0; i < n_blocks; ++i) order[i] = i;
  if (l.shuffled) std::shuffle(order.begin(), order.end(), l.random);
  if (!overlaps) in_flight.clear();
  join(in_flight);
  records.push_back({kernel, overlaps, n_blocks, 0});
  current = &l;
  for (uint64_t i : order) {
    run_block(l, {static_cast<unsigned>(i % grid.x), static_cast<unsigned>(i / grid.x % grid.y),
                  static_cast<unsigned>(i / (uint64_t{grid.x} * grid.y))});
    if (!l.error.empty()) break;
    records.back().triggered += l.triggered;
  }
  current = nullptr;
  in_flight.insert(in_flight.end(), l.written.begin(), l.written.end());
  happens_after(&l.end_token);
  if (!l.error.empty()) throw Fault(l.error);
}

Index3 thread_index() { return here().running->index; }
Index3 block_index() { return here().block_index; }
Index3 block_dim() { return here().block; }
Index3 grid_dim() { return here().grid; }
unsigned lane_id() { return here().running->linear % kWarpSize; }

unsigned char* shared_memory() { return here().shared_base(); }

uint32_t shared_address(const void* pointer) {
  Launch& l = here();
  const int64_t offset = static_cast<const unsigned char*>(pointer) - l.shared_base();
  if (offset < 0 || offset > static_cast<int64_t>(l.shared_bytes)) {
    fault("a pointer that is not into shared memory was used as one");
  }
  return static_cast<uint32_t>(offset);
}

unsigned char* shared_bytes(uint32_t address, size_t bytes, const char* what) {
  Launch& l = here();
  if (address + bytes > l.shared_bytes) {
    std::ostringstream message;
    message << what << " of " << bytes << " bytes at shared address " << address
            << ", outside the block's " << l.shared_bytes << " bytes";
    fault(message.str());
  }
  if (address % bytes != 0) {
    std::ostringstream message;
    message << what << " at shared address " << address << ", not aligned to " << bytes << " bytes";
    fault(message.str());
  }
  return l.shared_base() + address;
}

void fault(const std::string& message) {
  Launch& l = here();
  l.error = l.where(*l.running) + ": " + message;
  throw Abandoned{};
}

void index_fault(const char* what, int64_t index, int64_t size) {
  std::ostringstream message;
  message << what << ": index " << index << " is outside [0, " << size << ')';
  fault(message.str());
}

void sync_threads(Site site) {
  Launch& l = here();
  Barrier& b = l.block_barrier;
  Token* token = &b.tokens[b.phase & 1];
  release(token);
  if (!b.waiting.empty()) {
    const Thread* other = b.waiting[0];
    if (other->site.line != site.line || std::strcmp(other->site.file, site.file) != 0) {
      l.running->state = State::kWaiting;
      l.running->site = site;
      fault("divergent barrier: thread " + show(other->index) + " of the block waits at " +
            show(other->site) + ", this one came to " + show(site));
    }
  }
  if (b.waiting.size() + 1 == l.n_threads) {
    ++b.phase;
    l.wake(b.waiting);
  } else {
    b.waiting.push(l.running);
    l.wait(site);
  }
  acquire(token);
}

void named_barrier(Site site, unsigned id, unsigned threads, bool waits) {
  Launch& l = here();
  if (id >= kNamedBarriers) index_fault("named barrier", id, kNamedBarriers);
  if (threads == 0 || threads % kWarpSize != 0 || threads > l.n_threads) {
    fault("named barrier of " + std::to_string(threads) + " threads: must be whole warps");
  }
  Barrier& b = l.named[id];
  if (b.waiting.size() + b.arrived > 0 && b.expected != threads) {
    fault("named barrier " + std::to_string(id) + ": " + std::to_string(threads) +
          " threads expected here, " + std::to_string(b.expected) + " by those that came before");
  }
  b.expected = threads;
  Token* token = &b.tokens[b.phase & 1];
  release(token);
  if (b.waiting.size() + b.arrived + 1 == threads) {
    ++b.phase;
    b.arrived = 0;
    l.wake(b.waiting);
  } else if (waits) {
    b.waiting.push(l.running);
    l.wait(site);
  } else {
    ++b.arrived;
  }
  if (waits) acquire(token);
}

void warp_collective(Site site, uint32_t mask, const uint32_t* in, int n_in, uint32_t* out,
                     int n_out, WarpFunction complete) {
  Launch& l = here();
  Warp& w = l.warps[l.running->linear / kWarpSize];
  const unsigned lane = l.running->linear % kWarpSize;
  if (mask != 0xffffffffu) fault(show(site) + ": only whole warps are emulated");
  if (!w.waiting.empty() && std::strcmp(w.site.what, site.what) != 0) {
    fault("divergent warp: lanes wait at " + show(w.site) + ", this one came to " + show(site));
  }
  w.site = site;
  const unsigned parity = w.phase & 1;
  copy_words(w.in[parity][lane], in, n_in);
  if (w.waiting.size() + 1 == kWarpSize) {
    if (complete != nullptr) complete(w.in[parity], w.out[parity]);
    ++w.phase;
    l.wake(w.waiting);
  } else {
    w.waiting.push(l.running);
    l.wait(site);
  }
  copy_words(out, w.out[parity][lane], n_out);
}

void shuffle_words(const WarpWords& in, WarpWords& out) {
  for (int lane = 0; lane < 32; ++lane) out[lane][0] = in[in[lane][1] & 31][0];
}

void ballot_words(const WarpWords& in, WarpWords& out) {
  uint32_t bits = 0;
  for (int lane = 0; lane < 32; ++lane) bits |= (in[lane][0] != 0 ? 1u : 0u) << lane;
  for (int lane = 0; lane < 32; ++lane) out[lane][0] = bits;
}

void sync_warp(Site site, uint32_t mask) {
  Launch& l = here();
  Warp& w = l.warps[l.running->linear / kWarpSize];
  Token* token = &w.tokens[w.phase & 1];
  release(token);
  warp_collective(site, mask, nullptr, 0, nullptr, 0, nullptr);
  acquire(token);
}

void copy_async(uint32_t address, const void* source, uint32_t bytes, uint32_t valid) {
  Launch& l = here();
  unsigned char* target = shared_bytes(address, bytes, "cp.async");
  if (reinterpret_cast<uintptr_t>(source) % bytes != 0) {
    fault("cp.async from a global address that is not aligned to " + std::to_string(bytes));
  }
  if (valid > 0) check_global(source, valid, "cp.async");
  const AsyncCopy copy{target, static_cast<const unsigned char*>(source), bytes, valid,
                       l.running->open_group};
  if (l.shuffled && (l.random() & 1)) {
    l.land(copy);
  } else {
    if (l.running->copies.full()) fault("too many asynchronous copies in flight");
    l.running->copies.push(copy);
  }
  maybe_yield();
}

void copy_async_commit() { ++here().running->open_group; }

void copy_async_wait(int newest_groups_left) {
  Launch& l = here();
  Queue<AsyncCopy>& copies = l.running->copies;
  const uint64_t open = l.running->open_group;
  const uint64_t left = static_cast<uint64_t>(newest_groups_left);
  // Copies not yet committed belong to no group that this waits for.
  while (!copies.empty() && copies[0].group + left < open) l.land(copies.pop());
}

unsigned thread_number() { return here().running->linear; }
unsigned block_threads() { return here().n_threads; }
size_t shared_size() { return here().shared_bytes; }

void grid_wait() {
  here().waited_for_grid = true;
  here().running->past_grid_wait = true;
}

// Code for older devices has no such instruction.
void grid_launch_dependents() {
  if (the_device.capability >= 90 && the_device.has_sm90) here().triggered = true;
}

std::vector<LaunchRecord> take_launches() { return std::exchange(records, {}); }

uint64_t random_below(uint64_t n) {
  Launch& l = *current;  // the engines ask as well, between two threads
  return l.shuffled ? l.random() % n : 0;
}
bool chance() { return random_below(2) == 1; }

void wait_on(WaitList& list, Site site) {
  Launch& l = here();
  list.threads.push_back(l.running->linear);
  l.wait(site);
}

void wake(WaitList& list) {
  Launch& l = *current;
  for (unsigned linear : list.threads) {
    Thread& t = (*l.threads)[linear];
    t.state = State::kReady;
    l.ready.push(&t);
  }
  list.threads.clear();
}

void fail(unsigned thread, const std::string& message) {
  Launch& l = *current;
  l.error = l.where((*l.threads)[thread]) + ": " + message;
  l.ready.clear();
}

std::string show(Site s) {
  std::ostringstream out;
  const char* slash = std::strrchr(s.file, '/');
  out << s.what << " (" << (slash ? slash + 1 : s.file) << ':' << s.line << ')';
  return out.str();
}

void release(char* token) {
  happens_before(token);
  if (here().running->past_grid_wait) *token = 1;
}

void acquire(char* token) {
  happens_after(token);
  if (*token != 0) here().running->past_grid_wait = true;
}

#if defined(LMINF_THREAD_SANITIZER)
Unwatched::Unwatched() { AnnotateIgnoreReadsBegin(__FILE__, __LINE__); }
Unwatched::~Unwatched() { AnnotateIgnoreReadsEnd(__FILE__, __LINE__); }

namespace {

template <typename Act>
void as_fiber(void* fiber, Act act) {
  void* self = __tsan_get_current_fiber();
  __tsan_switch_to_fiber(fiber, __tsan_switch_to_fiber_no_sync);
  act();
  __tsan_switch_to_fiber(self, __tsan_switch_to_fiber_no_sync);
}

}  // namespace

void Agent::make() { fiber_ = __tsan_create_fiber(0); }
void Agent::release(void* token) {
  as_fiber(fiber_, [&] { __tsan_release(token); });
}
void Agent::read(const void* address, size_t bytes) {
  as_fiber(fiber_, [&] { announce_read(address, bytes); });
}
void Agent::write(void* address, size_t bytes) {
  as_fiber(fiber_, [&] { announce_write(address, bytes); });
}
void Agent::finish() {
  if (fiber_ != nullptr) __tsan_destroy_fiber(fiber_);
  fiber_ = nullptr;
}
#else
Unwatched::Unwatched() = default;
Unwatched::~Unwatched() = default;
void Agent::make() { (void)fiber_; }
void Agent::release(void*) {}
void Agent::read(const void*, size_t) {}
void Agent::write(void*, size_t) {}
void Agent::finish() {}
#endif

void announce_shared_read(const void* address, size_t bytes) { announce_read(address, bytes); }
void announce_shared_write(void* address, size_t bytes) { announce_write(address, bytes); }

void maybe_yield() {
  Launch& l = here();
  if (!l.shuffled || l.random() % 16 != 0) return;
  l.ready.push(l.running);
  l.switch_away(false);
}

void register_global(const void* begin, size_t bytes, const char* name) {
  const uintptr_t at = reinterpret_cast<uintptr_t>(begin);
  globals.push_back({at, at + bytes, name});
}

void clear_globals() { globals.clear(); }

namespace {

// Holds an access against the kernels that may still run, and remembers it for those to come.
void check_overlap(Launch& l, Span access, const char* what, bool writes) {
  if (!l.running->past_grid_wait) {
    if (writes) {
      fault(std::string(what) + " before grid_wait: a kernel that may still run may read there");
    }
    const auto after =
        std::upper_bound(in_flight.begin(), in_flight.end(), access.begin,
                         [](uintptr_t begin, const Span& written) { return begin < written.end; });
    if (after != in_flight.end() && after->begin < access.end) {
      fault(std::string(what) + " of what a kernel before this one writes, with no grid_wait " +
            "before it");
    }
  }
  if (!writes) return;
  if (!l.written.empty() && l.written.back().end == access.begin) {
    l.written.back().end = access.end;
  } else {
    l.written.push_back(access);
  }
}

}  // namespace

void check_global(const void* address, size_t bytes, const char* what, bool writes) {
  const Unwatched unwatched;
  Launch& l = here();
  const uintptr_t at = reinterpret_cast<uintptr_t>(address);
  check_overlap(l, {at, at + bytes}, what, writes);
  if (globals.empty()) return;
  for (const Global& g : globals) {
    if (at >= g.begin && at + bytes <= g.end) return;
  }
  std::ostringstream message;
  message << what << " of " << bytes << " bytes at " << address << ", outside every tensor:";
  for (const Global& g : globals) {
    message << "\n  " << g.name << " [" << reinterpret_cast<void*>(g.begin) << ", "
            << reinterpret_cast<void*>(g.end) << ')';
  }
  fault(message.str());
}

}  // namespace lminf::emulation
