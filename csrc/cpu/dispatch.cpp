// Chooses the kernels for this machine.
#include <cstdlib>
#include <stdexcept>
#include <string>
#if defined(__x86_64__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include "kernels.h"

namespace lminf::cpu {

// Each isa_<name>.cpp has one.
#define LMINF_DECLARE(isa)           \
  namespace isa {                    \
  extern const Kernels kernel_table; \
  }
LMINF_DECLARE(amx)
LMINF_DECLARE(avx512_bf16)
LMINF_DECLARE(avx512)
LMINF_DECLARE(avx2)
LMINF_DECLARE(portable)

namespace {

struct Candidate {
  const Kernels* kernels;
  bool supported;
};

#if defined(__x86_64__)
bool cpuid_bit(unsigned leaf, unsigned subleaf, int reg, int bit) {
  unsigned r[4] = {};
  return __get_cpuid_count(leaf, subleaf, &r[0], &r[1], &r[2], &r[3]) && (r[reg] >> bit & 1);
}

// Matrix tiles need a processor that has them and an operating system that lets this process use
// them.
bool has_amx() {
#if defined(__linux__)
  constexpr int kEdx = 3, kBf16 = 22, kTile = 24;
  constexpr long kArchRequestPermission = 0x1023, kTileData = 18;
  return cpuid_bit(7, 0, kEdx, kBf16) && cpuid_bit(7, 0, kEdx, kTile) &&
         syscall(SYS_arch_prctl, kArchRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

// The best first.
const Candidate* candidates() {
  static const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                               cpuid_bit(1, 0, 2, 29);  // F16C
  static const bool has_avx512 =
      has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  static const bool has_dot = has_avx512 && cpuid_bit(7, 1, 0, 5);
  // Intel's processors do a bf16 dot product in the time of four float32 ones of half its length,
  // so that converting to float32 is the faster way there; AMD's do it in the time of one.
  static const bool slow_dot = __builtin_cpu_is("intel");
  static const Candidate dot = {&avx512_bf16::kernel_table, has_dot};
  static const Candidate single = {&avx512::kernel_table, has_avx512};
  static const Candidate list[] = {{&amx::kernel_table, has_dot && has_amx()},
                                   slow_dot ? single : dot,
                                   slow_dot ? dot : single,
                                   {&avx2::kernel_table, has_avx2},
                                   {&portable::kernel_table, true},
                                   {nullptr, false}};
  return list;
}
#else
const Candidate* candidates() {
  static const Candidate list[] = {{&portable::kernel_table, true}, {nullptr, false}};
  return list;
}
#endif

}  // namespace

const Kernels& kernels() {
  const char* wanted = std::getenv("LMINF_CPU_ISA");
  const bool any = wanted == nullptr || *wanted == '\0';
  std::string usable;
  for (const Candidate* c = candidates(); c->kernels != nullptr; ++c) {
    if (!c->supported) continue;
    if (any || std::string(wanted) == c->kernels->isa) return *c->kernels;
    usable += usable.empty() ? c->kernels->isa : std::string(", ") + c->kernels->isa;
  }
  throw std::invalid_argument("LMINF_CPU_ISA is '" + std::string(wanted) +
                              "', which this machine cannot run; set it to one of " + usable +
                              ", or unset it to take the first of them");
}

}  // namespace lminf::cpu
