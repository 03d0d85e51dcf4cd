// Addresses: which space they mean, and whether an access lies inside an allocation.
#pragma once

#include <cstddef>
#include <cstdint>

#include "machine.h"

namespace lminf::interpreter {

// Global memory that kernels may touch. Views of one tensor may overlap.
void register_region(const void* begin, size_t bytes, const char* name);
void clear_regions();

// Generic addresses of shared memory and of the kernel's parameters carry these; all others are
// global, and the host's own.
constexpr uint64_t kSharedWindow = uint64_t{1} << 56, kParamWindow = uint64_t{2} << 56;
constexpr uint64_t kWindowMask = uint64_t{0xff} << 56;

// Checked: inside the block's shared memory. Says nothing to the order of accesses.
unsigned char* shared_bytes(const Site& site, uint64_t address, uint32_t bytes);
// Checked: inside a region, and allowed at this time.
unsigned char* global_bytes(const Site& site, uint64_t address, uint32_t bytes, bool writes);
// Of a parameter of the kernel.
const unsigned char* parameter_bytes(const Site& site, uint64_t offset, uint32_t bytes);

inline uint32_t shared_offset(uint32_t address) { return address - kSharedBase; }

}  // namespace lminf::interpreter
