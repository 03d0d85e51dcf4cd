// The launch that runs on this thread: its block's threads as fibers, who can run and who waits.
#pragma once

#include <cstdlib>
#include <deque>
#include <functional>
#include <memory>
#include <random>
#include <sstream>
#include <string>
#include <vector>

#include "fiber.h"
#include "ptx_sm90.h"
#include "runtime.h"

namespace lminf::emulation {

constexpr unsigned kWarpSize = 32;
constexpr unsigned kNamedBarriers = 16;
constexpr unsigned char kPoison = 0xFF;

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

struct Span {
  uintptr_t begin, end;
};

struct Free {
  void operator()(unsigned char* p) const { std::free(p); }
};
using Bytes = std::unique_ptr<unsigned char, Free>;

std::string show(Index3 i);

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
};

inline thread_local Launch* current = nullptr;

// The launch, for its running thread.
Launch& here();

// To ThreadSanitizer, whose only synchronisation these are (tsan.cpp).
void happens_before(void* token);
void happens_after(void* token);

// What kernels that may still run have written, as the next launch finds it (global_memory.cpp).
void forget_writes();
void keep_writes(const std::vector<Span>& written);

}  // namespace lminf::emulation
