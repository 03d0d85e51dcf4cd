// What tests ask of the machine whose only GPU is the interpreter. Plain C++.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace lminf::interpreter {

// The device that the runtime reports. What runs on it is what a driver would take from the build:
// the PTX for this very capability (9.0a), else the newest PTX that is not newer than the device.
struct Device {
  int capability = 80;
  int multiprocessors = 4;
  bool has_sm90a = true;  // whether the build's PTX for 9.0a counts as there,
  bool has_sm90 = true;   // and any for 9.0 and later
};
void set_device(Device device);
// The ordinal of the device that was set last: each has one of its own.
int current_device();

// The order of warps and copies: 0 in turn, anything else a shuffled order of that seed.
void set_schedule_seed(uint64_t seed);

void register_global(const void* begin, int64_t bytes, const char* name);
void clear_globals();

struct LaunchRecord {
  std::string kernel;  // without namespaces, template arguments and "_kernel"
  std::string name;    // as in the PTX
  std::string target;  // of the PTX that ran: "80", "90", "90a"
  bool overlaps;
  uint64_t blocks;
  uint64_t triggered;     // blocks that called griddepcontrol.launch_dependents
  uint64_t instructions;  // of all warps
};
// The launches since the last call of this.
std::vector<LaunchRecord> take_launches();

// --- The PTX itself ---

struct KernelText {
  std::string target;  // "80", "90", "90a"
  std::string name;    // as in the PTX
  std::string body;
};
std::vector<KernelText> kernel_texts();
// Another body for one of them, until restore_kernel_texts.
void replace_kernel_text(const KernelText& text);
void restore_kernel_texts();
// Decodes every function of the build; throws Fault for the first that is not understood.
void decode_all();

// --- A driver that refuses ---

// No context is current on this thread, as before its first CUDA work.
void forget_context();
// cuTensorMapEncodeTiled refuses so many calls, after so many more that it takes.
void refuse_tensor_maps(int calls, int after);
// cudaGetDriverEntryPointByVersion finds nothing, so many times from now on.
void hide_entry_points(int calls);

}  // namespace lminf::interpreter
