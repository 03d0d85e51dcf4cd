// Programmatic dependent launch: a kernel launched with LaunchShape::overlaps may start while the
// one before it still runs. The instructions exist from sm_90 on; in code for older devices, where
// no launch overlaps (DeviceFacts), they are nothing.
//
// What an overlapping kernel must do, which the emulation checks:
//   - some thread of every block calls grid_wait, so that the end of this kernel is the end of all
//     before it as well, and the next launch, overlapping or not, may count on that;
//   - until then nothing is read that a kernel before it writes, and nothing is written at all:
//     those kernels may still read there. Other threads wait for that one at a barrier.
// Where grid_launch_dependents stands decides when the next kernel starts, and nothing else: what
// was written before it is no more to be counted on than what is written after it.
#pragma once

#include "../common/device.cuh"

namespace lminf::cuda::ptx {

// Waits until the kernels before this one are done and their writes visible to the grid.
LMINF_DEVICE void grid_wait() {
#if defined(LMINF_EMULATION)
  emulation::grid_wait();
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;\n" ::: "memory");
#endif
}

// An overlapping kernel after this one may start once every block has called this or ended.
LMINF_DEVICE void grid_launch_dependents() {
#if defined(LMINF_EMULATION)
  emulation::grid_launch_dependents();
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;\n" ::: "memory");
#endif
}

}  // namespace lminf::cuda::ptx
