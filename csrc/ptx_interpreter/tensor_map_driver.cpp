#include "tensor_map_driver.h"

#include <cuda.h>

#include <cstring>
#include <string>

#include "control.h"
#include "tensor_copy.h"

namespace lminf::interpreter {
namespace {

int taken_calls = 0, refused_calls = 0, hidden_calls = 0;

uint8_t element_bytes(CUtensorMapDataType type) {
  switch (type) {
    case CU_TENSOR_MAP_DATA_TYPE_UINT8:
      return 1;
    case CU_TENSOR_MAP_DATA_TYPE_UINT16:
    case CU_TENSOR_MAP_DATA_TYPE_FLOAT16:
    case CU_TENSOR_MAP_DATA_TYPE_BFLOAT16:
      return 2;
    case CU_TENSOR_MAP_DATA_TYPE_FLOAT32:
      return 4;
    default:
      return 0;
  }
}

uint8_t swizzle_span(CUtensorMapSwizzle swizzle) {
  switch (swizzle) {
    case CU_TENSOR_MAP_SWIZZLE_32B:
      return 32;
    case CU_TENSOR_MAP_SWIZZLE_64B:
      return 64;
    case CU_TENSOR_MAP_SWIZZLE_128B:
      return 128;
    default:
      return 16;
  }
}

CUresult encode_tiled(CUtensorMap* out, CUtensorMapDataType type, cuuint32_t rank, void* base,
                      const cuuint64_t* size, const cuuint64_t* stride, const cuuint32_t* box,
                      const cuuint32_t* step, CUtensorMapInterleave interleave,
                      CUtensorMapSwizzle swizzle, CUtensorMapL2promotion,
                      CUtensorMapFloatOOBfill fill) {
  if (!context_is_current()) return CUDA_ERROR_INVALID_CONTEXT;
  if (refused_calls > 0 && taken_calls-- <= 0) {
    --refused_calls;
    return CUDA_ERROR_INVALID_VALUE;
  }
  TensorMap map = {};
  map.magic = kTensorMapMagic;
  map.rank = static_cast<uint8_t>(rank);
  map.element_bytes = element_bytes(type);
  map.span = swizzle_span(swizzle);
  map.base = reinterpret_cast<uint64_t>(base);
  constexpr uint64_t kMostSize = uint64_t{1} << 32, kMostStride = uint64_t{1} << 40;
  const bool fits = reinterpret_cast<uintptr_t>(out) % 64 == 0 && rank >= 1 &&
                    rank <= TensorMap::kMostRank && map.element_bytes > 0 && map.base % 16 == 0 &&
                    interleave == CU_TENSOR_MAP_INTERLEAVE_NONE &&
                    fill == CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE;
  if (!fits) return CUDA_ERROR_INVALID_VALUE;
  for (cuuint32_t k = 0; k < rank; ++k) {
    if (size[k] < 1 || size[k] > kMostSize || box[k] < 1 || box[k] > 256 || step[k] != 1) {
      return CUDA_ERROR_INVALID_VALUE;
    }
    map.size[k] = size[k];
    map.box[k] = static_cast<uint16_t>(box[k]);
    if (k + 1 == rank) continue;
    if (stride[k] % 16 != 0 || stride[k] >= kMostStride) return CUDA_ERROR_INVALID_VALUE;
    map.stride[k] = stride[k];
  }
  const uint32_t row_bytes = box[0] * map.element_bytes;
  if (row_bytes % 16 != 0) return CUDA_ERROR_INVALID_VALUE;
  if (map.span > 16 && row_bytes > map.span) return CUDA_ERROR_INVALID_VALUE;
  *out = {};
  std::memcpy(out, &map, sizeof(map));
  return CUDA_SUCCESS;
}

}  // namespace

void* tensor_map_entry_point(const char* symbol, unsigned version) {
  if (std::string(symbol) != "cuTensorMapEncodeTiled" || version < 12000) return nullptr;
  if (hidden_calls > 0) {
    --hidden_calls;
    return nullptr;
  }
  return reinterpret_cast<void*>(&encode_tiled);
}

void refuse_tensor_maps(int calls, int after) {
  refused_calls = calls;
  taken_calls = after;
}
void hide_entry_points(int calls) { hidden_calls = calls; }

}  // namespace lminf::interpreter
