// The prefill op: rotates the keys once into the workspace, then runs the kernel that covers the
// parameters.
//
//   window keys, near keys   R(j) k_j * scaling       (near keys only when global_k is given apart)
//   far keys                 R(-L) k_j * scaling^2    (they meet raw queries: both factors are
//   here)
#include <stdexcept>

#include "lambda_attn.h"
#include "rotate_rows.h"

namespace lminf::cuda {
namespace {

constexpr int64_t kAlignment = 256;
constexpr int64_t kMaxTensorCoreHeadDim = 256;
constexpr int64_t kMaxHeadDim = 384;  // the plain kernel's rows and keys in 99 KiB

int64_t element_bytes(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

bool aligned(const void* data, const Strides& s) {
  return data == nullptr || (reinterpret_cast<uintptr_t>(data) % 16 == 0 && s.batch % 8 == 0 &&
                             s.head % 8 == 0 && s.seq % 8 == 0);
}

// A contiguous [batch, heads, rows, D] tensor in the workspace.
struct Region {
  int64_t offset = 0, batch = 0, rows = 0;
  bool used() const { return batch > 0; }
};

// Which rotated keys the workspace holds, and where.
struct Workspace {
  Region window, near, far;
  bool far_per_row = false;  // far keys stand row by row as in k, not by position
  int64_t bytes = 0;
};

bool own_globals(const LambdaAttnParams& p) { return p.global_k != nullptr; }

// Distances reach Sk - 1 inside k, and any value from global_k.
bool may_have_near(const LambdaAttnParams& p) {
  return p.n_global > 0 && p.max_distance > p.window && (own_globals(p) || p.seqlen_k > p.window);
}
bool may_have_far(const LambdaAttnParams& p) {
  return p.n_global > 0 && (own_globals(p) || p.seqlen_k > p.max_distance);
}

Workspace plan_workspace(const LambdaAttnParams& p) {
  Workspace w;
  if (p.rope.rotary_dim == 0) return w;
  auto add = [&](Region& region, int64_t batch, int64_t rows) {
    region = {w.bytes, batch, rows};
    const int64_t bytes = batch * p.heads_kv * rows * p.head_dim * element_bytes(p.dtype);
    w.bytes += ceil_div(bytes, kAlignment) * kAlignment;
  };
  add(w.window, p.batch, p.seqlen_k);
  if (own_globals(p)) {
    if (may_have_near(p)) add(w.near, p.batch, p.n_global);
    if (may_have_far(p)) add(w.far, p.batch, p.n_global);
  } else if (may_have_far(p)) {
    const int64_t globals = min64(p.n_global, p.seqlen_k);
    w.far_per_row = p.cu_seqlens != nullptr && p.n_sequences * globals > p.seqlen_k;
    const int64_t worlds = p.cu_seqlens != nullptr && !w.far_per_row ? p.n_sequences : p.batch;
    add(w.far, worlds, w.far_per_row ? p.seqlen_k : globals);
  }
  return w;
}

}  // namespace

const char* name_of(AttnKernel kernel) {
  switch (kernel) {
    case AttnKernel::kTensorCore:
      return "sm80";
    case AttnKernel::kPlain:
      return "plain";
  }
  return "unknown";
}

AttnKernel lambda_attn_kernel(const LambdaAttnParams& p) {
  const bool tensor_core = p.dtype != DType::kFloat32 && p.head_dim % 8 == 0 &&
                           p.head_dim <= kMaxTensorCoreHeadDim && aligned(p.q, p.q_stride) &&
                           aligned(p.k, p.k_stride) && aligned(p.v, p.v_stride) &&
                           aligned(p.global_k, p.global_k_stride) &&
                           aligned(p.global_v, p.global_v_stride) && aligned(p.out, p.out_stride);
  return tensor_core ? AttnKernel::kTensorCore : AttnKernel::kPlain;
}

int64_t lambda_attn_workspace(const LambdaAttnParams& params) {
  return plan_workspace(params).bytes;
}

void lambda_attn(const LambdaAttnParams& params, void* workspace, Stream stream) {
  if (params.head_dim > kMaxHeadDim) {
    throw std::invalid_argument("lambda_attn: head dim is " + std::to_string(params.head_dim) +
                                ", but on CUDA it must be at most " + std::to_string(kMaxHeadDim));
  }
  if (params.batch == 0 || params.heads_q == 0 || params.seqlen_q == 0) return;

  AttnSources sources;
  sources.p = params;
  sources.has_near = may_have_near(params);
  sources.has_far = may_have_far(params);
  const KeyTensor raw{params.k, params.k_stride, false, false};
  const KeyTensor raw_globals{params.global_k, params.global_k_stride, true, false};
  sources.window_k = raw;
  sources.near_k = sources.far_k = own_globals(params) ? raw_globals : raw;

  const Workspace w = plan_workspace(params);
  RotateParams rotate;
  rotate.dtype = params.dtype;
  rotate.heads = params.heads_kv;
  rotate.head_dim = params.head_dim;
  rotate.rope = params.rope;
  auto run = [&](const Region& region, const KeyTensor& from) {
    KeyTensor made = from;
    made.data = static_cast<char*>(workspace) + region.offset;
    made.stride.seq = params.head_dim;
    made.stride.head = region.rows * made.stride.seq;
    made.stride.batch = params.heads_kv * made.stride.head;
    rotate.x = from.data;
    rotate.x_stride = from.stride;
    if (params.cu_seqlens != nullptr)
      rotate.x_stride.batch = 0;  // all sequences stand in one entry
    rotate.out = const_cast<void*>(made.data);
    rotate.out_stride = made.stride;
    rotate.batch = region.batch;
    rotate.rows = region.rows;
    rotate.x_rows = from.by_position ? params.n_global : params.seqlen_k;
    if (rotate.rows > 0 && rotate.batch > 0) rotate_rows(rotate, stream);
    return made;
  };

  if (w.window.used()) {
    rotate.copied_rows = params.k_rotated;
    rotate.start = params.k_start;
    rotate.cu_seqlens = params.cu_seqlens;
    rotate.n_sequences = params.n_sequences;
    sources.window_k = run(w.window, raw);
    rotate.copied_rows = 0;
  }
  if (!own_globals(params)) sources.near_k = sources.window_k;
  if (w.near.used()) {
    rotate.start = nullptr;
    sources.near_k = run(w.near, raw_globals);
  }
  if (w.far.used()) {
    rotate.has_fixed_position = true;
    rotate.fixed_position = -min64(params.max_distance, kUnbounded);
    rotate.rope.scaling = params.rope.scaling * params.rope.scaling;
    if (own_globals(params)) {
      rotate.start = nullptr;
      sources.far_k = run(w.far, raw_globals);
    } else {
      rotate.rows_are_positions = !w.far_per_row;
      sources.far_k = run(w.far, raw);
      sources.far_k.by_position = !w.far_per_row;
      sources.far_k.by_sequence = params.cu_seqlens != nullptr && !w.far_per_row;
    }
  }

  if (lambda_attn_kernel(params) == AttnKernel::kPlain) return lambda_attn_plain(sources, stream);
  switch (params.dtype) {
    case DType::kBFloat16:
      return lambda_attn_sm80_bf16(sources, stream);
    case DType::kFloat16:
      return lambda_attn_sm80_fp16(sources, stream);
    default:
      throw std::invalid_argument("lambda_attn: no tensor-core kernel for this dtype");
  }
}

}  // namespace lminf::cuda
