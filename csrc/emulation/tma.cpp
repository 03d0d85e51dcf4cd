// The copy engine: boxes of tensors and bytes in a row, to and from shared memory.
// Built without -fsanitize=thread, like launch.cpp.
#include <algorithm>
#include <cstring>

#include "engines.h"

namespace lminf::emulation {
namespace {

constexpr uint32_t kMagic = 0x6F736E65;  // a TensorMap of encode_tensor_map

// Calls use(address in shared memory, address in global memory or null outside the tensor, bytes).
template <typename Use>
void for_each_piece(const Box& box, Use use) {
  ptx_layout::for_pieces(box.map, box.first.at, box.shared,
                         [&](uint32_t shared, uint64_t global, uint32_t bytes) {
                           use(shared, reinterpret_cast<const unsigned char*>(global), bytes);
                         });
}

// Calls use(begin, bytes) for each run of bytes that stand one after another in global memory.
template <typename Use>
void for_each_run(const Box& box, Use use) {
  const unsigned char* begin = nullptr;
  size_t bytes = 0;
  for_each_piece(box, [&](uint32_t, const unsigned char* piece, uint32_t piece_bytes) {
    if (piece == nullptr) return;
    if (piece != begin + bytes) {
      if (bytes > 0) use(begin, bytes);
      begin = piece;
      bytes = 0;
    }
    bytes += piece_bytes;
  });
  if (bytes > 0) use(begin, bytes);
}

Box make_box(Site site, const TensorMap& map, uint32_t shared, Coordinates first,
             const char* access, bool writes) {
  if (map.magic != kMagic) fault(show(site) + ": this is no tensor map");
  const Box box{map, first, shared};
  check_shared(site, shared, box.bytes(), std::max<uint32_t>(128, 8 * map.span));
  for_each_run(box, [&](const unsigned char* begin, size_t bytes) {
    check_global(begin, bytes, access, writes);
  });
  return box;
}

void write_both(uint32_t address, const unsigned char* from, uint32_t bytes) {
  for (unsigned char* view : {shared_memory(), state.async_view.data()}) {
    if (from != nullptr) {
      std::memcpy(view + address, from, bytes);
    } else {
      std::memset(view + address, 0, bytes);
    }
  }
}

void issue(Load load, uint32_t barrier) {
  Mbarrier& b = barrier_at(load.site, barrier);
  if (!b.fenced) {
    fault(show(load.site) + ": no fence_barrier_init came after the mbarrier's initialisation");
  }
  load.thread = thread_number();
  load.barrier = &b;
  load.phase = b.phase;
  Engines& e = state;
  for (uint32_t at = load.target; at < load.target + load.bytes; at += kChunk) {
    check_idle(load.site, e.loading, at, "which another load still in flight will write");
    check_idle(load.site, e.multiplying, at, "which a wgmma still under way reads");
    check_idle(load.site, e.storing, at, "which a TMA store still under way reads");
  }
  load.agent.make();
  std::memset(shared_memory() + load.target, kPoison, load.bytes);
  std::memset(e.async_view.data() + load.target, kPoison, load.bytes);
  for (uint32_t at = load.target; at < load.target + load.bytes; at += kChunk) {
    ++e.loading[at / kChunk];
  }
  e.loads.push_back(load);
}

void read_source(Store& store) {
  if (store.read) return;
  store.read = true;
  for_each_piece(store.box, [&](uint32_t address, const unsigned char* target, uint32_t bytes) {
    const unsigned char* from = shared_memory() + address;
    if (target != nullptr) store.data.insert(store.data.end(), from, from + bytes);
  });
  for (uint32_t at = 0; at < store.box.bytes(); at += kChunk) {
    --state.storing[(store.box.shared + at) / kChunk];
  }
  store.agent.read(shared_memory() + store.box.shared, store.box.bytes());
  store.agent.release(&store.token);
}

}  // namespace

void land(Load& load) {
  if (load.source != nullptr) {
    load.agent.read(load.source, load.bytes);
    write_both(load.target, load.source, load.bytes);
  } else {
    for_each_run(load.box,
                 [&](const unsigned char* begin, size_t bytes) { load.agent.read(begin, bytes); });
    for_each_piece(load.box, write_both);
  }
  load.agent.write(shared_memory() + load.target, load.bytes);
  load.agent.release(&load.barrier->tokens[load.phase & 1]);
  load.agent.finish();
  load.barrier->transactions -= load.bytes;
}

void write_target(Store& store) {
  size_t next = 0;
  for_each_run(store.box, [&](const unsigned char* begin, size_t bytes) {
    auto* target = const_cast<unsigned char*>(begin);
    store.agent.write(target, bytes);
    std::memcpy(target, &store.data[next], bytes);
    next += bytes;
  });
  store.agent.release(&store.token);
  store.agent.finish();
}

TensorMap encode_tensor_map(const void* base, const uint64_t (&size)[4],
                            const uint64_t (&stride_bytes)[3], const uint32_t (&box)[4],
                            int swizzle_bytes) {
  TensorMap map{};
  map.magic = kMagic;
  map.rank = 4;
  map.element_bytes = 2;
  map.span = static_cast<uint8_t>(swizzle_bytes);
  map.base = reinterpret_cast<uint64_t>(base);
  std::copy(size, size + 4, map.size);
  std::copy(stride_bytes, stride_bytes + 3, map.stride);
  std::copy(box, box + 4, map.box);
  return map;
}

void tma_load(Site site, uint32_t target, const TensorMap& map, uint32_t barrier,
              Coordinates coordinates) {
  maybe_yield();
  const Unwatched unwatched;
  engines_in_use();
  Load load;
  load.site = site;
  load.target = target;
  load.box = make_box(site, map, target, coordinates, "TMA load", false);
  load.bytes = load.box.bytes();
  issue(load, barrier);
}

void bulk_load(Site site, uint32_t target, const void* source, int bytes, uint32_t barrier) {
  maybe_yield();
  const Unwatched unwatched;
  engines_in_use();
  if (bytes < 16 || bytes % 16 != 0 || reinterpret_cast<uintptr_t>(source) % 16 != 0) {
    fault(show(site) + " of " + std::to_string(bytes) +
          " bytes: must be a multiple of 16, from an address aligned to 16");
  }
  check_shared(site, target, static_cast<uint64_t>(bytes), 16);
  check_global(source, static_cast<size_t>(bytes), "bulk copy");
  Load load;
  load.site = site;
  load.target = target;
  load.bytes = static_cast<uint32_t>(bytes);
  load.source = static_cast<const unsigned char*>(source);
  issue(load, barrier);
}

void tma_store(Site site, const TensorMap& map, uint32_t source, Coordinates coordinates) {
  maybe_yield();
  const Unwatched unwatched;
  PerThread& thread = engines_in_use().threads[thread_number()];
  Store& store = thread.stores.emplace_back();
  store.site = site;
  store.box = make_box(site, map, source, coordinates, "TMA store", true);
  store.group = thread.open_group;
  for (uint32_t at = source; at < source + store.box.bytes(); at += kChunk) {
    check_not_loading(site, at);
    check_published(site, at);
    ++state.storing[at / kChunk];
  }
  store.agent.make();
  if (chance()) read_source(store);
}

void tma_store_commit() {
  const Unwatched unwatched;
  ++engines_in_use().threads[thread_number()].open_group;
}

void tma_store_wait(int newest_groups_left, bool read_only) {
  const Unwatched unwatched;
  PerThread& thread = engines_in_use().threads[thread_number()];
  const uint64_t left = static_cast<uint64_t>(newest_groups_left);
  for (Store& store : thread.stores) {
    if (store.group + left >= thread.open_group) break;
    read_source(store);
    acquire(&store.token);
  }
  while (!read_only && !thread.stores.empty() &&
         thread.stores.front().group + left < thread.open_group) {
    write_target(thread.stores.front());
    acquire(&thread.stores.front().token);
    thread.stores.pop_front();
  }
}

void fence_proxy_async() {
  maybe_yield();
  const Unwatched unwatched;
  Engines& e = engines_in_use();
  std::memcpy(e.async_view.data(), shared_memory(), shared_size());
}

}  // namespace lminf::emulation
