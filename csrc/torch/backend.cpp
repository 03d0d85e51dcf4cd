#include "backend.h"

#include "../cpu/kernels.h"

namespace lminf::binding {
namespace {

// PyTorch's own thread pool, so that torch.set_num_threads holds for these kernels too.
cpu::Threads torch_threads() {
  cpu::Threads threads;
  threads.count = static_cast<int>(torch::stable::get_num_threads());
  threads.parallel_for = [](int64_t n, const std::function<void(int64_t, int64_t)>& body) {
    torch::stable::parallel_for(0, n, 1, body);
  };
  return threads;
}

thread_local Planning* planning = nullptr;

KernelPlan plan_of(const LambdaAttnParams& params, const cuda::DeviceFacts& device) {
  return cuda::lambda_attn_plan(params, device);
}

KernelPlan plan_of(const LambdaDecodeParams& params, const cuda::DeviceFacts& device) {
  return cuda::lambda_decode_plan(params, device);
}

KernelPlan cpu_plan_of(const LambdaAttnParams& params) {
  return cpu::lambda_attn_plan(params, torch_threads().count);
}

KernelPlan cpu_plan_of(const LambdaDecodeParams&) {
  KernelPlan plan;
  plan.kernel = cpu::kernels().isa;
  plan.threads = torch_threads().count;
  return plan;
}

// Answers a Planning, if one lives on this thread.
template <typename Params>
bool planned(const Params& params, const Device& device) {
  if (planning == nullptr) return false;
  if (planning->device) {
    planning->plan = plan_of(params, *planning->device);
#if defined(LMINF_WITH_CUDA)
  } else if (device.type() == torch::headeronly::DeviceType::CUDA) {
    planning->plan = plan_of(params, cuda::device_facts(device.index()));
#endif
  } else {
    planning->plan = cpu_plan_of(params);
  }
  return true;
}

// Runs `on_cpu` for a CPU device, the CUDA kernels for a CUDA device where there are any.
template <typename Params>
void dispatch(const Params& params, const Device& device,
              void (*on_cpu)(const Params&, const cpu::Threads&)) {
  using torch::headeronly::DeviceType;
  if (device.type() == DeviceType::CPU) return on_cpu(params, torch_threads());
#if defined(LMINF_WITH_CUDA)
  if (device.type() == DeviceType::CUDA) return run_cuda(params, device);
#endif
  throw std::logic_error("lminf: no kernels are registered for this device");
}

}  // namespace

Planning::Planning(std::optional<cuda::DeviceFacts> of_device) : device(of_device) {
  planning = this;
}

Planning::~Planning() { planning = nullptr; }

void run(const LambdaAttnParams& params, const Device& device) {
  if (planned(params, device)) return;
  dispatch(params, device, cpu::kernels().lambda_attn);
}

void run(const LambdaDecodeParams& params, const Device& device) {
  if (planned(params, device)) return;
  dispatch(params, device, cpu::kernels().lambda_decode);
}

void run(const ClampedRopeParams& params, const Device& device) {
  dispatch(params, device, cpu::kernels().clamped_rope);
}

void run(const MiddleTopkParams& params, const Device& device) {
  dispatch(params, device, cpu::kernels().middle_topk);
}

}  // namespace lminf::binding
