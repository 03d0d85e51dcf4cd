// What a call of an op runs, worked out without running it.
#pragma once

#include <cstdint>

namespace lminf {

struct KernelPlan {
  const char* kernel = "none";  // of CUDA's AttnKernel, or the CPU's instruction set; none: no rows
  int64_t block_m = 0;          // rows of q that a block (a task on a CPU) takes at a time
  int64_t block_n = 0;          // keys that it meets at a time
  int64_t splits = 1;           // blocks that share the keys of the same rows
  bool overlaps = false;        // what merges their results starts while they still run
  int64_t blocks = 0;
  int64_t threads = 0;          // of a block; on a CPU, of the pool
  int64_t shared_bytes = 0;     // of a block
  int64_t workspace_bytes = 0;  // of device memory, while the call runs
};

}  // namespace lminf
