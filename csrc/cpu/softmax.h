// Online softmax of one tile of scores, row by row.
// Included inside namespace lminf::cpu::LMINF_ISA.

// Running state of the rows of a task. `max` is the reference that the sums are relative to; it may
// lag behind the true maximum by up to kMaxLag, so that most tiles rescale nothing (2^kMaxLag is
// far from overflow).
constexpr float kMaxLag = 8.0f;
constexpr float kLowestMax = std::numeric_limits<float>::lowest();

struct RowStates {
  float* max;  // [rows]
  float* sum;  // [rows][kLanes], partial sums by lane
  float* out;  // [rows][Dp], not yet normalised
};

// A head's learned logit, -inf where there is none; its slope, 0 where there is none.
inline float sink_of(const ScoreParams& score, int64_t head) {
  return score.sink_logits == nullptr ? minus_infinity() : score.sink_logits[head];
}
inline float slope_of(const ScoreParams& score, int64_t head) {
  return score.alibi_slopes == nullptr ? 0.0f : score.alibi_slopes[head];
}

inline SoftmaxEnd finish(SoftmaxState state, const ScoreParams& score, int64_t head) {
  return lminf::finish(state, score.sink_logits != nullptr, sink_of(score, head));
}

// What a table adds at one distance.
inline float bias_at(const ScoreParams& score, int64_t head, int64_t distance) {
  return score.has_table() ? score.distance_bias[head * score.n_distances + distance] : 0.0f;
}

// From a product, times the scale, at one distance to a score in units of log2.
inline float whole_score(const ScoreParams& score, float product, int64_t head, int64_t distance) {
  if (score.alibi_slopes != nullptr)
    product -= slope_of(score, head) * static_cast<float>(distance);
  product += bias_at(score, head, distance);
  if (score.softcap > 0.0f) product = score.softcap * std::tanh(product / score.softcap);
  return product * kLog2e;
}

// What stands beside the product in a score.
enum class Added { kNothing, kSlope, kTable };  // kTable: a slope, too, if there is one

// What turns a product <q, k> into a score in units of log2.
struct ScoreMap {
  float scale;
  float softcap;
  Added added;
  bool general;  // scale, ALiBi, biases by distance, softcap, one after the other; else the factor
  float factor;  // scale * log2(e), or 1 for mapped scores

  explicit ScoreMap(const ScoreParams& score)
      : scale(score.scale),
        softcap(score.softcap),
        added(score.distance_bias != nullptr  ? Added::kTable
              : score.alibi_slopes != nullptr ? Added::kSlope
                                              : Added::kNothing),
        // A negative scale turns maxima into minima, so it is applied before they are taken.
        general(added != Added::kNothing || softcap > 0.0f || scale < 0.0f),
        factor(general ? 1.0f : scale * kLog2e) {}
};

// What is added to one row of a tile. ALiBi: -slope * distance, which is exact until the product is
// taken.
struct RowBias {
  float slope;                   // 0: none
  float distance;                // at column 0 of the tile
  float step;                    // by which it shrinks from column to column; 0 where it is clamped
  const float* table = nullptr;  // of distance_bias, by column; whole vectors are read; null: none
};

// A head's biases for `n` columns, the first of them at `distance`: out[c] is the bias at distance
// - c, and 0 for keys ahead of the query, which it does not see.
inline void biases_by_column(const ScoreParams& score, int64_t head, int64_t distance, int n,
                             float* out) {
  const float* table = score.distance_bias + head * score.n_distances;
  const int64_t last = score.n_distances - 1;
  const int clamped = static_cast<int>(min64(max64(distance - last, 0), n));
  const int behind = static_cast<int>(min64(max64(distance + 1, 0), n));
  std::fill(out, out + clamped, table[last]);
  for (int c = clamped; c < behind; ++c) out[c] = table[distance - c];
  std::fill(out + behind, out + n, 0.0f);
}

// 2^x as exactly as probabilities of P are worth.
template <typename P>
inline Vec vexp2_for(Vec x) {
#if LMINF_BF16
  if constexpr (std::is_same_v<P, bf16>) return vexp2_rough(x);
#endif
  return vexp2(x);
}

// tanh as exactly as products of E are worth.
template <typename E>
inline Vec vtanh_for(Vec x) {
#if LMINF_BF16
  if constexpr (std::is_same_v<E, bf16>) return vtanh_rough(x);
#endif
  return vtanh(x);
}

// The scores of a row of products, in units of log2: the products times a factor.
struct ScaledScores {
  static constexpr bool kMapped = false, kCapped = false;
  Vec factor;
  explicit ScaledScores(const ScoreMap& map) : factor(vset(map.factor)) {}
  Vec minus(Vec max, const float* row, int c) const { return vfms(vload(row + c), factor, max); }
};

// The same where a factor is not all there is. Column c of a row is that of its bias.
template <bool kSoftcap, Added kAdded, typename E>
struct MappedScores {
  static constexpr bool kMapped = true, kCapped = kSoftcap;
  // Without a softcap log2(e) is part of the factors, with one it comes last.
  float unit;
  Vec scale, cap, slope, distance, step;
  const float* table;

  explicit MappedScores(const ScoreMap& map)
      : unit(kSoftcap ? 1.0f / map.softcap : kLog2e),
        scale(vset(map.scale * unit)),
        cap(vset(map.softcap * kLog2e)) {}

  void set_row(const RowBias& bias) {
    if constexpr (kAdded == Added::kNothing) return;
    slope = vset(-bias.slope * unit), step = vset(-bias.step);
    distance = vfma(step, viota(), vset(bias.distance));
    table = bias.table;
  }

  Vec operator()(const float* row, int c) const { return minus(vset(0.0f), row, c); }

  Vec minus(Vec max, const float* row, int c) const {
    const Vec product = vload(row + c);
    Vec s;
    if constexpr (kAdded == Added::kNothing) {
      s = kSoftcap ? vmul(product, scale) : vfms(product, scale, max);
    } else {
      // Exact up to here; without a softcap or a bias the maximum goes first: s is near it.
      const Vec apart = vfma(step, vset(static_cast<float>(c)), distance);
      const bool last = !kSoftcap && kAdded == Added::kSlope;
      s = vfma(product, scale, last ? vfms(slope, apart, max) : vmul(slope, apart));
      if (last) return s;
    }
    if constexpr (kAdded == Added::kTable) s = vfma(vload(table + c), vset(unit), s);
    if constexpr (kSoftcap) {
      s = vfms(cap, vtanh_for<E>(s), max);
    } else if constexpr (kAdded == Added::kTable) {
      s = vsub(s, max);
    }
    if constexpr (kAdded == Added::kTable) s = vhide(s, vload(table + c));
    return s;
  }

  // Columns [lo, hi) in place.
  void map(float* row, int lo, int hi) const {
    for (int c = lo / kLanes * kLanes; c < hi; c += kLanes) vstore(row + c, (*this)(row, c));
  }
};

// Calls f with what makes scores of products of E.
template <typename E, typename F>
inline void with_scores(const ScoreMap& map, const F& f) {
  const auto mapped = [&](auto softcap) {
    constexpr bool kSoftcap = decltype(softcap)::value;
    switch (map.added) {
      case Added::kNothing:
        return f(MappedScores<kSoftcap, Added::kNothing, E>(map));
      case Added::kSlope:
        return f(MappedScores<kSoftcap, Added::kSlope, E>(map));
      case Added::kTable:
        return f(MappedScores<kSoftcap, Added::kTable, E>(map));
    }
  };
  if (!map.general) return f(ScaledScores(map));
  map.softcap > 0.0f ? mapped(std::true_type{}) : mapped(std::false_type{});
}

inline float row_max(const float* row, int lo, int hi) {
  const Vec none = vset(minus_infinity());
  Vec m = none;
  int c = lo / kLanes * kLanes;
  if (c < lo) m = vkeep(vload(row + c), lo - c, hi - c, none), c += kLanes;
  for (; c + kLanes <= hi; c += kLanes) m = vmax(vload(row + c), m);
  if (c < hi) m = vmax(vkeep(vload(row + c), 0, hi - c, none), m);
  return vreduce_max(m);
}

// The largest score of columns [lo, hi) in units of log2, mapped in place where a factor is not all
// there is.
inline float scores_max(const ScoreMap& map, const RowBias& bias, float* row, int lo, int hi) {
  with_scores<float>(map, [&](auto scores) {
    if constexpr (scores.kMapped) scores.set_row(bias), scores.map(row, lo, hi);
  });
  return row_max(row, lo, hi) * map.factor;
}

// probs[c] = 2^(row[c] * factor - max) on [lo, hi), 0 on the rest of [begin, end); returns the sum
// by lane.
template <typename P>
inline Vec row_exp(const float* row, P* probs, int lo, int hi, int begin, int end, float factor,
                   float max) {
  const Vec zero = vset(0.0f), f = vset(factor), m = vset(max);
  Vec sum = zero;
  int c = begin;
  for (; c + kLanes <= lo; c += kLanes) vstore(probs + c, zero);
  if (c < lo) {
    const Vec p = vkeep(vexp2_for<P>(vfms(vload(row + c), f, m)), lo - c, hi - c, zero);
    vstore(probs + c, p);
    sum = vadd(sum, p), c += kLanes;
  }
  for (; c + kLanes <= hi; c += kLanes) {
    const Vec p = vexp2_for<P>(vfms(vload(row + c), f, m));
    vstore(probs + c, p);
    sum = vadd(sum, p);
  }
  if (c < hi) {
    const Vec p = vkeep(vexp2_for<P>(vfms(vload(row + c), f, m)), 0, hi - c, zero);
    vstore(probs + c, p);
    sum = vadd(sum, p), c += kLanes;
  }
  for (; c < end; c += kLanes) vstore(probs + c, zero);
  return sum;
}

inline void scale_row(float* row, int n, float factor) {
  const Vec f = vset(factor);
  for (int d = 0; d < n; d += kLanes) vstore(row + d, vmul(vload(row + d), f));
}

// One row's step: moves the reference if it must, rescales what stands, and writes the
// probabilities. Columns [lo, hi) are visible, [begin, end) is what the product with V will read.
template <typename P>
inline void softmax_row(const RowStates& states, int row, int dim_padded, float* scores, P* probs,
                        int lo, int hi, int begin, int end, float factor, float tile_max) {
  if (lo >= hi) {
    const Vec zero = vset(0.0f);
    for (int c = begin; c < end; c += kLanes) vstore(probs + c, zero);
    return;
  }
  // Visible scores that are all -inf or NaN have no maximum to refer to; they still have to be
  // summed, so that a NaN reaches the output.
  if (!(tile_max > kLowestMax)) tile_max = kLowestMax;
  float* sum = states.sum + row * kLanes;
  float& max = states.max[row];
  if (tile_max > max + kMaxLag) {
    const float rescale = exp2f(max - tile_max);  // 0 for the first tile
    if (max != minus_infinity()) scale_row(states.out + row * dim_padded, dim_padded, rescale);
    vstore(sum, vmul(vload(sum), vset(rescale)));
    max = tile_max;
  }
  if (factor != 1.0f && std::abs(max) > kFusedMax) {
    scale_row(scores + begin, end - begin, factor);
    factor = 1.0f;
  }
  const Vec added = row_exp(scores, probs, lo, hi, begin, end, factor, max);
  vstore(sum, vadd(vload(sum), added));
}

// One row's step over a strip without a look at its maximum first: writes the probabilities of the
// columns [lo, hi) of n, and 0 for the others. Returns false, with nothing done but that, where the
// reference has to move first, or rounding asks for more care: then softmax_row is to do it.
template <bool kAllVisible, typename Scores, typename P>
inline bool soften_row(const RowStates& states, int row, const Scores& scores,
                       const float* products, P* probs, int lo, int hi, int n) {
  if (!kAllVisible && (lo >= hi || lo >= n || hi <= 0)) {
    for (int c = 0; c < n; c += kLanes) vstore(probs + c, vset(0.0f));
    return true;
  }
  const float max = states.max[row];
  if (!(std::abs(max) <= kFusedMax)) return false;
  const Vec m = vset(max);
  Vec added = vset(0.0f);
  if (kAllVisible) {
    LMINF_UNROLL
    for (int c = 0; c < kStripKeys; c += 2 * kLanes) {
      const Vec a = vexp2_for<P>(scores.minus(m, products, c));
      const Vec b = vexp2_for<P>(scores.minus(m, products, c + kLanes));
      vstore2(probs + c, a, b);
      added = vadd(added, vadd(a, b));
    }
  } else {
    const Vec none = vset(minus_infinity());
    for (int c = 0; c < n; c += kLanes) {
      const Vec p = vexp2_for<P>(vkeep(scores.minus(m, products, c), lo - c, hi - c, none));
      vstore(probs + c, p);
      added = vadd(added, p);
    }
  }
  // A sum above this holds a probability above 2^kMaxLag.
  constexpr float kLargestSum = (1 << static_cast<int>(kMaxLag)) * (kStripKeys / kLanes);
  if (vany_above(added, kLargestSum)) return false;
  float* sum = states.sum + row * kLanes;
  vstore(sum, vadd(vload(sum), added));
  return true;
}
