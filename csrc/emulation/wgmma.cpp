// wgmma: products of a warpgroup, with their operands in shared memory or registers.
// Built without -fsanitize=thread, like launch.cpp.
#include <cuda_fp16.h>

#include <algorithm>
#include <cstring>

#include "engines.h"

namespace lminf::emulation {
namespace {

constexpr uint32_t kPoisonWord = 0xFFFFFFFF;

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

// The shared addresses of an operand's chunks, in the order of for_chunks.
std::vector<uint32_t> chunks_of(Site site, uint64_t descriptor, int rows, bool mn_major) {
  const ptx_layout::MatrixDescriptor operand(descriptor, mn_major);
  const uint32_t span = operand.span;
  if (operand.base_offset != 0) fault(show(site) + ": only a base offset of 0 is emulated");
  if (span > 16 && operand.start % (8 * span) >= std::max<uint32_t>(span, 128)) {
    fault(show(site) + ": a matrix starts at shared address " + std::to_string(operand.start) +
          ", not in the first row of a swizzle pattern of " + std::to_string(8 * span) + " bytes");
  }
  std::vector<uint32_t> chunks;
  ptx_layout::for_chunks(mn_major, rows, [&](int row, int k) {
    chunks.push_back(operand.address(static_cast<uint32_t>(row), static_cast<uint32_t>(k)));
    check_shared(site, chunks.back(), kChunk, kChunk);
  });
  return chunks;
}

// values[k][row] of an operand with these chunks.
void decode(const std::vector<uint32_t>& chunks, int rows, bool mn_major, bool is_bf16,
            float* values) {
  const float* fp16 = fp16_values();
  const uint32_t* chunk = chunks.data();
  ptx_layout::for_chunks(mn_major, rows, [&](int row, int k) {
    uint16_t elements[8];
    std::memcpy(elements, shared_memory() + *chunk++, kChunk);
    for (int e = 0; e < 8; ++e) {
      values[mn_major ? k * rows + row + e : (k + e) * rows + row] =
          is_bf16 ? as_float(static_cast<uint32_t>(elements[e]) << 16) : fp16[elements[e]];
    }
  });
}

// Where accumulator r of a warpgroup's thread stands among [64, n].
size_t accumulator_index(unsigned thread, int r, int n) {
  const auto at = ptx_layout::accumulator(static_cast<int>(thread % 32), r);
  return static_cast<size_t>((static_cast<int>(thread / 32) * 16 + at.row) * n + at.column);
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

Multiply* oldest(Warpgroup& w) {
  for (Multiply& m : w.multiplies) {
    if (!m.done) return &m;
  }
  return nullptr;
}

void compute(Multiply& m) {
  float a[16 * 64], b[16 * 256];
  if (m.a_in_registers) {
    const float* fp16 = fp16_values();
    for (unsigned i = 0; i < kWarpgroup; ++i) {
      for (int r = 0; r < 4; ++r) {
        const auto at = ptx_layout::a_pair(static_cast<int>(i % 32), r);
        const int row = static_cast<int>(i / 32 * 16) + at.row;
        for (int e = 0; e < 2; ++e) {
          const uint32_t bits = m.a_values[i][r] >> (16 * e) & 0xFFFF;
          a[(at.column + e) * 64 + row] = m.is_bf16 ? as_float(bits << 16) : fp16[bits];
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
      m.d->values[accumulator_index(i, r, n)] = d[r];
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
      d.registers[i][r] = d.values[accumulator_index(i, r, d.n)];
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

}  // namespace lminf::emulation
