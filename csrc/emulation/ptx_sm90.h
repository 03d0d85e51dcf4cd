// Host bodies of csrc/cuda/ptx/sm90.cuh, from the PTX ISA's description of each instruction.
//
//   - Shared memory has two views: ordinary loads and stores see one, wgmma and TMA the other. TMA
//     writes both; fence_proxy_async brings ordinary stores to the other. A wgmma or TMA store
//     whose operands differ between the two is a fault.
//   - A TMA load lands and a wgmma ends when no thread can run (in a seeded schedule, at any
//   moment),
//     loads before wgmmas. Until a load has landed its bytes are NaN, and a wgmma, TMA store or
//     second load that touches them is a fault.
//   - A wgmma reads its operands when it ends; its results land at the wait that covers it. Until
//     then its accumulators are NaN; whoever changes them or its A registers, or loads over its
//     operands, is reported.
//   - A TMA store reads its source at the wait that covers it (in a seeded schedule maybe at once).
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

#include "../ptx_layout.h"
#include "runtime.h"

namespace lminf::emulation {

struct alignas(64) TensorMap : ptx_layout::TensorMap {};
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
bool elect_one(Site site);

// What launch.cpp asks of the copy engine and the tensor cores.
namespace engines {

void start_block();
bool step();  // ends one load or wgmma; false when none can
void end_block();
std::string report();  // for a deadlock: every mbarrier's state

}  // namespace engines
}  // namespace lminf::emulation
