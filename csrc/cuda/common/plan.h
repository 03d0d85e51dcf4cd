// How calls are cut: tile sizes, splits, workspaces. Plain C++, so that a plan needs neither a GPU
// nor a CUDA compiler; what the kernels are compiled with is read off here too.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

#include "../../core/lambda_mask.h"
#include "../launchers.h"
#include "../prefill/sm90_tiles.h"

namespace lminf::cuda {

constexpr int64_t kMaxHeadDim = 2048;  // the plain kernels' rows and keys in 99 KiB
// The plain kernels keep whole rows of queries and outputs in shared memory, and pass over the dims
// of keys and values in pieces of so many. Past kManyDims they take fewer rows at a time.
constexpr int kPlainPiece = 128;
constexpr int64_t kManyDims = 512;

// Throws std::runtime_error when no launch takes so many blocks.
inline void check_blocks(const char* kernel, int64_t blocks) {
  constexpr int64_t kMaxBlocks = 2147483647;
  if (blocks > kMaxBlocks) {
    throw std::runtime_error(std::string(kernel) + ": needs " + std::to_string(blocks) +
                             " blocks, a launch takes at most " + std::to_string(kMaxBlocks) +
                             "; split the batch");
  }
}

inline void check_head_dim(const char* op, int64_t head_dim) {
  if (head_dim > kMaxHeadDim) {
    throw std::invalid_argument(std::string(op) + ": head dim is " + std::to_string(head_dim) +
                                ", but on CUDA it must be at most " + std::to_string(kMaxHeadDim));
  }
}

// Bytes of a part of a workspace.
inline int64_t aligned_up(int64_t bytes) { return ceil_div(bytes, 256) * 256; }

// Queries and keys of a block's tile.
struct TileSizes {
  int head_dim, block_m, block_n;
};

constexpr int kGlobalN = 16;  // keys of a far or near tile on tensor cores: n_global is 4 to 16
                              // in practice

// --- Prefill on tensor cores (prefill/sm80.cuh) ---

// Wanted: 32 rows a warp, so that a key fragment read from shared memory feeds two mma (shared
// memory keeps up with the tensor cores at a half of its rate); no spill at 255 registers, of which
// accumulators take block_m / warps * (D + block_n) / 32; two blocks an SM of sm_90, one of every
// sm_8x, whose smallest shared memory is 99 KiB.
constexpr TileSizes kSm80Tiles[] = {
    {64, 128, 64},   // 128 accumulators, 48 KiB of shared memory
    {80, 128, 64},   // 144, 60 KiB
    {96, 128, 64},   // 160, 72 KiB
    {128, 128, 48},  // 176, 80 KiB (64 keys spill; 48 also leave room for two blocks on sm_80)
    {256, 64, 32},   // 144, 96 KiB
};
constexpr int kSm80Warps = 4;
constexpr int kSm80Stages = 2;
constexpr int64_t kSm80MaxHeadDim = 256;

// Of the smallest kernel that covers a head dim: its missing columns are zeros.
constexpr TileSizes sm80_tiles(int64_t head_dim) {
  for (const TileSizes& tiles : kSm80Tiles) {
    if (head_dim <= tiles.head_dim) return tiles;
  }
  return {0, 0, 0};
}

constexpr int sm80_shared_bytes(TileSizes t) {
  return 2 * t.head_dim * (t.block_m + 2 * kSm80Stages * t.block_n) + kWalkBytes;
}

// --- Prefill on ordinary cores (prefill/plain.cu) ---

constexpr int kPlainWarps = 4;

constexpr TileSizes plain_tiles(int64_t head_dim) {  // a key for each lane
  return {0, head_dim <= kManyDims ? 16 : 4, 32};
}

struct PlainSharedSizes {
  static constexpr int kKeyPitch = kPlainPiece + 1;  // odd: the lanes' keys in different banks
  int rows, keys, weights;                           // floats
  LMINF_HD PlainSharedSizes(TileSizes tiles, int head_dim)
      : rows(tiles.block_m * head_dim),
        keys(tiles.block_n * kKeyPitch),
        weights(tiles.block_m * tiles.block_n) {}
  LMINF_HD int bytes() const { return 4 * (2 * rows + keys + weights) + kWalkBytes; }
};

// --- Keys rotated once, before either ---

// A contiguous [batch, heads, rows, D] tensor in the workspace.
struct Region {
  int64_t offset = 0, batch = 0, rows = 0;
  bool used() const { return batch > 0; }
};

// Which rotated keys the workspace holds, and where: those that some query meets, so that many keys
// before a few queries cost nothing.
struct AttnWorkspace {
  Region window, near, far;
  int64_t first_window_key = 0;  // of k, that the window region starts with
  bool far_per_row = false;      // far keys stand row by row as in k, not by position
  int64_t bytes = 0;
};
AttnWorkspace attn_workspace(const LambdaAttnParams& params);

constexpr int64_t element_bytes(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

inline bool own_globals(const LambdaAttnParams& p) { return p.global_k != nullptr; }

// Distances reach Sk - 1 inside k, and any value from global_k.
inline bool may_have_near(const LambdaAttnParams& p) {
  return p.n_global > 0 && p.max_distance > p.window && (own_globals(p) || p.seqlen_k > p.window);
}
inline bool may_have_far(const LambdaAttnParams& p) {
  return p.n_global > 0 && (own_globals(p) || p.seqlen_k > p.max_distance);
}

// Tiles of `tile_rows` queries of one batch entry and head.
inline int64_t query_tiles(const LambdaAttnParams& p, int tile_rows) {
  return p.cu_seqlens == nullptr ? ceil_div(p.seqlen_q, tile_rows)
                                 : p.seqlen_q / tile_rows + p.n_sequences;
}

// --- Decode ---

constexpr int kDecodeRows = 16;      // query heads of one key head in one tile
constexpr int kDecodeTileKeys = 16;  // keys a warp takes at a time

struct DecodeShape {
  AttnKernel kernel = AttnKernel::kPlain;
  int rows = kDecodeRows;  // query heads of a tile
  int threads = 0, shared_bytes = 0;
  int64_t head_tiles = 1;  // tiles per key head
  int64_t splits = 1;
  int64_t state_bytes = 0;      // of the splits' softmax states, at the workspace's start
  int64_t workspace_bytes = 0;  // of these and the splits' outputs
};
DecodeShape decode_shape(const LambdaDecodeParams& params, const DeviceFacts& device);

// Of the tensor-core kernels (decode/sm80.cu), the smallest that covers a head dim.
constexpr int decode_sm80_head_dim(int64_t head_dim) {
  return head_dim <= 64 ? 64 : head_dim <= 128 ? 128 : 256;
}
constexpr int decode_sm80_warps(int head_dim) { return head_dim <= 128 ? 4 : 2; }
constexpr int kDecodeSm80Blocks = 3;  // of a multiprocessor, as far as registers go
constexpr int kDecodeStages = 2;
constexpr int decode_sm80_warp_bytes(int head_dim) {  // a warp's stages of keys and values
  return kDecodeStages * 2 * kDecodeTileKeys * head_dim * 2;
}
constexpr int decode_sm80_shared_bytes(int head_dim) {
  constexpr int kState = 8;                  // a row's softmax state
  return (kDecodeRows + 2) * head_dim * 2 +  // the queries and the new token
         decode_sm80_warps(head_dim) * (decode_sm80_warp_bytes(head_dim) + kDecodeRows * kState);
}

// Of the plain kernel (decode/plain.cu): query heads of a tile, and their warps.
constexpr int decode_plain_rows(int64_t head_dim) {
  return head_dim <= kManyDims ? kDecodeRows : 4;
}
constexpr int decode_plain_warps(int rows) { return rows == kDecodeRows ? 4 : 2; }
constexpr int kDecodePlainBlocks = 4;

struct DecodePlainSharedSizes {
  static constexpr int kKeyPitch = kPlainPiece + 1;  // odd: the lanes' keys in different banks
  int rows, keys, weights;                           // floats
  LMINF_HD DecodePlainSharedSizes(int n_rows, int head_dim)
      : rows(n_rows * head_dim),
        keys(kDecodeTileKeys * kKeyPitch),
        weights(n_rows * kDecodeTileKeys) {}
  LMINF_HD int bytes(int head_dim) const { return 4 * (2 * rows + keys + weights + 2 * head_dim); }
};

}  // namespace lminf::cuda
