// Host bodies of csrc/cuda/ptx/sm80.cuh, from the PTX ISA's description of each instruction.
#pragma once

#include <cstdint>

namespace lminf::emulation {

// ldmatrix.sync.aligned.m8n8.x4[.trans].shared.b16
void load_matrices(uint32_t (&r)[4], uint32_t row_address, bool transposed);

// mma.sync.aligned.m16n8k16.row.col.f32.{bf16,f16}.{bf16,f16}.f32, accumulating in place
void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, bool is_bf16);

// ex2.approx.ftz.f32
float exp2_flushed(float x);

}  // namespace lminf::emulation
