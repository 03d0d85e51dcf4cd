// A call of an op, made ready by its `prepare`: the params of its kernels, and the tensors that
// these point into.
#pragma once

#include <algorithm>
#include <cstdint>
#include <list>
#include <stdexcept>
#include <utility>
#include <vector>

#include "../params.h"
#include "checks.h"

namespace lminf::binding {

// Tensors in the form that kernels read; what had to be copied for it lives as long as this does.
class Copies {
 public:
  const Tensor& keep(Tensor copy) { return copies_.emplace_back(std::move(copy)); }

  // Kernels read any strides but the last; a tensor that is strided there is copied once, as
  // PyTorch's own attention does.
  const Tensor& dense(const Tensor& tensor) {
    return has_dense_last_dim(tensor) ? tensor : keep(torch::stable::contiguous(tensor));
  }

  const Tensor& contiguous(const Tensor& tensor) {
    return tensor.is_contiguous() ? tensor : keep(torch::stable::contiguous(tensor));
  }

  const Tensor& contiguous_as(ScalarType type, const Tensor& tensor) {
    return contiguous(tensor.scalar_type() == type ? tensor
                                                   : keep(torch::stable::to(tensor, type)));
  }

  const std::list<Tensor>& all() const { return copies_; }

 private:
  std::list<Tensor> copies_;
};

template <typename Params>
struct Call {
  Params params;
  std::vector<Tensor> outputs;  // what the op returns
  Copies copies;

  // The arguments outlive the call.
  bool has_work() const {
    return std::any_of(outputs.begin(), outputs.end(),
                       [](const Tensor& output) { return output.numel() > 0; });
  }
};

inline DType dtype_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return DType::kFloat32;
    case ScalarType::BFloat16:
      return DType::kBFloat16;
    case ScalarType::Half:
      return DType::kFloat16;
    default:
      throw std::logic_error("dtype_of: check_attention_dtype must come first");
  }
}

inline Strides strides_of(const Tensor& tensor) {
  const auto strides = tensor.strides();
  return {strides[0], strides[1], strides[2]};
}

// Of a tensor of rank 4, `data` and `strides` in the params.
inline void read_from(const Tensor& tensor, const void*& data, Strides& strides) {
  data = tensor.const_data_ptr();
  strides = strides_of(tensor);
}

inline void write_to(const Tensor& tensor, void*& data, Strides& strides) {
  data = tensor.mutable_data_ptr();
  strides = strides_of(tensor);
}

template <typename T>
const T* data_of(const Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}

// Like torch.empty_like (a dense tensor's order of dimensions is kept), except that the last
// dimension is always contiguous. The fake kernels in Python do the same.
inline Tensor empty_output_like(const Tensor& tensor) {
  Tensor out = torch::stable::empty_like(tensor);
  if (has_dense_last_dim(out)) return out;
  return torch::stable::new_empty(tensor, tensor.sizes());
}

// An attention op's first two results: out like q, and lse.
template <typename Params>
void add_attention_outputs(Call<Params>& call, const Tensor& q) {
  call.outputs.reserve(3);
  call.outputs.push_back(empty_output_like(q));
  call.outputs.push_back(torch::stable::new_empty(q, q.sizes().slice(0, 3), ScalarType::Float));
  write_to(call.outputs[0], call.params.out, call.params.out_stride);
  call.params.lse = static_cast<float*>(call.outputs[1].mutable_data_ptr());
}

}  // namespace lminf::binding
