// The kernels of this process: PTX from the fat binaries that nvcc made, and their host functions.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "control.h"
#include "program.h"

namespace lminf::interpreter {

struct Kernel {
  size_t binary = 0;
  std::string name;
  int dynamic_shared = 48 * 1024;  // cudaFuncAttributeMaxDynamicSharedMemorySize
};

class Registry {
 public:
  static Registry& get();

  // Ordinal of a new fat binary.
  size_t add_binary(std::vector<std::string> ptx_texts);
  void add_kernel(const void* host_function, size_t binary, const char* name);
  Kernel* kernel(const void* host_function);  // null: not known
  // What a driver runs on such a device; null: it has no image for it.
  Module* module_for(const Kernel& kernel, const Device& device);

  std::vector<KernelText> texts();
  void replace(const KernelText& text);
  void restore();
  void decode_all();

 private:
  struct Binary {
    std::vector<std::string> texts;
    std::vector<std::unique_ptr<Module>> modules;  // made when first asked for
  };
  std::vector<std::unique_ptr<Module>>& modules_of(Binary& binary);

  std::vector<Binary> binaries_;
  std::map<const void*, Kernel> kernels_;
};

}  // namespace lminf::interpreter
