// What every kernel file stands on: element types, checked memory access, launches. The same names
// compile with nvcc for a GPU and, with LMINF_EMULATION, as C++ for csrc/emulation.
#pragma once

#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>
#include <type_traits>

#if defined(LMINF_EMULATION)
#include "../../emulation/device.h"
#define LMINF_DEVICE inline
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#define LMINF_DEVICE __device__ __forceinline__
#endif

#include "../../core/common.h"
#include "../../params.h"
#include "../launchers.h"
#include "plan.h"

namespace lminf::cuda {

using bf16 = __nv_bfloat16;
using fp16 = __half;

constexpr unsigned kFullWarp = 0xffffffffu;
constexpr int kWarpSize = 32;

// The same number, of which the compiler knows nothing. What follows from it is then worked out
// where it is used, and not kept in dozens of registers from one round of a loop to the next.
LMINF_DEVICE int recomputed(int x) {
#if !defined(LMINF_EMULATION)
  asm volatile("" : "+r"(x));
#endif
  return x;
}

// --- Elements ---

LMINF_DEVICE float to_float(float x) { return x; }
LMINF_DEVICE float to_float(bf16 x) { return __bfloat162float(x); }
LMINF_DEVICE float to_float(fp16 x) { return __half2float(x); }

template <typename T>
LMINF_DEVICE T from_float(float x);
template <>
LMINF_DEVICE float from_float<float>(float x) {
  return x;
}
template <>
LMINF_DEVICE bf16 from_float<bf16>(float x) {
  return __float2bfloat16_rn(x);
}
template <>
LMINF_DEVICE fp16 from_float<fp16>(float x) {
  return __float2half_rn(x);
}

// Calls f with a value of the element type.
template <typename F>
void with_element_type(DType dtype, const F& f) {
  switch (dtype) {
    case DType::kFloat32:
      return f(float{});
    case DType::kBFloat16:
      return f(bf16{});
    case DType::kFloat16:
      return f(fp16{});
  }
  throw std::invalid_argument("lminf: unknown element type " +
                              std::to_string(static_cast<int>(dtype)));
}

// Two 16-bit elements in one register, the first in the low half.
template <typename T>
LMINF_DEVICE uint32_t pack(float low, float high);
template <>
LMINF_DEVICE uint32_t pack<bf16>(float low, float high) {
  const __nv_bfloat162 v = __floats2bfloat162_rn(low, high);
  return static_cast<uint32_t>(__bfloat16_as_ushort(v.x)) |
         (static_cast<uint32_t>(__bfloat16_as_ushort(v.y)) << 16);
}
template <>
LMINF_DEVICE uint32_t pack<fp16>(float low, float high) {
  const __half2 v = __floats2half2_rn(low, high);
  return static_cast<uint32_t>(__half_as_ushort(__low2half(v))) |
         (static_cast<uint32_t>(__half_as_ushort(__high2half(v))) << 16);
}

template <typename T>
LMINF_DEVICE void unpack(uint32_t packed, float& low, float& high);
template <>
LMINF_DEVICE void unpack<bf16>(uint32_t packed, float& low, float& high) {
  low = __bfloat162float(__ushort_as_bfloat16(static_cast<unsigned short>(packed)));
  high = __bfloat162float(__ushort_as_bfloat16(static_cast<unsigned short>(packed >> 16)));
}
template <>
LMINF_DEVICE void unpack<fp16>(uint32_t packed, float& low, float& high) {
  low = __half2float(__ushort_as_half(static_cast<unsigned short>(packed)));
  high = __half2float(__ushort_as_half(static_cast<unsigned short>(packed >> 16)));
}

// Sixteen bytes, the widest access there is.
struct alignas(16) Chunk {
  uint32_t words[4];
};

template <typename T>
constexpr int kChunkElements = 16 / static_cast<int>(sizeof(T));

// kVec elements as they stand in memory: a chunk, moved in one access, or a single element.
template <typename T, int kVec>
using Packed = std::conditional_t<kVec == 1, T, Chunk>;

template <typename T, int kVec>
LMINF_DEVICE void unpack_elements(const Packed<T, kVec>& from, float (&to)[kVec]) {
  if constexpr (kVec == 1) {
    to[0] = to_float(from);
  } else if constexpr (sizeof(T) == 4) {
    memcpy(to, from.words, sizeof(to));
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) unpack<T>(from.words[i], to[2 * i], to[2 * i + 1]);
  }
}

template <typename T, int kVec>
LMINF_DEVICE Packed<T, kVec> pack_elements(const float (&from)[kVec]) {
  if constexpr (kVec == 1) {
    return from_float<T>(from[0]);
  } else {
    Chunk to;
    if constexpr (sizeof(T) == 4) {
      memcpy(to.words, from, sizeof(from));
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i) to.words[i] = pack<T>(from[2 * i], from[2 * i + 1]);
    }
    return to;
  }
}

// --- Global memory ---

template <typename T>
LMINF_DEVICE T load_global(const T* address) {
#if defined(LMINF_EMULATION)
  emulation::check_global(address, sizeof(T), "load");
#endif
  return *address;
}

template <typename T>
LMINF_DEVICE void store_global(T* address, T value) {
#if defined(LMINF_EMULATION)
  emulation::check_global(address, sizeof(T), "store", true);
#endif
  *address = value;
}

#if !defined(LMINF_EMULATION)
// One access of sixteen bytes, also when the words come one by one from registers.
LMINF_DEVICE void store_global(Chunk* address, Chunk value) {
  __stwb(reinterpret_cast<uint4*>(address),
         make_uint4(value.words[0], value.words[1], value.words[2], value.words[3]));
}
#endif

// --- Shared memory ---

// The block's dynamic shared memory, the only kind used here. Aligned to 1024 bytes, the largest
// pattern of a swizzle.
LMINF_DEVICE unsigned char* shared_memory() {
#if defined(LMINF_EMULATION)
  return emulation::shared_memory();
#else
  extern __shared__ __align__(1024) unsigned char lminf_shared_memory[];
  return lminf_shared_memory;
#endif
}

// The address of a shared object in the shared window, as PTX instructions take it.
LMINF_DEVICE uint32_t shared_address(const void* pointer) {
#if defined(LMINF_EMULATION)
  return emulation::shared_address(pointer);
#else
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
#endif
}

// `size` elements of shared memory; the emulation checks every index.
template <typename T>
class SharedArray {
 public:
  LMINF_DEVICE SharedArray(unsigned char* base, [[maybe_unused]] int size)
      : data_(reinterpret_cast<T*>(base)) {
#if defined(LMINF_EMULATION)
    size_ = size;
#endif
  }

  LMINF_DEVICE T& operator[](int i) const {
#if defined(LMINF_EMULATION)
    if (i < 0 || i >= size_) emulation::index_fault("shared array", i, size_);
#endif
    return data_[i];
  }

 private:
  T* data_;
#if defined(LMINF_EMULATION)
  int size_;
#endif
};

// --- Over a warp ---

// The maximum or sum over a group of kLanes neighbours.
template <int kLanes>
LMINF_DEVICE float group_max(float x) {
#pragma unroll
  for (int mask = kLanes / 2; mask > 0; mask /= 2) {
    x = fmaxf(x, __shfl_xor_sync(kFullWarp, x, mask));
  }
  return x;
}

template <int kLanes>
LMINF_DEVICE float group_sum(float x) {
#pragma unroll
  for (int mask = kLanes / 2; mask > 0; mask /= 2) x += __shfl_xor_sync(kFullWarp, x, mask);
  return x;
}

// --- Launching ---

struct LaunchShape {
  int64_t blocks;  // grid.x: the only dimension that goes past 65,535
  int threads;
  int shared_bytes;
  // May start while the kernel before it still runs (ptx/grid.cuh); for devices that overlap
  // launches (DeviceFacts) alone.
  bool overlaps = false;
};

// Throws std::runtime_error when the launch is impossible or the runtime reports an error.
template <typename... Params, typename... Args>
void launch(const char* name, void (*kernel)(Params...), LaunchShape shape,
            [[maybe_unused]] Stream stream, const Args&... args) {
  if (shape.blocks <= 0) return;
  check_blocks(name, shape.blocks);
#if defined(LMINF_EMULATION)
  emulation::launch(name, {static_cast<unsigned>(shape.blocks), 1, 1},
                    {static_cast<unsigned>(shape.threads), 1, 1},
                    static_cast<size_t>(shape.shared_bytes), shape.overlaps,
                    [&] { kernel(args...); });
#else
  auto check = [&](cudaError_t error) {
    if (error != cudaSuccess) {
      throw std::runtime_error(std::string(name) + ": " + cudaGetErrorString(error));
    }
  };
  constexpr int kSharedBytesWithoutAsking = 48 * 1024;
  if (shape.shared_bytes > kSharedBytesWithoutAsking) {
    check(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                               cudaFuncAttributeMaxDynamicSharedMemorySize, shape.shared_bytes));
  }
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(shape.blocks));
  config.blockDim = dim3(static_cast<unsigned>(shape.threads));
  config.dynamicSmemBytes = static_cast<size_t>(shape.shared_bytes);
  config.stream = static_cast<cudaStream_t>(stream);
  cudaLaunchAttribute overlap = {};
  overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  overlap.val.programmaticStreamSerializationAllowed = 1;
  config.attrs = &overlap;
  config.numAttrs = shape.overlaps ? 1 : 0;
  check(cudaLaunchKernelEx(&config, kernel, static_cast<Params>(args)...));
#endif
}

}  // namespace lminf::cuda
