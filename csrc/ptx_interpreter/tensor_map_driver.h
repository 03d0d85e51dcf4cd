// cuTensorMapEncodeTiled, as the driver API's text has it.
#pragma once

namespace lminf::interpreter {

// The driver's function of that name, null: it has none.
void* tensor_map_entry_point(const char* symbol, unsigned version);
// Of the runtime (cuda_runtime.cpp): whether the calling thread has a current context.
bool context_is_current();

}  // namespace lminf::interpreter
