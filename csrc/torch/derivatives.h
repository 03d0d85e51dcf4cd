// For the ops that are forward-only and called once per layer and token: no Python runs on the way
// to them, so they refuse derivatives themselves.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <array>
#include <stdexcept>
#include <string>
#include <vector>

namespace lminf::binding {

using torch::stable::Tensor;

// Throws std::runtime_error where one of the tensors wants a derivative; to be called where
// gradients are on (under torch.no_grad() and torch.inference_mode() they cost nothing then). Only
// Python can tell (the op lminf::why_no_derivative). Under torch.no_grad() a tangent of
// forward_ad.dual_level() therefore passes unnoticed; one of torch.func.jvp does not.
inline void refuse_derivatives(const char* op, const std::vector<Tensor>& tensors) {
  std::array<StableIValue, 2> stack{torch::stable::detail::from(std::string(op)),
                                    torch::stable::detail::from(tensors)};
  STD_TORCH_CHECK(torch_call_dispatcher("lminf::why_no_derivative", "", stack.data(),
                                        TORCH_ABI_VERSION) == AOTI_TORCH_SUCCESS,
                  op, ": lminf::why_no_derivative failed");
  const auto reason = torch::stable::detail::to<std::string>(stack[0]);
  if (!reason.empty()) throw std::runtime_error(reason);
}

}  // namespace lminf::binding
