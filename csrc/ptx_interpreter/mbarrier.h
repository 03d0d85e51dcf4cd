// Objects in shared memory that count arrivals and bytes, phase after phase.
#pragma once

#include "machine.h"

namespace lminf::interpreter {

// The mbarrier at an address; a fault where none was made, or none that the lane may know of.
Mbarrier& mbarrier_at(const Site& site, uint32_t address);

// A copy has brought bytes, `engine` at that tick.
void bytes_came(const Site& site, uint32_t address, uint32_t bytes, uint32_t engine, uint32_t tick);

}  // namespace lminf::interpreter
