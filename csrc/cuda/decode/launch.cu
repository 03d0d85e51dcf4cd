// The decode op: how many splits, which kernel, and the kernels that come after it. One merges the
// splits:
//
//   out = sum_s w_s out_s / (sum_s w_s sum_s + sink),   w_s = 2^(max_s - max over s)
//
// Schedule of the merge: a block takes one query head; its warps share out the splits, each with
// many loads under way together, then meet in shared memory. Where the device overlaps launches it
// starts while the splits still run, and waits for their results alone. After the kernel on tensor
// cores, and with a distance_bias only, the merge also mends rows that a hidden value has spoilt: a
// weight of 0 times an infinite value is NaN there.
#include <stdexcept>

#include "../common/score.cuh"
#include "../ptx/grid.cuh"
#include "launch.h"

namespace lminf::cuda {
namespace {

// One wait for memory covers kMergeWarps * kMergeAtOnce splits, more than batch 1 has at a window
// of 4096.
constexpr int kMergeWarps = 8;
constexpr int kMergeThreads = kMergeWarps * kWarpSize;
constexpr int kMergeAtOnce = 8;    // splits of a warp
constexpr int kMergeLaneDims = 4;  // lane + 32 n
constexpr int kMergeDims = kMergeLaneDims * kWarpSize;
constexpr int kMergeStateStart = kMergeWarps * kMergeDims * static_cast<int>(sizeof(float));
constexpr int kMergeSharedBytes =
    kMergeStateStart + kMergeWarps * static_cast<int>(sizeof(SoftmaxState));

// The block's row, numbered over batch and query heads.
template <typename T>
LMINF_DEVICE void merge_splits(const DecodeLaunch& l, int64_t row) {
  const LambdaDecodeParams& p = l.p;
  const int thread = static_cast<int>(threadIdx.x);
  const int lane = thread % kWarpSize, warp = thread / kWarpSize;
  const int head_dim = static_cast<int>(p.head_dim);
  const SharedArray<float> outs(shared_memory(), kMergeWarps * kMergeDims);
  const SharedArray<SoftmaxState> states(shared_memory() + kMergeStateStart, kMergeWarps);
  DecodeBlock d;
  d.batch = row / p.heads_q;
  d.split = 0;
  DecodeLaunch last = l;
  last.splits = 1;
#pragma unroll 1
  for (int first_dim = 0; first_dim < head_dim; first_dim += kMergeDims) {
    // --- Each warp its own splits ---
    SoftmaxState total = empty_softmax();
    float out[kMergeLaneDims] = {};
    int dims[kMergeLaneDims];  // past the last one, that one again, for nobody
#pragma unroll
    for (int i = 0; i < kMergeLaneDims; ++i) {
      const int dim = first_dim + lane + kWarpSize * i;
      dims[i] = dim < head_dim ? dim : head_dim - 1;
    }
#pragma unroll 1
    for (int64_t first = warp; first < l.splits; first += kMergeWarps * kMergeAtOnce) {
      SoftmaxState state[kMergeAtOnce + 1];  // the last one: of those before
      float part[kMergeAtOnce][kMergeLaneDims], weights[kMergeAtOnce + 1];
      const int left = static_cast<int>(min64(l.splits - first, kMergeWarps * kMergeAtOnce));
      const SoftmaxState* from_state = l.partial_state + row * l.splits + first;
      const float* from = l.partial_out + (row * l.splits + first) * head_dim;
#pragma unroll
      for (int n = 0; n < kMergeAtOnce; ++n) {
        // Past the last split the first one is read again, and dropped: no load waits in a branch.
        const bool there = n * kMergeWarps < left;
        const int split = there ? n * kMergeWarps : 0;
        const SoftmaxState loaded = load_global(from_state + split);
        state[n].max = there ? loaded.max : minus_infinity();
        state[n].sum = there ? loaded.sum : 0.0f;
#pragma unroll
        for (int i = 0; i < kMergeLaneDims; ++i) {
          const float x = load_global(from + split * head_dim + dims[i]);
          part[n][i] = there ? x : 0.0f;
        }
      }
      state[kMergeAtOnce] = total;
      total = merge_all(state, weights);
#pragma unroll
      for (int i = 0; i < kMergeLaneDims; ++i) {
        out[i] *= weights[kMergeAtOnce];
#pragma unroll
        for (int n = 0; n < kMergeAtOnce; ++n) out[i] = fmaf(part[n][i], weights[n], out[i]);
      }
    }

    // --- The warps together ---
    __syncthreads();  // the last use of what stood here
    if (lane == 0) states[warp] = total;
#pragma unroll
    for (int i = 0; i < kMergeLaneDims; ++i) {
      outs[warp * kMergeDims + lane + kWarpSize * i] = out[i];
    }
    __syncthreads();
    const int dim = first_dim + thread;
    if (thread < kMergeDims && dim < head_dim) {
      SoftmaxState state[kMergeWarps];
      float weights[kMergeWarps];
#pragma unroll
      for (int w = 0; w < kMergeWarps; ++w) state[w] = states[w];
      const SoftmaxState all = merge_all(state, weights);
      float sum = 0.0f;
#pragma unroll
      for (int w = 0; w < kMergeWarps; ++w) {
        sum = fmaf(outs[w * kMergeDims + thread], weights[w], sum);
      }
      store_decoded<T>(last, d, row % p.heads_q, dim, sum, all);
    }
  }
}

template <typename T>
__global__ void __launch_bounds__(kMergeThreads) lambda_decode_merge_kernel(const DecodeLaunch l) {
  ptx::grid_wait();
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
  const int64_t head = row % p.heads_q, kv_head = head / l.group;
  DecodeLaunch whole = l;
  whole.splits = whole.head_tiles = 1;
  const DecodeBlock d =
      decode_block(whole, static_cast<uint32_t>(row / p.heads_q * p.heads_kv + kv_head));
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
    const int64_t slot = global ? j : ring_slot(p, j);
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
  ptx::grid_wait();
  if (l.splits > 1) {
    merge_splits<T>(l, blockIdx.x);
    __syncthreads();  // the row is stored
  }
  const int thread = static_cast<int>(threadIdx.x);
  if (thread >= kWarpSize) return;
  if (is_spoilt<T>(l.p, blockIdx.x, thread)) decode_exactly<T>(l, blockIdx.x, thread);
}

// `mends`: see the head of this file.
template <typename T>
void run_merge(const DecodeLaunch& l, bool mends, bool overlaps, Stream stream) {
  const LaunchShape shape = {l.p.batch * l.p.heads_q, kMergeThreads, kMergeSharedBytes, overlaps};
  if constexpr (sizeof(T) == 2) {
    if (mends) {
      return launch("lambda_decode_mend", lambda_decode_mend_kernel<T>, shape, stream, l);
    }
  }
  launch("lambda_decode_merge", lambda_decode_merge_kernel<T>, shape, stream, l);
}

}  // namespace

void lambda_decode(const LambdaDecodeParams& params, const DeviceFacts& device, void* workspace,
                   Stream stream) {
  const KernelPlan plan = lambda_decode_plan(params, device);
  if (plan.blocks == 0) return;
  static_assert(sizeof(SoftmaxState) == 8, "what the plan counts with");
  const DecodeShape shape = decode_shape(params, device);
  DecodeLaunch l;
  l.p = params;
  l.splits = shape.splits;
  l.head_tiles = shape.head_tiles;
  l.group = params.heads_q / params.heads_kv;
  if (l.splits > 1) {
    l.partial_state = static_cast<SoftmaxState*>(workspace);
    l.partial_out = reinterpret_cast<float*>(static_cast<char*>(workspace) + shape.state_bytes);
  }
  if (shape.kernel == AttnKernel::kSm80) {
    lambda_decode_sm80(l, stream);
  } else {
    lambda_decode_plain(l, stream);
  }
  if (l.splits == 1 && !shape.mends) return;
  switch (params.dtype) {
    case DType::kFloat32:
      return run_merge<float>(l, shape.mends, plan.overlaps, stream);
    case DType::kBFloat16:
      return run_merge<bf16>(l, shape.mends, plan.overlaps, stream);
    case DType::kFloat16:
      return run_merge<fp16>(l, shape.mends, plan.overlaps, stream);
  }
  throw std::invalid_argument("lambda_decode: unknown dtype");
}

}  // namespace lminf::cuda
