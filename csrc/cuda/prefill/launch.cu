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

  const RowPositions as_keys = {RowPositions::kAsKeys, nullptr,           0, 0, params.k_start,
                                params.cu_seqlens,     params.n_sequences};
  const KeyTensor raw = {params.k, params.k_stride, params.seqlen_k, as_keys};
  const KeyTensor raw_globals = {
      params.global_k, params.global_k_stride, params.n_global, {RowPositions::kByPosition}};
  AttnSources sources;
  sources.p = params;
  sources.ready[kWindow] = true;
  sources.ready[kNear] = may_have_near(params);
  sources.ready[kFar] = may_have_far(params);
  sources.k[kWindow] = raw;

  const AttnWorkspace w = attn_workspace(params);
  RotateParams rotate;
  rotate.dtype = params.dtype;
  rotate.heads = params.heads_kv;
  rotate.head_dim = params.head_dim;
  rotate.rope = params.rope;
  // Rotated keys, row by row at `positions`, in their region of the workspace.
  auto rotated = [&](const Region& region, const KeyTensor& from, RowPositions positions) {
    KeyTensor made;
    made.data = static_cast<char*>(workspace) + region.offset;
    made.rows = region.rows;
    made.stride.seq = params.head_dim;
    made.stride.head = region.rows * made.stride.seq;
    made.stride.batch = params.heads_kv * made.stride.head;
    made.positions = positions;
    rotate.x = from.data;
    rotate.x_stride = from.stride;
    if (positions.kind == RowPositions::kBySequence) rotate.x_stride.batch = 0;
    rotate.x_rows = from.rows;
    rotate.out = const_cast<void*>(made.data);
    rotate.out_stride = made.stride;
    rotate.batch = region.batch;
    rotate.rows = region.rows;
    rotate.positions = positions;
    if (rotate.rows > 0 && rotate.batch > 0) rotate_rows(rotate, stream);
    return made;
  };
  // Global keys stand by position once rotated, unless there would be more of them than keys.
  const KeyTensor& from = own_globals(params) ? raw_globals : raw;
  sources.k[kNear] = sources.k[kFar] = from;
  RowPositions globals = from.positions;
  if (!own_globals(params)) {
    globals.kind = w.far_per_row                  ? RowPositions::kAsKeys
                   : params.cu_seqlens != nullptr ? RowPositions::kBySequence
                                                  : RowPositions::kByPosition;
  }

  if (w.window.used()) {
    RowPositions positions = as_keys;
    positions.first = w.first_window_key;
    rotate.copied_rows = params.k_rotated;
    sources.k[kWindow] = rotated(w.window, raw, positions);
    rotate.copied_rows = 0;
  }
  if (w.near.used()) {
    sources.k[kNear] = rotated(w.near, from, globals);
  } else if (!own_globals(params)) {
    sources.k[kNear] = sources.k[kWindow];
  }
  if (w.far.used()) {
    rotate.least_position = rotate.max_position = -min64(params.max_distance, kUnbounded);
    rotate.rope.scaling = params.rope.scaling * params.rope.scaling;
    sources.k[kFar] = rotated(w.far, from, globals);
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
