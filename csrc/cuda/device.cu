// Facts about a device that launch plans depend on.
#include "device.cuh"

namespace lminf::cuda {

#if defined(LMINF_EMULATION)

DeviceFacts device_facts(int) {
  const emulation::Device device = emulation::device();
  return {device.capability, device.multiprocessors, device.has_sm90a};
}

#else

#if defined(LMINF_WITH_SM90A)
constexpr bool kHasSm90a = true;
#else
constexpr bool kHasSm90a = false;
#endif

DeviceFacts device_facts(int device) {
  auto attribute = [&](cudaDeviceAttr which) {
    int value = 0;
    const cudaError_t error = cudaDeviceGetAttribute(&value, which, device);
    if (error != cudaSuccess) {
      throw std::runtime_error(std::string("device ") + std::to_string(device) + ": " +
                               cudaGetErrorString(error));
    }
    return value;
  };
  return {10 * attribute(cudaDevAttrComputeCapabilityMajor) +
              attribute(cudaDevAttrComputeCapabilityMinor),
          attribute(cudaDevAttrMultiProcessorCount), kHasSm90a};
}

#endif

}  // namespace lminf::cuda
