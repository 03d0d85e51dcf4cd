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

void check_cpu(const Device& device) {
  if (device.type() != torch::headeronly::DeviceType::CPU) {
    throw std::logic_error("lminf: no kernels are registered for this device");
  }
}

}  // namespace

void run(const LambdaAttnParams& params, const Device& device) {
  check_cpu(device);
  cpu::kernels().lambda_attn(params, torch_threads());
}

void run(const LambdaDecodeParams& params, const Device& device) {
  check_cpu(device);
  cpu::kernels().lambda_decode(params, torch_threads());
}

void run(const ClampedRopeParams& params, const Device& device) {
  check_cpu(device);
  cpu::kernels().clamped_rope(params, torch_threads());
}

}  // namespace lminf::binding
