// Facts about a device that launch plans depend on.
#include "device.cuh"

namespace lminf::cuda {

#if defined(LMINF_EMULATION)

// Few, so that decoding in the tests is cut into several splits, but not into dozens.
int multiprocessors(int) { return 4; }

#else

int multiprocessors(int device) {
  int count = 0;
  const cudaError_t error = cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
  if (error != cudaSuccess) {
    throw std::runtime_error(std::string("device ") + std::to_string(device) + ": " +
                             cudaGetErrorString(error));
  }
  return count;
}

#endif

}  // namespace lminf::cuda
