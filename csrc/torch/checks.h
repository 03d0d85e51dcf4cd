// What the ops accept. A broken rule throws std::invalid_argument, which PyTorch hands to Python as
// a ValueError; the message says which argument, what it is, what it may be, and the way out.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cmath>
#include <cstdint>
#include <initializer_list>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>

// The message is built only when the condition fails. `op` is the op's name.
#define LMINF_CHECK(op, condition, ...)                                                   \
  do {                                                                                    \
    if (!(condition)) ::lminf::binding::fail(op, ::lminf::binding::message(__VA_ARGS__)); \
  } while (false)

namespace lminf::binding {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kPositionLimit = int64_t{1} << 31;  // positions stand strictly inside +-2^31

[[noreturn]] inline void fail(const char* op, const std::string& text) {
  throw std::invalid_argument(std::string(op) + ": " + text);
}

template <typename... Parts>
std::string message(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  return text.str();
}

inline std::string shape_of(const Tensor& tensor) {
  std::ostringstream text;
  text << '[';
  for (int64_t i = 0; i < tensor.dim(); ++i) text << (i ? ", " : "") << tensor.size(i);
  text << ']';
  return text.str();
}

// As Python spells it.
inline std::string dtype_name(ScalarType type) {
  switch (type) {
    case ScalarType::Float:
      return "float32";
    case ScalarType::Double:
      return "float64";
    case ScalarType::BFloat16:
      return "bfloat16";
    case ScalarType::Half:
      return "float16";
    case ScalarType::Long:
      return "int64";
    case ScalarType::Int:
      return "int32";
    default:
      return torch::headeronly::toString(type);
  }
}

inline bool is_floating(ScalarType type) {
  return type == ScalarType::Float || type == ScalarType::Double || type == ScalarType::BFloat16 ||
         type == ScalarType::Half;
}

inline bool same_device(const Tensor& a, const Tensor& b) {
  const auto x = a.device(), y = b.device();
  return x.type() == y.type() && (a.is_cpu() || x.index() == y.index());
}

inline std::string device_name(const Tensor& tensor) {
  if (tensor.is_cpu()) return "cpu";
  if (tensor.is_cuda()) return message("cuda:", tensor.get_device_index());
  return message("device type ", static_cast<int>(tensor.device().type()));
}

// `layout` names the wanted dimensions, as in "[B, Hq, Sq, D]".
inline void check_rank(const char* op, const char* name, const Tensor& tensor, int64_t rank,
                       const char* layout) {
  LMINF_CHECK(op, tensor.dim() == rank, name, " has shape ", shape_of(tensor), ", but must have ",
              rank, rank == 1 ? " dimension " : " dimensions ", layout);
}

inline void check_shape(const char* op, const char* name, const Tensor& tensor,
                        std::initializer_list<int64_t> shape, const char* layout) {
  const auto sizes = tensor.sizes();
  bool same = sizes.size() == shape.size();
  size_t i = 0;
  for (int64_t extent : shape) same = same && sizes[i++] == extent;
  if (same) return;
  std::ostringstream wanted;
  for (int64_t extent : shape) wanted << (wanted.tellp() > 0 ? ", " : "") << extent;
  fail(op, message(name, " has shape ", shape_of(tensor), ", but must be ", layout, " = [",
                   wanted.str(), "]"));
}

inline void check_attention_dtype(const char* op, const char* name, const Tensor& tensor) {
  const ScalarType type = tensor.scalar_type();
  LMINF_CHECK(op,
              type == ScalarType::Float || type == ScalarType::BFloat16 || type == ScalarType::Half,
              name, " has dtype ", dtype_name(type),
              ", but must be float32, bfloat16 or float16; convert it with .to(), or use "
              "lminf_cuda.reference for other dtypes");
}

inline void check_dtype(const char* op, const char* name, const Tensor& tensor, ScalarType type,
                        const char* wanted) {
  LMINF_CHECK(op, tensor.scalar_type() == type, name, " has dtype ",
              dtype_name(tensor.scalar_type()), ", but must be ", wanted,
              "; convert it with .to(torch.", wanted, ")");
}

inline void check_same_device(const char* op, const char* name, const Tensor& tensor,
                              const char* lead_name, const Tensor& lead) {
  LMINF_CHECK(op, same_device(tensor, lead), name, " is on ", device_name(tensor), ", but ",
              lead_name, " is on ", device_name(lead), "; move both to one device");
}

// The tensors that must look like the leading one in dtype and device.
inline void check_like(const char* op, const char* name, const Tensor& tensor,
                       const char* lead_name, const Tensor& lead) {
  LMINF_CHECK(op, tensor.scalar_type() == lead.scalar_type(), name, " has dtype ",
              dtype_name(tensor.scalar_type()), ", but ", lead_name, " has ",
              dtype_name(lead.scalar_type()), "; all of them must share one dtype");
  check_same_device(op, name, tensor, lead_name, lead);
}

inline void check_heads(const char* op, int64_t heads_q, int64_t heads_kv) {
  LMINF_CHECK(op, heads_kv >= 1 && heads_q >= 1 && heads_q % heads_kv == 0, "q has ", heads_q,
              " heads and k has ", heads_kv,
              ", but the heads of q must be a positive multiple of those of k");
}

inline void check_head_dim(const char* op, const char* name, int64_t head_dim) {
  LMINF_CHECK(op, head_dim >= 1, name, " has head dim ", head_dim, ", but it must be at least 1");
}

// Kernels compute in float32.
inline void check_finite(const char* op, const char* name, double value) {
  LMINF_CHECK(op, std::isfinite(static_cast<float>(value)), name, " is ", value,
              ", but must be a finite number, in float32 too");
}

inline void check_window(const char* op, int64_t window, std::optional<int64_t> max_distance) {
  LMINF_CHECK(op, window >= 1, "window is ", window,
              ", but must be at least 1: it counts the query's own key too");
  LMINF_CHECK(op, !max_distance || *max_distance >= window, "max_distance is ",
              max_distance.value_or(0), ", but must be at least window, which is ", window,
              "; leave it out to take window itself");
}

inline bool has_dense_last_dim(const Tensor& tensor) {
  const int64_t last = tensor.dim() - 1;
  return tensor.size(last) <= 1 || tensor.stride(last) == 1;
}

// A tensor that the op writes to is never copied, so its layout is the caller's business.
inline void check_writable_cache(const char* op, const char* name, const Tensor& tensor) {
  LMINF_CHECK(op, has_dense_last_dim(tensor), name, " has stride ", tensor.stride(3),
              " in its last dimension, but the op writes to it in place and needs stride 1; "
              "allocate it as a contiguous tensor");
  for (int64_t i = 0; i < tensor.dim(); ++i) {
    LMINF_CHECK(op, tensor.size(i) <= 1 || tensor.stride(i) != 0, name,
                " is expanded along dimension ", i,
                ", but the op writes to it in place; allocate it as a contiguous tensor");
  }
}

}  // namespace lminf::binding
