// The prefill op: rotates the keys that some query meets once into the workspace, then runs the
// kernel that covers the parameters.
//
//   window keys   R(j) k_j * scaling
//   near keys     R(j) k_j * scaling       apart only where the window keys do not hold them
//   far keys      R(-L) k_j * scaling^2    they meet raw queries: both factors are here
#include "../common/plan.h"
#include "../rope/rotate_rows.h"
#include "launch.h"

namespace lminf::cuda {

template <>
void run_op(const LambdaAttnParams& params, const DeviceFacts& device, void* workspace,
            Stream stream) {
  if (plan_of(params, device).blocks == 0) return;

  AttnSources sources;
  sources.p = params;
  sources.has_near = may_have_near(params);
  sources.has_far = may_have_far(params);
  const KeyTensor raw{params.k, params.k_stride, params.seqlen_k};
  const KeyTensor raw_globals{params.global_k, params.global_k_stride, params.n_global, true};
  sources.window_k = raw;
  sources.near_k = sources.far_k = own_globals(params) ? raw_globals : raw;

  const AttnWorkspace w = attn_workspace(params);
  RotateParams rotate;
  rotate.dtype = params.dtype;
  rotate.heads = params.heads_kv;
  rotate.head_dim = params.head_dim;
  rotate.rope = params.rope;
  auto run = [&](const Region& region, const KeyTensor& from) {
    KeyTensor made = from;
    made.data = static_cast<char*>(workspace) + region.offset;
    made.rows = region.rows;
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
    rotate.x_rows = from.rows;
    if (rotate.rows > 0 && rotate.batch > 0) rotate_rows(rotate, stream);
    return made;
  };

  if (w.window.used()) {
    KeyTensor seen = raw;
    seen.first = rotate.first_row = w.first_window_key;
    seen.rows -= seen.first;
    seen.data = static_cast<const char*>(raw.data) +
                seen.first * raw.stride.seq * element_bytes(params.dtype);
    rotate.copied_rows = max64(0, params.k_rotated - seen.first);
    rotate.start = params.k_start;
    rotate.cu_seqlens = params.cu_seqlens;
    rotate.n_sequences = params.n_sequences;
    sources.window_k = run(w.window, seen);
    rotate.copied_rows = rotate.first_row = 0;
  }
  if (!own_globals(params)) sources.near_k = sources.window_k;
  if (w.near.used() && own_globals(params)) {
    rotate.start = nullptr;
    sources.near_k = run(w.near, raw_globals);
  } else if (w.near.used()) {
    rotate.rows_are_positions = true;
    sources.near_k = run(w.near, raw);
    sources.near_k.by_position = true;
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

  const bool is_bf16 = params.dtype == DType::kBFloat16;
  switch (lambda_attn_kernel(params, device)) {
    case AttnKernel::kSm90:
      if (is_bf16 ? lambda_attn_sm90_bf16(sources, device.multiprocessors, stream)
                  : lambda_attn_sm90_fp16(sources, device.multiprocessors, stream)) {
        return;
      }
      [[fallthrough]];  // what TMA does not take, the other kernel reads by itself
    case AttnKernel::kSm80:
      return is_bf16 ? lambda_attn_sm80_bf16(sources, stream)
                     : lambda_attn_sm80_fp16(sources, stream);
    case AttnKernel::kPlain:
      return lambda_attn_plain(sources, stream);
  }
}

}  // namespace lminf::cuda
