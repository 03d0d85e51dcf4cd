// One step of attention on tensor cores, by one warp: 16 or 32 rows of Q against a tile of keys.
// Prefill and decode share it; they differ in what a row is.
#pragma once

#include "score.cuh"
#include "shared_tile.cuh"
#include "softmax.cuh"

namespace lminf::cuda {

// What a warp carries from tile to tile. Lane 4g + c holds columns 2c, 2c + 1 (and + 8, ...) of
// rows g and g + 8 of each 16-row tile.
template <int kHeadDim_, int kRowTiles_>
struct WarpState : RowStates<2 * kRowTiles_, 4> {
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr int kRowTiles = kRowTiles_;
  float out[kRowTiles][kHeadDim / 8][4];  // not yet divided by the sum

  LMINF_DEVICE WarpState() {
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
      for (int n = 0; n < kHeadDim / 8; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) out[m][n][e] = 0.0f;
      }
    }
  }
};

// Scores, online softmax, out += P V over the first kKeys rows of a tile of keys.
// `rows` says what the warp's rows are:
//   scoring()                      the Scoring all share
//   score(product, r, row, column) of a pair, when scoring() does more than scale
//   columns(row)                   the columns that a row sees, asked for when `full` is false
// where `row` counts the warp's rows and r, known when compiled, this lane's.
template <int kKeys, typename State, typename QTile, typename KeyTile, typename Rows>
LMINF_DEVICE void attend(State& state, const Rows& rows, bool full, QTile q_tile, int first_row,
                         KeyTile k_tile, KeyTile v_tile, int lane) {
  using T = typename QTile::Element;
  constexpr int kRowTiles = State::kRowTiles;
  constexpr int kHeadDim = State::kHeadDim;
  constexpr int kKeyTiles = kKeys / 8;
  lane = recomputed(lane);
  const int c = lane % 4;

  // --- Which columns each row sees, while registers are free ---
  int seen[State::kRows];  // first column, and the one past the last in the high half
#pragma unroll
  for (int r = 0; r < State::kRows; ++r) seen[r] = kKeys << 16;
  if (!full) {
#pragma unroll
    for (int r = 0; r < State::kRows; ++r) {
      const ColumnRange columns = rows.columns(tile_row(r, lane));
      seen[r] = columns.lo | columns.hi << 16;
    }
  }

  // --- S = Q K^T ---
  float s[kRowTiles][kKeyTiles][4];
#pragma unroll
  for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
    for (int n = 0; n < kKeyTiles; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) s[m][n][e] = 0.0f;
    }
  }
#pragma unroll
  for (int step = 0; step < kHeadDim / 16; ++step) {
    uint32_t a[kRowTiles][4];
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
      ptx::load_matrices(a[m],
                         q_tile.address(first_row + 16 * m + lane % 16, 2 * step + lane / 16));
    }
#pragma unroll
    for (int n = 0; n < kKeyTiles; n += 2) {
      uint32_t b[4];
      ptx::load_matrices(b,
                         k_tile.address(8 * n + lane % 8 + lane / 16 * 8, 2 * step + lane / 8 % 2));
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m) {
        ptx::mma<T>(s[m][n], a[m], b[0], b[1]);
        ptx::mma<T>(s[m][n + 1], a[m], b[2], b[3]);
      }
    }
  }

  // --- Softcap, ALiBi, mask ---
  if (!rows.scoring().only_scales()) {
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
      for (int n = 0; n < kKeyTiles; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int r = 2 * m + e / 2;
          s[m][n][e] = rows.score(s[m][n][e], r, tile_row(r, lane), 8 * n + 2 * c + e % 2);
        }
      }
    }
  }
  if (!full) {
#pragma unroll
    for (int r = 0; r < State::kRows; ++r) {
      const int lo = seen[r] & 0xffff, hi = seen[r] >> 16;
#pragma unroll
      for (int n = 0; n < kKeyTiles; ++n) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int column = 8 * n + 2 * c + e;
          if (column < lo || column >= hi) s[r / 2][n][2 * (r % 2) + e] = minus_infinity();
        }
      }
    }
  }

  // --- Online softmax ---
  float factor[State::kRows];
  auto score = [&](int r, int n) -> float& { return s[r / 2][n / 2][2 * (r % 2) + n % 2]; };
  // Most tiles raise no row's maximum: then nothing needs rescaling.
  if (to_weights<kKeys / 4>(score, state, rows.scoring().exponent_unit(), factor)) {
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
      for (int n = 0; n < kHeadDim / 8; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) state.out[m][n][e] *= factor[2 * m + e / 2];
      }
    }
  }

  // --- O += P V ---
  lane = recomputed(lane);
#pragma unroll
  for (int step = 0; step < kKeys / 16; ++step) {
    uint32_t a[kRowTiles][4];
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
      a[m][0] = pack<T>(s[m][2 * step][0], s[m][2 * step][1]);
      a[m][1] = pack<T>(s[m][2 * step][2], s[m][2 * step][3]);
      a[m][2] = pack<T>(s[m][2 * step + 1][0], s[m][2 * step + 1][1]);
      a[m][3] = pack<T>(s[m][2 * step + 1][2], s[m][2 * step + 1][3]);
    }
#pragma unroll
    for (int n = 0; n < kHeadDim / 8; n += 2) {
      uint32_t b[4];
      ptx::load_matrices_transposed(b, v_tile.address(16 * step + lane % 16, n + lane / 16));
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m) {
        ptx::mma<T>(state.out[m][n], a[m], b[0], b[1]);
        ptx::mma<T>(state.out[m][n + 1], a[m], b[2], b[3]);
      }
    }
  }
}

}  // namespace lminf::cuda
