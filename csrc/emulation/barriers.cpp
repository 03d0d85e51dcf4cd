// Where threads meet: barriers of a block, collectives of a warp.
// Built without -fsanitize=thread, like launch.cpp.
#include <cstring>

#include "launch.h"

namespace lminf::emulation {
namespace {

// Copies without calling memcpy, which ThreadSanitizer would take for the kernel's own access.
void copy_words(uint32_t* to, const uint32_t* from, int n) {
  volatile uint32_t* target = to;
  for (int i = 0; i < n; ++i) target[i] = from[i];
}

}  // namespace

void release(char* token) {
  happens_before(token);
  if (here().running->past_grid_wait) *token = 1;
}

void acquire(char* token) {
  happens_after(token);
  if (*token != 0) here().running->past_grid_wait = true;
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

}  // namespace lminf::emulation
