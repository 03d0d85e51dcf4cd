// Decoding in float32 arithmetic on ordinary cores, for float32 and for what lambda_decode_sm80.cu
// does not cover.
//
// Schedule: blocks as in lambda_decode_sm80.cu; a block's four warps hold four query heads each and
// walk together over the split's tiles of 16 keys, which stand in shared memory as float32. A lane
// works out the product of one key with two of the warp's heads, then owns dims.
#include "lambda_decode.h"
#include "rotary.cuh"
#include "score.cuh"

namespace lminf::cuda {
namespace {

constexpr int kThreads = kDecodePlainWarps * kWarpSize;
constexpr int kWarpRows = kDecodeRows / kDecodePlainWarps;
constexpr int kHalves = kWarpSize / kDecodeTileKeys;  // a half warp for each of two rows at a time

// The maximum or sum over a half warp.
LMINF_DEVICE float half_warp_max(float x) {
#pragma unroll
  for (int mask = kDecodeTileKeys / 2; mask > 0; mask /= 2) {
    x = fmaxf(x, __shfl_xor_sync(kFullWarp, x, mask));
  }
  return x;
}

LMINF_DEVICE float half_warp_sum(float x) {
#pragma unroll
  for (int mask = kDecodeTileKeys / 2; mask > 0; mask /= 2) {
    x += __shfl_xor_sync(kFullWarp, x, mask);
  }
  return x;
}

template <typename T>
__global__ void __launch_bounds__(kThreads) lambda_decode_plain_kernel(const DecodeLaunch l) {
  const LambdaDecodeParams& p = l.p;
  const int thread = static_cast<int>(threadIdx.x);
  const int lane = thread % kWarpSize, warp = thread / kWarpSize;
  const int head_dim = static_cast<int>(p.head_dim);
  const DecodeBlock d = decode_block(l, blockIdx.x);
  const int64_t group = p.heads_q / p.heads_kv;
  const int64_t first_head = d.kv_head * group + d.head_tile * kDecodeRows;
  const int heads = static_cast<int>(min64(kDecodeRows, group - d.head_tile * kDecodeRows));

  // --- Shared memory ---
  const DecodePlainSharedSizes sizes(head_dim);
  unsigned char* memory = shared_memory();
  auto take = [&](int floats) {
    const SharedArray<float> array(memory, floats);
    memory += 4 * floats;
    return array;
  };
  const auto q = take(sizes.rows), out = take(sizes.rows), keys = take(sizes.keys),
             weights = take(sizes.weights), new_k = take(head_dim), new_v = take(head_dim);

  // --- q and the new token, rotated; the token is written to its slots ---
  const T* q_rows = static_cast<const T*>(p.q) + d.batch * p.q_stride.batch;
  for (int i = thread; i < kDecodeRows * head_dim; i += kThreads) {
    const int row = i / head_dim, dim = i % head_dim;
    q[i] = row < heads && d.position >= 0
               ? to_float(load_global(q_rows + (first_head + row) * p.q_stride.head + dim))
               : 0.0f;
    out[i] = 0.0f;
  }
  if (d.position >= 0) {
    const T* k =
        static_cast<const T*>(p.k) + d.batch * p.k_stride.batch + d.kv_head * p.k_stride.head;
    const T* v =
        static_cast<const T*>(p.v) + d.batch * p.v_stride.batch + d.kv_head * p.v_stride.head;
    for (int dim = thread; dim < head_dim; dim += kThreads) {
      const T key = load_global(k + dim), value = load_global(v + dim);
      new_k[dim] = to_float(key);
      new_v[dim] = to_float(value);
      if (d.appends && d.position < p.n_global) {
        store_global(static_cast<T*>(p.global_k) + d.batch * p.global_k_stride.batch +
                         d.kv_head * p.global_k_stride.head + d.position * p.global_k_stride.seq +
                         dim,
                     key);
        store_global(static_cast<T*>(p.global_v) + d.batch * p.global_v_stride.batch +
                         d.kv_head * p.global_v_stride.head + d.position * p.global_v_stride.seq +
                         dim,
                     value);
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
    const int64_t slot = d.position % p.capacity;
    for (int dim = thread; dim < head_dim; dim += kThreads) {
      store_global(static_cast<T*>(p.ring_k) + d.batch * p.ring_k_stride.batch +
                       d.kv_head * p.ring_k_stride.head + slot * p.ring_k_stride.seq + dim,
                   from_float<T>(new_k[dim]));
      store_global(static_cast<T*>(p.ring_v) + d.batch * p.ring_v_stride.batch +
                       d.kv_head * p.ring_v_stride.head + slot * p.ring_v_stride.seq + dim,
                   from_float<T>(new_v[dim]));
    }
  }

  // --- The split's tiles ---
  const Scoring scoring(p.score);
  const int half = lane / kDecodeTileKeys, column = lane % kDecodeTileKeys;
  SoftmaxState state[kWarpRows];
#pragma unroll
  for (int r = 0; r < kWarpRows; ++r) state[r] = empty_softmax();

  for (int64_t index = d.tiles.lo; index < d.tiles.hi; ++index) {
    const DecodeTile tile = decode_tile(d, index);
    // Loads keys or values; the new token comes from shared memory, missing rows are zeros.
    auto load = [&](const void* data, const Strides& s, const SharedArray<float>& own) {
      const T* rows = static_cast<const T*>(data) + d.batch * s.batch + d.kv_head * s.head;
      const int64_t first_slot = tile.global ? tile.first : tile.first % p.capacity;
      const int64_t slots = tile.global ? p.n_global : p.capacity;
      __syncthreads();  // the last use of what stood here
      for (int i = thread; i < kDecodeTileKeys * head_dim; i += kThreads) {
        const int row = i / head_dim, dim = i % head_dim;
        const int64_t j = tile.first + row;
        float x = 0.0f;
        if (j == d.position) {
          x = own[dim];
        } else if (row < tile.keys) {
          const int64_t slot = first_slot + row;
          x = to_float(load_global(rows + (slot < slots ? slot : slot - slots) * s.seq + dim));
        }
        keys[row * sizes.key_pitch + dim] = x;
      }
      __syncthreads();
    };
    load(tile.global ? p.global_k : p.ring_k, tile.global ? p.global_k_stride : p.ring_k_stride,
         new_k);
    if (tile.global && p.rope.rotary_dim > 0) {
      const int pairs = p.rope.rotary_dim / 2;
      for (int i = thread; i < tile.keys * pairs; i += kThreads) {
        const int row = i / pairs, t = i % pairs;
        const PairDims dims = pair_dims(t, p.rope.rotary_dim, p.rope.interleaved);
        const int64_t position =
            max64(tile.first + row, d.position - min64(p.max_distance, kUnbounded));
        rotate(keys[row * sizes.key_pitch + dims.first], keys[row * sizes.key_pitch + dims.second],
               rotation(position, load_frequency(p.rope, t)));
      }
      __syncthreads();
    }

    float factor[kWarpRows];
#pragma unroll
    for (int r = 0; r < kWarpRows; r += kHalves) {
      const int row = warp * kWarpRows + r + half;
      float product = 0.0f;
      for (int dim = 0; dim < head_dim; ++dim) {
        product = fmaf(q[row * head_dim + dim], keys[column * sizes.key_pitch + dim], product);
      }
      const float slope = row < heads ? alibi_slope(p.score, first_head + row) : 0.0f;
      const int64_t distance = clamped_distance(d.position - tile.first - column, p.max_distance);
      const float bias =
          row < heads ? distance_bias_at(p.score, first_head + row, distance, 0) : 0.0f;
      const float s = column >= tile.keys ? minus_infinity()
                      : scoring.only_scales()
                          ? product * scoring.exponent_unit()
                          : scoring.score<true>(product, slope, static_cast<float>(distance), bias);
      // Both halves' results go to all lanes, so that every lane knows all of the warp's rows.
      const float max = half_warp_max(s);
#pragma unroll
      for (int h = 0; h < kHalves; ++h) {
        const float row_max = __shfl_sync(kFullWarp, max, h * kDecodeTileKeys);
        const float new_max = fmaxf(state[r + h].max, row_max);
        factor[r + h] = rescale_factor(state[r + h].max, new_max);
        state[r + h].max = new_max;
      }
      const float own_max = half == 0 ? state[r].max : state[r + kHalves - 1].max;
      // A row whose keys were all hidden so far has max -inf; against 0 its weights come out 0.
      const float weight = exp2f(s - (own_max == minus_infinity() ? 0.0f : own_max));
      const float sum = half_warp_sum(weight);
#pragma unroll
      for (int h = 0; h < kHalves; ++h) {
        state[r + h].sum =
            state[r + h].sum * factor[r + h] + __shfl_sync(kFullWarp, sum, h * kDecodeTileKeys);
      }
      weights[row * kDecodeTileKeys + column] = weight;
    }
    load(tile.global ? p.global_v : p.ring_v, tile.global ? p.global_v_stride : p.ring_v_stride,
         new_v);
    for (int dim = lane; dim < head_dim; dim += kWarpSize) {
#pragma unroll
      for (int r = 0; r < kWarpRows; ++r) {
        const int row = warp * kWarpRows + r;
        float total = 0.0f;
        for (int key = 0; key < kDecodeTileKeys; ++key) {
          // A hidden key leaves its row alone, be its value infinite.
          const float weight = weights[row * kDecodeTileKeys + key];
          if (weight != 0.0f) total = fmaf(weight, keys[key * sizes.key_pitch + dim], total);
        }
        out[row * head_dim + dim] = out[row * head_dim + dim] * factor[r] + total;
      }
    }
  }

#pragma unroll
  for (int r = 0; r < kWarpRows; ++r) {
    const int row = warp * kWarpRows + r;
    if (row >= heads) continue;
    for (int dim = lane; dim < head_dim; dim += kWarpSize) {
      store_decoded<T>(l, d, first_head + row, dim, out[row * head_dim + dim], state[r]);
    }
  }
}

template <typename T>
void run(const DecodeLaunch& l, Stream stream) {
  const int head_dim = static_cast<int>(l.p.head_dim);
  launch("lambda_decode_plain", lambda_decode_plain_kernel<T>,
         {l.p.batch * l.p.heads_kv * l.head_tiles * l.splits, kThreads,
          DecodePlainSharedSizes(head_dim).bytes(head_dim)},
         stream, l);
}

}  // namespace

void lambda_decode_plain(const DecodeLaunch& launch, Stream stream) {
  switch (launch.p.dtype) {
    case DType::kFloat32:
      return run<float>(launch, stream);
    case DType::kBFloat16:
      return run<bf16>(launch, stream);
    case DType::kFloat16:
      return run<fp16>(launch, stream);
  }
  throw std::invalid_argument("lambda_decode: unknown dtype");
}

}  // namespace lminf::cuda
