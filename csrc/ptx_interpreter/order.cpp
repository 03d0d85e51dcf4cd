#include "order.h"

#include <algorithm>

#include "machine.h"

namespace lminf::interpreter {

void Order::start(int warps, uint32_t shared_bytes) {
  warps_ = warps;
  engines_ = static_cast<uint32_t>(warps) * kLanes;
  const uint32_t engines = static_cast<uint32_t>(warps) + kCopyEngines + 1;
  actors_ = (engines_ + engines + kLanes - 1) / kLanes * kLanes;
  engine_ticks_.assign(engines, 0);
  ++generation_;
  const size_t chunks = shared_bytes / kChunk + 1;
  if (chunks_.size() < chunks) {
    chunks_.resize(chunks);
    cells_.resize(chunks * kCells);
  }
}

uint32_t Order::thread(const Warp& warp, int lane) const {
  return static_cast<uint32_t>(warp.index * kLanes + lane);
}
uint32_t Order::matrix_engine(const Warp& warp) const {
  return engines_ + static_cast<uint32_t>(warp.index);
}
uint32_t Order::copy_engine(int mbarrier) const {
  return engines_ + static_cast<uint32_t>(warps_) + static_cast<uint32_t>(mbarrier) % kCopyEngines;
}

uint32_t Order::launch_before() const {
  return engines_ + static_cast<uint32_t>(warps_) + kCopyEngines;
}

// --- Shared memory ---

template <typename F>
void Order::for_cells(uint32_t offset, uint32_t bytes, bool overwrites, F f) {
  while (bytes > 0) {
    const uint32_t index = offset / kChunk, within = offset % kChunk;
    const uint32_t length = std::min(kChunk - within, bytes);
    Chunk& chunk = chunks_[index];
    Cell* cells = &cells_[static_cast<size_t>(index) * kCells];
    if (chunk.generation != generation_) {
      chunk = {generation_, 1};
      cells[0].writer = kNobody;
      cells[0].reads.clear();
    }
    const uint32_t wanted = length == kChunk ? 1 : (within | length) % 4 == 0 ? 4 : kCells;
    if (chunk.cells < wanted) {
      for (uint32_t k = wanted; k-- > 1;) cells[k] = cells[k * chunk.cells / wanted];
      chunk.cells = wanted;
    }
    const uint32_t width = kChunk / chunk.cells;
    const uint32_t end = (within + length + width - 1) / width;
    for (uint32_t k = within / width; k < end; ++k) f(cells[k], index * kChunk + k * width);
    if (overwrites && length == kChunk) chunk.cells = 1;
    offset += length;
    bytes -= length;
  }
}

std::string Order::name_of(const Site& site, uint32_t actor) const {
  if (actor >= engines_ + static_cast<uint32_t>(warps_)) return "a TMA copy";
  if (actor >= engines_) return "a wgmma of warp " + std::to_string(actor - engines_);
  const Size3 t =
      site.warp.block->thread(static_cast<int>(actor / kLanes), static_cast<int>(actor % kLanes));
  return "thread (" + std::to_string(t.x) + "," + std::to_string(t.y) + "," + std::to_string(t.z) +
         ")";
}

bool Order::knows(const Warp& warp, int lane, uint32_t actor, uint32_t tick) const {
  if (actor == thread(warp, lane)) return tick != kPending;
  const Knowledge* k = warp.order.lanes[lane].get();
  return k != nullptr && k->seen[actor] >= tick;
}

void Order::check_write_seen(const Site& site, Proxy proxy, const Cell& cell, bool writes,
                             uint32_t offset) const {
  if (cell.writer == kNobody) return;
  const char* verb = writes ? "writes" : "reads";
  const auto describe = [&](const char* what) {
    fault(site.warp, site.instruction, site.lane,
          std::string("race: ") + verb + " shared memory at " + std::to_string(offset) +
              ", which " + name_of(site, cell.writer) + " wrote at PTX line " +
              std::to_string(cell.write_line) + ", " + what);
  };
  if (cell.write_tick == kPending) describe("and that write is still under way");
  if (!knows(site.warp, site.lane, cell.writer, cell.write_tick)) {
    describe("and nothing orders the two");
  }
  if (proxy == Proxy::kGeneric || cell.write_proxy == Proxy::kAsync) return;
  const Knowledge* k = site.warp.order.lanes[site.lane].get();
  const uint32_t fenced = cell.writer == thread(site.warp, site.lane)
                              ? site.warp.order.own_fenced[site.lane]
                          : k != nullptr ? k->fenced[cell.writer]
                                         : 0;
  if (fenced < cell.write_tick) describe("with no fence.proxy.async between the two");
}

void Order::check_reads_seen(const Site& site, const Cell& cell, uint32_t offset) const {
  const Knowledge* k = site.warp.order.lanes[site.lane].get();
  const uint32_t self = thread(site.warp, site.lane);
  for (const Reads& reads : cell.reads) {
    const auto describe = [&](uint32_t lane, const char* what) {
      fault(site.warp, site.instruction, site.lane,
            "race: writes shared memory at " + std::to_string(offset) + ", which " +
                name_of(site, reads.group * kLanes + lane) + " read at PTX line " +
                std::to_string(reads.line) + ", " + what);
    };
    if (reads.pending > 0) {
      describe(static_cast<uint32_t>(first_lane(reads.lanes)), "and that read is still under way");
    }
    if (k != nullptr && k->least[reads.group] >= reads.tick) continue;
    for (LaneMask left = reads.lanes; left != 0; left &= left - 1) {
      const auto lane = static_cast<uint32_t>(first_lane(left));
      const uint32_t reader = reads.group * kLanes + lane;
      if (reader == self || (k != nullptr && k->seen[reader] >= reads.tick)) continue;
      describe(lane, "and nothing orders the two");
    }
  }
}

void Order::add_read(const Site& site, Cell& cell, uint32_t group, LaneMask lanes,
                     bool pending) const {
  const uint32_t tick = pending ? kPending : site.warp.order.tick;
  // Whoever is ordered after this read is ordered after those it knows of.
  constexpr size_t kMany = 4;
  if (cell.reads.size() >= kMany) {
    const Knowledge* k = site.warp.order.lanes[site.lane].get();
    const auto known = [&](const Reads& r) {
      return r.pending == 0 && k != nullptr && k->least[r.group] >= r.tick;
    };
    cell.reads.erase(std::remove_if(cell.reads.begin(), cell.reads.end(), known), cell.reads.end());
  }
  for (Reads& r : cell.reads) {
    if (r.group != group || r.tick != tick || (pending && r.lanes != lanes)) continue;
    r.lanes |= lanes;
    r.pending += pending;
    r.line = site.instruction.line;
    return;
  }
  cell.reads.push_back({group, lanes, tick, pending ? 1u : 0u, site.instruction.line});
}

void Order::read(const Site& site, uint32_t offset, uint32_t bytes) {
  read(site, 1u << site.lane, offset, bytes);
}

void Order::read(const Site& site, LaneMask lanes, uint32_t offset, uint32_t bytes) {
  const auto group = static_cast<uint32_t>(site.warp.index);
  for_cells(offset, bytes, false, [&](Cell& cell, uint32_t at) {
    // Who has read this since it was written, and told nobody of anything since then.
    for (const Reads& r : cell.reads) {
      if (r.group == group && r.tick == site.warp.order.tick && (lanes & ~r.lanes) == 0) return;
    }
    // Lanes that know the same are asked once; the writer knows of itself anyway.
    const Knowledge* asked = nullptr;
    bool has_asked = false;
    for (LaneMask left = lanes; left != 0; left &= left - 1) {
      const int lane = first_lane(left);
      const Knowledge* k = site.warp.order.lanes[lane].get();
      if ((has_asked && k == asked) || cell.writer == thread(site.warp, lane)) continue;
      check_write_seen({site.warp, site.instruction, lane}, Proxy::kGeneric, cell, false, at);
      asked = k;
      has_asked = true;
    }
    if (cell.write_tick == kPending) {
      check_write_seen(site, Proxy::kGeneric, cell, false, at);  // one's own, too
    }
    add_read(site, cell, group, lanes, false);
  });
}

void Order::write(const Site& site, uint32_t offset, uint32_t bytes) {
  const uint32_t self = thread(site.warp, site.lane);
  for_cells(offset, bytes, true, [&](Cell& cell, uint32_t at) {
    check_write_seen(site, Proxy::kGeneric, cell, true, at);
    check_reads_seen(site, cell, at);
    cell.reads.clear();
    cell.writer = self;
    cell.write_tick = site.warp.order.tick;
    cell.write_line = site.instruction.line;
    cell.write_proxy = Proxy::kGeneric;
  });
}

void Order::begin_write(const Site& site, uint32_t actor, Proxy proxy, uint32_t offset,
                        uint32_t bytes) {
  for_cells(offset, bytes, true, [&](Cell& cell, uint32_t at) {
    check_write_seen(site, proxy, cell, true, at);
    check_reads_seen(site, cell, at);
    cell.reads.clear();
    cell.writer = actor;
    cell.write_tick = kPending;
    cell.write_line = site.instruction.line;
    cell.write_proxy = proxy;
  });
}

void Order::end_write(uint32_t actor, uint32_t tick, uint32_t offset, uint32_t bytes) {
  for_cells(offset, bytes, false, [&](Cell& cell, uint32_t) {
    if (cell.writer == actor && cell.write_tick == kPending) cell.write_tick = tick;
  });
}

void Order::begin_read(const Site& site, uint32_t actor, uint32_t offset, uint32_t bytes) {
  for_cells(offset, bytes, false, [&](Cell& cell, uint32_t at) {
    check_write_seen(site, Proxy::kAsync, cell, false, at);
    add_read(site, cell, actor / kLanes, 1u << actor % kLanes, true);
  });
}

void Order::end_read(uint32_t actor, uint32_t tick, uint32_t offset, uint32_t bytes) {
  const uint32_t group = actor / kLanes;
  const LaneMask bit = 1u << actor % kLanes;
  for_cells(offset, bytes, false, [&](Cell& cell, uint32_t) {
    for (size_t i = 0; i < cell.reads.size(); ++i) {
      Reads& r = cell.reads[i];
      if (r.group != group || r.lanes != bit || r.pending == 0 || --r.pending > 0) continue;
      r.tick = tick;
      break;
    }
  });
}

// --- Handing on ---

Gathered Order::nothing() const {
  auto k = std::make_shared<Knowledge>();
  k->seen.assign(actors_, 0);
  k->fenced.assign(actors_, 0);
  return k;
}

void Order::join(Knowledge& into, const Knowledge& from) {
  for (size_t i = 0; i < into.seen.size(); ++i) {
    into.seen[i] = std::max(into.seen[i], from.seen[i]);
    into.fenced[i] = std::max(into.fenced[i], from.fenced[i]);
  }
}

void Order::release(Warp& warp, LaneMask lanes, Gathered& into) {
  if (into == nullptr) into = nothing();
  const Knowledge* before = nullptr;
  for_lanes(lanes, [&](int lane) {
    const Knowledge* k = warp.order.lanes[lane].get();
    if (k != nullptr && k != before) join(*into, *k);
    before = k;
  });
  for_lanes(lanes, [&](int lane) {
    const uint32_t self = thread(warp, lane);
    into->seen[self] = std::max(into->seen[self], warp.order.tick);
    into->fenced[self] = std::max(into->fenced[self], warp.order.own_fenced[lane]);
  });
  ++warp.order.tick;
}

void Order::release(uint32_t engine, uint32_t tick, Gathered& into) {
  if (into == nullptr) into = nothing();
  into->seen[engine] = std::max(into->seen[engine], tick);
}

KnowledgePtr Order::finished(Gathered&& gathered) const {
  if (gathered == nullptr) return nullptr;
  Knowledge& k = *gathered;
  k.least.assign(actors_ / kLanes, 0);
  for (size_t group = 0; group < k.least.size(); ++group) {
    const auto first = k.seen.begin() + static_cast<std::ptrdiff_t>(group * kLanes);
    k.least[group] = *std::min_element(first, first + kLanes);
  }
  return std::move(gathered);
}

void Order::acquire(Warp& warp, LaneMask lanes, const KnowledgePtr& from) {
  if (from == nullptr) return;
  const Knowledge* before = nullptr;
  KnowledgePtr made;
  for_lanes(lanes, [&](int lane) {
    KnowledgePtr& k = warp.order.lanes[lane];
    if (k == nullptr) {
      k = from;
      return;
    }
    if (k == from) return;
    if (k.get() != before || made == nullptr) {
      before = k.get();
      auto joined = std::make_shared<Knowledge>(*k);
      join(*joined, *from);
      made = finished(std::move(joined));
    }
    k = made;
  });
}

void Order::sync_lanes(Warp& warp, LaneMask lanes) {
  Gathered gathered;
  release(warp, lanes, gathered);
  const KnowledgePtr all = finished(std::move(gathered));
  for_lanes(lanes, [&](int lane) { warp.order.lanes[lane] = all; });
}

void Order::fence_async(Warp& warp, LaneMask lanes) {
  const Knowledge* before = nullptr;
  KnowledgePtr made;
  for_lanes(lanes, [&](int lane) {
    warp.order.own_fenced[lane] = warp.order.tick;
    KnowledgePtr& k = warp.order.lanes[lane];
    if (k == nullptr) return;
    if (k.get() != before || made == nullptr) {
      before = k.get();
      auto fenced = std::make_shared<Knowledge>(*k);
      for (size_t i = 0; i < fenced->seen.size(); ++i) {
        fenced->fenced[i] = std::max(fenced->fenced[i], fenced->seen[i]);
      }
      made = std::move(fenced);
    }
    k = made;
  });
  ++warp.order.tick;
}

}  // namespace lminf::interpreter
