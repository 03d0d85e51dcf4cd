// The CUDA runtime of a machine whose only GPU is the interpreter: the entry points that the
// project's host code and the stubs made by nvcc call. It refuses what a driver refuses.
#include <cuda_runtime.h>
#include <cxxabi.h>

#include <cstdlib>
#include <cstring>
#include <mutex>
#include <string>
#include <vector>

#include "control.h"
#include "fault.h"
#include "memory.h"
#include "registry.h"
#include "schedule.h"
#include "tensor_map_driver.h"

namespace lminf::interpreter {
namespace {

std::mutex& launching() {
  static std::mutex mutex;
  return mutex;
}

// --- Devices ---

std::vector<Device>& devices() {
  static auto* all = new std::vector<Device>{Device()};
  return *all;
}
int chosen_device = 0;
thread_local bool has_context = false;

const Device& device() { return devices()[static_cast<size_t>(chosen_device)]; }

// Dynamic shared memory of a block, at most.
int shared_limit(int capability) {
  switch (capability) {
    case 80:
    case 87:
      return 163 * 1024;
    case 90:
    case 100:
    case 103:
      return 227 * 1024;
    default:
      return 99 * 1024;
  }
}

// --- Errors ---

struct LastError {
  cudaError_t error = cudaSuccess;
  std::string text = "no error";
};
LastError& last_error() {
  static thread_local LastError last;
  return last;
}
cudaError_t refuse(cudaError_t error, const std::string& text) {
  last_error() = {error, text};
  return error;
}

// --- Launches ---

std::vector<LaunchRecord>& records() {
  static auto* all = new std::vector<LaunchRecord>;
  return *all;
}

std::string short_name(const std::string& mangled) {
  int status = 0;
  char* demangled = abi::__cxa_demangle(mangled.c_str(), nullptr, nullptr, &status);
  std::string name = status == 0 ? demangled : mangled;
  std::free(demangled);
  size_t end = name.find("_kernel");
  if (end == std::string::npos) end = name.find_first_of("<(");
  name = name.substr(0, end);
  return name.substr(name.find_last_of(": ") + 1);
}

cudaError_t launch(const void* host_function, dim3 grid, dim3 block, void** arguments,
                   size_t shared_bytes, bool overlaps) {
  const std::lock_guard<std::mutex> lock(launching());
  has_context = true;
  Kernel* kernel = Registry::get().kernel(host_function);
  if (kernel == nullptr) return refuse(cudaErrorInvalidDeviceFunction, "unknown kernel");
  Module* module = Registry::get().module_for(*kernel, device());
  if (module == nullptr) {
    return refuse(cudaErrorNoKernelImageForDevice, "no kernel image for this device");
  }
  const Function* function = module->function(kernel->name);
  if (function == nullptr) return refuse(cudaErrorInvalidDeviceFunction, "not in the PTX");
  Launch run_this;
  run_this.function = function;
  run_this.grid = {grid.x, grid.y, grid.z};
  run_this.block = {block.x, block.y, block.z};
  run_this.shared_bytes = static_cast<uint32_t>(shared_bytes);
  run_this.overlaps = overlaps;
  const uint64_t threads = run_this.block.count();
  if (run_this.grid.count() == 0 || grid.x > 2147483647u || grid.y > 65535 || grid.z > 65535) {
    return refuse(cudaErrorInvalidConfiguration, "invalid grid");
  }
  if (threads == 0 || threads > 1024 || block.z > 64) {
    return refuse(cudaErrorInvalidConfiguration, "invalid block");
  }
  if (function->most_threads > 0 && threads > static_cast<uint64_t>(function->most_threads)) {
    return refuse(cudaErrorInvalidValue, "more threads than the kernel's launch bounds");
  }
  if (shared_bytes > static_cast<size_t>(kernel->dynamic_shared)) {
    return refuse(cudaErrorInvalidValue, "more shared memory than cudaFuncSetAttribute allowed");
  }
  if (overlaps && device().capability < 90) {
    return refuse(cudaErrorNotSupported, "launches overlap from capability 9.0 on");
  }
  constexpr int kParameterBytes = 4096;
  if (function->parameter_bytes > kParameterBytes) {
    return refuse(cudaErrorInvalidValue, "more than 4096 bytes of parameters");
  }
  run_this.parameters.resize(static_cast<size_t>(function->parameter_bytes));
  for (size_t k = 0; k < function->parameters.size(); ++k) {
    const Parameter& p = function->parameters[k];
    std::memcpy(run_this.parameters.data() + p.offset, arguments[k], static_cast<size_t>(p.bytes));
  }
  run(run_this);  // a Fault goes on to the caller
  records().push_back({short_name(kernel->name), kernel->name, module->target(), overlaps,
                       run_this.grid.count(), run_this.triggered, run_this.instructions});
  return cudaSuccess;
}

// The PTX in a fat binary: texts that begin with ".version" and end with a zero byte.
std::vector<std::string> ptx_texts(const void* fat_binary) {
  struct Header {
    uint32_t magic;
    uint16_t version, header_bytes;
    uint64_t bytes;
  };
  Header header;
  std::memcpy(&header, fat_binary, sizeof(header));
  const char* at = static_cast<const char*>(fat_binary) + header.header_bytes;
  const char* end = at + header.bytes;
  std::vector<std::string> texts;
  constexpr char kBegin[] = ".version";
  for (; at + sizeof(kBegin) < end; ++at) {
    if (std::memcmp(at, kBegin, sizeof(kBegin) - 1) != 0) continue;
    texts.emplace_back(at, strnlen(at, static_cast<size_t>(end - at)));
    at += texts.back().size();
  }
  return texts;
}

struct PushedCall {
  dim3 grid, block;
  size_t shared_bytes;
  void* stream;
};
thread_local PushedCall pushed;

}  // namespace

// --- control.h ---

void set_device(Device wanted) {
  auto& all = devices();
  for (size_t k = 0; k < all.size(); ++k) {
    const Device& d = all[k];
    if (d.capability == wanted.capability && d.multiprocessors == wanted.multiprocessors &&
        d.has_sm90a == wanted.has_sm90a && d.has_sm90 == wanted.has_sm90) {
      chosen_device = static_cast<int>(k);
      return;
    }
  }
  all.push_back(wanted);
  chosen_device = static_cast<int>(all.size()) - 1;
}
int current_device() { return chosen_device; }
void set_schedule_seed(uint64_t seed) { set_schedule(seed); }
void register_global(const void* begin, int64_t bytes, const char* name) {
  register_region(begin, static_cast<size_t>(bytes), name);
}
void clear_globals() { clear_regions(); }
std::vector<LaunchRecord> take_launches() { return std::exchange(records(), {}); }
std::vector<KernelText> kernel_texts() { return Registry::get().texts(); }
void replace_kernel_text(const KernelText& text) { Registry::get().replace(text); }
void restore_kernel_texts() { Registry::get().restore(); }
void decode_all() { Registry::get().decode_all(); }
void forget_context() { has_context = false; }
bool context_is_current() { return has_context; }

}  // namespace lminf::interpreter

// --- What nvcc's stubs call ---

using namespace lminf::interpreter;  // NOLINT: the C entry points stand outside of it

#define LMINF_ENTRY extern "C" __attribute__((visibility("default")))

LMINF_ENTRY void** __cudaRegisterFatBinary(void* wrapper) {
  struct Wrapper {
    int magic, version;
    const void* data;
    void* file;
  };
  const auto* w = static_cast<const Wrapper*>(wrapper);
  // A handle is the ordinal plus one: null would mean an error.
  return reinterpret_cast<void**>(Registry::get().add_binary(ptx_texts(w->data)) + 1);
}
LMINF_ENTRY void __cudaRegisterFatBinaryEnd(void**) {}
LMINF_ENTRY void __cudaUnregisterFatBinary(void**) {}
LMINF_ENTRY char __cudaInitModule(void**) { return 1; }
LMINF_ENTRY void __cudaRegisterFunction(void** binary, const char* host_function, char*,
                                        const char* name, int, uint3*, uint3*, dim3*, dim3*, int*) {
  Registry::get().add_kernel(host_function, reinterpret_cast<size_t>(binary) - 1, name);
}
LMINF_ENTRY unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared_bytes,
                                                 void* stream) {
  pushed = {grid, block, shared_bytes, stream};
  return 0;
}
LMINF_ENTRY cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared_bytes,
                                                   void* stream) {
  *grid = pushed.grid;
  *block = pushed.block;
  *shared_bytes = pushed.shared_bytes;
  std::memcpy(stream, &pushed.stream, sizeof(void*));
  return cudaSuccess;
}
LMINF_ENTRY cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* host_function) {
  *kernel = reinterpret_cast<cudaKernel_t>(const_cast<void*>(host_function));
  return cudaSuccess;
}
LMINF_ENTRY cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void** args,
                                           size_t shared_bytes, cudaStream_t) {
  return launch(reinterpret_cast<const void*>(kernel), grid, block, args, shared_bytes, false);
}

// --- The runtime's API ---

cudaError_t cudaLaunchKernel(const void* function, dim3 grid, dim3 block, void** args,
                             size_t shared_bytes, cudaStream_t) {
  return launch(function, grid, block, args, shared_bytes, false);
}

cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* function,
                                void** args) {
  bool overlaps = false;
  for (unsigned k = 0; k < config->numAttrs; ++k) {
    if (config->attrs[k].id != cudaLaunchAttributeProgrammaticStreamSerialization) {
      return refuse(cudaErrorNotSupported, "a launch attribute that is not known here");
    }
    overlaps = config->attrs[k].val.programmaticStreamSerializationAllowed != 0;
  }
  return launch(function, config->gridDim, config->blockDim, args, config->dynamicSmemBytes,
                overlaps);
}

cudaError_t cudaFuncSetAttribute(const void* function, cudaFuncAttribute attribute, int value) {
  has_context = true;
  Kernel* kernel = Registry::get().kernel(function);
  if (kernel == nullptr) return refuse(cudaErrorInvalidDeviceFunction, "unknown kernel");
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize) {
    return refuse(cudaErrorNotSupported, "an attribute that is not known here");
  }
  const int limit = shared_limit(device().capability);
  if (value > limit) {
    return refuse(cudaErrorInvalidValue,
                  std::to_string(value) + " bytes of shared memory, over " + std::to_string(limit));
  }
  kernel->dynamic_shared = value;
  return cudaSuccess;
}

cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void* function) {
  has_context = true;
  Kernel* kernel = Registry::get().kernel(function);
  if (kernel == nullptr) return refuse(cudaErrorInvalidDeviceFunction, "unknown kernel");
  const Module* module = Registry::get().module_for(*kernel, device());
  if (module == nullptr) {
    return refuse(cudaErrorNoKernelImageForDevice, "no kernel image for this device");
  }
  *attributes = {};
  attributes->ptxVersion = attributes->binaryVersion = module->capability();
  return cudaSuccess;
}

const char* cudaGetErrorString(cudaError_t error) {
  return error == last_error().error ? last_error().text.c_str() : "an error of another call";
}
cudaError_t cudaGetLastError() { return std::exchange(last_error().error, cudaSuccess); }

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int which) {
  if (which < 0 || which >= static_cast<int>(devices().size())) {
    return refuse(cudaErrorInvalidDevice, "no such device");
  }
  const Device& d = devices()[static_cast<size_t>(which)];
  switch (attribute) {
    case cudaDevAttrComputeCapabilityMajor:
      *value = d.capability / 10;
      return cudaSuccess;
    case cudaDevAttrComputeCapabilityMinor:
      *value = d.capability % 10;
      return cudaSuccess;
    case cudaDevAttrMultiProcessorCount:
      *value = d.multiprocessors;
      return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = shared_limit(d.capability);
      return cudaSuccess;
    default:
      return refuse(cudaErrorNotSupported, "a device attribute that is not known here");
  }
}
cudaError_t cudaGetDevice(int* which) {
  *which = chosen_device;
  return cudaSuccess;
}
cudaError_t cudaSetDevice(int which) {
  if (which < 0 || which >= static_cast<int>(devices().size())) {
    return refuse(cudaErrorInvalidDevice, "no such device");
  }
  chosen_device = which;
  has_context = true;
  return cudaSuccess;
}
cudaError_t cudaGetDeviceCount(int* count) {
  *count = static_cast<int>(devices().size());
  return cudaSuccess;
}

// Memory for the C++ tests; it holds NaN until it is written.
cudaError_t cudaMallocManaged(void** memory, size_t bytes, unsigned) {
  constexpr size_t kAlignment = 256;
  has_context = true;
  *memory = std::aligned_alloc(kAlignment, (bytes + kAlignment - 1) / kAlignment * kAlignment);
  std::memset(*memory, 0xff, bytes);
  register_region(*memory, bytes, "managed memory");
  return cudaSuccess;
}
// Kept: its region would be another tensor's, if the memory were used again.
cudaError_t cudaFree(void*) {
  has_context = true;
  return cudaSuccess;
}
cudaError_t cudaDeviceSynchronize() { return cudaSuccess; }

cudaError_t cudaGetDriverEntryPointByVersion(const char* symbol, void** function, unsigned version,
                                             unsigned long long,  // NOLINT: the API's type
                                             cudaDriverEntryPointQueryResult* found) {
  *function = tensor_map_entry_point(symbol, version);
  if (found != nullptr) {
    *found =
        *function != nullptr ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
  }
  return cudaSuccess;
}
