// The CUDA names that the kernels use, on top of runtime.h. Included instead of the CUDA runtime
// when a .cu file is compiled as C++ with LMINF_EMULATION.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cmath>
#include <cstring>
#include <type_traits>

#include "runtime.h"

#undef __launch_bounds__
#define __launch_bounds__(...)
#undef __global__
#define __global__
#undef __grid_constant__
#define __grid_constant__
#undef __restrict__
#define __restrict__ __restrict

#define threadIdx (::lminf::emulation::thread_index())
#define blockIdx (::lminf::emulation::block_index())
#define blockDim (::lminf::emulation::block_dim())
#define gridDim (::lminf::emulation::grid_dim())

// The place of a collective in the source, taken where the collective is called.
#define LMINF_HERE const char *file = __builtin_FILE(), int line = __builtin_LINE()

inline void __syncthreads(LMINF_HERE) {
  lminf::emulation::sync_threads({"__syncthreads", file, line});
}

inline void __syncwarp(unsigned mask = 0xffffffffu, LMINF_HERE) {
  lminf::emulation::sync_warp({"__syncwarp", file, line}, mask);
}

namespace lminf::emulation {

template <typename T>
uint32_t to_word(T value) {
  static_assert(sizeof(T) == 4, "32-bit values only");
  uint32_t word;
  std::memcpy(&word, &value, 4);
  return word;
}

template <typename T>
T from_word(uint32_t word) {
  T value;
  std::memcpy(&value, &word, 4);
  return value;
}

template <typename T>
T shuffle(Site site, unsigned mask, T value, unsigned source_lane) {
  const uint32_t in[2] = {to_word(value), source_lane};
  uint32_t out;
  warp_collective(site, mask, in, 2, &out, 1, shuffle_words);
  return from_word<T>(out);
}

}  // namespace lminf::emulation

template <typename T>
T __shfl_sync(unsigned mask, T value, int source_lane, LMINF_HERE) {
  return lminf::emulation::shuffle({"__shfl_sync", file, line}, mask, value, source_lane);
}

template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, LMINF_HERE) {
  return lminf::emulation::shuffle({"__shfl_xor_sync", file, line}, mask, value,
                                   lminf::emulation::lane_id() ^ static_cast<unsigned>(lane_mask));
}

inline unsigned __ballot_sync(unsigned mask, int predicate, LMINF_HERE) {
  const uint32_t in = predicate != 0;
  uint32_t out;
  lminf::emulation::warp_collective({"__ballot_sync", file, line}, mask, &in, 1, &out, 1,
                                    lminf::emulation::ballot_words);
  return out;
}

inline int __any_sync(unsigned mask, int predicate, LMINF_HERE) {
  return __ballot_sync(mask, predicate, file, line) != 0;
}

#undef LMINF_HERE
