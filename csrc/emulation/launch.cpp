// Built without -fsanitize=thread even in a ThreadSanitizer build: its own bookkeeping is shared by
// all fibers on one thread. What a wrapper reads or writes for a kernel is announced by hand.
#include "launch.h"

#include <algorithm>
#include <cstring>
#include <sstream>
#include <utility>

#include "ptx_sm90.h"

namespace lminf::emulation {
namespace {

thread_local std::deque<Thread> pool;
uint64_t schedule_seed = 0;
Device the_device;
std::vector<LaunchRecord> records;

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

std::string show(Index3 i) {
  std::ostringstream out;
  out << '(' << i.x << ',' << i.y << ',' << i.z << ')';
  return out.str();
}

Launch& here() {
  if (current == nullptr || current->running == nullptr) {
    throw Fault("a device function was called outside a kernel launch");
  }
  return *current;
}

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
  if (!overlaps) forget_writes();
  records.push_back({kernel, overlaps, n_blocks, 0});
  current = &l;
  for (uint64_t i : order) {
    run_block(l, {static_cast<unsigned>(i % grid.x), static_cast<unsigned>(i / grid.x % grid.y),
                  static_cast<unsigned>(i / (uint64_t{grid.x} * grid.y))});
    if (!l.error.empty()) break;
    records.back().triggered += l.triggered;
  }
  current = nullptr;
  keep_writes(l.written);
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

void maybe_yield() {
  Launch& l = here();
  if (!l.shuffled || l.random() % 16 != 0) return;
  l.ready.push(l.running);
  l.switch_away(false);
}

}  // namespace lminf::emulation
