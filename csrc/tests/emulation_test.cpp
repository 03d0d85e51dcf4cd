// The emulation catches what it claims to catch: kernels with one planted fault each, beside the
// same kernels without it. With a name as argument, runs that one case alone (for ThreadSanitizer,
// whose report is then what the caller looks for).
#include <cmath>
#include <cstring>
#include <string>
#include <vector>

#include "../cuda/common/device.cuh"
#include "../cuda/ptx/sm80.cuh"
#include "check.h"

namespace lminf::test {
namespace {

using cuda::SharedArray;

constexpr int kThreads = 64;

enum class Planted {
  kNothing,
  kMissingBarrier,
  kMissingWait,
  kIndexOffByOne,
  kAddressOffByOne,
  kGlobalOffByOne,
  kDivergentBarrier,
  kLeavesEarly,
  kDivergentWarp,
  kNamedBarrierShort,
  kReusedTooEarly,
};

// Each thread copies four floats to shared memory asynchronously, and writes out its neighbour's.
template <Planted kPlanted>
void neighbour(const float* in, float* out) {
  unsigned char* memory = cuda::shared_memory();
  SharedArray<float> tile(memory, 4 * kThreads);
  const int thread = static_cast<int>(threadIdx.x);
  const uint32_t address = cuda::shared_address(&tile[4 * thread]);

  if constexpr (kPlanted == Planted::kLeavesEarly) {
    if (thread == 5) return;
  }
  if constexpr (kPlanted == Planted::kDivergentWarp) {
    if (thread % 32 < 16) {
      __shfl_sync(cuda::kFullWarp, thread, 0);
    } else {
      __syncwarp();
    }
  }
  constexpr int kAddressFault = kPlanted == Planted::kAddressOffByOne ? 16 : 0;
  constexpr int kGlobalFault = kPlanted == Planted::kGlobalOffByOne ? 4 : 0;
  cuda::ptx::copy_async(address + kAddressFault, in + 4 * thread + kGlobalFault, true);
  cuda::ptx::copy_async_commit();
  if constexpr (kPlanted != Planted::kMissingWait) cuda::ptx::copy_async_wait<0>();

  if constexpr (kPlanted == Planted::kDivergentBarrier) {
    if (thread < 32) {
      __syncthreads();
    } else {
      __syncthreads();
    }
  } else if constexpr (kPlanted == Planted::kNamedBarrierShort) {
    if (thread < 32) cuda::ptx::named_barrier(1, kThreads);
  } else if constexpr (kPlanted != Planted::kMissingBarrier) {
    __syncthreads();
  }

  constexpr int kWrap = kPlanted == Planted::kIndexOffByOne ? 4 * kThreads + 4 : 4 * kThreads;
  float values[4];
  for (int e = 0; e < 4; ++e) values[e] = tile[(4 * thread + 4 + e) % kWrap];
  for (int e = 0; e < 4; ++e) cuda::store_global(out + 4 * thread + e, values[e]);
  if constexpr (kPlanted == Planted::kReusedTooEarly) {
    // Overwrites the neighbour's source while it may still be read.
    cuda::ptx::copy_async(address, in, true);
    cuda::ptx::copy_async_commit();
    cuda::ptx::copy_async_wait<0>();
  }
}

struct Outcome {
  std::string fault;  // empty: none reported
  bool right = false;
};

template <Planted kPlanted>
Outcome run(uint64_t seed = 0) {
  constexpr int kFloats = 4 * kThreads;
  alignas(16) static float in[kFloats];
  std::vector<float> out(kFloats, 0.0f);
  for (int i = 0; i < kFloats; ++i) in[i] = static_cast<float>(i + 1);
  emulation::clear_globals();
  emulation::register_global(in, sizeof(in), "in");
  emulation::register_global(out.data(), kFloats * sizeof(float), "out");
  emulation::set_schedule_seed(seed);
  Outcome outcome;
  try {
    cuda::launch("neighbour", neighbour<kPlanted>, {1, kThreads, kFloats * 4}, nullptr,
                 static_cast<const float*>(in), out.data());
  } catch (const emulation::Fault& fault) {
    outcome.fault = fault.what();
  }
  emulation::set_schedule_seed(0);
  emulation::clear_globals();
  outcome.right = true;
  for (int i = 0; i < kFloats; ++i) outcome.right &= out[i] == in[(i + 4) % kFloats];
  return outcome;
}

bool has(const std::string& text, const char* part) { return text.find(part) != std::string::npos; }

#define CHECK_FAULT(planted, part)                            \
  do {                                                        \
    const std::string fault = run<Planted::planted>().fault;  \
    CHECK(has(fault, part), #planted ": reported: " + fault); \
  } while (false)

void all_faults() {
  for (uint64_t seed = 0; seed < 8; ++seed) {
    const Outcome sound = run<Planted::kNothing>(seed);
    CHECK(sound.fault.empty() && sound.right,
          "seed " + std::to_string(seed) + ", sound kernel: " + sound.fault);
  }

  // A missing barrier shows as poison in the result (and as a race under ThreadSanitizer).
  CHECK(!run<Planted::kMissingBarrier>().right, "the neighbour's data was there with no barrier");
  CHECK_FAULT(kMissingWait, "asynchronous copies that no wait covers");
  CHECK(!run<Planted::kMissingWait>().right, "a copy landed with no wait");
  CHECK_FAULT(kIndexOffByOne, "index 256 is outside [0, 256)");
  CHECK_FAULT(kIndexOffByOne, "thread (63,0,0)");
  CHECK_FAULT(kAddressOffByOne, "cp.async of 16 bytes at shared address 1024, outside");
  CHECK_FAULT(kGlobalOffByOne, "outside every tensor");
  CHECK_FAULT(kDivergentBarrier, "divergent barrier");
  CHECK_FAULT(kLeavesEarly, "deadlock");
  CHECK_FAULT(kLeavesEarly, "threads 0 to 4: waits at __syncthreads (emulation_test.cpp:");
  CHECK_FAULT(kLeavesEarly, "thread 5: finished");
  CHECK_FAULT(kDivergentWarp, "divergent warp");
  CHECK_FAULT(kNamedBarrierShort, "threads 0 to 31: waits at bar.sync");

  int wrong = 0;
  for (uint64_t seed = 1; seed < 9; ++seed) wrong += !run<Planted::kReusedTooEarly>(seed).right;
  CHECK(wrong > 0, "no shuffled schedule showed memory overwritten while being read");
}

}  // namespace
}  // namespace lminf::test

int main(int argc, char** argv) {
  using namespace lminf::test;
  const std::string name = argc > 1 ? argv[1] : "";
  if (name.empty()) {
    all_faults();
  } else if (name == "sound") {
    CHECK(run<Planted::kNothing>().right, "sound kernel");
  } else if (name == "missing_barrier") {
    CHECK(!run<Planted::kMissingBarrier>().right, "missing barrier");
  } else {
    CHECK(false, "unknown case " + name);
  }
  return finish_tests("emulation_test");
}
