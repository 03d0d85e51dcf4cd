// Prefill forward in float32 arithmetic on ordinary cores, for float32 inputs and for what the
// tensor-core kernel does not cover (large head dims or ones off a multiple of 8, unaligned rows).
//
// Schedule of a block, kBlockM queries of one head, spread over four warps, the branches in the
// order of prefill/sm80.cuh: tiles of 32 keys pass through shared memory as float32, a piece of
// their dims at a time; a lane works out whole products of one key with its warp's rows; the warp
// reduces the softmax; then the values take the keys' place, and a lane owns dims and adds them up.
// Rows, weights and outputs stay in shared memory.
#include <cmath>

#include "../common/score.cuh"
#include "../common/softmax.cuh"
#include "launch.h"

namespace lminf::cuda {
namespace {

constexpr int kThreads = kPlainWarps * kWarpSize;
constexpr int kBlockN = kWarpSize;

// At least four blocks a multiprocessor: told nothing, ptxas aims at more, and spills.
template <typename T, int kBlockM>
__global__ void __launch_bounds__(kThreads, 4) lambda_attn_plain_kernel(const AttnSources sources) {
  constexpr int kWarpRows = kBlockM / kPlainWarps;
  constexpr int kKeyPitch = PlainSharedSizes::kKeyPitch;
  const LambdaAttnParams& p = sources.p;
  const int thread = static_cast<int>(threadIdx.x);
  const int lane = thread % kWarpSize;
  const int warp_row = thread / kWarpSize * kWarpRows;
  const int head_dim = static_cast<int>(p.head_dim);

  // --- Shared memory ---
  const PlainSharedSizes sizes({head_dim, kBlockM, kBlockN}, head_dim);
  unsigned char* memory = shared_memory();
  BlockWalk<T>& walk = SharedArray<BlockWalk<T>>(memory, 1)[0];
  memory += kWalkBytes;
  auto take = [&](int floats) {
    const SharedArray<float> array(memory, floats);
    memory += 4 * floats;
    return array;
  };
  const auto q = take(sizes.rows), out = take(sizes.rows), keys = take(sizes.keys),
             weights = take(sizes.weights);

  if (thread < kWarpSize) walk.fill(sources, blockIdx.x, kBlockM, kBlockN, kBlockN, lane);
  __syncthreads();
  const QueryTile& tile = walk.tile;
  if (tile.rows <= 0) return;
  const T* q_rows = row_at<const T>(p.q, p.q_stride, tile.batch, tile.head, tile.first_row);
  for (int i = thread; i < kBlockM * head_dim; i += kThreads) {
    const int row = i / head_dim, dim = i % head_dim;
    q[i] = row < tile.rows ? to_float(load_global(q_rows + row * p.q_stride.seq + dim)) : 0.0f;
    out[i] = 0.0f;
  }
  __syncthreads();

  const Scoring scoring(p.score);
  const float slope = alibi_slope(p.score, tile.head);
  RowStates<kWarpRows, kWarpSize> state;

  for (int branch = kFar; branch < kBranches; ++branch) {
    if (branch == kNear && p.rope.rotary_dim > 0) {
      for (int i = lane; i < kWarpRows * (p.rope.rotary_dim / 2); i += kWarpSize) {
        const int row = warp_row + i % kWarpRows, t = i / kWarpRows;
        const PairDims dims = pair_dims(t, p.rope.rotary_dim, p.rope.interleaved);
        float& first = q[row * head_dim + dims.first];
        float& second = q[row * head_dim + dims.second];
        rotate_pair(rotation(tile.positions.lo + row, load_frequency(p.rope, t)), first, second);
        first *= p.rope.scaling;
        second *= p.rope.scaling;
      }
    }
    const BranchKeys<T>& met = walk.branches[branch];
    for (int64_t index = met.tiles.begin; index < met.tiles.end; ++index) {
      const int64_t position = met.position(index);

      // A piece of keys or values; those that no query sees are zeros, whatever stands there.
      auto load = [&](const T* rows, int64_t origin, int64_t stride, int first, int width) {
        __syncthreads();  // the last use of what stood here
        for (int i = thread; i < kBlockN * width; i += kThreads) {
          const int row = i / width, dim = i % width;
          const int64_t j = position + row;
          const bool there = j >= met.visible.lo && j < met.visible.hi;
          keys[row * kKeyPitch + dim] =
              there ? to_float(load_global(rows + (j - origin) * stride + first + dim)) : 0.0f;
        }
        __syncthreads();
      };

      // --- Scores and softmax ---
      float product[kWarpRows] = {};
      for (int first = 0; first < head_dim; first += kPlainPiece) {
        const int width = static_cast<int>(min64(kPlainPiece, head_dim - first));
        load(met.k, met.k_origin, met.k_stride, first, width);
        float part[kWarpRows] = {};  // a sum of its own: long sums lose digits
        for (int dim = 0; dim < width; ++dim) {
          const float key = keys[lane * kKeyPitch + dim];
#pragma unroll
          for (int r = 0; r < kWarpRows; ++r) {
            part[r] = fmaf(q[(warp_row + r) * head_dim + first + dim], key, part[r]);
          }
        }
#pragma unroll
        for (int r = 0; r < kWarpRows; ++r) product[r] += part[r];
      }
      float factor[kWarpRows];
#pragma unroll
      for (int r = 0; r < kWarpRows; ++r) {
        const int64_t i = tile.positions.lo + warp_row + r, j = position + lane;
        if (!met.branch.sees(i, j)) {
          product[r] = minus_infinity();
        } else if (!scoring.only_scales()) {
          product[r] = scoring.score<true>(
              product[r], slope, static_cast<float>(clamped_distance(i - j, p.max_distance)),
              bias_at(p.score, tile.head, i - j, 0));
        }
      }
      to_weights<1>([&](int r, int) -> float& { return product[r]; }, state,
                    scoring.exponent_unit(), factor);
#pragma unroll
      for (int r = 0; r < kWarpRows; ++r) weights[(warp_row + r) * kBlockN + lane] = product[r];

      // --- Values ---
      for (int first = 0; first < head_dim; first += kPlainPiece) {
        const int width = static_cast<int>(min64(kPlainPiece, head_dim - first));
        load(met.v, met.v_origin, met.v_stride, first, width);
        for (int dim = lane; dim < width; dim += kWarpSize) {
          float total[kWarpRows] = {};
#pragma unroll 4
          for (int row = 0; row < kBlockN; ++row) {
            const float value = keys[row * kKeyPitch + dim];
#pragma unroll
            for (int r = 0; r < kWarpRows; ++r) {
              total[r] = fmaf(weights[(warp_row + r) * kBlockN + row], value, total[r]);
            }
          }
#pragma unroll
          for (int r = 0; r < kWarpRows; ++r) {
            float& o = out[(warp_row + r) * head_dim + first + dim];
            o = o * factor[r] + total[r];
          }
        }
      }
    }
    __syncthreads();
  }

  // --- Normalise and store ---
  const Sink sink(p.score, tile.head);
  T* out_rows = row_at<T>(p.out, p.out_stride, tile.batch, tile.head, tile.first_row);
#pragma unroll
  for (int r = 0; r < kWarpRows; ++r) {
    const int row = warp_row + r;
    const SoftmaxEnd end = sink.finish(state.row(r));
    if (row >= tile.rows) break;
    if (lane == 0) {
      store_global(p.lse + (tile.batch * p.heads_q + tile.head) * p.seqlen_q + tile.first_row + row,
                   end.lse);
    }
    for (int dim = lane; dim < head_dim; dim += kWarpSize) {
      store_global(out_rows + row * p.out_stride.seq + dim,
                   from_float<T>(out[row * head_dim + dim] * end.out_scale));
    }
  }
}

template <typename T, int kBlockM>
void run(AttnSources sources, Stream stream) {
  const LambdaAttnParams& p = sources.p;
  const int head_dim = static_cast<int>(p.head_dim);
  sources.query_tiles = query_tiles(p, kBlockM);
  launch("lambda_attn_plain", lambda_attn_plain_kernel<T, kBlockM>,
         {sources.query_tiles * p.heads_q * p.batch, kThreads,
          PlainSharedSizes({head_dim, kBlockM, kBlockN}, head_dim).bytes()},
         stream, sources);
}

template <typename T>
void run(const AttnSources& sources, Stream stream) {
  constexpr int kRows = plain_tiles(1).block_m, kFewRows = plain_tiles(kMaxHeadDim).block_m;
  static_assert(plain_tiles(1).block_n == kBlockN, "a key for each lane");
  if (plain_tiles(sources.p.head_dim).block_m == kRows) return run<T, kRows>(sources, stream);
  run<T, kFewRows>(sources, stream);
}

}  // namespace

void lambda_attn_plain(AttnSources sources, Stream stream) {
  with_element_type(sources.p.dtype,
                    [&](auto element) { run<decltype(element)>(sources, stream); });
}

}  // namespace lminf::cuda
