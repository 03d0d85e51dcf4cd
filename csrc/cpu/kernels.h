// The CPU backend's front: one table of kernels per instruction set, chosen when first asked for.
#pragma once

#include <cstdint>
#include <functional>

#include "../params.h"
#include "../plan.h"

namespace lminf::cpu {

// How a kernel gets its threads: the caller's pool, so that torch.set_num_threads holds here too.
struct Threads {
  int count = 1;
  // Calls body(begin, end) over disjoint pieces of [0, n), possibly from several threads, and
  // waits.
  std::function<void(int64_t n, const std::function<void(int64_t begin, int64_t end)>& body)>
      parallel_for;
};

// The calling thread alone.
inline const Threads& serial() {
  static const Threads threads = {
      1, [](int64_t n, const std::function<void(int64_t, int64_t)>& body) { body(0, n); }};
  return threads;
}

struct Kernels {
  const char* isa;  // "amx", "avx512_bf16", "avx512", "avx2", "portable"
  void (*lambda_attn)(const LambdaAttnParams&, const Threads&);
  // How lambda_attn is cut for so many threads; `kernel` is left empty.
  KernelPlan (*lambda_attn_plan)(const LambdaAttnParams&, int threads);
  void (*lambda_decode)(const LambdaDecodeParams&, const Threads&);
  void (*clamped_rope)(const ClampedRopeParams&, const Threads&);
  void (*middle_topk)(const MiddleTopkParams&, const Threads&);
};

// The best table this machine can run, or the one named by the environment variable LMINF_CPU_ISA,
// which is read at every call so that tests can force each in turn. Throws std::invalid_argument
// for a name that is unknown, not built, or not supported by this machine; the message lists the
// names that would work.
const Kernels& kernels();

// What lambda_attn runs with so many threads.
KernelPlan lambda_attn_plan(const LambdaAttnParams& params, int threads);

}  // namespace lminf::cpu
