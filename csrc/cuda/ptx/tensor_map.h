// Descriptions of tensors in global memory for the bulk tensor copies (TMA), made on the host.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

#if defined(LMINF_EMULATION)
#include "../../emulation/ptx_sm90.h"
#else
#include <cuda.h>
#include <cuda_runtime.h>

#include <atomic>
#if CUDART_VERSION < 12050
#error "lminf_cuda needs a CUDA toolkit of 12.5 or newer: cudaGetDriverEntryPointByVersion"
#endif
#endif

namespace lminf::cuda {

// How 16-byte chunks trade places within rows of that many bytes (ptx/sm90.cuh).
enum class Swizzle { kNone, k32, k64, k128 };

constexpr int swizzle_bytes(Swizzle swizzle) {
  return swizzle == Swizzle::kNone ? 16
         : swizzle == Swizzle::k32 ? 32
         : swizzle == Swizzle::k64 ? 64
                                   : 128;
}

#if defined(LMINF_EMULATION)
using TensorMap = emulation::TensorMap;
#else
using TensorMap = CUtensorMap;
#endif

// A tensor of 16-bit elements, innermost dimension first: (dim, row, head, batch). The innermost is
// contiguous; the other strides, in elements, come in any order. `box`: what one copy moves.
struct TensorMapShape {
  const void* base;
  int64_t size[4];
  int64_t stride[4];
  int box[4];
  Swizzle swizzle;
};

// What keeps TMA from covering such a tensor, or null. A dimension of size 1 may have any stride.
inline const char* tensor_map_problem(const TensorMapShape& shape) {
  if (reinterpret_cast<uintptr_t>(shape.base) % 16 != 0) return "not aligned to 16 bytes";
  if (shape.stride[0] != 1 && shape.size[0] != 1) return "innermost dimension not contiguous";
  for (int i = 0; i < 4; ++i) {
    if (shape.size[i] < 1 || shape.size[i] > int64_t{1} << 31) return "size not in [1, 2^31]";
    if (shape.box[i] < 1 || shape.box[i] > 256) return "box side not in [1, 256]";
    if (i == 0 || shape.size[i] == 1) continue;
    if (shape.stride[i] < 8 || shape.stride[i] % 8 != 0 || shape.stride[i] >= int64_t{1} << 39) {
      return "stride not a positive multiple of 16 bytes below 2^40";
    }
  }
  const int row_bytes = 2 * shape.box[0];
  if (row_bytes % 16 != 0) return "box row not a multiple of 16 bytes";
  if (shape.swizzle != Swizzle::kNone && row_bytes != swizzle_bytes(shape.swizzle)) {
    return "box row not as long as the swizzle's span";
  }
  return nullptr;
}

// The driver has no such function, or refuses a tensor. A kernel that needs no map may still take
// it.
class TensorMapRefused : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

#if !defined(LMINF_EMULATION)
using EncodeTensorMap = decltype(&cuTensorMapEncodeTiled);

// Asked of the runtime, so that the module loads on a machine with no driver. Null where the driver
// has no such function; then the next call asks again.
inline EncodeTensorMap tensor_map_encoder() {
  static std::atomic<EncodeTensorMap> known{nullptr};
  if (known == nullptr) {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found;
    if (cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000,
                                         cudaEnableDefault, &found) == cudaSuccess &&
        found == cudaDriverEntryPointSuccess) {
      known = reinterpret_cast<EncodeTensorMap>(function);
    }
  }
  return known;
}

// Makes the current device's context current on this thread, as any launch would: a call of the
// driver itself finds none where it is the thread's first CUDA work.
inline void bind_context() {
  int device = 0;
  if (cudaGetDevice(&device) == cudaSuccess) cudaSetDevice(device);
}
#endif

// Throws std::invalid_argument where there is a problem, TensorMapRefused where the driver has one.
inline TensorMap encode_tensor_map(const TensorMapShape& shape) {
  if (const char* problem = tensor_map_problem(shape)) {
    throw std::invalid_argument(std::string("tensor map: ") + problem);
  }
  uint64_t size[4], stride_bytes[3];
  uint32_t box[4];
  for (int i = 0; i < 4; ++i) {
    size[i] = static_cast<uint64_t>(shape.size[i]);
    box[i] = static_cast<uint32_t>(shape.box[i]);
    if (i > 0) stride_bytes[i - 1] = shape.size[i] == 1 ? 16 : 2 * uint64_t(shape.stride[i]);
  }
  TensorMap map;
#if defined(LMINF_EMULATION)
  map = emulation::encode_tensor_map(shape.base, size, stride_bytes, box,
                                     swizzle_bytes(shape.swizzle));
#else
  const EncodeTensorMap encode = tensor_map_encoder();
  if (encode == nullptr) {
    throw TensorMapRefused("tensor map: the driver has no cuTensorMapEncodeTiled");
  }
  const uint32_t steps[4] = {1, 1, 1, 1};
  const CUtensorMapSwizzle swizzle = shape.swizzle == Swizzle::kNone ? CU_TENSOR_MAP_SWIZZLE_NONE
                                     : shape.swizzle == Swizzle::k32 ? CU_TENSOR_MAP_SWIZZLE_32B
                                     : shape.swizzle == Swizzle::k64 ? CU_TENSOR_MAP_SWIZZLE_64B
                                                                     : CU_TENSOR_MAP_SWIZZLE_128B;
  const auto ask = [&] {
    return encode(&map, CU_TENSOR_MAP_DATA_TYPE_UINT16, 4, const_cast<void*>(shape.base), size,
                  stride_bytes, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle,
                  CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  };
  CUresult result = ask();
  if (result == CUDA_ERROR_INVALID_CONTEXT) {
    bind_context();
    result = ask();
  }
  if (result != CUDA_SUCCESS) {
    throw TensorMapRefused("tensor map: cuTensorMapEncodeTiled failed with error " +
                           std::to_string(static_cast<int>(result)));
  }
#endif
  return map;
}

}  // namespace lminf::cuda
