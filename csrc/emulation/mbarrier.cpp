// mbarriers: arrivals and bytes of a phase.
// Built without -fsanitize=thread, like launch.cpp.
#include <cstring>

#include "engines.h"

namespace lminf::emulation {
namespace {

constexpr uint64_t kMagic = 0x6D62617272696572;      // what stands in place of an mbarrier
constexpr int64_t kMaxTransactions = (1 << 20) - 1;  // bytes, by the ISA; arrivals as well

}  // namespace

Mbarrier& barrier_at(Site site, uint32_t address) {
  check_shared(site, address, 8, 8);
  for (Mbarrier& b : engines_in_use().barriers) {
    if (b.address != address) continue;
    uint64_t there;
    std::memcpy(&there, shared_memory() + address, 8);
    if (there != kMagic) {
      fault(show(site) + ": the mbarrier at shared address " + std::to_string(address) +
            " was written over");
    }
    return b;
  }
  fault(show(site) + ": no mbarrier was initialised at shared address " + std::to_string(address));
}

const char* settle(Mbarrier& b) {
  if (b.pending > 0 || b.transactions > 0) return nullptr;
  if (b.transactions < 0) return "copies brought more bytes than it was told to expect";
  for (const Load& load : state.loads) {
    if (load.barrier == &b) {
      return "its phase completes while a copy of that phase is in flight: more bytes were copied "
             "than it was told to expect";
    }
  }
  ++b.phase;
  b.pending = b.count;
  wake(b.waiting);
  return nullptr;
}

std::string complaint(const Mbarrier& b, const char* what) {
  return "the mbarrier at shared address " + std::to_string(b.address) + ": " + what;
}

void mbarrier_init(Site site, uint32_t barrier, int arrivals) {
  const Unwatched unwatched;
  Engines& e = engines_in_use();
  check_shared(site, barrier, 8, 8);
  if (arrivals < 1 || arrivals > kMaxTransactions) {
    fault(show(site) + ": " + std::to_string(arrivals) + " arrivals, outside [1, 2^20 - 1]");
  }
  for (const Mbarrier& b : e.barriers) {
    if (b.address == barrier) fault(show(site) + ": there is an mbarrier already");
  }
  Mbarrier& b = e.barriers.emplace_back();
  b.address = barrier;
  b.maker = thread_number();
  b.count = b.pending = arrivals;
  b.waiting.threads.reserve(block_threads());
  std::memcpy(shared_memory() + barrier, &kMagic, 8);
  std::memcpy(e.async_view.data() + barrier, &kMagic, 8);
}

void fence_barrier_init() {
  const Unwatched unwatched;
  for (Mbarrier& b : engines_in_use().barriers) b.fenced |= b.maker == thread_number();
}

void mbarrier_arrive(Site site, uint32_t barrier, int expected_bytes) {
  maybe_yield();
  const Unwatched unwatched;
  Mbarrier& b = barrier_at(site, barrier);
  if (b.pending == 0) {
    fault(show(site) + ": " +
          complaint(b, "more arrivals in one phase than it was initialised with"));
  }
  release(&b.tokens[b.phase & 1]);
  b.transactions += expected_bytes;
  if (expected_bytes < 0 || b.transactions > kMaxTransactions) {
    fault(show(site) + ": " + complaint(b, "its transaction count is out of range"));
  }
  --b.pending;
  if (const char* problem = settle(b)) fault(show(site) + ": " + complaint(b, problem));
}

void mbarrier_wait(Site site, uint32_t barrier, int parity) {
  maybe_yield();
  const Unwatched unwatched;
  Mbarrier& b = barrier_at(site, barrier);
  if (parity != 0 && parity != 1) fault(show(site) + ": a parity is 0 or 1");
  while (static_cast<int>(b.phase & 1) == parity) wait_on(b.waiting, site);
  acquire(&b.tokens[parity]);
}

}  // namespace lminf::emulation
