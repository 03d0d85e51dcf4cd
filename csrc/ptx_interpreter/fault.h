// What a kernel may not do, as an exception out of the launch.
#pragma once

#include <stdexcept>
#include <string>

#include "program.h"

namespace lminf::interpreter {

// "kernel K, block (x,y,z), thread (x,y,z), PTX line N `instruction`: what"
class Fault : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// `lane`: who is to blame, -1 for the whole warp.
[[noreturn]] void fault(const Warp& warp, const Instruction& instruction, int lane,
                        const std::string& what);

std::string hex(uint64_t value);

}  // namespace lminf::interpreter
