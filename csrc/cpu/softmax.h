// Online softmax of one tile of scores, row by row.
// Included inside namespace lminf::cpu::LMINF_ISA.

// Running state of the rows of a task. `max` is the reference that the sums are relative to; it may
// lag behind the true maximum by up to kMaxLag, so that most tiles rescale nothing (2^kMaxLag is
// far from overflow).
constexpr float kMaxLag = 8.0f;
constexpr float kLowestMax = std::numeric_limits<float>::lowest();

// Up to here the rounding of a score in units of log2 is small beside 1. Beyond it the maximum,
// which is rounded, and the scores must be rounded alike: a fused step would leave them far apart.
constexpr float kFusedMax = 1 << 20;

struct RowStates {
  float* max;  // [rows]
  float* sum;  // [rows][kLanes], partial sums by lane
  float* out;  // [rows][Dp], not yet normalised
};

// What turns a product <q, k> into a score in units of log2.
struct ScoreMap {
  float factor;  // scale * log2(e), where that is all there is
  bool general;  // else: scale, ALiBi, biases by distance, softcap, one after the other
  float scale;
  float softcap;
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

// tanh as exactly as products of E are worth.
template <typename E>
inline Vec vtanh_for(Vec x) {
#if LMINF_BF16
  if constexpr (std::is_same_v<E, bf16>) return vtanh_rough(x);
#endif
  return vtanh(x);
}

// Columns [lo, hi) of a row of products of E become scores in units of log2; returns the largest.
template <bool kSoftcap, bool kTable, typename E>
inline float map_scores(const ScoreMap& map, const RowBias& bias, float* row, int lo, int hi) {
  // Without a softcap log2(e) is part of the factors, with one it comes last.
  const float unit = kSoftcap ? 1.0f / map.softcap : kLog2e;
  const Vec scale = vset(map.scale * unit), slope = vset(-bias.slope * unit);
  const Vec distance = vset(bias.distance), step = vset(-bias.step);
  const Vec cap = vset(map.softcap * kLog2e), none = vset(minus_infinity());
  Vec largest = none;
  for (int c = lo / kLanes * kLanes; c < hi; c += kLanes) {
    const Vec column = vadd(viota(), vset(static_cast<float>(c)));
    Vec s = vfma(vload(row + c), scale, vmul(slope, vfma(step, column, distance)));
    if (kTable) s = vfma(vload(bias.table + c), vset(unit), s);
    if (kSoftcap) s = vmul(cap, vtanh_for<E>(s));
    if (kTable) s = vhide(s, vload(bias.table + c));
    vstore(row + c, s);
    largest = vmax(c < lo || c + kLanes > hi ? vkeep(s, lo - c, hi - c, none) : s, largest);
  }
  return vreduce_max(largest);
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
template <typename E = float>
inline float scores_max(const ScoreMap& map, const RowBias& bias, float* row, int lo, int hi) {
  if (!map.general) return row_max(row, lo, hi) * map.factor;
  if (bias.table != nullptr) {
    return map.softcap > 0.0f ? map_scores<true, true, E>(map, bias, row, lo, hi)
                              : map_scores<false, true, E>(map, bias, row, lo, hi);
  }
  return map.softcap > 0.0f ? map_scores<true, false, E>(map, bias, row, lo, hi)
                            : map_scores<false, false, E>(map, bias, row, lo, hi);
}

// probs[c] = 2^(row[c] * factor - max) on [lo, hi), 0 on the rest of [begin, end); returns the sum
// by lane.
template <int kDegree, typename P>
inline Vec row_exp(const float* row, P* probs, int lo, int hi, int begin, int end, float factor,
                   float max) {
  const Vec zero = vset(0.0f), f = vset(factor), m = vset(max);
  Vec sum = zero;
  int c = begin;
  for (; c + kLanes <= lo; c += kLanes) vstore(probs + c, zero);
  if (c < lo) {
    const Vec p = vkeep(vexp2<kDegree>(vfms(vload(row + c), f, m)), lo - c, hi - c, zero);
    vstore(probs + c, p);
    sum = vadd(sum, p), c += kLanes;
  }
  for (; c + kLanes <= hi; c += kLanes) {
    const Vec p = vexp2<kDegree>(vfms(vload(row + c), f, m));
    vstore(probs + c, p);
    sum = vadd(sum, p);
  }
  if (c < hi) {
    const Vec p = vkeep(vexp2<kDegree>(vfms(vload(row + c), f, m)), 0, hi - c, zero);
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
template <int kDegree, typename P>
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
  const Vec added = row_exp<kDegree>(scores, probs, lo, hi, begin, end, factor, max);
  vstore(sum, vadd(vload(sum), added));
}
