// Tile sizes of the Hopper prefill (prefill/sm90.cuh) and the boxes that it takes from its tensors,
// for the kernel and for plans. Plain C++.
#pragma once

#include <cstdint>

#include "../../params.h"
#include "../ptx/tensor_map_shape.h"

namespace lminf::cuda {

constexpr int kWalkBytes = 640;  // a BlockWalk (prefill/sources.cuh)

struct Sm90Tiles {
  int head_dim;
  int block_m;  // queries: 64 for each consumer warpgroup
  int block_n;  // keys of a window tile
  int stages;   // of the K ring and of the V ring
  int q_slots;  // tiles of queries in shared memory: two, where they fit, so that the next one and
                // its first keys come in while this one ends
};

// The arithmetic, for 16-bit elements.
// Registers of a consumer's thread: D / 2 outputs and N / 2 scores in float32, and N / 4 pairs of
// the tile before's weights, all three alive at once, beside about 40 others.
// Shared memory: 2 D (q_slots M + 2 stages N), of the 227 KiB that a block may have.
// Operations: 4 M N D a tile, on 4 N D bytes of keys and values: M of them a byte from the second
// cache level. Cycles of the tensor cores (4096 operations a cycle) and of the exponentials (16 a
// cycle), the least that a tile takes:
//   D     M    N   registers      shared memory  tensor cores  exponentials
//   64   128  128   32 + 64 + 32     160 KiB         1024          1024
//   128  128  128   64 + 64 + 32     192 KiB         2048          1024
//   256  128   48  128 + 24 + 12     208 KiB         1536           384    (64 keys spill)
// Keys that a query sees / keys that it meets, n_global 16 and queries far from either end; tiles
// of 48 keys do not line up with those of queries, so theirs is a mean:
//   window      256            1024             4096
//   N = 128  272 / 400 68%  1040 / 1168 89%  4112 / 4240 97%
//   N = 48   272 / 432 63%  1040 / 1200 87%  4112 / 4272 96%
// A third consumer (M = 192, two q slots) would meet 1296 keys at window 1024, 11% more, and leave
// a thread 160 registers where 128 are taken by D = 64; what it saves, a third of the traffic from
// the second cache level, does not bind (benchmarks/README.md). So there are two everywhere.
constexpr Sm90Tiles kSm90Tiles[] = {
    {64, 128, 128, 4, 2},
    {128, 128, 128, 2, 2},
    {256, 128, 48, 3, 1},
};
constexpr int64_t kSm90MaxHeadDim = 256;
constexpr int kSm90Consumers = 2;                         // warpgroups that multiply
constexpr int kSm90Threads = 128 * (1 + kSm90Consumers);  // and one that loads and stores
constexpr int kSm90BarrierBytes = 256;

// A thread's registers, which setmaxnreg shares out in eights. The launch takes 168 for each of 384
// threads, the most that fit 65,536; the producer gives away what it does not need.
constexpr int kSm90LaunchRegisters = 65536 / kSm90Threads / 8 * 8;
constexpr int kSm90ProducerRegisters = 72;
constexpr int kSm90ConsumerRegisters = 216;
static_assert(kSm90ProducerRegisters + kSm90Consumers * kSm90ConsumerRegisters <=
                  (1 + kSm90Consumers) * kSm90LaunchRegisters,
              "no more than the launch took");

// Of the smallest kernel that covers a head dim: its missing columns are zeros.
constexpr Sm90Tiles sm90_tiles(int64_t head_dim) {
  for (const Sm90Tiles& tiles : kSm90Tiles) {
    if (head_dim <= tiles.head_dim) return tiles;
  }
  return {0, 0, 0, 0, 0};
}

constexpr int sm90_shared_bytes(Sm90Tiles t) {
  return 2 * t.head_dim * (t.q_slots * t.block_m + 2 * t.stages * t.block_n) +
         t.q_slots * kWalkBytes + kSm90BarrierBytes;
}

constexpr int kPanel = 64;  // columns: 128 bytes, the width of a swizzled TMA box

inline TensorMapShape sm90_map_shape(const void* data, const Strides& stride, int64_t batch,
                                     int64_t heads, int64_t rows, int64_t head_dim, int box_rows) {
  return {data,
          {head_dim, rows, heads, batch},
          {1, stride.seq, stride.head, stride.batch},
          {kPanel, box_rows, 1, 1},
          Swizzle::k128};
}

}  // namespace lminf::cuda
