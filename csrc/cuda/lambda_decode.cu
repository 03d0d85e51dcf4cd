// The decode op: how many splits, which kernel, and the kernel that merges the splits:
//
//   out = sum_s w_s out_s / (sum_s w_s sum_s + sink),   w_s = 2^(max_s - max over s)
//
// Schedule of the merge: a block takes one query head; a thread owns dims and walks over the
// splits.
#include <stdexcept>

#include "lambda_decode.h"

namespace lminf::cuda {
namespace {

constexpr int kMergeThreads = 128;
constexpr int64_t kAlignment = 256;
constexpr int64_t kMaxTensorCoreHeadDim = 256;
constexpr int64_t kMaxHeadDim = 384;  // the plain kernel's rows and keys in 99 KiB
// Blocks per multiprocessor that keep its memory pipes busy, and rounds that a block's four warps
// should at least have between them, lest merging costs more than it wins.
constexpr int64_t kBlocksPerMultiprocessor = 4;
constexpr int64_t kLeastTiles = 8;

template <typename T>
__global__ void __launch_bounds__(kMergeThreads) lambda_decode_merge_kernel(const DecodeLaunch l) {
  const LambdaDecodeParams& p = l.p;
  const int64_t row = blockIdx.x;
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
void run_merge(const DecodeLaunch& l, Stream stream) {
  launch("lambda_decode_merge", lambda_decode_merge_kernel<T>,
         {l.p.batch * l.p.heads_q, kMergeThreads, 0}, stream, l);
}

bool aligned(const void* data, const Strides& s, bool has_rows = true) {
  return data == nullptr || (reinterpret_cast<uintptr_t>(data) % 16 == 0 && s.batch % 8 == 0 &&
                             s.head % 8 == 0 && (!has_rows || s.seq % 8 == 0));
}

DecodeLaunch plan(const LambdaDecodeParams& p, int multiprocessors) {
  DecodeLaunch l;
  l.p = p;
  l.head_tiles = ceil_div(p.heads_q / p.heads_kv, kDecodeRows);
  const int64_t most_tiles = ceil_div(min64(p.window, p.capacity), kDecodeTileKeys) +
                             ceil_div(p.n_global, kDecodeTileKeys);
  const int64_t blocks = max64(1, p.batch * p.heads_kv * l.head_tiles);
  const int64_t wanted = kBlocksPerMultiprocessor * multiprocessors / blocks;
  l.splits = max64(1, min64(wanted, most_tiles / kLeastTiles));
  return l;
}

int64_t state_bytes(const DecodeLaunch& l) {
  const int64_t bytes =
      l.p.batch * l.p.heads_q * l.splits * static_cast<int64_t>(sizeof(SoftmaxState));
  return ceil_div(bytes, kAlignment) * kAlignment;
}

}  // namespace

AttnKernel lambda_decode_kernel(const LambdaDecodeParams& p) {
  const bool tensor_core =
      p.dtype != DType::kFloat32 && p.head_dim % 8 == 0 && p.head_dim <= kMaxTensorCoreHeadDim &&
      aligned(p.q, p.q_stride, false) && aligned(p.k, p.k_stride, false) &&
      aligned(p.v, p.v_stride, false) && aligned(p.ring_k, p.ring_k_stride) &&
      aligned(p.ring_v, p.ring_v_stride) && aligned(p.global_k, p.global_k_stride) &&
      aligned(p.global_v, p.global_v_stride);
  return tensor_core ? AttnKernel::kTensorCore : AttnKernel::kPlain;
}

int64_t lambda_decode_workspace(const LambdaDecodeParams& params, int multiprocessors) {
  const DecodeLaunch l = plan(params, multiprocessors);
  if (l.splits == 1) return 0;
  return state_bytes(l) + params.batch * params.heads_q * l.splits * params.head_dim * 4;
}

void lambda_decode(const LambdaDecodeParams& params, int multiprocessors, void* workspace,
                   Stream stream) {
  if (params.head_dim > kMaxHeadDim) {
    throw std::invalid_argument("lambda_decode: head dim is " + std::to_string(params.head_dim) +
                                ", but on CUDA it must be at most " + std::to_string(kMaxHeadDim));
  }
  DecodeLaunch l = plan(params, multiprocessors);
  if (l.splits > 1) {
    l.partial_state = static_cast<SoftmaxState*>(workspace);
    l.partial_out = reinterpret_cast<float*>(static_cast<char*>(workspace) + state_bytes(l));
  }
  if (lambda_decode_kernel(params) == AttnKernel::kTensorCore) {
    lambda_decode_sm80(l, stream);
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
