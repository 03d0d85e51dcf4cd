// Tile sizes of the Hopper prefill (lambda_attn_sm90.cuh), for the kernel and for plans. Plain C++.
#pragma once

#include <cstdint>

namespace lminf::cuda {

struct Sm90Tiles {
  int head_dim;
  int block_m;  // queries: 64 for each consumer warpgroup
  int block_n;  // keys of a window tile
  int stages;   // of the K ring and of the V ring
  int q_slots;  // tiles of queries in shared memory: two, where they fit, so that the next one and
                // its first keys come in while this one ends
};

// The arithmetic, for 16-bit elements. Accumulators are float32 registers of a consumer's thread:
// out D / 2, scores N / 2, and the tile before's weights N / 4, all three alive at once.
// Shared memory is 2 D (q_slots M + 2 stages N), of 227 KiB a block may have. A tile is 4 M N D
// operations in 4 N D bytes of keys and values, so M operations a byte from the second cache level,
// of which a multiprocessor takes about 40 bytes a cycle and here asks 32. Cycles a tile takes of
// the tensor cores (4096 operations a cycle) and of the exponentials (16 a cycle):
//   D     M    N   registers       shared memory  tensor cores  exponentials
//   64   128  128   32 + 64 + 32       160 KiB        1024          1024
//   128  128  128   64 + 64 + 32       192 KiB        2048          1024
//   256  128   64  128 + 32 + 16       192 KiB        2048           512
// Keys that the queries of a tile see / keys that they meet, n_global 16, far from either end:
//   window          256          1024          4096
//   N = 128      272 / 400   1040 / 1168   4112 / 4240      68%, 89%, 97%
//   N = 64       272 / 400   1040 / 1168   4112 / 4240      the edges are M + N - 64 wide
// A third consumer (M = 192) would meet 1360 keys at window 1024, 16% more, and leave 160 registers
// to a thread; it would save a third of the traffic from the second cache level, which does not
// bind. So there are two everywhere.
constexpr Sm90Tiles kSm90Tiles[] = {
    {64, 128, 128, 4, 2},
    {128, 128, 128, 2, 2},
    {256, 128, 48, 3, 1},
};
constexpr int64_t kSm90MaxHeadDim = 256;
constexpr int kSm90Consumers = 2;                         // warpgroups that multiply
constexpr int kSm90Threads = 128 * (1 + kSm90Consumers);  // and one that loads and stores
constexpr int kSm90PlanBytes = 640;                       // what a tile of queries meets, each slot
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
         t.q_slots * kSm90PlanBytes + kSm90BarrierBytes;
}

}  // namespace lminf::cuda
