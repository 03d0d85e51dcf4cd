// From checked tensors to the plain structs that every backend takes. What had to be copied or
// converted on the way is owned by the caller of these functions until the kernel has run.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>
#include <optional>

#include "../params.h"
#include "checks.h"

namespace lminf::binding {

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

// Kernels read any strides but the last; a tensor that is strided there is copied once, as
// PyTorch's own attention does.
inline Tensor with_dense_last_dim(const Tensor& tensor) {
  return has_dense_last_dim(tensor) ? tensor : torch::stable::contiguous(tensor);
}

inline Tensor as_contiguous(const Tensor& tensor) {
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

// Like torch.empty_like (a dense tensor's order of dimensions is kept), except that the last
// dimension is always contiguous. The fake kernels in ops.py do the same.
inline Tensor empty_output_like(const Tensor& tensor) {
  Tensor out = torch::stable::empty_like(tensor);
  if (has_dense_last_dim(out)) return out;
  return torch::stable::new_empty(tensor, tensor.sizes());
}

inline Tensor empty_lse(const Tensor& q) {
  return torch::stable::new_empty(q, q.sizes().slice(0, 3), ScalarType::Float);
}

// A tensor of any floating dtype on the device of q, as contiguous float32.
inline Tensor as_float(const char* op, const char* name, const Tensor& tensor, const Tensor& q) {
  const ScalarType type = tensor.scalar_type();
  LMINF_CHECK(op, is_floating(type), name, " has dtype ", dtype_name(type),
              ", but must be float32 (or another floating dtype, which is converted)");
  check_same_device(op, name, tensor, "q", q);
  return as_contiguous(type == ScalarType::Float ? tensor
                                                 : torch::stable::to(tensor, ScalarType::Float));
}

// A per-head vector [Hq] of any floating dtype, as float32.
inline std::optional<Tensor> per_head(const char* op, const char* name,
                                      const std::optional<Tensor>& vector, const Tensor& q) {
  if (!vector) return std::nullopt;
  check_shape(op, name, *vector, {q.size(1)}, "[Hq]");
  return as_float(op, name, *vector, q);
}

// Kernels count distances in a table in int32.
inline void check_table_length(const char* op, const Tensor& distance_bias) {
  constexpr int64_t kMost = int64_t{1} << 30;
  LMINF_CHECK(op, distance_bias.size(1) <= kMost, "distance_bias has ", distance_bias.size(1),
              " distances, but may have at most 2^30; take a smaller max_distance");
}

// distance_bias [Hq, max_distance + 1] of any floating dtype, as float32.
inline std::optional<Tensor> bias_by_distance(const char* op,
                                              const std::optional<Tensor>& distance_bias,
                                              const Tensor& q, int64_t max_distance) {
  if (!distance_bias) return std::nullopt;
  constexpr int64_t kMost = std::numeric_limits<int64_t>::max();
  check_shape(op, "distance_bias", *distance_bias,
              {q.size(1), max_distance == kMost ? kMost : max_distance + 1},
              "[Hq, max_distance + 1]");
  check_table_length(op, *distance_bias);
  return as_float(op, "distance_bias", *distance_bias, q);
}

inline const float* float_data(const std::optional<Tensor>& tensor) {
  return tensor ? static_cast<const float*>(tensor->const_data_ptr()) : nullptr;
}

// inv_freq [R/2] with R <= D, as float32 or float64.
inline std::optional<Tensor> frequencies(const char* op, const std::optional<Tensor>& inv_freq,
                                         const char* lead_name, const Tensor& lead) {
  if (!inv_freq) return std::nullopt;
  check_rank(op, "inv_freq", *inv_freq, 1, "[R/2]");
  const int64_t pairs = inv_freq->size(0);
  const int64_t head_dim = lead.size(3);
  LMINF_CHECK(op, pairs >= 1 && pairs <= head_dim / 2, "inv_freq has ", pairs,
              " frequencies, but must have 1 to ", head_dim / 2, ": each rotates one pair of the ",
              head_dim, " dims of a head");
  const ScalarType type = inv_freq->scalar_type();
  LMINF_CHECK(op, is_floating(type), "inv_freq has dtype ", dtype_name(type),
              ", but must be float32 or float64");
  check_same_device(op, "inv_freq", *inv_freq, lead_name, lead);
  const bool keep = type == ScalarType::Float || type == ScalarType::Double;
  return as_contiguous(keep ? *inv_freq : torch::stable::to(*inv_freq, ScalarType::Float));
}

// `inv_freq` comes from frequencies().
inline RopeParams rope_params(const char* op, const char* scaling_name,
                              const std::optional<Tensor>& inv_freq, double scaling,
                              bool interleaved) {
  check_finite(op, scaling_name, scaling);
  RopeParams rope;
  rope.scaling = static_cast<float>(scaling);
  rope.interleaved = interleaved;
  if (inv_freq) {
    rope.inv_freq = inv_freq->const_data_ptr();
    rope.inv_freq_is_double = inv_freq->scalar_type() == ScalarType::Double;
    rope.rotary_dim = static_cast<int32_t>(2 * inv_freq->size(0));
  }
  return rope;
}

// `alibi_slopes` and `sink_logits` come from per_head(), `distance_bias` from bias_by_distance().
inline ScoreParams score_params(const char* op, std::optional<double> scale, double softcap,
                                const std::optional<Tensor>& alibi_slopes,
                                const std::optional<Tensor>& sink_logits,
                                const std::optional<Tensor>& distance_bias, int64_t head_dim) {
  if (scale) check_finite(op, "scale", *scale);
  check_softcap(op, softcap);
  ScoreParams score;
  score.scale = static_cast<float>(scale ? *scale : 1.0 / std::sqrt(double(head_dim)));
  score.softcap = static_cast<float>(softcap);
  score.alibi_slopes = float_data(alibi_slopes);
  score.sink_logits = float_data(sink_logits);
  score.distance_bias = float_data(distance_bias);
  score.n_distances = distance_bias ? distance_bias->size(1) : 0;
  return score;
}

}  // namespace lminf::binding
