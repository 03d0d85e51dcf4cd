// For the ops that are forward-only and called once per layer and token: no Python runs on the way
// to them, so they refuse derivatives themselves.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <array>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

namespace lminf::binding {

using torch::stable::Tensor;

// Throws std::runtime_error where one of the tensors wants a derivative and gradients are on. Only
// Python can tell (the op lminf::why_no_derivative of ops.py), and it is asked only then: under
// torch.no_grad() and torch.inference_mode() this costs nothing. Under torch.no_grad() a tangent of
// forward_ad.dual_level() therefore passes unnoticed; one of torch.func.jvp does not (ops.py).
inline void refuse_derivatives(const char* op, std::vector<Tensor> tensors,
                               std::initializer_list<const std::optional<Tensor>*> options) {
  for (const auto* option : options) {
    if (*option) tensors.push_back(**option);
  }
  std::array<StableIValue, 2> stack{torch::stable::detail::from(std::string(op)),
                                    torch::stable::detail::from(tensors)};
  STD_TORCH_CHECK(torch_call_dispatcher("lminf::why_no_derivative", "", stack.data(),
                                        TORCH_ABI_VERSION) == AOTI_TORCH_SUCCESS,
                  op, ": lminf::why_no_derivative failed");
  const auto reason = torch::stable::detail::to<std::string>(stack[0]);
  if (!reason.empty()) throw std::runtime_error(reason);
}

}  // namespace lminf::binding
