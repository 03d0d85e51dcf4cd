// Memory that kernels of a C++ test and the test itself both see: plain memory under emulation,
// managed memory on a GPU.
#pragma once

#include <cstddef>
#include <cstdlib>

#include "../cuda/common/device.cuh"

namespace lminf::test {

template <typename T>
class DeviceBuffer {
 public:
  explicit DeviceBuffer(size_t size) : size_(size) {
#if defined(LMINF_EMULATION)
    data_ = static_cast<T*>(std::aligned_alloc(256, (size * sizeof(T) + 255) / 256 * 256));
#else
    cudaMallocManaged(&data_, size * sizeof(T));
#endif
  }
  ~DeviceBuffer() {
#if defined(LMINF_EMULATION)
    std::free(data_);
#else
    cudaFree(data_);
#endif
  }
  DeviceBuffer(const DeviceBuffer&) = delete;
  DeviceBuffer& operator=(const DeviceBuffer&) = delete;

  T* data() { return data_; }
  size_t size() const { return size_; }
  T& operator[](size_t i) { return data_[i]; }

 private:
  T* data_ = nullptr;
  size_t size_;
};

// Waits for the kernels launched so far; false when one of them failed.
inline bool synchronize() {
#if defined(LMINF_EMULATION)
  return true;
#else
  return cudaDeviceSynchronize() == cudaSuccess;
#endif
}

// Whether this machine can run the test's kernels at all.
inline bool has_device() {
#if defined(LMINF_EMULATION)
  return true;
#else
  int count = 0;
  return cudaGetDeviceCount(&count) == cudaSuccess && count > 0;
#endif
}

}  // namespace lminf::test
