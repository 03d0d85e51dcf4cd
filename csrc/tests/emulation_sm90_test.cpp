// The emulation of sm_90a catches what it claims to catch: one kernel of a producer warp and a
// consumer warpgroup, with one planted fault each. With a name as argument, runs that one case
// alone (for ThreadSanitizer, whose report is then what the caller looks for).
#include <cmath>
#include <cstring>
#include <string>
#include <vector>

#include "../cuda/ptx/sm80.cuh"
#include "../cuda/ptx/sm90.cuh"
#include "check.h"

namespace lminf::test {
namespace {

using cuda::bf16;
using cuda::Swizzle;
using cuda::ptx::Major;

enum class Planted {
  kNothing,
  // mbarriers
  kNoBarrier,
  kNoInitFence,
  kBarrierOverwritten,
  kNoBarrierWait,
  kWrongPhase,
  kFewerBytesExpected,
  kMoreBytesExpected,
  kOneArrivalMore,
  kNobodyWaits,
  // TMA
  kMapOfAnotherSwizzle,
  kMisalignedTile,
  kBoxOutsideShared,
  kLoadOutsideTensor,
  kReleasedTooEarly,
  kNoStoreWait,
  kSourceReused,
  // proxies
  kNoProxyFenceBeforeWgmma,
  kProxyFenceTooEarly,
  kNoProxyFenceBeforeStore,
  // wgmma
  kDescriptorOfAnotherSwizzle,
  kWrongStride,
  kNoWgmmaFence,
  kNoCommit,
  kNoWgmmaWait,
  kWaitTooWeak,
  kResultsTooEarly,
  kAccumulatorChanged,
  kARegisterChanged,
  kOneWarpLess,
  kOperandsDisagree,
  // the block
  kNoBarrierBeforeWgmma,
  kBarrierLeftHalfway,
};

constexpr int kTile = 64;  // rows and columns of both operands
constexpr int kTileBytes = kTile * kTile * 2;
constexpr int kTiles = 3;  // one after another through one stage
constexpr int kConsumers = 128, kThreads = kConsumers + 32;
constexpr int kSharedBytes = 3 * kTileBytes + 16;

// out[t] = 2 a[t] * a[t]^T + a[t][:, :16] * a[t][:, :16]^T for each of kTiles tiles, with TMA in
// and out. The first factor is doubled in shared memory by ordinary stores, and the last product
// has it in registers.
template <Planted kPlanted>
void squares(const cuda::TensorMap a, const cuda::TensorMap out) {
  using namespace cuda::ptx;
  constexpr auto planted = [](Planted p) { return p == kPlanted; };
  unsigned char* memory = cuda::shared_memory();
  const uint32_t first = cuda::shared_address(memory);
  const uint32_t second = first + kTileBytes + (planted(Planted::kMisalignedTile) ? 128 : 0);
  const uint32_t result = first + 2 * kTileBytes;
  const uint32_t full = first + 3 * kTileBytes, empty = full + 8;
  const int thread = static_cast<int>(threadIdx.x);
  if (thread == 0 && !planted(Planted::kNoBarrier)) {
    mbarrier_init(full, 1);
    mbarrier_init(empty, kConsumers);
    if (!planted(Planted::kNoInitFence)) fence_barrier_init();
  }
  __syncthreads();

  if (thread >= kConsumers) {
    if (!elect_one()) return;
    for (int t = 0; t < (planted(Planted::kNobodyWaits) ? 1 : kTiles); ++t) {
      mbarrier_wait(empty, (t & 1) ^ 1);
      if (planted(Planted::kBarrierOverwritten)) memset(memory + full - first, 0, 8);
      mbarrier_arrive_expect_tx(full, 2 * kTileBytes -
                                          (planted(Planted::kFewerBytesExpected) ? 128 : 0) +
                                          (planted(Planted::kMoreBytesExpected) ? 128 : 0));
      tma_load_4d(planted(Planted::kBoxOutsideShared) ? result + 1024 : first, a, full, 0,
                  kTile * t, 0, 0);
      tma_load_4d(second, a, full, 0, kTile * t, 0, 0);
      if (planted(Planted::kOneArrivalMore)) {
        mbarrier_arrive(full);
        mbarrier_arrive(full);
      }
    }
    return;
  }

  cuda::SharedArray<bf16> doubled(memory, kTile * kTile);
  cuda::SharedArray<bf16> staged(memory + 2 * kTileBytes, kTile * kTile);
  for (int t = 0; t < kTiles; ++t) {
    if (planted(Planted::kWrongPhase)) {
      mbarrier_wait(full, (t & 1) ^ 1);
    } else if (!planted(Planted::kNoBarrierWait) && !planted(Planted::kNobodyWaits)) {
      mbarrier_wait(full, t & 1);
    }
    if (planted(Planted::kNobodyWaits)) return;

    // A registers of the tile's first 16 columns, before they are doubled.
    const int lane = thread % 32, top = thread / 32 * 16 + lane / 4;
    uint32_t fragment[4];
    for (int r = 0; r < 4; ++r) {
      const int row = top + r % 2 * 8, column = lane % 4 * 2 + r / 2 * 8;
      memcpy(&fragment[r], &doubled[row * 64 + (((column / 8) ^ (row % 8)) * 8 + column % 8)], 4);
    }
    named_barrier(1, kConsumers);
    if (planted(Planted::kProxyFenceTooEarly)) {
      fence_proxy_async();
      named_barrier(1, kConsumers);
    }
    for (int i = thread; i < kTile * kTile; i += kConsumers) {
      doubled[i] = cuda::from_float<bf16>(2.0f * cuda::to_float(doubled[i]));
    }
    if (!planted(Planted::kNoProxyFenceBeforeWgmma) && !planted(Planted::kProxyFenceTooEarly)) {
      fence_proxy_async();
    }
    if (!planted(Planted::kNoBarrierBeforeWgmma)) named_barrier(1, kConsumers);

    float acc[32];
    const Descriptor left = planted(Planted::kDescriptorOfAnotherSwizzle)
                                ? make_descriptor<Swizzle::k64>(first, 16, 1024)
                                : k_major_descriptor<Swizzle::k128>(first);
    const Descriptor right = planted(Planted::kWrongStride)
                                 ? make_descriptor<Swizzle::k128>(second, 16, 512)
                                 : k_major_descriptor<Swizzle::k128>(second);
    if (!planted(Planted::kNoWgmmaFence)) wgmma_fence();
    for (int step = 0; step < 4; ++step) {
      if (planted(Planted::kOneWarpLess) && thread >= 96) break;
      const int which = planted(Planted::kOperandsDisagree) && thread == 64 ? 0 : step;
      wgmma<bf16, Major::kK, Major::kK>(acc, left.plus(32 * which), right.plus(32 * step),
                                        step > 0);
      if (planted(Planted::kAccumulatorChanged) && step == 1) acc[3] = 0.0f;
    }
    if (!planted(Planted::kOneWarpLess)) wgmma<bf16, Major::kK>(acc, fragment, right, true);
    if (!planted(Planted::kNoCommit)) wgmma_commit();
    if (planted(Planted::kARegisterChanged)) fragment[2] ^= 1;
    if (planted(Planted::kReleasedTooEarly)) mbarrier_arrive(empty);
    if (planted(Planted::kWaitTooWeak)) {
      wgmma_wait<1>(acc);
    } else if (planted(Planted::kResultsTooEarly)) {
      wgmma_wait<1>();
    } else if (!planted(Planted::kNoWgmmaWait)) {
      wgmma_wait<0>();
    }
    if (planted(Planted::kReleasedTooEarly)) named_barrier(1, kConsumers);

    for (int r = 0; r < 32; ++r) {
      const int row = top + r / 2 % 2 * 8, column = r / 4 * 8 + lane % 4 * 2 + r % 2;
      staged[row * 64 + (((column / 8) ^ (row % 8)) * 8 + column % 8)] =
          cuda::from_float<bf16>(acc[r]);
    }
    if (planted(Planted::kResultsTooEarly)) wgmma_wait<0>();
    if (!planted(Planted::kNoProxyFenceBeforeStore)) fence_proxy_async();
    named_barrier(1, kConsumers);
    if (!planted(Planted::kReleasedTooEarly)) mbarrier_arrive(empty);
    if (thread == 0) {
      tma_store_4d(out, result, 0, kTile * t, 0, 0);
      tma_store_commit();
      if (planted(Planted::kSourceReused)) memset(&staged[0], 0, 64);
      if (!planted(Planted::kNoStoreWait)) tma_store_wait_read<0>();
    }
    named_barrier(1, kConsumers);
  }
  if (planted(Planted::kBarrierLeftHalfway) && thread < 32) named_barrier_arrive(4, 64);
}

struct Outcome {
  std::string fault;  // empty: none reported
  bool right = false;
};

template <Planted kPlanted>
Outcome run(uint64_t seed = 0) {
  constexpr int kElements = kTiles * kTile * kTile;
  alignas(16) static bf16 in[kElements], out[kElements];
  std::vector<float> values(kElements);
  for (int i = 0; i < kElements; ++i) {
    values[i] =
        static_cast<float>(static_cast<int>(static_cast<uint32_t>(i) * 2654435761u >> 20) % 3 - 1);
    in[i] = cuda::from_float<bf16>(values[i]);
    out[i] = cuda::from_float<bf16>(0.0f);
  }
  emulation::clear_globals();
  emulation::register_global(in, sizeof(in) - (kPlanted == Planted::kLoadOutsideTensor ? 2 : 0),
                             "in");
  emulation::register_global(out, sizeof(out), "out");
  emulation::set_schedule_seed(seed);
  const auto map_of = [](const bf16* base) {
    return cuda::encode_tensor_map({base,
                                    {kTile, kTiles * kTile, 1, 1},
                                    {1, kTile, 1, 1},
                                    {kTile, kTile, 1, 1},
                                    Swizzle::k128});
  };
  cuda::TensorMap map = map_of(in);
  if (kPlanted == Planted::kMapOfAnotherSwizzle) map.span = 64;
  Outcome outcome;
  try {
    cuda::launch("squares", squares<kPlanted>, {1, kThreads, kSharedBytes}, nullptr, map,
                 map_of(out));
  } catch (const emulation::Fault& fault) {
    outcome.fault = fault.what();
  }
  emulation::set_schedule_seed(0);
  emulation::clear_globals();
  outcome.right = true;
  for (int t = 0; t < kTiles; ++t) {
    const float* x = values.data() + t * kTile * kTile;
    for (int i = 0; i < kTile * kTile; ++i) {
      float want = 0.0f;
      for (int k = 0; k < kTile; ++k) {
        want += (k < 16 ? 3.0f : 2.0f) * x[i / kTile * kTile + k] * x[i % kTile * kTile + k];
      }
      outcome.right &= cuda::to_float(out[t * kTile * kTile + i]) == want;
    }
  }
  return outcome;
}

// The fault is reported in every order of threads, in these words, by the kernel's name and thread.
template <Planted kPlanted>
void check_fault(const char* name, const char* part, bool in_every_order = true) {
  for (uint64_t seed = 0; seed < (in_every_order ? 6 : 1); ++seed) {
    const std::string fault = run<kPlanted>(seed).fault;
    CHECK(fault.find(part) != std::string::npos &&
              fault.find("kernel squares, block (0,0,0), thread (") != std::string::npos,
          std::string(name) + ", seed " + std::to_string(seed) + ": reported: " + fault);
  }
}
#define CHECK_FAULT(planted, ...) check_fault<Planted::planted>(#planted, __VA_ARGS__)

// No fault can be seen here, but the numbers are wrong.
template <Planted kPlanted>
void check_wrong(const char* name) {
  const Outcome outcome = run<kPlanted>();
  CHECK(!outcome.right, std::string(name) + ": the numbers are right");
}
#define CHECK_WRONG(planted) check_wrong<Planted::planted>(#planted)

void all_faults() {
  for (uint64_t seed = 0; seed < 20; ++seed) {
    const Outcome sound = run<Planted::kNothing>(seed);
    CHECK(sound.fault.empty() && sound.right,
          "seed " + std::to_string(seed) + ", sound kernel: " + sound.fault);
  }
  CHECK_FAULT(kNoBarrier, "no mbarrier was initialised at shared address 24576");
  CHECK_FAULT(kNoInitFence, "no fence_barrier_init");
  CHECK_FAULT(kBarrierOverwritten, "was written over");
  CHECK_FAULT(kNoBarrierWait, "touches shared address 0, which a ", false);
  CHECK_WRONG(kNoBarrierWait);
  CHECK_FAULT(kWrongPhase, "touches shared address 0, which a ", false);
  CHECK_WRONG(kWrongPhase);
  CHECK_FAULT(kFewerBytesExpected, "than it was told to expect");
  CHECK_FAULT(kMoreBytesExpected,
              "phase 0, 0 of 1 arrivals and 128 bytes missing, 128 threads wait");
  CHECK_FAULT(kOneArrivalMore, "more arrivals in one phase", false);
  CHECK_FAULT(kNobodyWaits, "no wait on its mbarrier covers it", false);

  CHECK_WRONG(kMapOfAnotherSwizzle);
  CHECK_FAULT(kMisalignedTile, "not aligned to 1024 bytes");
  CHECK_FAULT(kBoxOutsideShared, "outside the block's 24592 bytes");
  CHECK_FAULT(kLoadOutsideTensor, "outside every tensor");
  CHECK_FAULT(kReleasedTooEarly, "which a wgmma still under way reads", false);
  CHECK_FAULT(kNoStoreWait, "ended before the store had read its source", false);
  CHECK_WRONG(kSourceReused);

  CHECK_FAULT(kNoProxyFenceBeforeWgmma, "with no fence_proxy_async");
  CHECK_FAULT(kProxyFenceTooEarly, "with no fence_proxy_async");
  CHECK_FAULT(kNoProxyFenceBeforeStore, "with no fence_proxy_async");

  CHECK_WRONG(kDescriptorOfAnotherSwizzle);
  CHECK_WRONG(kWrongStride);
  CHECK_FAULT(kNoWgmmaFence, "no wgmma_fence since");
  CHECK_FAULT(kNoCommit, "which a wgmma still under way reads", false);
  CHECK_WRONG(kNoCommit);
  CHECK_FAULT(kNoWgmmaWait, "which a wgmma still under way reads", false);
  CHECK_WRONG(kNoWgmmaWait);
  CHECK_FAULT(kWaitTooWeak, "results are read after a wgmma_wait that does not cover");
  CHECK_WRONG(kResultsTooEarly);
  CHECK_FAULT(kAccumulatorChanged, "accumulators were changed");
  CHECK_FAULT(kARegisterChanged, "A registers were changed");
  CHECK_FAULT(kOneWarpLess, "deadlock");
  CHECK_FAULT(kOperandsDisagree, "disagree about the operands");

  CHECK_FAULT(kBarrierLeftHalfway, "named barrier 4 was left with 32 threads arrived");
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
  } else if (name == "no_barrier_before_wgmma") {
    CHECK(run<Planted::kNoBarrierBeforeWgmma>().right, "no barrier before wgmma");
  } else {
    CHECK(false, "unknown case " + name);
  }
  return finish_tests("emulation_sm90_test");
}
