// The emulation catches what programmatic dependent launches can do wrong: a kernel that writes and
// one that sums what it wrote, launched to overlap it, with one planted fault each.
#include <string>
#include <vector>

#include "../cuda/ptx/grid.cuh"
#include "../cuda/ptx/sm80.cuh"
#include "check.h"

namespace lminf::test {
namespace {

constexpr int kThreads = 64;
constexpr int kBlocks = 3;

enum class Planted {
  kNothing,
  kWriteAfterTrigger,        // no fault: that is what the wait is for
  kNeverTriggers,            // nor is this: the second kernel starts later, that is all
  kOneThreadWaits,           // nor this: the others meet it at a barrier
  kNoWait,                   // reads what may not be there
  kWriteAfterTriggerNoWait,  // the same, written later
  kWaitTooLate,              // after the read
  kNoBarrierAfterWait,       // one thread waits, the others do not meet it
  kAsyncCopyBeforeWait,
  kWritesBeforeWait,  // where the kernel before may still read
  kOneBlockLeaves,    // without waiting, so that its end is not the first kernel's
};

template <Planted kPlanted>
void first_kernel(float* between) {
  constexpr bool kLate =
      kPlanted == Planted::kWriteAfterTrigger || kPlanted == Planted::kWriteAfterTriggerNoWait;
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (!kLate) cuda::store_global(between + i, static_cast<float>(i));
  if (kPlanted != Planted::kNeverTriggers) cuda::ptx::grid_launch_dependents();
  if (kLate) cuda::store_global(between + i, static_cast<float>(i));
}

// out[i] = between[i] + table[i]; the table was there before.
template <Planted kPlanted>
void second_kernel(const float* between, const float* table, float* out) {
  constexpr auto planted = [](Planted p) { return p == kPlanted; };
  const int thread = static_cast<int>(threadIdx.x);
  const int i = static_cast<int>(blockIdx.x) * kThreads + thread;
  const float offset = cuda::load_global(table + i);  // nobody writes that
  float value = 0.0f;
  if (planted(Planted::kOneBlockLeaves) && blockIdx.x == 1) return;
  if (planted(Planted::kWritesBeforeWait)) cuda::store_global(out + i, 0.0f);
  if (planted(Planted::kWaitTooLate)) value = cuda::load_global(between + i);
  if (planted(Planted::kAsyncCopyBeforeWait) && thread % 4 == 0) {
    cuda::ptx::copy_async(cuda::shared_address(cuda::shared_memory() + 4 * thread), between + i,
                          true);
    cuda::ptx::copy_async_commit();
    cuda::ptx::copy_async_wait<0>();
  }
  if (planted(Planted::kOneThreadWaits) || planted(Planted::kNoBarrierAfterWait)) {
    if (thread == 0) cuda::ptx::grid_wait();
    if (planted(Planted::kOneThreadWaits)) __syncthreads();
  } else if (!planted(Planted::kNoWait) && !planted(Planted::kWriteAfterTriggerNoWait)) {
    cuda::ptx::grid_wait();
  }
  if (!planted(Planted::kWaitTooLate)) value = cuda::load_global(between + i);
  cuda::store_global(out + i, value + offset);
}

struct Outcome {
  std::string fault;  // empty: none reported
  bool right = false;
};

template <Planted kPlanted>
Outcome run(uint64_t seed = 0) {
  constexpr int kSize = kBlocks * kThreads;
  std::vector<float> between(kSize + 4), table(kSize, 0.5f), out(kSize);
  // Aligned for the asynchronous copy.
  float* first = between.data();
  while (reinterpret_cast<uintptr_t>(first) % 16 != 0) ++first;
  emulation::set_schedule_seed(seed);
  Outcome outcome;
  try {
    cuda::launch("first", first_kernel<kPlanted>, {kBlocks, kThreads, 0}, nullptr, first);
    cuda::launch("second", second_kernel<kPlanted>, {kBlocks, kThreads, 4 * kThreads, true},
                 nullptr, static_cast<const float*>(first), static_cast<const float*>(table.data()),
                 out.data());
  } catch (const emulation::Fault& fault) {
    outcome.fault = fault.what();
  }
  emulation::set_schedule_seed(0);
  outcome.right = true;
  for (int i = 0; i < kSize; ++i) outcome.right &= out[i] == static_cast<float>(i) + 0.5f;
  return outcome;
}

template <Planted kPlanted>
void check_sound(const char* name, uint64_t triggered) {
  for (uint64_t seed = 0; seed < 6; ++seed) {
    emulation::take_launches();
    const Outcome outcome = run<kPlanted>(seed);
    CHECK(outcome.fault.empty() && outcome.right,
          std::string(name) + ", seed " + std::to_string(seed) + ": " + outcome.fault);
    const auto launches = emulation::take_launches();
    CHECK(launches.size() == 2 && !launches[0].overlaps && launches[1].overlaps, name);
    CHECK(launches[0].blocks == kBlocks && launches[0].triggered == triggered, name);
  }
}

template <Planted kPlanted>
void check_fault(const char* name, const char* part) {
  for (uint64_t seed = 0; seed < 6; ++seed) {
    const std::string fault = run<kPlanted>(seed).fault;
    CHECK(fault.find("kernel second, block (") == 0 && fault.find(part) != std::string::npos,
          std::string(name) + ", seed " + std::to_string(seed) + ": reported: " + fault);
  }
}
#define CHECK_SOUND(planted, triggered) check_sound<Planted::planted>(#planted, triggered)
#define CHECK_FAULT(planted, part) check_fault<Planted::planted>(#planted, part)

void all_faults() {
  emulation::Device device;
  device.capability = 90;
  emulation::set_device(device);
  CHECK_SOUND(kNothing, kBlocks);
  CHECK_SOUND(kWriteAfterTrigger, kBlocks);
  CHECK_SOUND(kNeverTriggers, 0);
  CHECK_SOUND(kOneThreadWaits, kBlocks);

#if !defined(LMINF_THREAD_SANITIZER)  // which has nothing to say of these
  constexpr char kTooEarly[] = "load of what a kernel before this one writes, with no grid_wait";
  CHECK_FAULT(kNoWait, kTooEarly);
  CHECK_FAULT(kWriteAfterTriggerNoWait, kTooEarly);
  CHECK_FAULT(kWaitTooLate, kTooEarly);
  CHECK_FAULT(kNoBarrierAfterWait, kTooEarly);
  CHECK_FAULT(kAsyncCopyBeforeWait, "cp.async of what a kernel before this one writes");
  CHECK_FAULT(kWritesBeforeWait, "store before grid_wait");
  CHECK_FAULT(kOneBlockLeaves, "no thread of the block called grid_wait");
#endif

  // A kernel that does not overlap starts when everything before it is done.
  std::vector<float> memory(kThreads);
  cuda::launch("first", first_kernel<Planted::kNothing>, {1, kThreads, 0}, nullptr, memory.data());
  cuda::launch("first", first_kernel<Planted::kNothing>, {1, kThreads, 0}, nullptr, memory.data());

  // Devices and code without overlap.
  for (const emulation::Device& other :
       {emulation::Device{89, 4, true, true}, emulation::Device{90, 4, true, false}}) {
    emulation::set_device(other);
    CHECK(run<Planted::kNothing>().fault.find("launches overlap on compute capability 9.0") !=
              std::string::npos,
          "an overlapping launch on " + std::to_string(other.capability));
  }
  emulation::set_device({});
}

}  // namespace
}  // namespace lminf::test

int main() {
  lminf::test::all_faults();
  return lminf::test::finish_tests("emulation_overlap_test");
}
