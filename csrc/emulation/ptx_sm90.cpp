// Built without -fsanitize=thread, like runtime.cpp. One launch runs at a time on a thread, one
// block after another, so the state of the running block's engines stands here.
#include "ptx_sm90.h"

#include <cuda_fp16.h>

#include <algorithm>
#include <cstring>
#include <deque>
#include <sstream>
#include <vector>

namespace lminf::emulation {
namespace {

constexpr unsigned kWarpgroup = 128;
constexpr uint64_t kMapMagic = 0x70616D726F736E65;      // a TensorMap of encode_tensor_map
constexpr uint64_t kBarrierMagic = 0x6D62617272696572;  // what stands in place of an mbarrier
constexpr int64_t kMaxTransactions = (1 << 20) - 1;     // bytes, by the ISA; arrivals as well
constexpr uint32_t kChunk = 16;                         // bytes; what is tracked as one
constexpr unsigned char kPoison = 0xFF;
constexpr uint32_t kPoisonWord = 0xFFFFFFFF;

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

  uint32_t bytes() const { return 2 * map.box[0] * map.box[1] * map.box[2] * map.box[3]; }
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

thread_local Engines state;

// --- Shared memory ---

// Sized when the block first uses an engine: most kernels never do.
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

// The address of the byte that the swizzle puts in place of the one at `address`.
uint32_t swizzled(uint32_t address, uint32_t span) {
  return address ^ ((address >> 7 & (span / 16 - 1)) << 4);
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

// --- mbarriers ---

Mbarrier& barrier_at(Site site, uint32_t address) {
  check_shared(site, address, 8, 8);
  for (Mbarrier& b : engines_in_use().barriers) {
    if (b.address != address) continue;
    uint64_t there;
    std::memcpy(&there, shared_memory() + address, 8);
    if (there != kBarrierMagic) {
      fault(show(site) + ": the mbarrier at shared address " + std::to_string(address) +
            " was written over");
    }
    return b;
  }
  fault(show(site) + ": no mbarrier was initialised at shared address " + std::to_string(address));
}

// What is wrong with the barrier's counts, or null. Completes the phase where that is due.
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

// --- Boxes of tensors ---

// Calls use(address in shared memory, address in global memory or null outside the tensor) for each
// element, row by row.
template <typename Use>
void for_each_element(const Box& box, Use use) {
  const TensorMap& map = box.map;
  uint32_t address = box.shared;
  for (uint32_t b = 0; b < map.box[3]; ++b) {
    for (uint32_t h = 0; h < map.box[2]; ++h) {
      for (uint32_t r = 0; r < map.box[1]; ++r) {
        const int64_t at[4] = {box.first.at[0], int64_t{box.first.at[1]} + r,
                               int64_t{box.first.at[2]} + h, int64_t{box.first.at[3]} + b};
        bool inside = true;
        int64_t offset = 0;
        for (int i = 1; i < 4; ++i) {
          inside &= at[i] >= 0 && at[i] < static_cast<int64_t>(map.size[i]);
          offset += at[i] * static_cast<int64_t>(map.stride_bytes[i - 1]);
        }
        for (uint32_t c = 0; c < map.box[0]; ++c, address += 2) {
          const int64_t column = at[0] + c;
          const bool there = inside && column >= 0 && column < static_cast<int64_t>(map.size[0]);
          use(swizzled(address, map.swizzle_bytes),
              there ? map.base + offset + 2 * column : nullptr);
        }
      }
    }
  }
}

// Calls use(begin, bytes) for each run of elements that stand one after another in global memory.
template <typename Use>
void for_each_run(const Box& box, Use use) {
  const unsigned char* begin = nullptr;
  size_t bytes = 0;
  for_each_element(box, [&](uint32_t, const unsigned char* element) {
    if (element == nullptr) return;
    if (element != begin + bytes) {
      if (bytes > 0) use(begin, bytes);
      begin = element;
      bytes = 0;
    }
    bytes += 2;
  });
  if (bytes > 0) use(begin, bytes);
}

Box make_box(Site site, const TensorMap& map, uint32_t shared, Coordinates first,
             const char* access, bool writes) {
  if (map.magic != kMapMagic) fault(show(site) + ": this is no tensor map");
  const Box box{map, first, shared};
  check_shared(site, shared, box.bytes(), std::max<uint32_t>(128, 8 * map.swizzle_bytes));
  for_each_run(box, [&](const unsigned char* begin, size_t bytes) {
    check_global(begin, bytes, access, writes);
  });
  return box;
}

// --- Loads ---

void write_both(uint32_t address, const unsigned char* from, uint32_t bytes) {
  for (unsigned char* view : {shared_memory(), state.async_view.data()}) {
    if (from != nullptr) {
      std::memcpy(view + address, from, bytes);
    } else {
      std::memset(view + address, 0, bytes);
    }
  }
}

void land(Load& load) {
  if (load.source != nullptr) {
    load.agent.read(load.source, load.bytes);
    write_both(load.target, load.source, load.bytes);
  } else {
    for_each_run(load.box,
                 [&](const unsigned char* begin, size_t bytes) { load.agent.read(begin, bytes); });
    for_each_element(load.box, [&](uint32_t address, const unsigned char* element) {
      write_both(address, element, 2);
    });
  }
  load.agent.write(shared_memory() + load.target, load.bytes);
  load.agent.release(&load.barrier->tokens[load.phase & 1]);
  load.agent.finish();
  load.barrier->transactions -= load.bytes;
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

// --- Stores ---

void read_source(Store& store) {
  if (store.read) return;
  store.read = true;
  for_each_element(store.box, [&](uint32_t address, const unsigned char* element) {
    if (element == nullptr) return;
    for (int byte = 0; byte < 2; ++byte) store.data.push_back(shared_memory()[address + byte]);
  });
  for (uint32_t at = 0; at < store.box.bytes(); at += kChunk) {
    --state.storing[(store.box.shared + at) / kChunk];
  }
  store.agent.read(shared_memory() + store.box.shared, store.box.bytes());
  store.agent.release(&store.token);
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

// --- wgmma ---

float as_float(uint32_t bits) {
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}

const float* fp16_values() {
  static const std::vector<float> values = [] {
    std::vector<float> v(1 << 16);
    for (uint32_t bits = 0; bits < v.size(); ++bits) {
      const __half_raw raw{static_cast<unsigned short>(bits)};
      v[bits] = __half2float(__half(raw));
    }
    return v;
  }();
  return values.data();
}

// The shared addresses of an operand's chunks: K-major, two of each of `rows` rows; MN-major, of
// each of the 16 k one per eight rows.
std::vector<uint32_t> chunks_of(Site site, uint64_t descriptor, int rows, bool mn_major) {
  const auto field = [&](int bit) {
    return static_cast<uint32_t>(descriptor >> bit & 0x3FFF) << 4;
  };
  const uint32_t start = field(0), leading = field(16), stride = field(32);
  constexpr uint32_t kSpans[4] = {16, 128, 64, 32};
  const uint32_t span = kSpans[descriptor >> 62];
  if ((descriptor >> 49 & 7) != 0) fault(show(site) + ": only a base offset of 0 is emulated");
  if (span > 16 && start % (8 * span) >= std::max<uint32_t>(span, 128)) {
    fault(show(site) + ": a matrix starts at shared address " + std::to_string(start) +
          ", not in the first row of a swizzle pattern of " + std::to_string(8 * span) + " bytes");
  }
  std::vector<uint32_t> chunks;
  const auto add = [&](uint32_t address) {
    address = swizzled(address, span);
    check_shared(site, address, kChunk, kChunk);
    chunks.push_back(address);
  };
  const uint32_t per_span = span / kChunk;
  if (mn_major) {
    for (uint32_t k = 0; k < 16; ++k) {
      for (uint32_t c = 0; c < static_cast<uint32_t>(rows) / 8; ++c) {
        if (span == 16) {
          add(start + c * stride + k / 8 * leading + k % 8 * 16);
        } else {
          add(start + c / per_span * leading + k / 8 * stride + k % 8 * span + c % per_span * 16);
        }
      }
    }
  } else {
    for (uint32_t r = 0; r < static_cast<uint32_t>(rows); ++r) {
      for (uint32_t half = 0; half < 2; ++half) {
        add(start + r / 8 * stride + r % 8 * span + half * (span == 16 ? leading : 16));
      }
    }
  }
  return chunks;
}

// values[k][row] of an operand with these chunks.
void decode(const std::vector<uint32_t>& chunks, int rows, bool mn_major, bool is_bf16,
            float* values) {
  const float* fp16 = fp16_values();
  for (size_t i = 0; i < chunks.size(); ++i) {
    uint16_t elements[8];
    std::memcpy(elements, shared_memory() + chunks[i], kChunk);
    for (int e = 0; e < 8; ++e) {
      const float value =
          is_bf16 ? as_float(static_cast<uint32_t>(elements[e]) << 16) : fp16[elements[e]];
      const int index = static_cast<int>(i);
      const int k = mn_major ? index / (rows / 8) : index % 2 * 8 + e;
      const int row = mn_major ? index % (rows / 8) * 8 + e : index / 2;
      values[k * rows + row] = value;
    }
  }
}

// Thread i's accumulator r is element (row, column).
int fragment_row(unsigned i, int r) {
  return static_cast<int>(i / 32 * 16 + i % 32 / 4) + r / 2 % 2 * 8;
}
int fragment_column(unsigned i, int r) { return r / 4 * 8 + static_cast<int>(i % 4) * 2 + r % 2; }

void compute(Multiply& m) {
  float a[16 * 64], b[16 * 256];
  if (m.a_in_registers) {
    const float* fp16 = fp16_values();
    for (unsigned i = 0; i < kWarpgroup; ++i) {
      for (int r = 0; r < 4; ++r) {
        const int row = static_cast<int>(i / 32 * 16 + i % 32 / 4) + r % 2 * 8;
        const int k = static_cast<int>(i % 4) * 2 + r / 2 * 8;
        for (int e = 0; e < 2; ++e) {
          const uint32_t bits = m.a_values[i][r] >> (16 * e) & 0xFFFF;
          a[(k + e) * 64 + row] = m.is_bf16 ? as_float(bits << 16) : fp16[bits];
        }
      }
    }
  } else {
    decode(m.a_chunks, 64, m.a_mn_major, m.is_bf16, a);
  }
  decode(m.b_chunks, m.n, m.b_mn_major, m.is_bf16, b);
  const int n = m.n;
  for (int row = 0; row < 64; ++row) {
    float sum[256] = {};
    for (int k = 0; k < 16; ++k) {
      const float left = a[k * 64 + row];
      const float* right = b + k * n;
      for (int column = 0; column < n; ++column) sum[column] += left * right[column];
    }
    float* d = m.d->values.data() + row * n;
    for (int column = 0; column < n; ++column) {
      d[column] = m.accumulate ? d[column] + sum[column] : sum[column];
    }
  }
  for (const auto* chunks : {&m.a_chunks, &m.b_chunks}) {
    for (uint32_t at : *chunks) {
      --state.multiplying[at / kChunk];
      for (Agent& agent : m.agents) agent.read(shared_memory() + at, kChunk);
    }
  }
  for (Agent& agent : m.agents) {
    agent.release(&m.done_token);
    agent.finish();
  }
  m.done = true;
}

Warpgroup& own_warpgroup(Site site) {
  Engines& e = engines_in_use();
  const unsigned group = thread_number() / kWarpgroup;
  if ((group + 1) * kWarpgroup > block_threads()) {
    fault(show(site) + ": the block's last " + std::to_string(block_threads() % kWarpgroup) +
          " threads are no warpgroup");
  }
  return e.warpgroups[group];
}

bool still_poisoned(const float* registers, int n) {
  for (int r = 0; r < n / 2; ++r) {
    uint32_t bits;
    std::memcpy(&bits, registers + r, 4);
    if (bits != kPoisonWord) return false;
  }
  return true;
}

// The accumulators in flight that stand in this thread's `registers`; null: they are idle.
Accumulators* in_flight(Site site, Warpgroup& w, unsigned i, const float* registers, int n) {
  for (Accumulators& d : w.accumulators) {
    if (d.landed[i] || d.registers[i] == nullptr) continue;
    if (d.registers[i] == registers && d.n == n) return &d;
    if (d.registers[i] < registers + n / 2 && registers < d.registers[i] + d.n / 2) {
      fault(show(site) + ": its accumulators overlap those of a wgmma of another shape that no " +
            "wait has covered");
    }
  }
  return nullptr;
}

void check_same(Site site, bool same, const char* what) {
  if (!same) fault(show(site) + ": the threads of a warpgroup disagree about the " + what);
}

// The one that ends next, or null: they end in order, each adds to what those before it left.
Multiply* oldest(Warpgroup& w) {
  for (Multiply& m : w.multiplies) {
    if (!m.done) return &m;
  }
  return nullptr;
}

// Retires what all threads are past.
void retire(Warpgroup& w) {
  const uint64_t past = *std::min_element(w.waited, w.waited + kWarpgroup);
  while (w.first < past) {
    w.multiplies.pop_front();
    ++w.first;
  }
  while (!w.accumulators.empty() && w.accumulators.front().n_landed == kWarpgroup) {
    w.accumulators.pop_front();
  }
}

}  // namespace

TensorMap encode_tensor_map(const void* base, const uint64_t (&size)[4],
                            const uint64_t (&stride_bytes)[3], const uint32_t (&box)[4],
                            int swizzle_bytes) {
  TensorMap map{};
  map.magic = kMapMagic;
  map.base = static_cast<const unsigned char*>(base);
  std::copy(size, size + 4, map.size);
  std::copy(stride_bytes, stride_bytes + 3, map.stride_bytes);
  std::copy(box, box + 4, map.box);
  map.swizzle_bytes = static_cast<uint32_t>(swizzle_bytes);
  return map;
}

// --- mbarriers ---

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
  std::memcpy(shared_memory() + barrier, &kBarrierMagic, 8);
  std::memcpy(e.async_view.data() + barrier, &kBarrierMagic, 8);
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

// --- Bulk copies ---

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

// --- wgmma ---

void wgmma_fence(Site site) {
  maybe_yield();
  const Unwatched unwatched;
  own_warpgroup(site).fenced[thread_number() % kWarpgroup] = true;
}

void wgmma(Site site, float* d, int n, const uint32_t* a_registers, uint64_t a, bool a_mn_major,
           uint64_t b, bool b_mn_major, bool accumulate, bool is_bf16) {
  const Unwatched unwatched;
  Warpgroup& w = own_warpgroup(site);
  const unsigned i = thread_number() % kWarpgroup;
  if (!w.fenced[i]) {
    fault(show(site) + ": no wgmma_fence since this thread's last wgmma_commit");
  }
  const uint64_t number = w.issued[i]++;
  const bool first = number == w.first + w.multiplies.size();
  Accumulators* running = in_flight(site, w, i, d, n);
  if (first) {
    Multiply& m = w.multiplies.emplace_back();
    m.site = site;
    m.n = n;
    m.a = a;
    m.b = b;
    m.a_in_registers = a_registers != nullptr;
    m.a_mn_major = a_mn_major;
    m.b_mn_major = b_mn_major;
    m.accumulate = accumulate;
    m.is_bf16 = is_bf16;
    m.group = w.open_group[i];
    m.d = running;
    if (running == nullptr) {
      m.d = &w.accumulators.emplace_back();
      m.d->n = n;
      m.d->values.resize(static_cast<size_t>(64 * n));
    }
    if (a_registers == nullptr) m.a_chunks = chunks_of(site, a, 64, a_mn_major);
    m.b_chunks = chunks_of(site, b, n, b_mn_major);
    for (const auto* chunks : {&m.a_chunks, &m.b_chunks}) {
      for (uint32_t at : *chunks) ++state.multiplying[at / kChunk];
    }
  }
  Multiply& m = w.multiplies[number - w.first];
  check_same(site, m.n == n && m.a == a && m.b == b, "operands");
  check_same(site,
             m.a_in_registers == (a_registers != nullptr) && m.a_mn_major == a_mn_major &&
                 m.b_mn_major == b_mn_major && m.is_bf16 == is_bf16,
             "kind of operands");
  check_same(site, m.accumulate == accumulate, "accumulate flag");
  check_same(site, m.group == w.open_group[i], "group, that is about the commits");
  check_same(site, running == nullptr ? m.d->registers[i] == nullptr : m.d == running,
             "accumulators");
  if (running == nullptr) {
    for (int r = 0; r < n / 2; ++r) {
      m.d->values[static_cast<size_t>(fragment_row(i, r) * n + fragment_column(i, r))] = d[r];
    }
    m.d->registers[i] = d;
  } else if (!still_poisoned(d, n)) {
    fault(show(site) + ": accumulators were changed while " + show(m.site) + " was using them");
  }
  m.d->last_group[i] = m.group;
  for (int r = 0; r < n / 2; ++r) std::memcpy(d + r, &kPoisonWord, 4);
  if (a_registers != nullptr) {
    m.a_registers[i] = a_registers;
    std::copy(a_registers, a_registers + 4, m.a_values[i]);
  }
  if (i % 32 == 0) m.agents[i / 32].make();
  ++m.issued;
  const bool last = m.issued == kWarpgroup;
  if (first || last) {
    for (const auto* chunks : {&m.a_chunks, &m.b_chunks}) {
      for (uint32_t at : *chunks) {
        check_not_loading(site, at);
        if (last) check_published(site, at);
      }
    }
  }
}

void wgmma_commit(Site site) {
  const Unwatched unwatched;
  Warpgroup& w = own_warpgroup(site);
  ++w.open_group[thread_number() % kWarpgroup];
  w.fenced[thread_number() % kWarpgroup] = false;
}

void wgmma_wait(int newest_groups_left) {
  maybe_yield();
  const Unwatched unwatched;
  const Site site{"wgmma.wait_group", "", 0};
  Warpgroup& w = own_warpgroup(site);
  const unsigned i = thread_number() % kWarpgroup;
  const uint64_t left = static_cast<uint64_t>(newest_groups_left);
  const auto covered = [&](uint64_t group) { return group + left < w.open_group[i]; };
  for (; w.waited[i] < w.issued[i]; ++w.waited[i]) {
    const auto at = [&]() -> Multiply& { return w.multiplies[w.waited[i] - w.first]; };
    if (!covered(at().group)) break;
    while (!at().done) wait_on(w.waiting, at().site);
    Multiply& m = at();
    acquire(&m.done_token);
    if (m.a_in_registers && !std::equal(m.a_values[i], m.a_values[i] + 4, m.a_registers[i])) {
      fault(show(m.site) + ": its A registers were changed before the wait that covers it");
    }
  }
  for (Accumulators& d : w.accumulators) {
    if (d.landed[i] || d.registers[i] == nullptr || !covered(d.last_group[i])) continue;
    if (!still_poisoned(d.registers[i], d.n)) {
      fault("accumulators were changed before the wait that covers their wgmma");
    }
    for (int r = 0; r < d.n / 2; ++r) {
      d.registers[i][r] =
          d.values[static_cast<size_t>(fragment_row(i, r) * d.n + fragment_column(i, r))];
    }
    d.landed[i] = true;
    ++d.n_landed;
  }
  retire(w);
}

void check_landed(const void* registers, size_t bytes) {
  const Unwatched unwatched;
  const Site site{"wgmma.wait_group", "", 0};
  Warpgroup& w = own_warpgroup(site);
  const unsigned i = thread_number() % kWarpgroup;
  const char* begin = static_cast<const char*>(registers);
  for (const Accumulators& d : w.accumulators) {
    if (d.landed[i] || d.registers[i] == nullptr) continue;
    const char* theirs = reinterpret_cast<const char*>(d.registers[i]);
    if (theirs < begin + bytes && begin < theirs + 4 * (d.n / 2)) {
      fault("results are read after a wgmma_wait that does not cover their wgmma");
    }
  }
}

// --- The rest ---

namespace {

// in: a lane's four registers, of matrix 0 to 3. out: the lane's row of 8 elements.
void collect(const WarpWords& in, WarpWords& out) {
  for (int lane = 0; lane < 32; ++lane) {
    for (int c = 0; c < 4; ++c) out[lane][c] = in[4 * (lane % 8) + c][lane / 8];
  }
}

void collect_transposed(const WarpWords& in, WarpWords& out) {
  for (int lane = 0; lane < 32; ++lane) {
    const int matrix = lane / 8, row = lane % 8;
    // Element (row, column) of the stored matrix is (column, row) of the registers' one.
    auto element = [&](int column) {
      return in[4 * column + row / 2][matrix] >> (16 * (row % 2)) & 0xFFFF;
    };
    for (int c = 0; c < 4; ++c) out[lane][c] = element(2 * c) | element(2 * c + 1) << 16;
  }
}

void elect(const WarpWords&, WarpWords& out) {
  for (unsigned lane = 0; lane < 32; ++lane) out[lane][0] = lane == state.elected ? 1 : 0;
}

}  // namespace

void store_matrices(uint32_t row_address, const uint32_t (&r)[4], bool transposed) {
  maybe_yield();
  unsigned char* row = shared_bytes(row_address, 16, "stmatrix");
  uint32_t words[4];
  warp_collective({"stmatrix", __FILE__, __LINE__}, 0xffffffffu, r, 4, words, 4,
                  transposed ? collect_transposed : collect);
  announce_shared_write(row, 16);
  const Unwatched unwatched;
  std::memcpy(row, words, 16);
}

bool elect_one(Site site) {
  const Unwatched unwatched;
  engines_in_use();
  uint32_t mine;
  warp_collective(site, 0xffffffffu, nullptr, 0, &mine, 1, elect);
  return mine != 0;
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
