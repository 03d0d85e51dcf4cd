// There are no CUDA kernels for the backward of lambda_attn yet: a call that would need them
// throws.
#include <stdexcept>

#include "../launchers.h"

namespace lminf::cuda {
namespace {

[[noreturn]] void refuse() {
  throw std::invalid_argument(
      "lambda_attn_backward: there is no backward on CUDA devices yet; train on a CPU");
}

}  // namespace

template <>
KernelPlan plan_of(const LambdaAttnBackwardParams&, const DeviceFacts&) {
  refuse();
}

template <>
void run_op(const LambdaAttnBackwardParams&, const DeviceFacts&, void*, Stream) {
  refuse();
}

}  // namespace lminf::cuda
