// Descriptions of tensors in global memory for the bulk tensor copies (TMA), made on the host.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

#include "tensor_map_shape.h"

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

#if defined(LMINF_EMULATION)
using TensorMap = emulation::TensorMap;
#else
using TensorMap = CUtensorMap;
#endif

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
