// Rotary tables and the rotation of one head vector.
// Included inside namespace lminf::cpu::LMINF_ISA.

// The rotary embedding of one call: frequencies in float64, as the angles are reduced in it.
struct Rotary {
  const double* inv_freq;  // [pairs]
  int pairs;               // R / 2; 0: no rotary embedding
  float scaling;
  bool interleaved;
};

// cos and sin of position * inv_freq[t], times `scaling`, for all pairs. Same angle as
// core/rotation.h, in a form without branches that compilers turn into vector code: reduced to
// [-π/4, π/4] in float64, then the classic single-precision polynomials.
inline void rotation_table(int64_t position, const Rotary& rotary, float scaling,
                           float* __restrict cos_out, float* __restrict sin_out) {
  constexpr double kTwoOverPi = 0.6366197723675814;
  constexpr double kHalfPiHigh = 1.5707963267948966;
  constexpr double kHalfPiLow = 6.123233995736766e-17;
  constexpr double kMagic = 6755399441055744.0;  // 1.5 * 2^52: adding it rounds to an integer
  const double p = static_cast<double>(position);
  for (int t = 0; t < rotary.pairs; ++t) {
    const double angle = p * rotary.inv_freq[t];
    const double shifted = angle * kTwoOverPi + kMagic;
    const double quarter_turns = shifted - kMagic;
    uint64_t bits;
    std::memcpy(&bits, &shifted, 8);
    const uint32_t quadrant = static_cast<uint32_t>(bits);
    const float x = static_cast<float>(
        std::fma(-quarter_turns, kHalfPiLow, std::fma(-quarter_turns, kHalfPiHigh, angle)));
    const float z = x * x;
    const float s =
        x + x * z * (-1.6666654611e-1f + z * (8.3321608736e-3f + z * -1.9515295891e-4f));
    const float c =
        1.0f - 0.5f * z +
        z * z * (4.166664568298827e-2f + z * (-1.388731625493765e-3f + z * 2.443315711809948e-5f));
    const bool odd = quadrant & 1;
    const float sin_value = odd ? c : s;
    const float cos_value = odd ? s : c;
    sin_out[t] = (quadrant & 2 ? -sin_value : sin_value) * scaling;
    cos_out[t] = ((quadrant + 1) & 2 ? -cos_value : cos_value) * scaling;
  }
}

// The angles a + b of all pairs.
inline void compose_tables(int pairs, const float* __restrict cos_a, const float* __restrict sin_a,
                           const float* __restrict cos_b, const float* __restrict sin_b,
                           float* __restrict cos_out, float* __restrict sin_out) {
  for (int t = 0; t < pairs; ++t) {
    cos_out[t] = cos_a[t] * cos_b[t] - sin_a[t] * sin_b[t];
    sin_out[t] = sin_a[t] * cos_b[t] + cos_a[t] * sin_b[t];
  }
}

// Rotates the first 2 * pairs floats of `row` in place.
inline void rotate_row(const Rotary& rotary, const float* __restrict cos,
                       const float* __restrict sin, float* __restrict row) {
  if (rotary.interleaved) {
    for (int t = 0; t < rotary.pairs; ++t)
      rotate_pair({cos[t], sin[t]}, row[2 * t], row[2 * t + 1]);
    return;
  }
  float* second = row + rotary.pairs;
  for (int t = 0; t < rotary.pairs; ++t) {
    const float a = row[t], b = second[t];
    row[t] = a * cos[t] - b * sin[t];
    second[t] = b * cos[t] + a * sin[t];
  }
}

// The raw frame: no angle, but the rope scaling all the same.
inline void scale_rotary_dims(const Rotary& rotary, float* row) {
  if (rotary.scaling == 1.0f) return;
  for (int d = 0; d < 2 * rotary.pairs; ++d) row[d] *= rotary.scaling;
}

// D values of any type to floats; the tail up to `padded` is zeroed.
template <typename T>
inline void load_row(const T* src, int dim, float* dst, int padded) {
  int d = 0;
  for (; d + kLanes <= dim; d += kLanes) vstore(dst + d, vload(src + d));
  for (; d < dim; ++d) dst[d] = to_float(src[d]);
  for (; d < padded; ++d) dst[d] = 0.0f;
}

// The first `dim` floats of a row, times `factor`, as values of any type.
template <typename T>
inline void store_row(const float* src, int dim, T* dst, float factor = 1.0f) {
  int d = 0;
  for (; d + kLanes <= dim; d += kLanes) vstore(dst + d, vmul(vload(src + d), vset(factor)));
  for (; d < dim; ++d) from_float(src[d] * factor, dst[d]);
}

// cos and sin of some angles, one of each pair.
struct Angles {
  const float* cos;
  const float* sin;
};

// A row of `dim` values rotated by the angles a, or by a + b, as values of E; zeros up to `padded`.
// `cos`, `sin` and `row` are room for the tables and the padded row.
template <typename T, typename E>
inline void rotate_into(const Rotary& rotary, Angles a, const Angles* b, const T* x, int dim,
                        int padded, float* cos, float* sin, float* row, E* out) {
  const int pairs = rotary.pairs;
  if (rotary.interleaved || pairs % kLanes != 0 || dim % kLanes != 0) {
    if (b != nullptr) {
      compose_tables(pairs, a.cos, a.sin, b->cos, b->sin, cos, sin);
      a = {cos, sin};
    }
    load_row(x, dim, row, padded);
    rotate_row(rotary, a.cos, a.sin, row);
    store_row(row, padded, out);
    return;
  }
  // The same without a stop in memory.
  for (int t = 0; t < pairs; t += kLanes) {
    Vec c = vload(a.cos + t), s = vload(a.sin + t);
    if (b != nullptr) {
      const Vec cb = vload(b->cos + t), sb = vload(b->sin + t);
      const Vec composed = vfms(c, cb, vmul(s, sb));
      s = vfma(s, cb, vmul(c, sb));
      c = composed;
    }
    const Vec first = vload(x + t), second = vload(x + pairs + t);
    vstore(out + t, vfms(first, c, vmul(second, s)));
    vstore(out + pairs + t, vfma(second, c, vmul(first, s)));
  }
  for (int d = 2 * pairs; d < dim; d += kLanes) vstore(out + d, vload(x + d));
  for (int d = dim; d < padded; d += kLanes) vstore(out + d, vset(0.0f));
}
