// The decode op: how many splits, which kernel, and the kernels that come after it. One merges the
// splits:
//
//   out = sum_s w_s out_s / (sum_s w_s sum_s + sink),   w_s = 2^(max_s - max over s)
//
// Schedule of the merge: a block takes one query head; a thread owns dims and walks over the
// splits. After the kernel on tensor cores, and with a distance_bias only, the merge also mends
// rows that a hidden value has spoilt: a weight of 0 times an infinite value is NaN there.
#include <stdexcept>

#include "lambda_decode.h"
#include "score.cuh"

namespace lminf::cuda {
namespace {

constexpr int kMergeThreads = 128;

// The block's row, numbered over batch and query heads.
template <typename T>
LMINF_DEVICE void merge_splits(const DecodeLaunch& l, int64_t row) {
  const LambdaDecodeParams& p = l.p;
  DecodeBlock d;
  d.batch = row / p.heads_q;
  d.split = 0;
  DecodeLaunch last = l;
  last.splits = 1;
  for (int dim = static_cast<int>(threadIdx.x); dim < p.head_dim; dim += kMergeThreads) {
    SoftmaxState total = empty_softmax();
    float out = 0.0f;
    for (int64_t s = 0; s < l.splits; ++s) {
      const SoftmaxMerge both = merge(total, load_global(l.partial_state + row * l.splits + s));
      const float part = load_global(l.partial_out + (row * l.splits + s) * p.head_dim + dim);
      out = out * both.weight_a + part * both.weight_b;
      total = both.state;
    }
    store_decoded<T>(last, d, row % p.heads_q, dim, out, total);
  }
}

template <typename T>
__global__ void __launch_bounds__(kMergeThreads) lambda_decode_merge_kernel(const DecodeLaunch l) {
  merge_splits<T>(l, blockIdx.x);
}

// Whether the softmax of a row is sound and its output is not finite, by one warp.
template <typename T>
LMINF_DEVICE bool is_spoilt(const LambdaDecodeParams& p, int64_t row, int lane) {
  const T* out = static_cast<const T*>(p.out) + row / p.heads_q * p.out_stride.batch +
                 row % p.heads_q * p.out_stride.head;
  float zero = 0.0f;  // until something is not finite
  for (int dim = lane; dim < p.head_dim; dim += kWarpSize) {
    zero = fmaf(to_float(load_global(out + dim)), 0.0f, zero);
  }
  const float lse = load_global(p.lse + row);
  return __any_sync(kFullWarp, zero != 0.0f) && lse == lse;
}

// Works a row out again by one warp, key by key, and touches only keys that it sees. The new token
// stands in its slots by now.
template <typename T>
LMINF_DEVICE void decode_exactly(const DecodeLaunch& l, int64_t row, int lane) {
  constexpr int kOwn =
      decode_sm80_head_dim(kMaxHeadDim) / kWarpSize;  // dims of a lane: lane + 32 n
  const LambdaDecodeParams& p = l.p;
  const int head_dim = static_cast<int>(p.head_dim);
  const int64_t head = row % p.heads_q, kv_head = head / (p.heads_q / p.heads_kv);
  DecodeLaunch whole = l;
  whole.splits = whole.head_tiles = 1;
  const DecodeBlock d = decode_block(whole, row / p.heads_q * p.heads_kv + kv_head);
  // Rounded, as the kernel's own rotated queries and keys are.
  auto load = [&](const T* from, int dim, bool rotated, int64_t position) {
    if (dim >= head_dim) return 0.0f;
    if (!rotated || dim >= p.rope.rotary_dim) return to_float(load_global(from + dim));
    return to_float(from_float<T>(rotated_element(p.rope, from, dim, position)));
  };
  auto row_of = [&](const void* data, const Strides& s, int64_t of_head, int64_t slot) {
    return static_cast<const T*>(data) + d.batch * s.batch + of_head * s.head + slot * s.seq;
  };

  float q[kOwn], out[kOwn];
#pragma unroll
  for (int n = 0; n < kOwn; ++n) {
    q[n] = load(row_of(p.q, p.q_stride, head, 0), lane + kWarpSize * n, true, d.position);
    out[n] = 0.0f;
  }
  const Scoring scoring(p.score);
  const float slope = alibi_slope(p.score, head);
  SoftmaxState state = empty_softmax();
#pragma unroll 1
  for (int64_t i = d.globals.lo - d.globals.hi; i < d.window.hi - d.window.lo; ++i) {
    const bool global = i < 0;
    const int64_t j = global ? d.globals.hi + i : d.window.lo + i;
    const float bias = distance_bias_at(p.score, head, d.position - j, 0);
    if (bias == minus_infinity()) continue;  // hidden
    const int64_t slot = global ? j : j % p.capacity;
    const T* k = global ? row_of(p.global_k, p.global_k_stride, kv_head, slot)
                        : row_of(p.ring_k, p.ring_k_stride, kv_head, slot);
    const T* v = global ? row_of(p.global_v, p.global_v_stride, kv_head, slot)
                        : row_of(p.ring_v, p.ring_v_stride, kv_head, slot);
    float product = 0.0f;
#pragma unroll
    for (int n = 0; n < kOwn; ++n) {
      product = fmaf(q[n], load(k, lane + kWarpSize * n, global, met_at(p, d, j)), product);
    }
    product = warp_sum(product);
    const float distance = static_cast<float>(clamped_distance(d.position - j, p.max_distance));
    const SoftmaxMerge both =
        merge(state, {scoring.score<false>(product, slope, distance, bias), 1.0f});
#pragma unroll
    for (int n = 0; n < kOwn; ++n) {
      const float value = load(v, lane + kWarpSize * n, false, 0);
      out[n] = out[n] * both.weight_a + both.weight_b * value;
    }
    state = both.state;
  }
#pragma unroll
  for (int n = 0; n < kOwn; ++n) {
    const int dim = lane + kWarpSize * n;
    if (dim < head_dim) store_decoded<T>(whole, d, head, dim, out[n], state);
  }
}

template <typename T>
__global__ void __launch_bounds__(kMergeThreads) lambda_decode_mend_kernel(const DecodeLaunch l) {
  if (l.splits > 1) {
    merge_splits<T>(l, blockIdx.x);
    __syncthreads();  // the row is stored
  }
  const int thread = static_cast<int>(threadIdx.x);
  if (thread >= kWarpSize) return;
  if (is_spoilt<T>(l.p, blockIdx.x, thread)) decode_exactly<T>(l, blockIdx.x, thread);
}

template <typename T>
void run_merge(const DecodeLaunch& l, Stream stream) {
  launch("lambda_decode_merge", lambda_decode_merge_kernel<T>,
         {l.p.batch * l.p.heads_q, kMergeThreads, 0}, stream, l);
}

template <typename T>
void run_mend(const DecodeLaunch& l, Stream stream) {
  launch("lambda_decode_mend", lambda_decode_mend_kernel<T>,
         {l.p.batch * l.p.heads_q, kMergeThreads, 0}, stream, l);
}

}  // namespace

void lambda_decode(const LambdaDecodeParams& params, const DeviceFacts& device, void* workspace,
                   Stream stream) {
  if (lambda_decode_plan(params, device).blocks == 0) return;
  static_assert(sizeof(SoftmaxState) == 8, "what the plan counts with");
  const DecodeShape shape = decode_shape(params, device.multiprocessors);
  DecodeLaunch l;
  l.p = params;
  l.splits = shape.splits;
  l.head_tiles = shape.head_tiles;
  if (l.splits > 1) {
    l.partial_state = static_cast<SoftmaxState*>(workspace);
    l.partial_out = reinterpret_cast<float*>(static_cast<char*>(workspace) + shape.state_bytes);
  }
  if (lambda_decode_kernel(params, device.capability) == AttnKernel::kTensorCore) {
    lambda_decode_sm80(l, stream);
    if (params.score.distance_bias != nullptr) {
      return params.dtype == DType::kBFloat16 ? run_mend<bf16>(l, stream)
                                              : run_mend<fp16>(l, stream);
    }
  } else {
    lambda_decode_plain(l, stream);
  }
  if (l.splits == 1) return;
  switch (params.dtype) {
    case DType::kFloat32:
      return run_merge<float>(l, stream);
    case DType::kBFloat16:
      return run_merge<bf16>(l, stream);
    case DType::kFloat16:
      return run_merge<fp16>(l, stream);
  }
  throw std::invalid_argument("lambda_decode: unknown dtype");
}

}  // namespace lminf::cuda
