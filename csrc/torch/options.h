// The options that the ops share, as groups of arguments. An op takes a group as one argument of
// its `prepare`; in its schema the group's arguments stand side by side, in the order of `fields`.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>
#include <optional>
#include <tuple>

#include "call.h"

namespace lminf::binding {

struct RotaryOptions {
  std::optional<Tensor> inv_freq;  // [R/2] with R <= D
  double scaling = 1.0;
  bool interleaved = false;

  template <typename Self>
  static auto fields(Self& self) {
    return std::tie(self.inv_freq, self.scaling, self.interleaved);
  }
};

struct ScoreOptions {
  std::optional<Tensor> alibi_slopes, sink_logits;  // [Hq]
  std::optional<double> scale;
  double softcap = 0.0;
  std::optional<Tensor> distance_bias;  // [Hq, distances]

  template <typename Self>
  static auto fields(Self& self) {
    return std::tie(self.alibi_slopes, self.sink_logits, self.scale, self.softcap,
                    self.distance_bias);
  }
};

// The distances at which queries meet keys: all from 0 to `limit`, or that one alone.
struct Distances {
  int64_t limit;
  bool alone = false;
};

// `lead` is the tensor whose head dim and device the others follow. inv_freq stays in float32 or
// float64.
inline RopeParams rope_params(const char* op, const RotaryOptions& options, const char* lead_name,
                              const Tensor& lead, Copies& copies,
                              const char* scaling_name = "rope_scaling") {
  RopeParams rope;
  if (options.inv_freq) {
    const Tensor& inv_freq = *options.inv_freq;
    check_rank(op, "inv_freq", inv_freq, 1, "[R/2]");
    const int64_t pairs = inv_freq.size(0), head_dim = lead.size(3);
    LMINF_CHECK(op, pairs >= 1 && pairs <= head_dim / 2, "inv_freq has ", pairs,
                " frequencies, but must have 1 to ", head_dim / 2,
                ": each rotates one pair of the ", head_dim, " dims of a head");
    const ScalarType type = inv_freq.scalar_type();
    LMINF_CHECK(op, is_floating(type), "inv_freq has dtype ", dtype_name(type),
                ", but must be float32 or float64");
    check_same_device(op, "inv_freq", inv_freq, lead_name, lead);
    rope.inv_freq_is_double = type == ScalarType::Double;
    rope.inv_freq =
        copies.contiguous_as(rope.inv_freq_is_double ? type : ScalarType::Float, inv_freq)
            .const_data_ptr();
    rope.rotary_dim = static_cast<int32_t>(2 * pairs);
  }
  check_finite(op, scaling_name, options.scaling);
  rope.scaling = static_cast<float>(options.scaling);
  rope.interleaved = options.interleaved;
  return rope;
}

// A tensor of any floating dtype on the device of q, as float32.
inline const float* float_data(const char* op, const char* name, const Tensor& tensor,
                               const Tensor& q, Copies& copies) {
  const ScalarType type = tensor.scalar_type();
  LMINF_CHECK(op, is_floating(type), name, " has dtype ", dtype_name(type),
              ", but must be float32 (or another floating dtype, which is converted)");
  check_same_device(op, name, tensor, "q", q);
  return data_of<float>(copies.contiguous_as(ScalarType::Float, tensor));
}

// [Hq] of any floating dtype, as float32.
inline const float* per_head(const char* op, const char* name, const std::optional<Tensor>& vector,
                             const Tensor& q, Copies& copies) {
  if (!vector) return nullptr;
  check_shape(op, name, *vector, {q.size(1)}, "[Hq]");
  return float_data(op, name, *vector, q, copies);
}

inline void check_distance_bias(const char* op, const Tensor& table, int64_t heads,
                                Distances distances) {
  if (distances.alone) {
    check_rank(op, "distance_bias", table, 2, "[Hq, max_distance + 1]");
    LMINF_CHECK(op, table.size(0) == heads && table.size(1) > distances.limit,
                "distance_bias has shape ", shape_of(table), ", but must have ", heads,
                " rows, one a head, and more than distance columns, which is ", distances.limit);
  } else {
    constexpr int64_t kMost = std::numeric_limits<int64_t>::max();
    check_shape(op, "distance_bias", table,
                {heads, distances.limit == kMost ? kMost : distances.limit + 1},
                "[Hq, max_distance + 1]");
  }
  // Kernels count distances in a table in int32.
  LMINF_CHECK(op, table.size(1) <= int64_t{1} << 30, "distance_bias has ", table.size(1),
              " distances, but may have at most 2^30; take a smaller max_distance");
}

inline ScoreParams score_params(const char* op, const ScoreOptions& options, const Tensor& q,
                                Distances distances, Copies& copies) {
  ScoreParams score;
  score.alibi_slopes = per_head(op, "alibi_slopes", options.alibi_slopes, q, copies);
  score.sink_logits = per_head(op, "sink_logits", options.sink_logits, q, copies);
  if (options.distance_bias) {
    const Tensor& table = *options.distance_bias;
    check_distance_bias(op, table, q.size(1), distances);
    score.distance_bias = float_data(op, "distance_bias", table, q, copies);
    score.n_distances = table.size(1);
  }
  if (options.scale) check_finite(op, "scale", *options.scale);
  // Beyond these limits s / c or c itself would leave the range of float32.
  const double softcap = options.softcap;
  LMINF_CHECK(op, softcap == 0 || (softcap >= 1e-30 && softcap <= 1e30), "softcap is ", softcap,
              ", but must be 0 (none) or a positive number from 1e-30 to 1e30");
  score.scale = static_cast<float>(options.scale.value_or(1.0 / std::sqrt(double(q.size(3)))));
  score.softcap = static_cast<float>(softcap);
  return score;
}

}  // namespace lminf::binding
