// The inline PTX of sm_80 and up. Each wrapper has a host body written from the PTX ISA's text of
// that instruction, which csrc/emulation runs; csrc/tests/ptx_sm80_test.cu holds the two together.
//
// Fragments (lane = 4 * g + c):
//   ldmatrix   register r of a lane holds elements (row g, columns 2c, 2c+1) of 8x8 matrix r;
//              transposed: elements (rows 2c, 2c+1, column g). Lane 8r + i gives matrix r's row i.
//   mma A 16x16  a[0] (g, 2c), a[1] (g + 8, 2c), a[2] (g, 2c + 8), a[3] (g + 8, 2c + 8)
//   mma B 16x8   b[0] (2c, g), b[1] (2c + 8, g)            two neighbours along k in one register
//   mma C 16x8   d[0], d[1] (g, 2c), (g, 2c + 1); d[2], d[3] the same of row g + 8
#pragma once

#include <cmath>
#include <type_traits>

#include "../common/device.cuh"

#if defined(LMINF_EMULATION)
#include "../../emulation/ptx_sm80.h"
#endif

namespace lminf::cuda::ptx {

// Sixteen bytes from global to shared memory; with `valid` false, sixteen zeros and no read.
LMINF_DEVICE void copy_async(uint32_t shared_address, const void* source, bool valid) {
#if defined(LMINF_EMULATION)
  emulation::copy_async(shared_address, source, 16, valid ? 16 : 0);
#else
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(shared_address), "l"(source),
               "r"(valid ? 16 : 0)
               : "memory");
#endif
}

LMINF_DEVICE void copy_async_commit() {
#if defined(LMINF_EMULATION)
  emulation::copy_async_commit();
#else
  asm volatile("cp.async.commit_group;\n" ::: "memory");
#endif
}

// Waits until at most kLeft of this thread's newest committed groups are still under way.
template <int kLeft>
LMINF_DEVICE void copy_async_wait() {
#if defined(LMINF_EMULATION)
  emulation::copy_async_wait(kLeft);
#else
  asm volatile("cp.async.wait_group %0;\n" ::"n"(kLeft) : "memory");
#endif
}

// Four 8x8 matrices of 16-bit elements.
LMINF_DEVICE void load_matrices(uint32_t (&r)[4], uint32_t row_address) {
#if defined(LMINF_EMULATION)
  emulation::load_matrices(r, row_address, false);
#else
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(row_address)
               : "memory");
#endif
}

LMINF_DEVICE void load_matrices_transposed(uint32_t (&r)[4], uint32_t row_address) {
#if defined(LMINF_EMULATION)
  emulation::load_matrices(r, row_address, true);
#else
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(row_address)
               : "memory");
#endif
}

// d += a * b, m16n8k16, accumulated in float32.
template <typename T>
LMINF_DEVICE void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  static_assert(std::is_same_v<T, bf16> || std::is_same_v<T, fp16>, "bf16 or fp16");
#if defined(LMINF_EMULATION)
  emulation::mma_m16n8k16(d, a, b0, b1, std::is_same_v<T, bf16>);
#else
  if constexpr (std::is_same_v<T, bf16>) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};\n"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};\n"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
#endif
}

// 2^x to about two units in the last place; subnormal results are 0. 2^-inf is 0.
LMINF_DEVICE float exp2_approx(float x) {
#if defined(LMINF_EMULATION)
  return emulation::exp2_flushed(x);
#else
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;\n" : "=f"(y) : "f"(x));
  return y;
#endif
}

// Waits for `threads` threads (whole warps) at barrier `id`, which need not stand on one line.
LMINF_DEVICE void named_barrier(int id, int threads) {
#if defined(LMINF_EMULATION)
  emulation::named_barrier({"bar.sync", __builtin_FILE(), __builtin_LINE()},
                           static_cast<unsigned>(id), static_cast<unsigned>(threads));
#else
  asm volatile("bar.sync %0, %1;\n" ::"r"(id), "r"(threads) : "memory");
#endif
}

}  // namespace lminf::cuda::ptx
