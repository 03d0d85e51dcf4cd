// The decode op: how many splits, which kernel, and the kernel that merges the splits:
//
//   out = sum_s w_s out_s / (sum_s w_s sum_s + sink),   w_s = 2^(max_s - max over s)
//
// Schedule of the merge: a block takes one query head; its warps share out the splits, each with
// many loads under way together, then meet in shared memory. Where the device overlaps launches it
// starts while the splits still run, and waits for their results alone.
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
__global__ void __launch_bounds__(kMergeThreads) lambda_decode_merge_kernel(const DecodeLaunch l) {
  ptx::grid_wait();
  const LambdaDecodeParams& p = l.p;
  const int64_t row = blockIdx.x;
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

}  // namespace

template <>
void run_op(const LambdaDecodeParams& params, const DeviceFacts& device, void* workspace,
            Stream stream) {
  const KernelPlan plan = plan_of(params, device);
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
  if (l.splits == 1) return;
  with_element_type(params.dtype, [&](auto element) {
    launch("lambda_decode_merge", lambda_decode_merge_kernel<decltype(element)>,
           {params.batch * params.heads_q, kMergeThreads, kMergeSharedBytes, plan.overlaps}, stream,
           l);
  });
}

}  // namespace lminf::cuda
