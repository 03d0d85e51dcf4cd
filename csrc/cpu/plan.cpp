// How a forward is cut on a CPU, worked out without running it.
#include "attn_plan.h"
#include "kernels.h"

namespace lminf::cpu {
namespace {
#include "tiles.h"
}  // namespace

KernelPlan lambda_attn_plan(const LambdaAttnParams& p, int threads) {
  const AttnPlan tasks(p, threads, kTaskRows, kMaxHeadsPerTask);
  KernelPlan plan;
  plan.kernel = kernels().isa;
  plan.block_m = tasks.rows_per_task();
  plan.block_n = kBlockN;
  plan.blocks = tasks.tasks();
  plan.threads = threads;
  return plan;
}

}  // namespace lminf::cpu
