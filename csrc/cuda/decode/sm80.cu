// Decoding one token of each row over the fixed cache, on tensor cores.
//
//   q' = R(p) q,  k' = R(p) k;  ring[p % C] = k', global[p] = k when p < G
//   out = softmax(score(<q', ring>), score(<q', R(max(j, p - L)) global_j>)) V,   L = max_distance
//
// Schedule: a block takes one row, one key head with up to 16 of its query heads packed into one
// tile (each key is read once for all of them), and one split of the keys. Its warps take 16 keys
// at a time, each with its own stages of shared memory and its own softmax, so that the loop has no
// block barrier; all stages are under way before anything else. At the end the warps' results are
// merged, and the splits' by a second kernel. The new token is put into its tile from shared
// memory: nobody reads the slots being written.
#include "../common/attend.cuh"
#include "../ptx/grid.cuh"
#include "launch.h"

namespace lminf::cuda {
namespace {

// Accumulators take head dim / 2 registers; shared memory is 69 KiB at 128, three blocks an SM of
// sm_90.
template <typename T, int kHeadDim_>
struct DecodeTraits {
  using Element = T;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr int kWarps = decode_sm80_warps(kHeadDim);
  static constexpr int kThreads = kWarps * kWarpSize;
  using QTile = SharedTile<T, kDecodeRows, kHeadDim>;
  using NewTile = SharedTile<T, 2, kHeadDim>;  // the new token's key and value
  using KeyTile = SharedTile<T, kDecodeTileKeys, kHeadDim>;
  static constexpr int kNewStart = QTile::kBytes;
  static constexpr int kStageStart = kNewStart + NewTile::kBytes;
  static constexpr int kWarpBytes = decode_sm80_warp_bytes(kHeadDim);
  static constexpr int kMergeStart = kStageStart + kWarps * kWarpBytes;
  static constexpr int kMergeBytes = kWarps * kDecodeRows * static_cast<int>(sizeof(SoftmaxState));
  static constexpr int kSharedBytes = decode_sm80_shared_bytes(kHeadDim);
  static_assert(kMergeStart + kMergeBytes == kSharedBytes, "as planned");
  // A warp's result takes the place of its stages.
  static_assert(kDecodeRows * kHeadDim * 4 <= kWarpBytes, "room for the warp's float32 result");
};

// The query heads of a tile, all at one position, against a tile of keys.
struct DecodeRows {
  const ScoreParams& params;
  Scoring shared_scoring;
  float slopes[2];   // of this lane's rows
  int64_t heads[2];  // and their heads
  int64_t distance;  // to the tile's first key
  int64_t max_distance;
  int keys;

  LMINF_DEVICE const Scoring& scoring() const { return shared_scoring; }
  LMINF_DEVICE float score(float product, int r, int, int column) const {
    return shared_scoring.score<false>(
        product, slopes[r],
        clamped_distance_in_tile(static_cast<float>(distance), 0, column,
                                 static_cast<float>(max_distance)),
        bias_at(params, heads[r], distance, -column));
  }
  LMINF_DEVICE ColumnRange columns(int) const { return {0, keys}; }
};

// Starts the copy of a tile, by one warp. The new token's row is left zero.
template <typename Traits>
LMINF_DEVICE void issue_tile(const DecodeLaunch& l, const DecodeBlock& d, const DecodeTile& tile,
                             typename Traits::KeyTile k_tile, typename Traits::KeyTile v_tile,
                             int lane) {
  using T = typename Traits::Element;
  using Tile = typename Traits::KeyTile;
  const LambdaDecodeParams& p = l.p;
  const int64_t first_slot = tile.global ? tile.first : ring_slot(p, tile.first);
  const int64_t slots = tile.global ? p.n_global : p.capacity;
  // A lane takes one chunk of every so many rows. From `wrap` on they stand at the ring's start.
  lane = recomputed(lane);
  static_assert(kWarpSize % Tile::kChunks == 0, "lanes share out whole rows");
  constexpr int kStep = kWarpSize / Tile::kChunks;
  const int first_row = lane / Tile::kChunks, chunk = lane % Tile::kChunks;
  const int keys = chunk * Tile::kChunk < p.head_dim ? tile.keys : 0;
  const int own = static_cast<int>(min64(d.position - tile.first, kDecodeTileKeys));
  const int wrap = static_cast<int>(min64(slots - first_slot, 2 * kDecodeTileKeys));
  // Where a lane stands in keys or values, and in bytes how far its rows and the ring's ends are
  // from each other.
  struct Place {
    const char* row;
    int64_t step, round;
  };
  auto place = [&](const void* data, const Strides& stride) {
    const int64_t row_bytes = stride.seq * static_cast<int64_t>(sizeof(T));
    const int64_t slot = first_slot + first_row - (first_row >= wrap ? slots : 0);
    return Place{reinterpret_cast<const char*>(row_at<const T>(data, stride, d.batch, d.kv_head) +
                                               chunk * Tile::kChunk) +
                     slot * row_bytes,
                 kStep * row_bytes, slots * row_bytes};
  };
  Place k = tile.global ? place(p.global_k, p.global_k_stride) : place(p.ring_k, p.ring_k_stride);
  Place v = tile.global ? place(p.global_v, p.global_v_stride) : place(p.ring_v, p.ring_v_stride);
#pragma unroll
  for (int n = 0; n < kDecodeTileKeys / kStep; ++n) {
    const int row = first_row + n * kStep;
    if (n > 0) {
      k.row += k.step;
      v.row += v.step;
      if (row >= wrap && row < wrap + kStep) {
        k.row -= k.round;
        v.row -= v.round;
      }
    }
    const bool there = row < keys && row != own;
    ptx::copy_async(k_tile.address(row, chunk), k.row, there);
    ptx::copy_async(v_tile.address(row, chunk), v.row, there);
  }
}

template <typename Traits>
__global__ void __launch_bounds__(Traits::kThreads, kDecodeSm80Blocks)
    lambda_decode_sm80_kernel(const DecodeLaunch l) {
  using T = typename Traits::Element;
  using KeyTile = typename Traits::KeyTile;
  using QTile = typename Traits::QTile;
  using NewTile = typename Traits::NewTile;
  constexpr int kChunks = QTile::kChunks, kChunk = QTile::kChunk;
  ptx::grid_launch_dependents();  // what merges the splits may take its place and wait there
  const LambdaDecodeParams& p = l.p;
  const int thread = static_cast<int>(threadIdx.x);
  const int lane = thread % kWarpSize, warp = thread / kWarpSize;
  const DecodeBlock d = decode_block(l, blockIdx.x);
  const int64_t first_head = d.kv_head * l.group + d.head_tile * kDecodeRows;
  const int heads = static_cast<int>(min64(kDecodeRows, l.group - d.head_tile * kDecodeRows));

  const QTile q_tile(0);
  const NewTile new_tile(Traits::kNewStart);
  const int warp_start = Traits::kStageStart + warp * Traits::kWarpBytes;
  auto k_stage = [&](int64_t i) {
    return KeyTile(warp_start + static_cast<int>(i % kDecodeStages) * 2 * KeyTile::kBytes);
  };
  auto v_stage = [&](int64_t i) {
    return KeyTile(warp_start + (static_cast<int>(i % kDecodeStages) * 2 + 1) * KeyTile::kBytes);
  };

  // --- The first keys ---
  auto tile_at = [&](int64_t i) { return decode_tile(d, d.tiles.lo + warp + i * Traits::kWarps); };
  const int64_t rounds =
      max64(0, ceil_div(d.tiles.hi - d.tiles.lo - warp, Traits::kWarps));  // this warp's
  auto issue = [&](int64_t i) {
    if (i < rounds) issue_tile<Traits>(l, d, tile_at(i), k_stage(i), v_stage(i), lane);
    ptx::copy_async_commit();
  };
#pragma unroll 1
  for (int i = 0; i < kDecodeStages; ++i) issue(i);

  // --- q and the new token, rotated; the token is written to its slots ---
  if (d.position >= 0) {
    const T* q = row_at<const T>(p.q, p.q_stride, d.batch, first_head);
    const T* k = row_at<const T>(p.k, p.k_stride, d.batch, d.kv_head);
    const T* v = row_at<const T>(p.v, p.v_stride, d.batch, d.kv_head);
    for (int i = thread; i < (kDecodeRows + 2) * kChunks; i += Traits::kThreads) {
      const int row = i / kChunks, chunk = i % kChunks;
      const bool is_query = row < kDecodeRows;
      const T* source = is_query ? q + row * p.q_stride.head : row == kDecodeRows ? k : v;
      Chunk data = {{0, 0, 0, 0}};
      if ((!is_query || row < heads) && chunk * kChunk < p.head_dim) {
        data = load_global(reinterpret_cast<const Chunk*>(source + chunk * kChunk));
      }
      if (is_query) {
        q_tile.chunk(row, chunk) = data;
      } else {
        new_tile.chunk(row - kDecodeRows, chunk) = data;
        if (d.appends && d.position < p.n_global && chunk * kChunk < p.head_dim) {
          const bool is_key = row == kDecodeRows;
          T* slot = row_at<T>(is_key ? p.global_k : p.global_v,
                              is_key ? p.global_k_stride : p.global_v_stride, d.batch, d.kv_head,
                              d.position);
          store_global(reinterpret_cast<Chunk*>(slot + chunk * kChunk), data);
        }
      }
    }
    __syncthreads();
    if (p.rope.rotary_dim > 0) {
      // All rows at the token's position: a first position so low never steps.
      const int rows = kDecodeRows / Traits::kWarps;
      rotate_tile_rows(q_tile, p.rope, warp * rows, rows, d.position - kDecodeRows, d.position,
                       lane);
      if (warp == 0) rotate_tile_rows(new_tile, p.rope, 0, 1, d.position, d.position, lane);
    }
    __syncthreads();
    if (d.appends) {
      const int64_t slot = ring_slot(p, d.position);
      for (int i = thread; i < 2 * kChunks; i += Traits::kThreads) {
        const bool is_key = i < kChunks;
        const int chunk = i % kChunks;
        T* row = row_at<T>(is_key ? p.ring_k : p.ring_v, is_key ? p.ring_k_stride : p.ring_v_stride,
                           d.batch, d.kv_head, slot);
        if (chunk * kChunk < p.head_dim) {
          store_global(reinterpret_cast<Chunk*>(row + chunk * kChunk),
                       new_tile.chunk(is_key ? 0 : 1, chunk));
        }
      }
    }
  }

  // --- This warp's tiles, the next ones always under way ---
  WarpState<Traits::kHeadDim, 1> state;
  const Scoring scoring(p.score);
  // Of this lane's rows; a row without a head computes what the last one does, for nobody.
  auto head_of = [&](int r) { return first_head + min64(lane / 4 + 8 * r, heads - 1); };
  const float slopes[2] = {alibi_slope(p.score, head_of(0)), alibi_slope(p.score, head_of(1))};
  for (int64_t i = 0; i < rounds; ++i) {
    const DecodeTile tile = tile_at(i);
    ptx::copy_async_wait<kDecodeStages - 1>();
    __syncwarp();
    const int64_t own_row = d.position - tile.first;
    if (tile.global) {
      if (p.rope.rotary_dim > 0) {
        rotate_tile_rows(k_stage(i), p.rope, 0, tile.keys, tile.first,
                         d.position - min64(p.max_distance, kUnbounded), lane);
        __syncwarp();
      }
    } else if (own_row < tile.keys) {
      for (int chunk = lane; chunk < kChunks; chunk += kWarpSize) {
        k_stage(i).chunk(static_cast<int>(own_row), chunk) = new_tile.chunk(0, chunk);
        v_stage(i).chunk(static_cast<int>(own_row), chunk) = new_tile.chunk(1, chunk);
      }
      __syncwarp();
    }
    const DecodeRows rows{p.score,
                          scoring,
                          {slopes[0], slopes[1]},
                          {head_of(0), head_of(1)},
                          d.position - tile.first,
                          p.max_distance,
                          tile.keys};
    attend<kDecodeTileKeys>(state, rows, tile.keys == kDecodeTileKeys, q_tile, 0, k_stage(i),
                            v_stage(i), lane);
    __syncwarp();  // everybody has left the stage about to be filled
    issue(i + kDecodeStages);
  }
  ptx::copy_async_wait<0>();
  __syncwarp();

  // --- Merge the warps ---
  const SharedArray<SoftmaxState> states(shared_memory() + Traits::kMergeStart,
                                         Traits::kWarps * kDecodeRows);
  auto outs = [&](int of_warp) {
    return SharedArray<float>(shared_memory() + Traits::kStageStart + of_warp * Traits::kWarpBytes,
                              kDecodeRows * Traits::kHeadDim);
  };
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int row = lane / 4 + 8 * r;
    const SoftmaxState total = state.row(r);
    if (lane % 4 == 0) states[warp * kDecodeRows + row] = total;
#pragma unroll
    for (int n = 0; n < Traits::kHeadDim / 8; ++n) {
      for (int e = 0; e < 2; ++e) {
        outs(warp)[row * Traits::kHeadDim + 8 * n + 2 * (lane % 4) + e] =
            state.out[0][n][2 * r + e];
      }
    }
  }
  __syncthreads();
  const int head_dim = static_cast<int>(p.head_dim);
  for (int i = thread; i < heads * head_dim; i += Traits::kThreads) {
    const int row = i / head_dim, dim = i % head_dim;
    SoftmaxState state[Traits::kWarps];
    float weights[Traits::kWarps];
#pragma unroll
    for (int w = 0; w < Traits::kWarps; ++w) state[w] = states[w * kDecodeRows + row];
    const SoftmaxState total = merge_all(state, weights);
    float out = 0.0f;
#pragma unroll
    for (int w = 0; w < Traits::kWarps; ++w) {
      out = fmaf(outs(w)[row * Traits::kHeadDim + dim], weights[w], out);
    }
    store_decoded<T>(l, d, first_head + row, dim, out, total);
  }
}

template <typename T, int kHeadDim>
void run(const DecodeLaunch& l, Stream stream) {
  using Traits = DecodeTraits<T, kHeadDim>;
  launch(
      "lambda_decode_sm80", lambda_decode_sm80_kernel<Traits>,
      {l.p.batch * l.p.heads_kv * l.head_tiles * l.splits, Traits::kThreads, Traits::kSharedBytes},
      stream, l);
}

// Columns that a head dim in between lacks are neither read nor written.
template <typename T>
void run(const DecodeLaunch& l, Stream stream) {
  switch (decode_sm80_head_dim(l.p.head_dim)) {
    case 64:
      return run<T, 64>(l, stream);
    case 128:
      return run<T, 128>(l, stream);
    default:
      return run<T, 256>(l, stream);
  }
}

}  // namespace

void lambda_decode_sm80(const DecodeLaunch& launch, Stream stream) {
  if (launch.p.dtype == DType::kBFloat16) {
    run<bf16>(launch, stream);
  } else {
    run<fp16>(launch, stream);
  }
}

}  // namespace lminf::cuda
