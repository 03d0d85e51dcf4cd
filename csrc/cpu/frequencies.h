// The inverse frequencies of a call, in float64.
#pragma once

#include <vector>

#include "../params.h"

namespace lminf::cpu {

class Frequencies {
 public:
  explicit Frequencies(const RopeParams& rope) : values_(rope.rotary_dim / 2) {
    for (size_t t = 0; t < values_.size(); ++t)
      values_[t] = rope.inv_freq_is_double ? static_cast<const double*>(rope.inv_freq)[t]
                                           : static_cast<const float*>(rope.inv_freq)[t];
  }
  const double* data() const { return values_.data(); }

 private:
  std::vector<double> values_;
};

}  // namespace lminf::cpu
