// Copies that run beside the threads.
#pragma once

#include <cstddef>

#include "machine.h"

namespace lminf::interpreter {

// The block's load of that number comes to its end: now, as the scheduler has it.
void land_load(Block& block, size_t index);

}  // namespace lminf::interpreter
