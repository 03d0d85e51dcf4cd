#include "plan.h"

namespace lminf::cuda {
namespace {

constexpr int kWarpSize = 32;
// Tiles that a block's four warps should at least have between them, lest merging costs more than
// it wins.
constexpr int64_t kLeastTiles = 8;

// Whether all rows start at a multiple of 16 bytes. A tensor of one row has none to step to.
bool aligned(const void* data, const Strides& s, bool has_rows = true) {
  return data == nullptr || (reinterpret_cast<uintptr_t>(data) % 16 == 0 && s.batch % 8 == 0 &&
                             s.head % 8 == 0 && (!has_rows || s.seq % 8 == 0));
}

bool fits_tensor_cores(DType dtype, int64_t head_dim) {
  return dtype != DType::kFloat32 && head_dim % 8 == 0 && head_dim <= kSm80MaxHeadDim;
}

// Of what the tensor cores cover, what the kernel for Hopper does. Keys that the pre-pass rotates
// are read from where it writes them. TMA brings whole tiles of global tokens: only with a window
// as long as a tile no slot that holds nothing yet stands beside one that a query sees.
bool hopper_covers(const LambdaAttnParams& p) {
  auto fits_tma = [&](const void* data, const Strides& stride, int64_t heads, int64_t rows) {
    return data == nullptr || rows == 0 ||
           tensor_map_problem(sm90_map_shape(data, stride, p.batch, heads, rows, p.head_dim, 1)) ==
               nullptr;
  };
  const bool raw_keys = p.rope.rotary_dim == 0;
  return p.cu_seqlens == nullptr && !p.score.has_table() &&
         (!own_globals(p) || p.window >= kGlobalN) && p.head_dim <= kSm90MaxHeadDim &&
         fits_tma(p.q, p.q_stride, p.heads_q, p.seqlen_q) &&
         fits_tma(p.out, p.out_stride, p.heads_q, p.seqlen_q) &&
         fits_tma(p.v, p.v_stride, p.heads_kv, p.seqlen_k) &&
         fits_tma(p.global_v, p.global_v_stride, p.heads_kv, p.n_global) &&
         (!raw_keys || (fits_tma(p.k, p.k_stride, p.heads_kv, p.seqlen_k) &&
                        fits_tma(p.global_k, p.global_k_stride, p.heads_kv, p.n_global)));
}

// Blocks of a multiprocessor that its shared memory has room for, 1 KiB of each the system's.
int64_t blocks_in_shared(const DeviceFacts& device, int shared_bytes) {
  int kibibytes = 100;
  switch (device.capability) {
    case 80:
    case 87:
      kibibytes = 164;
      break;
    case 90:
    case 100:
    case 103:
    case 110:
      kibibytes = 228;
  }
  return max64(1, 1024 * kibibytes / (shared_bytes + 1024));
}

}  // namespace

const char* name_of(AttnKernel kernel) {
  switch (kernel) {
    case AttnKernel::kSm90:
      return "sm90";
    case AttnKernel::kSm80:
      return "sm80";
    case AttnKernel::kPlain:
      return "plain";
  }
  return "unknown";
}

AttnKernel lambda_attn_kernel(const LambdaAttnParams& p, const DeviceFacts& device) {
  const bool tensor_core = fits_tensor_cores(p.dtype, p.head_dim) && aligned(p.q, p.q_stride) &&
                           aligned(p.k, p.k_stride) && aligned(p.v, p.v_stride) &&
                           aligned(p.global_k, p.global_k_stride) &&
                           aligned(p.global_v, p.global_v_stride) && aligned(p.out, p.out_stride);
  if (!tensor_core) return AttnKernel::kPlain;
  const bool hopper = device.capability == 90 && device.has_sm90a && hopper_covers(p);
  return hopper ? AttnKernel::kSm90 : AttnKernel::kSm80;
}

AttnKernel lambda_decode_kernel(const LambdaDecodeParams& p) {
  const bool tensor_core =
      fits_tensor_cores(p.dtype, p.head_dim) && aligned(p.q, p.q_stride, false) &&
      aligned(p.k, p.k_stride, false) && aligned(p.v, p.v_stride, false) &&
      aligned(p.ring_k, p.ring_k_stride) && aligned(p.ring_v, p.ring_v_stride) &&
      aligned(p.global_k, p.global_k_stride) && aligned(p.global_v, p.global_v_stride);
  return tensor_core ? AttnKernel::kSm80 : AttnKernel::kPlain;
}

AttnWorkspace attn_workspace(const LambdaAttnParams& p) {
  AttnWorkspace w;
  if (p.rope.rotary_dim == 0) return w;
  auto add = [&](Region& region, int64_t batch, int64_t rows) {
    region = {w.bytes, batch, rows};
    w.bytes += aligned_up(batch * p.heads_kv * rows * p.head_dim * element_bytes(p.dtype));
  };
  // Positions may start anywhere; which keys the windows reach does not depend on it.
  w.first_window_key = window_branch({0, p.seqlen_k}, p.window)
                           .visible_keys({p.seqlen_k - p.seqlen_q, p.seqlen_k})
                           .lo;
  add(w.window, p.batch, p.seqlen_k - w.first_window_key);
  if (own_globals(p)) {
    if (may_have_near(p)) add(w.near, p.batch, p.n_global);
    if (may_have_far(p)) add(w.far, p.batch, p.n_global);
    return w;
  }
  const int64_t globals = min64(p.n_global, p.seqlen_k);
  if (may_have_near(p) && w.first_window_key > 0) add(w.near, p.batch, globals);
  if (may_have_far(p)) {
    w.far_per_row = p.cu_seqlens != nullptr && p.n_sequences * globals > p.seqlen_k;
    const int64_t worlds = p.cu_seqlens != nullptr && !w.far_per_row ? p.n_sequences : p.batch;
    add(w.far, worlds, w.far_per_row ? p.seqlen_k : globals);
  }
  return w;
}

template <>
KernelPlan plan_of(const LambdaAttnParams& p, const DeviceFacts& device) {
  check_head_dim("lambda_attn", p.head_dim);
  KernelPlan plan;
  if (p.batch == 0 || p.heads_q == 0 || p.seqlen_q == 0) return plan;
  const AttnKernel kernel = lambda_attn_kernel(p, device);
  TileSizes tiles = plain_tiles(p.head_dim);
  switch (kernel) {
    case AttnKernel::kSm90: {
      const Sm90Tiles own = sm90_tiles(p.head_dim);
      tiles = {own.head_dim, own.block_m, own.block_n};
      plan.threads = kSm90Threads;
      plan.shared_bytes = sm90_shared_bytes(own);
      break;
    }
    case AttnKernel::kSm80:
      tiles = sm80_tiles(p.head_dim);
      plan.threads = kSm80Warps * kWarpSize;
      plan.shared_bytes = sm80_shared_bytes(tiles);
      break;
    case AttnKernel::kPlain:
      plan.threads = kPlainWarps * kWarpSize;
      plan.shared_bytes = PlainSharedSizes(tiles, static_cast<int>(p.head_dim)).bytes();
      break;
  }
  plan.kernel = name_of(kernel);
  plan.block_m = tiles.block_m;
  plan.block_n = tiles.block_n;
  plan.blocks = query_tiles(p, tiles.block_m) * p.heads_q * p.batch;
  if (kernel == AttnKernel::kSm90) plan.blocks = min64(plan.blocks, device.multiprocessors);
  check_blocks("lambda_attn", plan.blocks);
  plan.workspace_bytes = attn_workspace(p).bytes;
  return plan;
}

DecodeShape decode_shape(const LambdaDecodeParams& p, const DeviceFacts& device) {
  DecodeShape shape;
  shape.kernel = lambda_decode_kernel(p);
  const int head_dim = static_cast<int>(p.head_dim);
  int most_blocks = kDecodePlainBlocks;
  if (shape.kernel == AttnKernel::kSm80) {
    const int built = decode_sm80_head_dim(head_dim);
    shape.threads = decode_sm80_warps(built) * kWarpSize;
    shape.shared_bytes = decode_sm80_shared_bytes(built);
    most_blocks = kDecodeSm80Blocks;
  } else {
    shape.rows = decode_plain_rows(head_dim);
    shape.threads = decode_plain_warps(shape.rows) * kWarpSize;
    shape.shared_bytes = DecodePlainSharedSizes(shape.rows, head_dim).bytes(head_dim);
  }
  shape.head_tiles = ceil_div(p.heads_q / p.heads_kv, shape.rows);

  // As many blocks as the device holds at once: those of a second round would only begin to ask for
  // keys when the first ones are done. Rounded up, so that no warp takes a round more than another.
  const int64_t most_tiles = ceil_div(min64(p.window, p.capacity), kDecodeTileKeys) +
                             ceil_div(p.n_global, kDecodeTileKeys);
  const int64_t useful = most_tiles < 2 * kLeastTiles ? 1 : ceil_div(most_tiles, kLeastTiles);
  const int64_t blocks = max64(1, p.batch * p.heads_kv * shape.head_tiles);
  const int64_t resident = min64(most_blocks, blocks_in_shared(device, shape.shared_bytes));
  shape.splits = max64(1, min64(resident * device.multiprocessors / blocks, useful));
  if (shape.splits > 1) {
    constexpr int64_t kStateBytes = 8;
    const int64_t parts = p.batch * p.heads_q * shape.splits;
    shape.state_bytes = aligned_up(parts * kStateBytes);
    shape.workspace_bytes = shape.state_bytes + parts * p.head_dim * 4;
  }
  return shape;
}

template <>
KernelPlan plan_of(const LambdaDecodeParams& p, const DeviceFacts& device) {
  check_head_dim("lambda_decode", p.head_dim);
  KernelPlan plan;
  if (p.batch == 0 || p.heads_q == 0) return plan;
  const DecodeShape shape = decode_shape(p, device);
  plan.kernel = name_of(shape.kernel);
  plan.block_m = shape.rows;
  plan.block_n = kDecodeTileKeys;
  plan.splits = shape.splits;
  plan.overlaps = device.overlaps_launches() && shape.splits > 1;
  plan.blocks = p.batch * p.heads_kv * shape.head_tiles * shape.splits;
  check_blocks("lambda_decode", plan.blocks);
  plan.threads = shape.threads;
  plan.shared_bytes = shape.shared_bytes;
  plan.workspace_bytes = shape.workspace_bytes;
  return plan;
}

}  // namespace lminf::cuda
