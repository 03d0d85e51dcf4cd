// Decoding in float32 arithmetic on ordinary cores, for float32 and for what decode/sm80.cu
// does not cover.
//
// Schedule: blocks as in decode/sm80.cu; a block's warps hold a few of its kRows query heads
// each and walk together over the split's tiles of 16 keys, which pass through shared memory as
// float32, a piece of their dims at a time. A lane works out the products of one key with every
// second of the warp's heads, then owns dims.
#include "../common/score.cuh"
#include "../common/softmax.cuh"
#include "../ptx/grid.cuh"
#include "launch.h"

namespace lminf::cuda {
namespace {

constexpr int kHalves = kWarpSize / kDecodeTileKeys;  // a half warp for each of two rows at a time

// Two blocks a multiprocessor: told nothing, ptxas aims at more of the small ones, and spills.
template <typename T, int kRows>
__global__ void __launch_bounds__(decode_plain_warps(kRows) * kWarpSize, 2)
    lambda_decode_plain_kernel(const DecodeLaunch l) {
  ptx::grid_launch_dependents();
  constexpr int kThreads = decode_plain_warps(kRows) * kWarpSize;
  constexpr int kWarpRows = kRows / decode_plain_warps(kRows);
  constexpr int kKeyPitch = DecodePlainSharedSizes::kKeyPitch;
  const LambdaDecodeParams& p = l.p;
  const int thread = static_cast<int>(threadIdx.x);
  const int lane = thread % kWarpSize, warp = thread / kWarpSize;
  const int head_dim = static_cast<int>(p.head_dim);
  const DecodeBlock d = decode_block(l, blockIdx.x);
  const int64_t first_head = d.kv_head * l.group + d.head_tile * kRows;
  const int heads = static_cast<int>(min64(kRows, l.group - d.head_tile * kRows));

  // --- Shared memory ---
  const DecodePlainSharedSizes sizes(kRows, head_dim);
  unsigned char* memory = shared_memory();
  auto take = [&](int floats) {
    const SharedArray<float> array(memory, floats);
    memory += 4 * floats;
    return array;
  };
  const auto q = take(sizes.rows), out = take(sizes.rows), keys = take(sizes.keys),
             weights = take(sizes.weights), new_k = take(head_dim), new_v = take(head_dim);

  // --- q and the new token, rotated; the token is written to its slots ---
  const T* q_rows = row_at<const T>(p.q, p.q_stride, d.batch, first_head);
  for (int i = thread; i < kRows * head_dim; i += kThreads) {
    const int row = i / head_dim, dim = i % head_dim;
    q[i] = row < heads && d.position >= 0
               ? to_float(load_global(q_rows + row * p.q_stride.head + dim))
               : 0.0f;
    out[i] = 0.0f;
  }
  if (d.position >= 0) {
    const T* k = row_at<const T>(p.k, p.k_stride, d.batch, d.kv_head);
    const T* v = row_at<const T>(p.v, p.v_stride, d.batch, d.kv_head);
    const bool is_global = d.appends && d.position < p.n_global;
    T* global_k = row_at<T>(p.global_k, p.global_k_stride, d.batch, d.kv_head, d.position);
    T* global_v = row_at<T>(p.global_v, p.global_v_stride, d.batch, d.kv_head, d.position);
    for (int dim = thread; dim < head_dim; dim += kThreads) {
      const T key = load_global(k + dim), value = load_global(v + dim);
      new_k[dim] = to_float(key);
      new_v[dim] = to_float(value);
      if (is_global) {
        store_global(global_k + dim, key);
        store_global(global_v + dim, value);
      }
    }
  }
  __syncthreads();
  auto rotate = [&](float& first, float& second, CosSin angle) {
    rotate_pair(angle, first, second);
    first *= p.rope.scaling;
    second *= p.rope.scaling;
  };
  if (d.position >= 0) {
    for (int t = thread; t < p.rope.rotary_dim / 2; t += kThreads) {
      const PairDims dims = pair_dims(t, p.rope.rotary_dim, p.rope.interleaved);
      const CosSin angle = rotation(d.position, load_frequency(p.rope, t));
      for (int row = 0; row < heads; ++row) {
        rotate(q[row * head_dim + dims.first], q[row * head_dim + dims.second], angle);
      }
      rotate(new_k[dims.first], new_k[dims.second], angle);
      // The ring holds it rounded, and so it is met from the first.
      new_k[dims.first] = to_float(from_float<T>(new_k[dims.first]));
      new_k[dims.second] = to_float(from_float<T>(new_k[dims.second]));
    }
  }
  __syncthreads();
  if (d.appends) {
    const int64_t slot = ring_slot(p, d.position);
    T* ring_k = row_at<T>(p.ring_k, p.ring_k_stride, d.batch, d.kv_head, slot);
    T* ring_v = row_at<T>(p.ring_v, p.ring_v_stride, d.batch, d.kv_head, slot);
    for (int dim = thread; dim < head_dim; dim += kThreads) {
      store_global(ring_k + dim, from_float<T>(new_k[dim]));
      store_global(ring_v + dim, from_float<T>(new_v[dim]));
    }
  }

  // --- The split's tiles ---
  const Scoring scoring(p.score);
  const int half = lane / kDecodeTileKeys, column = lane % kDecodeTileKeys;
  constexpr int kOwnRows = kWarpRows / kHalves;  // of a lane: every second of its warp's
  RowStates<kOwnRows, kDecodeTileKeys> state;

  for (int64_t index = d.tiles.lo; index < d.tiles.hi; ++index) {
    const DecodeTile tile = decode_tile(d, index);
    // A piece of keys or values; the new token comes from shared memory, missing rows are zeros.
    auto load = [&](const void* data, const Strides& s, const SharedArray<float>& own, int first,
                    int width, bool rotated) {
      const T* rows = row_at<const T>(data, s, d.batch, d.kv_head);
      const int64_t first_slot = tile.global ? tile.first : ring_slot(p, tile.first);
      const int64_t slots = tile.global ? p.n_global : p.capacity;
      __syncthreads();  // the last use of what stood here
      for (int i = thread; i < kDecodeTileKeys * width; i += kThreads) {
        const int row = i / width, dim = first + i % width;
        const int64_t j = tile.first + row;
        float x = 0.0f;
        if (j == d.position) {
          x = own[dim];
        } else if (row < tile.keys) {
          const int64_t slot =
              first_slot + row < slots ? first_slot + row : first_slot + row - slots;
          const T* from = rows + slot * s.seq;
          x = rotated && dim < p.rope.rotary_dim
                  ? rotated_element(p.rope, from, dim, met_at(p, d, j))
                  : to_float(load_global(from + dim));
        }
        keys[row * kKeyPitch + i % width] = x;
      }
      __syncthreads();
    };

    // Before the softmax: products of this lane's key with its half's rows.
    float product[kOwnRows] = {};
    for (int first = 0; first < head_dim; first += kPlainPiece) {
      const int width = static_cast<int>(min64(kPlainPiece, head_dim - first));
      load(tile.global ? p.global_k : p.ring_k, tile.global ? p.global_k_stride : p.ring_k_stride,
           new_k, first, width, tile.global);
      float part[kOwnRows] = {};  // a sum of its own: long sums lose digits
      for (int dim = 0; dim < width; ++dim) {
        const float key = keys[column * kKeyPitch + dim];
#pragma unroll
        for (int r = 0; r < kOwnRows; ++r) {
          const int row = warp * kWarpRows + kHalves * r + half;
          part[r] = fmaf(q[row * head_dim + first + dim], key, part[r]);
        }
      }
#pragma unroll
      for (int r = 0; r < kOwnRows; ++r) product[r] += part[r];
    }
    float factor[kOwnRows];
    const int64_t distance = clamped_distance(d.position - tile.first - column, p.max_distance);
#pragma unroll
    for (int r = 0; r < kOwnRows; ++r) {
      // A row without a head computes what the last one does, for nobody.
      const int64_t head = first_head + min64(warp * kWarpRows + kHalves * r + half, heads - 1);
      if (column >= tile.keys) {
        product[r] = minus_infinity();
      } else if (!scoring.only_scales()) {
        product[r] =
            scoring.score<true>(product[r], alibi_slope(p.score, head),
                                static_cast<float>(distance), bias_at(p.score, head, distance, 0));
      }
    }
    to_weights<1>([&](int r, int) -> float& { return product[r]; }, state, scoring.exponent_unit(),
                  factor);
#pragma unroll
    for (int r = 0; r < kOwnRows; ++r) {
      weights[(warp * kWarpRows + kHalves * r + half) * kDecodeTileKeys + column] = product[r];
    }
    float factors[kWarpRows];  // of both halves' rows
#pragma unroll
    for (int r = 0; r < kWarpRows; ++r) {
      factors[r] = __shfl_sync(kFullWarp, factor[r / kHalves], r % kHalves * kDecodeTileKeys);
    }
    for (int first = 0; first < head_dim; first += kPlainPiece) {
      const int width = static_cast<int>(min64(kPlainPiece, head_dim - first));
      load(tile.global ? p.global_v : p.ring_v, tile.global ? p.global_v_stride : p.ring_v_stride,
           new_v, first, width, false);
      for (int dim = lane; dim < width; dim += kWarpSize) {
#pragma unroll
        for (int r = 0; r < kWarpRows; ++r) {
          const int row = warp * kWarpRows + r;
          float total = 0.0f;
#pragma unroll 4
          for (int key = 0; key < kDecodeTileKeys; ++key) {
            total = fmaf(weights[row * kDecodeTileKeys + key], keys[key * kKeyPitch + dim], total);
          }
          float& o = out[row * head_dim + first + dim];
          o = o * factors[r] + total;
        }
      }
    }
  }

#pragma unroll
  for (int r = 0; r < kWarpRows; ++r) {
    const int row = warp * kWarpRows + r;
    SoftmaxState total = state.row(r / kHalves);
    total.max = __shfl_sync(kFullWarp, total.max, r % kHalves * kDecodeTileKeys);
    total.sum = __shfl_sync(kFullWarp, total.sum, r % kHalves * kDecodeTileKeys);
    if (row >= heads) continue;
    for (int dim = lane; dim < head_dim; dim += kWarpSize) {
      store_decoded<T>(l, d, first_head + row, dim, out[row * head_dim + dim], total);
    }
  }
}

template <typename T, int kRows>
void run(const DecodeLaunch& l, Stream stream) {
  const int head_dim = static_cast<int>(l.p.head_dim);
  launch("lambda_decode_plain", lambda_decode_plain_kernel<T, kRows>,
         {l.p.batch * l.p.heads_kv * l.head_tiles * l.splits, decode_plain_warps(kRows) * kWarpSize,
          DecodePlainSharedSizes(kRows, head_dim).bytes(head_dim)},
         stream, l);
}

template <typename T>
void run(const DecodeLaunch& l, Stream stream) {
  if (decode_plain_rows(l.p.head_dim) == kDecodeRows) return run<T, kDecodeRows>(l, stream);
  run<T, decode_plain_rows(kMaxHeadDim)>(l, stream);
}

}  // namespace

void lambda_decode_plain(const DecodeLaunch& launch, Stream stream) {
  with_element_type(launch.p.dtype, [&](auto element) { run<decltype(element)>(launch, stream); });
}

}  // namespace lminf::cuda
