// Runs the blocks of a launch, warp by warp.
#pragma once

#include <cstdint>

#include "machine.h"

namespace lminf::interpreter {

// Which of the orders that the hardware might choose: 0 takes blocks in turn, and copies land at
// their wait; others take any order, and copies land at any time that is allowed.
void set_schedule(uint64_t seed);

// All blocks, one after another. Throws Fault.
void run(Launch& launch);

}  // namespace lminf::interpreter
