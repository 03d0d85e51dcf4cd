#include "registry.h"

#include "fault.h"

namespace lminf::interpreter {

Registry& Registry::get() {
  // Fat binaries register before main: made at the first call, never destroyed.
  static auto* registry = new Registry;
  return *registry;
}

size_t Registry::add_binary(std::vector<std::string> ptx_texts) {
  binaries_.push_back({std::move(ptx_texts), {}});
  return binaries_.size() - 1;
}

void Registry::add_kernel(const void* host_function, size_t binary, const char* name) {
  Kernel& kernel = kernels_[host_function];
  kernel.binary = binary;
  kernel.name = name;
}

Kernel* Registry::kernel(const void* host_function) {
  const auto found = kernels_.find(host_function);
  return found == kernels_.end() ? nullptr : &found->second;
}

std::vector<std::unique_ptr<Module>>& Registry::modules_of(Binary& binary) {
  if (binary.modules.empty()) {
    for (const std::string& text : binary.texts) {
      binary.modules.push_back(std::make_unique<Module>(text));
    }
  }
  return binary.modules;
}

Module* Registry::module_for(const Kernel& kernel, const Device& device) {
  Module* best = nullptr;
  for (const auto& module : modules_of(binaries_[kernel.binary])) {
    const int target = module->capability();
    if (target >= 90 && !device.has_sm90) continue;
    if (module->is_specific() && (target != device.capability || !device.has_sm90a)) continue;
    if (target > device.capability) continue;
    const bool better = best == nullptr || target > best->capability() ||
                        (target == best->capability() && module->is_specific());
    if (better) best = module.get();
  }
  return best;
}

std::vector<KernelText> Registry::texts() {
  std::vector<KernelText> all;
  for (Binary& binary : binaries_) {
    for (const auto& module : modules_of(binary)) {
      for (const auto& [name, text] : module->texts()) {
        if (text.is_entry) all.push_back({module->target(), name, text.body});
      }
    }
  }
  return all;
}

void Registry::replace(const KernelText& text) {
  for (Binary& binary : binaries_) {
    for (const auto& module : modules_of(binary)) {
      if (module->target() == text.target && module->replace(text.name, text.body)) return;
    }
  }
  throw Fault("no kernel " + text.name + " for target " + text.target);
}

void Registry::restore() {
  for (Binary& binary : binaries_) binary.modules.clear();
}

void Registry::decode_all() {
  for (Binary& binary : binaries_) {
    for (const auto& module : modules_of(binary)) {
      for (const auto& [name, text] : module->texts()) module->function(name);
    }
  }
}

}  // namespace lminf::interpreter
