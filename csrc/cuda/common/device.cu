// Facts about a device that launch plans depend on.
#include "device.cuh"

#if !defined(LMINF_EMULATION)
#include <atomic>
#endif

namespace lminf::cuda {

#if defined(LMINF_EMULATION)

DeviceFacts device_facts(int) {
  const emulation::Device device = emulation::device();
  return {device.capability, device.multiprocessors, device.has_sm90a, device.has_sm90};
}

#else

#if defined(LMINF_WITH_SM90A)
constexpr bool kHasSm90a = true;
#else
constexpr bool kHasSm90a = false;
#endif

namespace {

__global__ void probe_kernel() {}

// Whether the code that a device runs was compiled for 9.0 or later. Where a build has nothing
// newer, the driver makes it from the PTX of an older one, which lacks what came with 9.0.
bool runs_sm90_code(int device) {
  enum Answer { kNotAsked, kNo, kYes };
  constexpr int kRemembered = 64;  // devices: the first answer loads the module
  static std::atomic<int> answers[kRemembered];
  const bool remembered = device >= 0 && device < kRemembered;
  if (remembered && answers[device] != kNotAsked) return answers[device] == kYes;
  int current = device;
  cudaFuncAttributes code = {};
  cudaGetDevice(&current);
  if (current != device) cudaSetDevice(device);
  const cudaError_t error =
      cudaFuncGetAttributes(&code, reinterpret_cast<const void*>(probe_kernel));
  if (current != device) cudaSetDevice(current);
  if (error != cudaSuccess) {
    cudaGetLastError();  // a launch will say it better
    return false;
  }
  const bool yes = code.ptxVersion >= 90;
  if (remembered) answers[device] = yes ? kYes : kNo;
  return yes;
}

}  // namespace

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
  DeviceFacts facts;
  facts.capability = 10 * attribute(cudaDevAttrComputeCapabilityMajor) +
                     attribute(cudaDevAttrComputeCapabilityMinor);
  facts.multiprocessors = attribute(cudaDevAttrMultiProcessorCount);
  facts.has_sm90a = kHasSm90a;
  facts.has_sm90 = facts.capability >= 90 && runs_sm90_code(device);
  return facts;
}

#endif

}  // namespace lminf::cuda
