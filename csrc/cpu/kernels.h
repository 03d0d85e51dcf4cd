// The CPU backend's front: one table of kernels per instruction set, chosen when first asked for.
#pragma once

#include <cstdint>
#include <functional>
#include <tuple>

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

template <typename Params>
struct Kernel {
  void (*run)(const Params&, const Threads&);
  KernelPlan (*plan)(const Params&, int threads);
};

// A kernel for each of the ops.
template <typename List>
struct KernelTable;
template <typename... Params>
struct KernelTable<OpList<Params...>> {
  const char* isa;  // "amx", "avx512_bf16", "avx512", "avx2", "portable"
  std::tuple<Kernel<Params>...> kernels;

  template <typename P>
  const Kernel<P>& of() const {
    return std::get<Kernel<P>>(kernels);
  }
};
using Kernels = KernelTable<Ops>;

// The best table this machine can run, or the one named by the environment variable LMINF_CPU_ISA,
// which is read at every call so that tests can force each in turn. Throws std::invalid_argument
// for a name that is unknown, not built, or not supported by this machine; the message lists the
// names that would work.
const Kernels& kernels();

template <typename Params>
void run_op(const Params& params, const Threads& threads) {
  kernels().of<Params>().run(params, threads);
}

// What that runs with so many threads.
template <typename Params>
KernelPlan plan_of(const Params& params, int threads) {
  const Kernels& chosen = kernels();
  KernelPlan plan = chosen.of<Params>().plan(params, threads);
  plan.kernel = chosen.isa;
  plan.threads = threads;
  return plan;
}

}  // namespace lminf::cpu
