// From an op's `prepare` to an op of PyTorch: its arguments are taken off PyTorch's stack by the
// types that `prepare` has, and the backend runs or plans what it made of them.
#pragma once

#include <torch/csrc/stable/library.h>

#include <cstdint>
#include <optional>
#include <string>
#include <tuple>
#include <type_traits>
#include <vector>

#include "arguments.h"
#include "call.h"
#include "derivatives.h"

// What runs the calls: run(call, arguments) and plan(call, device).
#if !defined(LMINF_BACKEND)
#define LMINF_BACKEND "backend.h"
#define LMINF_LIBRARY lminf
#endif
#include LMINF_BACKEND

namespace lminf::binding {

template <auto prepare>
struct Op;

template <typename Params, typename... Arguments, Call<Params> (*prepare)(Arguments...)>
struct Op<prepare> {
  using Taken = std::tuple<std::decay_t<Arguments>...>;
  static constexpr uint64_t kWidth = (Stack::width<std::decay_t<Arguments>>() + ...);

  static void run(StableIValue* stack, uint64_t n_arguments, uint64_t n_outputs) {
    call(stack, n_arguments, n_outputs, [](const Taken&) {});
  }

  // For an op without an autograd kernel, which goes by this name.
  template <const char* name>
  static void run_forward_only(StableIValue* stack, uint64_t n_arguments, uint64_t n_outputs) {
    call(stack, n_arguments, n_outputs, [](const Taken& taken) {
      if (!aoti_torch_grad_mode_is_enabled()) return;
      std::vector<Tensor> tensors;
      const auto add = [&](const Tensor& tensor) { tensors.push_back(tensor); };
      each_tensor(taken, add);
      refuse_derivatives(name, tensors);
    });
  }

  // What a call would run: the op's arguments, then the device to plan for (capability 0: the
  // tensors' own) and its multiprocessors; gives the kernel's name and the plan's other entries.
  static void plan(StableIValue* stack, uint64_t n_arguments, uint64_t) {
    STD_TORCH_CHECK(n_arguments == kWidth + 2, "the schema of a plan has ", n_arguments,
                    " arguments, its kernel ", kWidth + 2);
    Stack in(stack);
    const Taken taken{in.take<std::decay_t<Arguments>>()...};
    std::optional<cuda::DeviceFacts> device;
    const auto capability = in.take<int64_t>(), multiprocessors = in.take<int64_t>();
    if (capability != 0) {
      device.emplace();
      device->capability = static_cast<int>(capability);
      device->multiprocessors = static_cast<int>(multiprocessors);
    }
    const Call<Params> call = std::apply(prepare, taken);
    const KernelPlan plan = call.has_work() ? binding::plan(call, device) : KernelPlan();
    stack[0] = torch::stable::detail::from(std::string(plan.kernel));
    stack[1] = torch::stable::detail::from(
        std::vector<int64_t>{plan.block_m, plan.block_n, plan.splits, plan.overlaps, plan.blocks,
                             plan.threads, plan.shared_bytes, plan.workspace_bytes});
  }

 private:
  template <typename F>
  static void call(StableIValue* stack, uint64_t n_arguments, uint64_t n_outputs,
                   const F& look_at) {
    STD_TORCH_CHECK(n_arguments == kWidth, "the schema has ", n_arguments,
                    " arguments, its kernel ", kWidth);
    Stack in(stack);
    const Taken taken{in.take<std::decay_t<Arguments>>()...};
    look_at(taken);
    const Call<Params> call = std::apply(prepare, taken);
    STD_TORCH_CHECK(n_outputs == call.outputs.size(), "the schema has ", n_outputs,
                    " outputs, its kernel ", call.outputs.size());
    if (call.has_work()) binding::run(call, taken);
    for (uint64_t i = 0; i < n_outputs; ++i) {
      stack[i] = torch::stable::detail::from(call.outputs[i]);
    }
  }
};

}  // namespace lminf::binding

// Registers `kernel` under `name`, a string, for every device that the build has kernels for.
#define LMINF_REGISTER(name, kernel)   \
  LMINF_REGISTER_ON(CPU, name, kernel) \
  LMINF_REGISTER_ON_CUDA(name, kernel)
#define LMINF_REGISTER_ON(key, name, kernel) \
  STABLE_TORCH_LIBRARY_IMPL(LMINF_LIBRARY, key, library) { library.impl(name, kernel); }
#if defined(LMINF_WITH_CUDA)
#define LMINF_REGISTER_ON_CUDA(name, kernel) LMINF_REGISTER_ON(CUDA, name, kernel)
#else
#define LMINF_REGISTER_ON_CUDA(name, kernel)
#endif
