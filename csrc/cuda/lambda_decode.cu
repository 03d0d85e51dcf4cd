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
