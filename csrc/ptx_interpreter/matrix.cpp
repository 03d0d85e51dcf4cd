// Matrices held by a warp: ldmatrix, stmatrix, mma.
#include "../ptx_layout.h"
#include "decode.h"
#include "machine.h"
#include "memory.h"

namespace lminf::interpreter {
namespace {

constexpr uint32_t kRowBytes = 16;
using Matrix = uint16_t[8][8];

void check_whole(const Warp& warp, const Instruction& i, LaneMask lanes) {
  if (lanes != kAllLanes) fault(warp, i, -1, "executed by a part of the warp");
}

// Lane 8 m + r gives the address of matrix m's row r.
unsigned char* matrix_row(Warp& warp, const Instruction& i, int lane, bool writes) {
  const uint64_t given = warp.row(i.address.row)[lane] + static_cast<uint64_t>(i.address.offset);
  const auto address = static_cast<uint32_t>(given);
  if (address % kRowBytes != 0) {
    fault(warp, i, lane, "row address " + hex(address) + " not aligned to 16 bytes");
  }
  const Site site{warp, i, lane};
  unsigned char* row = shared_bytes(site, address, kRowBytes);
  Order& order = *warp.block->order;
  if (writes) {
    order.write(site, shared_offset(address), kRowBytes);
  } else {
    order.read(site, shared_offset(address), kRowBytes);
  }
  return row;
}

void load_matrices(Warp& warp, const Instruction& i, LaneMask lanes) {
  check_whole(warp, i, lanes);
  const int count = static_cast<int>(i.out.size());
  Matrix matrices[4];
  for (int m = 0; m < count; ++m) {
    for (int r = 0; r < 8; ++r) {
      std::memcpy(matrices[m][r], matrix_row(warp, i, 8 * m + r, false), kRowBytes);
    }
  }
  for (int m = 0; m < count; ++m) {
    uint64_t* d = warp.row(i.out[static_cast<size_t>(m)]);
    for (int lane = 0; lane < kLanes; ++lane) {
      const int g = lane / 4, t = lane % 4 * 2;
      const uint32_t low = i.flag ? matrices[m][t][g] : matrices[m][g][t];
      const uint32_t high = i.flag ? matrices[m][t + 1][g] : matrices[m][g][t + 1];
      d[lane] = low | high << 16;
    }
  }
}

void store_matrices(Warp& warp, const Instruction& i, LaneMask lanes) {
  check_whole(warp, i, lanes);
  const int count = static_cast<int>(i.in.size());
  for (int m = 0; m < count; ++m) {
    Matrix matrix;
    const uint64_t* s = warp.row(i.in[static_cast<size_t>(m)]);
    for (int lane = 0; lane < kLanes; ++lane) {
      const int g = lane / 4, t = lane % 4 * 2;
      (i.flag ? matrix[t][g] : matrix[g][t]) = static_cast<uint16_t>(s[lane]);
      (i.flag ? matrix[t + 1][g] : matrix[g][t + 1]) = static_cast<uint16_t>(s[lane] >> 16);
    }
    for (int r = 0; r < 8; ++r) {
      std::memcpy(matrix_row(warp, i, 8 * m + r, true), matrix[r], kRowBytes);
    }
  }
}

// d = a b + c, m16n8k16. Products are exact in float32; a GPU sums them in an order of its own.
template <float (*kFrom)(uint16_t)>
void multiply(Warp& warp, const Instruction& i, LaneMask lanes) {
  check_whole(warp, i, lanes);
  float a[16][16], b[16][8], sums[16][8];
  const auto pair = [&](int operand, int lane, float& low, float& high) {
    const uint64_t bits = warp.row(i.in[static_cast<size_t>(operand)])[lane];
    low = kFrom(static_cast<uint16_t>(bits));
    high = kFrom(static_cast<uint16_t>(bits >> 16));
  };
  for (int lane = 0; lane < kLanes; ++lane) {
    for (int r = 0; r < 4; ++r) {
      const auto at = ptx_layout::a_pair(lane, r);
      pair(r, lane, a[at.row][at.column], a[at.row][at.column + 1]);
    }
    for (int r = 0; r < 2; ++r) {
      const auto at = ptx_layout::b_pair(lane, r);
      pair(4 + r, lane, b[at.row][at.column], b[at.row + 1][at.column]);
    }
    for (int e = 0; e < 4; ++e) {
      const auto at = ptx_layout::accumulator(lane, e);
      sums[at.row][at.column] = get<float>(warp.row(i.in[static_cast<size_t>(6 + e)])[lane]);
    }
  }
  for (auto row = 0; row < 16; ++row) {
    for (int k = 0; k < 16; ++k) {
      for (int n = 0; n < 8; ++n) sums[row][n] += a[row][k] * b[k][n];
    }
  }
  for (int lane = 0; lane < kLanes; ++lane) {
    for (int e = 0; e < 4; ++e) {
      const auto at = ptx_layout::accumulator(lane, e);
      put(warp.row(i.out[static_cast<size_t>(e)])[lane], sums[at.row][at.column]);
    }
  }
}

// --- Decoding ---

void check_count(const Decoder& d, const Spelling& s, size_t count) {
  const size_t named = s.has("x4") ? 4 : s.has("x2") ? 2 : 1;
  if (count != named) d.refuse("number of matrices");
}

void decode_ldmatrix(Decoder& d, const Spelling& s, Instruction& i) {
  d.allow(s, {"sync", "aligned", "m8n8", "x1", "x2", "x4", "trans", "shared", "shared::cta"});
  d.expect_operands(s, 2, 2);
  i.out = d.rows(s.operands[0]);
  check_count(d, s, i.out.size());
  i.address = d.address(s.operands[1]);
  i.flag = s.has("trans");
  i.execute = load_matrices;
  d.warp_sync(i);
}

void decode_stmatrix(Decoder& d, const Spelling& s, Instruction& i) {
  d.allow(s, {"sync", "aligned", "m8n8", "x1", "x2", "x4", "trans", "shared", "shared::cta"});
  d.expect_operands(s, 2, 2);
  i.in = d.rows(s.operands[1]);
  check_count(d, s, i.in.size());
  i.address = d.address(s.operands[0]);
  i.flag = s.has("trans");
  i.execute = store_matrices;
  d.warp_sync(i);
}

void decode_mma(Decoder& d, const Spelling& s, Instruction& i) {
  d.allow(s, {"sync", "aligned", "m16n8k16", "row", "col"});
  const std::vector<Type> bf16{Type::kF32, Type::kBF16, Type::kBF16, Type::kF32};
  const std::vector<Type> f16{Type::kF32, Type::kF16, Type::kF16, Type::kF32};
  if (s.types != bf16 && s.types != f16) d.refuse("types of mma");
  if (!s.has("m16n8k16") || !s.has("row") || !s.has("col")) d.refuse("shape of mma");
  d.expect_operands(s, 4, 4);
  i.out = d.rows(s.operands[0]);
  for (size_t k = 1; k < 4; ++k) {
    const std::vector<int> rows = d.rows(s.operands[k]);
    i.in.insert(i.in.end(), rows.begin(), rows.end());
  }
  if (i.out.size() != 4 || i.in.size() != 10) d.refuse("number of registers");
  i.execute = s.types == bf16 ? multiply<from_bf16> : multiply<from_f16>;
  d.warp_sync(i);
}

}  // namespace

void add_matrix(OpcodeTable& table) {
  table["ldmatrix"] = decode_ldmatrix;
  table["stmatrix"] = decode_stmatrix;
  table["mma"] = decode_mma;
}

}  // namespace lminf::interpreter
