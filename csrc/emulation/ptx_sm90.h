// Host bodies of csrc/cuda/ptx_sm90.cuh, from the PTX ISA's description of each instruction.
//
//   - Two views of shared memory: what ordinary loads and stores see, and what wgmma and TMA see.
//     TMA writes both; ordinary stores reach the other view with fence_proxy_async.
//   - A TMA load lands when no thread can run (in a seeded schedule, at any moment). Until then its
//     bytes are NaN, and a wgmma, TMA store, ldmatrix or second load that touches them is a fault.
//   - A wgmma reads its operands and lands its results at the wait that covers it (in a seeded
//     schedule, its operands are read as soon as all four warps have issued it, now and then).
//     Until then its accumulators are NaN. Whoever changes them, its A registers, or loads over its
//     operands in the meantime is reported.
//   - A TMA store reads its source at the wait that covers it (seeded: at once, now and then).
#pragma once

#include <cstddef>
#include <cstdint>

#include "runtime.h"

namespace lminf::emulation {

struct alignas(64) TensorMap {
  uint64_t magic;
  const unsigned char* base;
  uint64_t size[4];          // elements
  uint64_t stride_bytes[3];  // of dimensions 1 to 3
  uint32_t box[4];
  uint32_t swizzle_bytes;  // 16: none
};
static_assert(sizeof(TensorMap) == 128, "as large as the real one");

TensorMap encode_tensor_map(const void* base, const uint64_t (&size)[4],
                            const uint64_t (&stride_bytes)[3], const uint32_t (&box)[4],
                            int swizzle_bytes);

struct Coordinates {
  int at[4];  // (dim, row, head, batch)
};

void mbarrier_init(Site site, uint32_t barrier, int arrivals);
void fence_barrier_init();
void mbarrier_arrive(Site site, uint32_t barrier, int expected_bytes);
void mbarrier_wait(Site site, uint32_t barrier, int parity);

void tma_load(Site site, uint32_t target, const TensorMap& map, uint32_t barrier,
              Coordinates coordinates);
void tma_store(Site site, const TensorMap& map, uint32_t source, Coordinates coordinates);
void tma_store_commit();
void tma_store_wait(int newest_groups_left, bool read_only);
void bulk_load(Site site, uint32_t target, const void* source, int bytes, uint32_t barrier);
void fence_proxy_async();

// `d`: n / 2 accumulators. `a_registers`: four, or null for A in shared memory.
void wgmma(Site site, float* d, int n, const uint32_t* a_registers, uint64_t a, bool a_mn_major,
           uint64_t b, bool b_mn_major, bool accumulate, bool is_bf16);
void wgmma_fence(Site site);
void wgmma_commit(Site site);
void wgmma_wait(int newest_groups_left);
// Faults when a wgmma that no wait has covered yet has accumulators there.
void check_landed(const void* registers, size_t bytes);

// stmatrix.sync.aligned.m8n8.x4[.trans].shared.b16
void store_matrices(uint32_t row_address, const uint32_t (&r)[4], bool transposed);
void named_barrier_arrive(Site site, unsigned id, unsigned threads);
bool elect_one(Site site);
void set_registers(int registers, bool increase);
void grid_wait();

}  // namespace lminf::emulation
