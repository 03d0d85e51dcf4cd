// Prefill forward on tensor cores (mma.sync m16n8k16), sm_80 and up.
//
//   out = softmax over the visible keys of score(<R(min(i - j, L)) q_i, k_j>) v_j,  L =
//   max_distance
//
// Schedule of a block, kBlockM queries of one head:
//   1. far keys (global, at distance >= L) in narrow tiles: raw Q against keys rotated by -L;
//   2. Q is rotated in place, each warp its own rows;
//   3. near keys (global, window <= distance < L; empty when L == window), narrow tiles;
//   4. window keys in tiles of kBlockN: masked at the two edges, bare in between.
// Keys come rotated from a pre-pass. A tile no query needs is never touched. K and V go through two
// stages of shared memory: while a tile is worked on, the next one is under way, and one barrier a
// tile both publishes the new tile and retires the old. A warp owns whole rows, so the softmax
// needs no shared memory. Scores live in base 2 with the scale folded into the exponent's fma.
#pragma once

#include "../common/attend.cuh"
#include "launch.h"
#include "rows.cuh"

namespace lminf::cuda {

template <typename T, int kHeadDim_>
struct AttnTraits {
  using Element = T;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr TileSizes kTiles = sm80_tiles(kHeadDim);
  static constexpr int kBlockM = kTiles.block_m;
  static constexpr int kBlockN = kTiles.block_n;
  static constexpr int kWarps = kSm80Warps;
  static constexpr int kThreads = kWarps * kWarpSize;
  static constexpr int kWarpRows = kBlockM / kWarps;
  static constexpr int kRowTiles = kWarpRows / 16;  // mma tiles of a warp's rows
  using QTile = SharedTile<T, kBlockM, kHeadDim>;
  using KeyTile = SharedTile<T, kBlockN, kHeadDim>;
  static constexpr int kWalkStart = QTile::kBytes + 2 * kSm80Stages * KeyTile::kBytes;
  static constexpr int kSharedBytes = sm80_shared_bytes(kTiles);
  static_assert(kTiles.head_dim == kHeadDim, "a kernel of its own");
  static_assert(kWalkStart + sizeof(BlockWalk<T>) <= kSharedBytes, "the walk fits");
  static_assert(kRowTiles * 16 * kWarps == kBlockM && kBlockN % 16 == 0, "whole mma tiles");
};

// Starts the copies of a tile's keys and values; rows that no query sees become zeros. A thread
// goes down one column of chunks, or where the threads are no whole rows, from piece to piece.
template <typename Traits, int kKeys>
LMINF_DEVICE void issue_tile(const BranchKeys<typename Traits::Element>& keys, int64_t position,
                             int head_dim, typename Traits::KeyTile k_tile,
                             typename Traits::KeyTile v_tile) {
  using T = typename Traits::Element;
  using Tile = typename Traits::KeyTile;
  const int thread = recomputed(static_cast<int>(threadIdx.x));
  const int first = static_cast<int>(max64(keys.visible.lo - position, 0));
  const int end = static_cast<int>(min64(keys.visible.hi - position, kKeys));
  const int64_t k_stride = keys.k_stride, v_stride = keys.v_stride;
  const T* k = keys.k + (position - keys.k_origin) * k_stride;
  const T* v = keys.v + (position - keys.v_origin) * v_stride;
  if constexpr (Traits::kThreads % Tile::kChunks == 0) {
    constexpr int kStep = Traits::kThreads / Tile::kChunks;
    static_assert(kKeys % kStep == 0, "every thread has as many rows");
    const int first_row = thread / Tile::kChunks, chunk = thread % Tile::kChunks;
    const bool in_head = chunk * Tile::kChunk < head_dim;
    k += first_row * k_stride + chunk * Tile::kChunk;
    v += first_row * v_stride + chunk * Tile::kChunk;
#pragma unroll
    for (int row = first_row; row < first_row + kKeys; row += kStep) {
      const bool there = in_head && row >= first && row < end;
      ptx::copy_async(k_tile.address(row, chunk), k, there);
      ptx::copy_async(v_tile.address(row, chunk), v, there);
      k += kStep * k_stride;
      v += kStep * v_stride;
    }
  } else {
#pragma unroll
    for (int piece = thread; piece < kKeys * Tile::kChunks; piece += Traits::kThreads) {
      const int row = piece / Tile::kChunks, chunk = piece % Tile::kChunks;
      const bool there = row >= first && row < end && chunk * Tile::kChunk < head_dim;
      ptx::copy_async(k_tile.address(row, chunk), k + row * k_stride + chunk * Tile::kChunk, there);
      ptx::copy_async(v_tile.address(row, chunk), v + row * v_stride + chunk * Tile::kChunk, there);
    }
  }
}

template <typename Traits>
__global__ void __launch_bounds__(Traits::kThreads)
    lambda_attn_sm80_kernel(const __grid_constant__ AttnSources sources) {
  using T = typename Traits::Element;
  using QTile = typename Traits::QTile;
  using KeyTile = typename Traits::KeyTile;
  using State = WarpState<Traits::kHeadDim, Traits::kRowTiles>;
  const LambdaAttnParams& p = sources.p;
  const int thread = static_cast<int>(threadIdx.x);
  const int lane = thread % kWarpSize;
  const int warp_row = thread / kWarpSize * Traits::kWarpRows;
  const int head_dim = static_cast<int>(p.head_dim);

  // --- Shared memory: Q, then K and V of each stage, then the walk ---
  const QTile q_tile(0);
  auto k_stage = [](int visit) {
    return KeyTile(QTile::kBytes + visit % kSm80Stages * 2 * KeyTile::kBytes);
  };
  auto v_stage = [](int visit) {
    return KeyTile(QTile::kBytes + (visit % kSm80Stages * 2 + 1) * KeyTile::kBytes);
  };
  BlockWalk<T>& walk = SharedArray<BlockWalk<T>>(shared_memory() + Traits::kWalkStart, 1)[0];

  // --- Which tiles of which branch ---
  if (thread < kWarpSize) {
    walk.fill(sources, blockIdx.x, Traits::kBlockM, kGlobalN, Traits::kBlockN, lane);
  }
  __syncthreads();
  if (walk.tile.rows <= 0) return;
  auto issue = [&](int visit) {
    const BranchKeys<T>& keys = walk.branch_of(visit);
    const int64_t position = keys.position(walk.tile_of(visit));
    if (visit < walk.visits.near_end) {
      issue_tile<Traits, kGlobalN>(keys, position, head_dim, k_stage(visit), v_stage(visit));
    } else {
      issue_tile<Traits, Traits::kBlockN>(keys, position, head_dim, k_stage(visit), v_stage(visit));
    }
  };

  // --- Q and the first tile of keys ---
  if (walk.visits.end > 0) {
    const QueryTile& tile = walk.tile;
    const T* q = row_at<const T>(p.q, p.q_stride, tile.batch, tile.head, tile.first_row);
#pragma unroll 4
    for (int piece = thread; piece < Traits::kBlockM * QTile::kChunks; piece += Traits::kThreads) {
      const int row = piece / QTile::kChunks, chunk = piece % QTile::kChunks;
      const bool there = row < tile.rows && chunk * QTile::kChunk < head_dim;
      ptx::copy_async(q_tile.address(row, chunk),
                      there ? q + row * p.q_stride.seq + chunk * QTile::kChunk : q, there);
    }
    issue(0);
    ptx::copy_async_commit();
  }

  // --- Far, near and window tiles, the next one always under way ---
  State state;
  const float slope = alibi_slope(p.score, walk.tile.head);
  for (int visit = 0; visit < walk.visits.end; ++visit) {
    ptx::copy_async_wait<0>();
    __syncthreads();  // this tile is everybody's, and everybody has left the one before it
    if (visit + 1 < walk.visits.end) issue(visit + 1);
    ptx::copy_async_commit();

    const int64_t first_query = walk.tile.positions.lo + recomputed(warp_row);
    if (visit == walk.visits.far_end && p.rope.rotary_dim > 0) {
      rotate_tile_rows(q_tile, p.rope, warp_row, Traits::kWarpRows, first_query, -kUnbounded, lane);
      __syncwarp();
    }
    const BranchKeys<T>& keys = walk.branch_of(visit);
    const int64_t index = walk.tile_of(visit);
    const int n_keys = visit < walk.visits.near_end ? kGlobalN : Traits::kBlockN;
    const QueryRows<true> rows{p.score,        walk.tile.head, slope,
                               keys.branch,    first_query,    keys.origin + index * n_keys,
                               p.max_distance, n_keys};
    const bool full = keys.tiles.full(index);
    if (visit < walk.visits.near_end) {
      attend<kGlobalN>(state, rows, full, q_tile, warp_row, k_stage(visit), v_stage(visit), lane);
    } else {
      attend<Traits::kBlockN>(state, rows, full, q_tile, warp_row, k_stage(visit), v_stage(visit),
                              lane);
    }
  }
  ptx::copy_async_wait<0>();

  // --- Normalise; out through the warp's own rows of Q's tile, lse directly ---
  const QueryTile tile = walk.tile;
  const Sink sink(p.score, tile.head);
  __syncwarp();  // the last reads of Q
#pragma unroll
  for (int r = 0; r < State::kRows; ++r) {
    const SoftmaxEnd end = sink.finish(state.row(r));
    const int row = warp_row + tile_row(r, lane);
    if (lane % 4 == 0 && row < tile.rows) {
      store_global(p.lse + (tile.batch * p.heads_q + tile.head) * p.seqlen_q + tile.first_row + row,
                   end.lse);
    }
#pragma unroll
    for (int n = 0; n < Traits::kHeadDim / 8; ++n) {
      const float* pair = &state.out[r / 2][n][2 * (r % 2)];
      q_tile.pair(row, 8 * n + 2 * (lane % 4)) =
          pack<T>(pair[0] * end.out_scale, pair[1] * end.out_scale);
    }
  }
  __syncwarp();
  T* out = row_at<T>(p.out, p.out_stride, tile.batch, tile.head, tile.first_row);
  for (int piece = lane; piece < Traits::kWarpRows * QTile::kChunks; piece += kWarpSize) {
    const int row = warp_row + piece / QTile::kChunks, chunk = piece % QTile::kChunks;
    if (row < tile.rows && chunk * QTile::kChunk < head_dim) {
      store_global(reinterpret_cast<Chunk*>(out + row * p.out_stride.seq + chunk * QTile::kChunk),
                   q_tile.chunk(row, chunk));
    }
  }
}

template <typename T, int kHeadDim>
void run_lambda_attn_sm80(AttnSources sources, Stream stream) {
  using Traits = AttnTraits<T, kHeadDim>;
  sources.query_tiles = query_tiles(sources.p, Traits::kBlockM);
  launch("lambda_attn_sm80", lambda_attn_sm80_kernel<Traits>,
         {sources.query_tiles * sources.p.heads_q * sources.p.batch, Traits::kThreads,
          Traits::kSharedBytes},
         stream, sources);
}

template <typename T>
void run_lambda_attn_sm80(const AttnSources& sources, Stream stream) {
  switch (sm80_tiles(sources.p.head_dim).head_dim) {
    case 64:
      return run_lambda_attn_sm80<T, 64>(sources, stream);
    case 80:
      return run_lambda_attn_sm80<T, 80>(sources, stream);
    case 96:
      return run_lambda_attn_sm80<T, 96>(sources, stream);
    case 128:
      return run_lambda_attn_sm80<T, 128>(sources, stream);
    case 256:
      return run_lambda_attn_sm80<T, 256>(sources, stream);
  }
  throw std::invalid_argument("lambda_attn: head dim " + std::to_string(sources.p.head_dim) +
                              " on tensor cores, but at most 256 is built");
}

}  // namespace lminf::cuda
