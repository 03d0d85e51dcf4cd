// Built without -fsanitize=thread, like launch.cpp.
#include "engines.h"

#include <cstring>
#include <sstream>

namespace lminf::emulation {

Engines& engines_in_use() {
  Engines& e = state;
  if (!e.used) {
    e.used = true;
    const size_t chunks = (shared_size() + kChunk - 1) / kChunk;
    e.async_view.assign(shared_size(), kPoison);
    e.loading.assign(chunks, 0);
    e.multiplying.assign(chunks, 0);
    e.storing.assign(chunks, 0);
    e.threads.assign(block_threads(), {});
    e.warpgroups.resize((block_threads() + kWarpgroup - 1) / kWarpgroup);
    e.elected = static_cast<unsigned>(random_below(32));
  }
  return e;
}

void check_shared(Site site, uint32_t address, uint64_t bytes, uint32_t alignment) {
  if (address + bytes > shared_size()) {
    fault(show(site) + " of " + std::to_string(bytes) + " bytes at shared address " +
          std::to_string(address) + ", outside the block's " + std::to_string(shared_size()) +
          " bytes");
  }
  if (address % alignment != 0) {
    fault(show(site) + " at shared address " + std::to_string(address) + ", not aligned to " +
          std::to_string(alignment) + " bytes");
  }
}

void check_idle(Site site, const std::vector<uint16_t>& busy, uint32_t chunk_address,
                const char* what) {
  if (busy[chunk_address / kChunk] == 0) return;
  fault(show(site) + " touches shared address " + std::to_string(chunk_address) + ", " + what);
}
void check_not_loading(Site site, uint32_t address) {
  check_idle(site, state.loading, address,
             "which a load still in flight will write: no wait on its mbarrier came before");
}

void check_published(Site site, uint32_t address) {
  if (std::memcmp(shared_memory() + address, state.async_view.data() + address, kChunk) == 0) {
    return;
  }
  fault(show(site) + " reads shared address " + std::to_string(address) +
        ", written by ordinary stores with no fence_proxy_async after them");
}

namespace engines {

void start_block() {
  const Unwatched unwatched;
  Engines& e = state;
  for (Load& load : e.loads) load.agent.finish();
  for (Warpgroup& w : e.warpgroups) {
    for (Multiply& m : w.multiplies) {
      for (Agent& agent : m.agents) agent.finish();
    }
  }
  for (PerThread& thread : e.threads) {
    for (Store& store : thread.stores) store.agent.finish();
  }
  e.barriers.clear();
  e.loads.clear();
  e.warpgroups.clear();
  e.threads.clear();
  e.used = false;
}

bool step() {
  Engines& e = state;
  if (!e.used) return false;
  const Unwatched unwatched;
  std::vector<Warpgroup*> ready;  // whose oldest wgmma under way can end
  for (Warpgroup& w : e.warpgroups) {
    const Multiply* m = oldest(w);
    if (m != nullptr && m->issued == kWarpgroup) ready.push_back(&w);
  }
  const size_t works = e.loads.size() + ready.size();
  if (works == 0) return false;
  const size_t chosen = random_below(works);
  if (chosen < e.loads.size()) {
    Load load = e.loads[chosen];
    e.loads.erase(e.loads.begin() + static_cast<int64_t>(chosen));
    for (uint32_t at = load.target; at < load.target + load.bytes; at += kChunk) {
      --e.loading[at / kChunk];
    }
    land(load);
    // Bytes may come before the arrival that tells to expect them; not after the last arrival.
    Mbarrier& b = *load.barrier;
    const char* problem = b.pending == 0 ? settle(b) : nullptr;
    if (problem != nullptr) fail(load.thread, show(load.site) + ": " + complaint(b, problem));
  } else {
    Warpgroup& w = *ready[chosen - e.loads.size()];
    compute(*oldest(w));
    wake(w.waiting);
  }
  return true;
}

void end_block() {
  Engines& e = state;
  if (!e.used) return;
  const Unwatched unwatched;
  for (const Load& load : e.loads) {
    return fail(load.thread, show(load.site) + ": no wait on its mbarrier covers it");
  }
  for (unsigned t = 0; t < e.threads.size(); ++t) {
    for (Store& store : e.threads[t].stores) {
      if (!store.read || store.group == e.threads[t].open_group) {
        return fail(t,
                    show(store.site) + ": the thread ended before the store had read its source");
      }
      write_target(store);
      acquire(&store.token);
    }
  }
  for (unsigned g = 0; g < e.warpgroups.size(); ++g) {
    const Warpgroup& w = e.warpgroups[g];
    for (const Accumulators& d : w.accumulators) {
      for (unsigned i = 0; i < kWarpgroup; ++i) {
        if (!d.landed[i]) {
          return fail(g * kWarpgroup + i, "ended with a wgmma that no wait covers");
        }
      }
    }
  }
  for (const Mbarrier& b : e.barriers) {
    if (b.transactions != 0) {
      return fail(b.maker, complaint(b, "ended with a phase that expects bytes"));
    }
  }
}

std::string report() {
  std::ostringstream out;
  for (const Mbarrier& b : state.barriers) {
    out << "\n  mbarrier at shared address " << b.address << ": phase " << b.phase << ", "
        << b.pending << " of " << b.count << " arrivals and " << b.transactions
        << " bytes missing, " << b.waiting.threads.size() << " threads wait";
  }
  return out.str();
}

}  // namespace engines

}  // namespace lminf::emulation
