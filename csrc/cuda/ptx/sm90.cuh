// The inline PTX of sm_90a: mbarriers, bulk tensor copies (TMA), wgmma, and what orders them. Each
// wrapper has a host body written from the PTX ISA's text, which csrc/emulation runs;
// csrc/tests/ptx_sm90_test.cu holds the two together.
//
// Building. wgmma and setmaxnreg exist for the target sm_90a alone. A kernel that uses this file
// keeps its body between `#if LMINF_SM90A` and `#else __trap(); #endif`, so that the same .cu
// compiles for every other architecture of the list; setup.py builds 9.0 as 9.0a and then defines
// LMINF_WITH_SM90A for the launchers, which is how they know that the kernel is there.
//
// Order of things, which the emulation checks:
//   - mbarrier_init by one thread, then fence_barrier_init, then a barrier of the block;
//   - shared memory written by ordinary stores (stmatrix too) and then read by wgmma or tma_store:
//     fence_proxy_async in each writing thread, then a barrier, then the reader. What TMA wrote
//     needs no fence, only the wait on its mbarrier;
//   - wgmma_fence before the first wgmma of each group, after the last change of its registers;
//     wgmma_commit after its last one; wgmma_wait before anything touches the accumulators, the A
//     registers (which must stay alive until then) or writes over the operands in shared memory;
//   - a thread that committed TMA stores ends only after tma_store_wait_read<0>.
#pragma once

#include <cstdint>
#include <type_traits>

#include "../common/device.cuh"
#include "tensor_map.h"

#if defined(LMINF_EMULATION)
#include "../../emulation/ptx_sm90.h"
#define LMINF_SM90A 1
// The caller's place in the source, for the emulation's reports.
#define LMINF_CALLER , const char *file = __builtin_FILE(), int line = __builtin_LINE()
#define LMINF_ONLY_CALLER const char *file = __builtin_FILE(), int line = __builtin_LINE()
#else
#include "sm90_wgmma.cuh"
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define LMINF_SM90A 1
#else
#define LMINF_SM90A 0
#endif
#define LMINF_CALLER
#define LMINF_ONLY_CALLER
#endif

namespace lminf::cuda::ptx {

// --- mbarrier: eight bytes of shared memory, aligned to eight ---

// Each phase completes with `arrivals` arrivals and with every byte it was told to expect.
LMINF_DEVICE void mbarrier_init(uint32_t barrier, int arrivals LMINF_CALLER) {
#if defined(LMINF_EMULATION)
  emulation::mbarrier_init({"mbarrier.init", file, line}, barrier, arrivals);
#else
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;\n" ::"r"(barrier), "r"(arrivals)
               : "memory");
#endif
}

// After the inits, by the thread that made them: the copy engine sees them too.
LMINF_DEVICE void fence_barrier_init() {
#if defined(LMINF_EMULATION)
  emulation::fence_barrier_init();
#else
  asm volatile("fence.mbarrier_init.release.cluster;\n" ::: "memory");
#endif
}

LMINF_DEVICE void mbarrier_arrive(uint32_t barrier LMINF_CALLER) {
#if defined(LMINF_EMULATION)
  emulation::mbarrier_arrive({"mbarrier.arrive", file, line}, barrier, 0);
#else
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];\n" ::"r"(barrier) : "memory");
#endif
}

// One arrival, and `bytes` more that copies must bring before the phase completes.
LMINF_DEVICE void mbarrier_arrive_expect_tx(uint32_t barrier, int bytes LMINF_CALLER) {
#if defined(LMINF_EMULATION)
  emulation::mbarrier_arrive({"mbarrier.arrive.expect_tx", file, line}, barrier, bytes);
#else
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;\n" ::"r"(barrier), "r"(bytes)
               : "memory");
#endif
}

// Waits until the phase of this parity is complete: that of the first phase is 0, of the next one
// 1. On a new barrier, parity 1 counts as complete.
LMINF_DEVICE void mbarrier_wait(uint32_t barrier, int parity LMINF_CALLER) {
#if defined(LMINF_EMULATION)
  emulation::mbarrier_wait({"mbarrier.try_wait", file, line}, barrier, parity);
#else
  uint32_t done;
  do {
    asm volatile(
        "{\n"
        ".reg .pred complete;\n"
        "mbarrier.try_wait.parity.shared::cta.b64 complete, [%1], %2;\n"
        "selp.u32 %0, 1, 0, complete;\n"
        "}\n"
        : "=r"(done)
        : "r"(barrier), "r"(parity)
        : "memory");
  } while (done == 0);
#endif
}

// --- Bulk copies ---

LMINF_DEVICE void tma_prefetch_map(const TensorMap& map) {
#if !defined(LMINF_EMULATION)
  asm volatile("prefetch.tensormap [%0];\n" ::"l"(&map) : "memory");
#else
  (void)map;
#endif
}

// A box of the map's tensor to shared memory at `target`, aligned to 128 bytes (with a swizzle: to
// its pattern). Coordinates (dim, row, head, batch) of the box's first element may be negative or
// past the end; what is outside the tensor arrives as zeros. Always brings the whole box's bytes.
// `map` must be a __grid_constant__ parameter of the kernel. One thread calls this.
LMINF_DEVICE void tma_load_4d(uint32_t target, const TensorMap& map, uint32_t barrier, int dim,
                              int row, int head, int batch LMINF_CALLER) {
#if defined(LMINF_EMULATION)
  emulation::tma_load({"tma_load", file, line}, target, map, barrier, {dim, row, head, batch});
#else
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%2, %3, %4, %5}], [%6];\n" ::"r"(target),
      "l"(&map), "r"(dim), "r"(row), "r"(head), "r"(batch), "r"(barrier)
      : "memory");
#endif
}

// A box from shared memory to the map's tensor; what would fall outside it is not written.
LMINF_DEVICE void tma_store_4d(const TensorMap& map, uint32_t source, int dim, int row, int head,
                               int batch LMINF_CALLER) {
#if defined(LMINF_EMULATION)
  emulation::tma_store({"tma_store", file, line}, map, source, {dim, row, head, batch});
#else
  asm volatile(
      "cp.async.bulk.tensor.4d.global.shared::cta.tile.bulk_group [%0, {%1, %2, %3, %4}], "
      "[%5];\n" ::"l"(&map),
      "r"(dim), "r"(row), "r"(head), "r"(batch), "r"(source)
      : "memory");
#endif
}

LMINF_DEVICE void tma_store_commit() {
#if defined(LMINF_EMULATION)
  emulation::tma_store_commit();
#else
  asm volatile("cp.async.bulk.commit_group;\n" ::: "memory");
#endif
}

// Waits until at most kLeft of this thread's newest store groups still read shared memory.
template <int kLeft>
LMINF_DEVICE void tma_store_wait_read() {
#if defined(LMINF_EMULATION)
  emulation::tma_store_wait(kLeft, true);
#else
  asm volatile("cp.async.bulk.wait_group.read %0;\n" ::"n"(kLeft) : "memory");
#endif
}

// As above, until their writes are done as well.
template <int kLeft>
LMINF_DEVICE void tma_store_wait() {
#if defined(LMINF_EMULATION)
  emulation::tma_store_wait(kLeft, false);
#else
  asm volatile("cp.async.bulk.wait_group %0;\n" ::"n"(kLeft) : "memory");
#endif
}

// `bytes` in a row from global to shared memory: a multiple of 16, both addresses aligned to 16.
LMINF_DEVICE void bulk_load(uint32_t target, const void* source, int bytes,
                            uint32_t barrier LMINF_CALLER) {
#if defined(LMINF_EMULATION)
  emulation::bulk_load({"bulk_load", file, line}, target, source, bytes, barrier);
#else
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, "
      "[%3];\n" ::"r"(target),
      "l"(source), "r"(bytes), "r"(barrier)
      : "memory");
#endif
}

// Makes what this thread wrote to shared memory (or saw written, past a barrier) visible to wgmma
// and TMA.
LMINF_DEVICE void fence_proxy_async() {
#if defined(LMINF_EMULATION)
  emulation::fence_proxy_async();
#else
  asm volatile("fence.proxy.async.shared::cta;\n" ::: "memory");
#endif
}

// --- Matrices in shared memory as wgmma reads them ---
//
// A descriptor says where 16-byte chunks (eight elements) of an operand stand. In it, in units of
// 16 bytes: bits 0-13 the start address, 16-29 the leading byte offset, 32-45 the stride byte
// offset; bits 49-51 the base offset, 62-63 the swizzle. With `span` the swizzle's 128, 64 or 32
// bytes (16 with no swizzle), rows of one span stand one after another, as a TMA box whose
// innermost side is one span writes them, and the swizzle exchanges chunks within a row: address
// bits 4-6 ^= bits 7-9 (128), 4-5 ^= 7-8 (64), 4 ^= 7 (32). It works on the address itself, so with
// tiles aligned to the pattern's 8 spans the base offset is 0, always so here.
//
//   K-major (a row of the tile is one m or n, its columns are k): eight rows are 8 * span bytes,
//   the
//     stride offset goes from eight rows to the next eight. The 16 values of k of one wgmma are 32
//     bytes, one or two chunks beside each other in a row, and the next 16 start 32 bytes further
//     on in the unswizzled row: add them to the start address. The leading offset is used with no
//     swizzle alone, from the first chunk to the second.
//   MN-major (a row of the tile is one k, its columns are m or n; what V needs, whose rows are
//   keys):
//     the stride offset goes from eight k to the next eight, 8 * span bytes in a box; the leading
//     offset from one span of columns to the next, that is from one box to the next, rows * span
//     bytes. The next 16 k start 16 * span bytes further on.

enum class Major { kK = 0, kMN = 1 };

struct Descriptor {
  uint64_t bits;

  // The same layout that many bytes (a multiple of 16) further on.
  LMINF_DEVICE Descriptor plus(int bytes) const {
    return {bits + static_cast<uint64_t>(bytes >> 4)};
  }
};

template <Swizzle kSwizzle>
LMINF_DEVICE Descriptor make_descriptor(uint32_t address, int leading_bytes, int stride_bytes) {
  constexpr uint64_t kMode = kSwizzle == Swizzle::kNone  ? 0
                             : kSwizzle == Swizzle::k128 ? 1
                             : kSwizzle == Swizzle::k64  ? 2
                                                         : 3;
  return {static_cast<uint64_t>((address & 0x3FFFF) >> 4) |
          static_cast<uint64_t>(leading_bytes >> 4) << 16 |
          static_cast<uint64_t>(stride_bytes >> 4) << 32 | kMode << 62};
}

// Of a tile in boxes one span wide, rows one after another.
template <Swizzle kSwizzle>
LMINF_DEVICE Descriptor k_major_descriptor(uint32_t address) {
  static_assert(kSwizzle != Swizzle::kNone, "with no swizzle, a box holds half of the 16 k");
  return make_descriptor<kSwizzle>(address, 16, 8 * swizzle_bytes(kSwizzle));
}

// `box_bytes`: from one box of columns to the next.
template <Swizzle kSwizzle>
LMINF_DEVICE Descriptor mn_major_descriptor(uint32_t address, int box_bytes) {
  static_assert(kSwizzle != Swizzle::kNone, "with no swizzle, the two offsets trade places");
  return make_descriptor<kSwizzle>(address, box_bytes, 8 * swizzle_bytes(kSwizzle));
}

// --- wgmma: d[64 x N] (+)= a[64 x 16] * b[16 x N], by the 128 threads of a warpgroup ---
//
// N is twice the number of accumulators, any multiple of 8 from 8 to 256. Thread 32 w + 4 g + c:
//   d[4 j + 2 h + e]  row 16 w + g + 8 h, column 8 j + 2 c + e
//   a[r]              row 16 w + g + 8 (r % 2), k = 2 c + 8 (r / 2) and the one after it
// so accumulators d[8 s .. 8 s + 7], packed in pairs, are the A registers of k-step s.

// Before the first wgmma of a group, and after any change of its registers.
LMINF_DEVICE void wgmma_fence(LMINF_ONLY_CALLER) {
#if defined(LMINF_EMULATION)
  emulation::wgmma_fence({"wgmma.fence", file, line});
#else
  asm volatile("wgmma.fence.sync.aligned;\n" ::: "memory");
#endif
}

// Both operands in shared memory. With `accumulate` false, d's old values are not used.
template <typename T, Major kMajorA, Major kMajorB, int kRegisters>
LMINF_DEVICE void wgmma(float (&d)[kRegisters], Descriptor a, Descriptor b,
                        bool accumulate LMINF_CALLER) {
  static_assert(std::is_same_v<T, bf16> || std::is_same_v<T, fp16>, "bf16 or fp16");
  static_assert(kRegisters % 4 == 0 && kRegisters >= 4 && kRegisters <= 128, "N of 8 to 256");
#if defined(LMINF_EMULATION)
  emulation::wgmma({"wgmma.mma_async", file, line}, d, 2 * kRegisters, nullptr, a.bits,
                   kMajorA == Major::kMN, b.bits, kMajorB == Major::kMN, accumulate,
                   std::is_same_v<T, bf16>);
#else
  Wgmma<2 * kRegisters>::template shared<std::is_same_v<T, bf16>, static_cast<int>(kMajorA),
                                         static_cast<int>(kMajorB)>(d, a.bits, b.bits, accumulate);
#endif
}

// A in registers.
template <typename T, Major kMajorB, int kRegisters>
LMINF_DEVICE void wgmma(float (&d)[kRegisters], const uint32_t (&a)[4], Descriptor b,
                        bool accumulate LMINF_CALLER) {
  static_assert(std::is_same_v<T, bf16> || std::is_same_v<T, fp16>, "bf16 or fp16");
  static_assert(kRegisters % 4 == 0 && kRegisters >= 4 && kRegisters <= 128, "N of 8 to 256");
#if defined(LMINF_EMULATION)
  emulation::wgmma({"wgmma.mma_async", file, line}, d, 2 * kRegisters, a, 0, false, b.bits,
                   kMajorB == Major::kMN, accumulate, std::is_same_v<T, bf16>);
#else
  Wgmma<2 * kRegisters>::template registers<std::is_same_v<T, bf16>, static_cast<int>(kMajorB)>(
      d, a, b.bits, accumulate);
#endif
}

// Ends this warpgroup's group of wgmmas.
LMINF_DEVICE void wgmma_commit(LMINF_ONLY_CALLER) {
#if defined(LMINF_EMULATION)
  emulation::wgmma_commit({"wgmma.commit_group", file, line});
#else
  asm volatile("wgmma.commit_group.sync.aligned;\n" ::: "memory");
#endif
}

// Keeps the compiler from moving work on these registers across this point: to it, an accumulator
// has its value as soon as the wgmma is issued.
template <typename T, int kRegisters>
LMINF_DEVICE void pin_registers([[maybe_unused]] T (&r)[kRegisters]) {
#if !defined(LMINF_EMULATION)
#pragma unroll
  for (int i = 0; i < kRegisters; ++i) {
    if constexpr (std::is_same_v<T, float>) {
      asm volatile("" : "+f"(r[i])::"memory");
    } else {
      asm volatile("" : "+r"(r[i])::"memory");
    }
  }
#endif
}

// Waits until at most kLeft of the newest groups are still under way. `results`: the accumulators
// that are read next (arrays; the emulation checks that this wait covers them).
template <int kLeft, typename... Arrays>
LMINF_DEVICE void wgmma_wait(Arrays&... results) {
#if defined(LMINF_EMULATION)
  emulation::wgmma_wait(kLeft);
  (emulation::check_landed(results, sizeof(results)), ...);
#else
  asm volatile("wgmma.wait_group.sync.aligned %0;\n" ::"n"(kLeft) : "memory");
  (pin_registers(results), ...);
#endif
}

// --- The rest ---

// Four 8x8 matrices of 16-bit elements to shared memory: the reverse of load_matrices.
LMINF_DEVICE void store_matrices(uint32_t row_address, const uint32_t (&r)[4]) {
#if defined(LMINF_EMULATION)
  emulation::store_matrices(row_address, r, false);
#else
  asm volatile(
      "stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};\n" ::"r"(row_address),
      "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3])
      : "memory");
#endif
}

LMINF_DEVICE void store_matrices_transposed(uint32_t row_address, const uint32_t (&r)[4]) {
#if defined(LMINF_EMULATION)
  emulation::store_matrices(row_address, r, true);
#else
  asm volatile(
      "stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};\n" ::"r"(row_address),
      "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3])
      : "memory");
#endif
}

// Counts this thread in at a named barrier (ptx/sm80.cuh) without waiting there.
LMINF_DEVICE void named_barrier_arrive(int id, int threads LMINF_CALLER) {
#if defined(LMINF_EMULATION)
  emulation::named_barrier({"bar.arrive", file, line}, static_cast<unsigned>(id),
                           static_cast<unsigned>(threads), false);
#else
  asm volatile("bar.arrive %0, %1;\n" ::"r"(id), "r"(threads) : "memory");
#endif
}

// True in one lane of a whole warp, the same one each time.
LMINF_DEVICE bool elect_one(LMINF_ONLY_CALLER) {
#if defined(LMINF_EMULATION)
  return emulation::elect_one({"elect.sync", file, line});
#else
  uint32_t elected;
  asm volatile(
      "{\n"
      ".reg .pred mine;\n"
      "elect.sync _|mine, 0xffffffff;\n"
      "selp.u32 %0, 1, 0, mine;\n"
      "}\n"
      : "=r"(elected));
  return elected != 0;
#endif
}

// The thread's warpgroup, and its warp, as numbers that the compiler knows to be one for the warp.
LMINF_DEVICE int warp_index() {
  return __shfl_sync(kFullWarp, static_cast<int>(threadIdx.x) / kWarpSize, 0);
}
LMINF_DEVICE int warpgroup_index() {
  return __shfl_sync(kFullWarp, static_cast<int>(threadIdx.x) / (4 * kWarpSize), 0);
}

// Registers of each thread of the warpgroup from here on; every warpgroup's sum must fit.
template <int kRegisters>
LMINF_DEVICE void registers_increase() {
  static_assert(kRegisters % 8 == 0 && kRegisters >= 24 && kRegisters <= 256, "24 to 256, by 8");
#if !defined(LMINF_EMULATION)
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;\n" ::"n"(kRegisters));
#endif
}
template <int kRegisters>
LMINF_DEVICE void registers_decrease() {
  static_assert(kRegisters % 8 == 0 && kRegisters >= 24 && kRegisters <= 256, "24 to 256, by 8");
#if !defined(LMINF_EMULATION)
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;\n" ::"n"(kRegisters));
#endif
}

}  // namespace lminf::cuda::ptx

#undef LMINF_CALLER
#undef LMINF_ONLY_CALLER
