// wgmma: products of matrices in shared memory by the 128 threads of a warpgroup, beside which the
// threads go on. Each warp of the group computes its own 16 rows, at once; until the wait for their
// group, touching the registers or writing over the operands is a fault.
#include "../ptx_layout.h"
#include "decode.h"
#include "machine.h"
#include "memory.h"

namespace lminf::interpreter {
namespace {

constexpr int kRows = 16;  // of one warp
constexpr int kK = 16;

using ptx_layout::MatrixDescriptor;

MatrixState& state_of(Warp& warp) {
  MatrixState& state = warp.matrix;
  if (!state.used) {
    state.used = true;
    const auto rows = static_cast<size_t>(warp.frame().function->rows);
    state.busy_until.assign(rows, 0);
    state.touched_at.assign(rows, 0);
  }
  return state;
}

uint64_t same_in_all_lanes(Warp& warp, const Instruction& i, int row, const char* what) {
  const uint64_t* values = warp.row(row);
  for (int lane = 1; lane < kLanes; ++lane) {
    if (values[lane] != values[0]) fault(warp, i, lane, std::string(what) + " differs in the warp");
  }
  return values[0];
}

// The eight elements at an address, whose bytes the wgmma holds until it is done.
template <float (*kFrom)(uint16_t)>
void read_chunk(const Site& site, uint32_t address, float (&elements)[8]) {
  Warp& warp = site.warp.block->warps[static_cast<size_t>(site.warp.index)];
  uint16_t bits[8];
  std::memcpy(bits, shared_bytes(site, address, 16), 16);
  for (int e = 0; e < 8; ++e) elements[e] = kFrom(bits[e]);
  Order& order = *warp.block->order;
  order.begin_read(site, order.matrix_engine(warp), shared_offset(address), 16);
  warp.matrix.open_reads.push_back({shared_offset(address), 16});
}

// Rows [first, first + count) of an operand, as [k][row]; `held` rows are read in all, those that
// other warps compute with too.
template <float (*kFrom)(uint16_t)>
void read_operand(const Site& site, const MatrixDescriptor& operand, int held, int first, int count,
                  float* to) {
  float chunk[8];
  ptx_layout::for_chunks(operand.mn_major, held, [&](int row, int k) {
    read_chunk<kFrom>(site, operand.address(static_cast<uint32_t>(row), static_cast<uint32_t>(k)),
                      chunk);
    for (int e = 0; e < 8; ++e) {
      const int at = row + (operand.mn_major ? e : 0) - first;
      if (at >= 0 && at < count) to[(k + (operand.mn_major ? 0 : e)) * count + at] = chunk[e];
    }
  });
}

// number: N. flag: A in registers, flag2: A is MN-major, mode2: B is. mode: sign of the product.
template <float (*kFrom)(uint16_t)>
void multiply(Warp& warp, const Instruction& i, LaneMask lanes) {
  if (lanes != kAllLanes) fault(warp, i, -1, "executed by a part of the warp");
  MatrixState& state = state_of(warp);
  if (state.fenced_at == 0) fault(warp, i, -1, "no wgmma.fence comes before the first wgmma");
  const Site site{warp, i, 0};
  const int n = i.number;
  const auto columns = static_cast<size_t>(n);
  std::vector<float> b(kK * columns), sums(kRows * columns);
  float a[kK][kRows];

  size_t next = 1;
  if (i.flag) {
    for (int lane = 0; lane < kLanes; ++lane) {
      for (int r = 0; r < 4; ++r) {
        const uint64_t bits = warp.row(i.in[static_cast<size_t>(r)])[lane];
        const auto at = ptx_layout::a_pair(lane, r);
        a[at.column][at.row] = kFrom(static_cast<uint16_t>(bits));
        a[at.column + 1][at.row] = kFrom(static_cast<uint16_t>(bits >> 16));
      }
    }
    next = 4;
  } else {
    const MatrixDescriptor operand(same_in_all_lanes(warp, i, i.in[0], "A's descriptor"), i.flag2);
    read_operand<kFrom>(site, operand, 64, warp.index % 4 * kRows, kRows, &a[0][0]);
  }
  const MatrixDescriptor operand(same_in_all_lanes(warp, i, i.in[next], "B's descriptor"),
                                 i.mode2 != 0);
  read_operand<kFrom>(site, operand, n, 0, n, b.data());
  const uint64_t accumulate = same_in_all_lanes(warp, i, i.in[next + 1], "scale-d");

  const auto each_accumulator = [&](auto f) {
    for (int lane = 0; lane < kLanes; ++lane) {
      for (int e = 0; e < n / 2; ++e) {
        const auto at = ptx_layout::accumulator(lane, e);
        f(warp.row(i.out[static_cast<size_t>(e)])[lane],
          sums[static_cast<size_t>(at.row * n + at.column)]);
      }
    }
  };
  if (accumulate != 0) each_accumulator([](uint64_t bits, float& sum) { sum = get<float>(bits); });
  const auto sign = static_cast<float>(i.mode);
  for (size_t row = 0; row < kRows; ++row) {
    float* sum = &sums[row * columns];
    for (size_t k = 0; k < kK; ++k) {
      const float x = sign * a[k][row];
      const float* y = &b[k * columns];
      for (size_t c = 0; c < columns; ++c) sum[c] += x * y[c];
    }
  }
  each_accumulator([](uint64_t& bits, float& sum) { put(bits, sum); });

  std::vector<int> registers = i.out;
  if (i.flag) registers.insert(registers.end(), i.in.begin(), i.in.begin() + 4);
  for (const int r : registers) {
    if (state.touched_at[static_cast<size_t>(r)] > state.fenced_at) {
      fault(warp, i, -1, "one of its registers was read or written since wgmma.fence");
    }
    state.busy_until[static_cast<size_t>(r)] = state.committed + 1;
  }
}

void fence(Warp& warp, const Instruction&, LaneMask) {
  MatrixState& state = state_of(warp);
  state.fenced_at = state.clock++;
}

void commit(Warp& warp, const Instruction&, LaneMask) {
  MatrixState& state = state_of(warp);
  ++state.committed;
  state.reads.push_back(std::move(state.open_reads));
  state.open_reads.clear();
}

void wait(Warp& warp, const Instruction& i, LaneMask lanes) {
  MatrixState& state = state_of(warp);
  Order& order = *warp.block->order;
  const uint32_t engine = order.matrix_engine(warp);
  Gathered done;
  while (state.reads.size() > static_cast<size_t>(i.number)) {
    const uint32_t tick = order.tick_of(engine);
    for (const MatrixState::Read& read : state.reads.front()) {
      order.end_read(engine, tick, read.offset, read.bytes);
    }
    order.release(engine, tick, done);
    state.reads.erase(state.reads.begin());
    ++state.done;
  }
  order.acquire(warp, lanes, order.finished(std::move(done)));
}

// --- Decoding ---

bool is_one(int sign) { return sign == 1 || sign == -1; }

void decode_wgmma(Decoder& d, const Spelling& s, Instruction& i) {
  i.is_wgmma = true;
  d.warp_sync(i);
  const auto& o = s.operands;
  if (s.has("fence") || s.has("commit_group")) {
    d.allow(s, {"fence", "commit_group", "sync", "aligned"});
    d.expect_operands(s, 0, 0);
    i.execute = s.has("fence") ? fence : commit;
    return;
  }
  if (s.has("wait_group")) {
    d.allow(s, {"wait_group", "sync", "aligned"});
    d.expect_operands(s, 1, 1);
    i.number = d.number(o[0]);
    i.execute = wait;
    return;
  }
  const std::string shape = s.parts.size() > 4 ? s.parts[4] : "";
  i.number = shape.compare(0, 4, "m64n") == 0 ? std::atoi(shape.c_str() + 4) : 0;
  if (shape != "m64n" + std::to_string(i.number) + "k16" || i.number % 8 != 0 || i.number < 8 ||
      i.number > 256) {
    d.refuse("shape of wgmma");
  }
  d.allow(s, {"mma_async", "sync", "aligned", shape.c_str()});
  const std::vector<Type> bf16{Type::kF32, Type::kBF16, Type::kBF16};
  const std::vector<Type> f16{Type::kF32, Type::kF16, Type::kF16};
  if (s.types != bf16 && s.types != f16) d.refuse("types of wgmma");
  // d, a or its descriptor, b's descriptor, scale-d, signs of a and b, majors of a (in shared
  // memory) and b
  d.expect_operands(s, 7, 8);
  i.flag = o[1][0] == '{';
  d.expect_operands(s, i.flag ? 7 : 8, i.flag ? 7 : 8);
  i.out = d.rows(o[0]);
  i.in = d.rows(o[1]);
  if (static_cast<int>(i.out.size()) != i.number / 2 || i.in.size() != (i.flag ? 4u : 1u)) {
    d.refuse("number of registers");
  }
  i.in.push_back(d.row(o[2]));
  i.in.push_back(d.row(o[3]));
  const int sign_a = d.number(o[4]), sign_b = d.number(o[5]);
  if (!is_one(sign_a) || !is_one(sign_b)) d.refuse("signs of wgmma");
  i.mode = sign_a * sign_b;
  i.flag2 = !i.flag && d.number(o[6]) != 0;
  i.mode2 = d.number(o.back());
  i.execute = s.types == bf16 ? multiply<from_bf16> : multiply<from_f16>;
}

}  // namespace

void add_wgmma(OpcodeTable& table) { table["wgmma"] = decode_wgmma; }

}  // namespace lminf::interpreter
