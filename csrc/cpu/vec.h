// A vector of floats of the instruction set being compiled: the few operations the kernels need.
// Included inside namespace lminf::cpu::LMINF_ISA.

using bf16 = uint16_t;  // the bits of a bfloat16
struct f16 {            // the bits of an IEEE half
  uint16_t bits;
};

inline float to_float(float x) { return x; }
inline float to_float(bf16 x) {
  const uint32_t bits = static_cast<uint32_t>(x) << 16;
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}
inline float to_float(f16 x) {
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000) << 16;
  const uint32_t magnitude = x.bits & 0x7fff;
  uint32_t bits;
  if (magnitude >= 0x7c00) {  // inf, NaN
    bits = 0x7f800000 | (magnitude & 0x3ff) << 13;
  } else if (magnitude >= 0x0400) {  // normal: rebias the exponent
    bits = (magnitude << 13) + 0x38000000;
  } else {  // zero, subnormal: magnitude * 2^-24
    const float f = static_cast<float>(magnitude) * 5.9604644775390625e-8f;
    std::memcpy(&bits, &f, 4);
  }
  bits |= sign;
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}

// Rounds to nearest, ties to even; NaN stays NaN.
inline void from_float(float x, float& out) { out = x; }
inline void from_float(float x, bf16& out) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  const uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  out = static_cast<bf16>((bits & 0x7fffffff) > 0x7f800000 ? (bits >> 16 | 0x40) : rounded);
}
inline void from_float(float x, f16& out) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  const uint32_t sign = bits >> 16 & 0x8000;
  bits &= 0x7fffffff;
  uint32_t half;
  if (bits > 0x7f800000) {
    half = 0x7e00;
  } else if (bits >= 0x477ff000) {  // 65520 and above round to infinity
    half = 0x7c00;
  } else if (bits >= 0x38800000) {  // normal
    half = (bits - 0x38000000 + 0xfff + (bits >> 13 & 1)) >> 13;
  } else {  // subnormal: the addition rounds at 2^-24
    float f;
    std::memcpy(&f, &bits, 4);
    f += 0.5f;
    std::memcpy(&half, &f, 4);
    half -= 0x3f000000;
  }
  out.bits = static_cast<uint16_t>(sign | half);
}

constexpr int kLanes = LMINF_LANES;

// Asks for the cache line of p, which may be any address.
inline void prefetch(const void* p) { __builtin_prefetch(p); }

#if LMINF_LANES == 16

using Vec = __m512;
inline Vec vload(const float* p) { return _mm512_loadu_ps(p); }
inline void vstore(float* p, Vec v) { _mm512_storeu_ps(p, v); }
inline Vec vset(float x) { return _mm512_set1_ps(x); }
inline Vec vadd(Vec a, Vec b) { return _mm512_add_ps(a, b); }
inline Vec vmul(Vec a, Vec b) { return _mm512_mul_ps(a, b); }
// a / b for normal b, by an approximate reciprocal and one step of Newton's: 2 units in the last
// place.
inline Vec vdiv(Vec a, Vec b) {
  const Vec r = _mm512_rcp14_ps(b);
  return _mm512_mul_ps(a, _mm512_fmadd_ps(r, _mm512_fnmadd_ps(b, r, _mm512_set1_ps(1.0f)), r));
}
inline Vec vfma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }  // a * b + c
inline Vec vfms(Vec a, Vec b, Vec c) { return _mm512_fmsub_ps(a, b, c); }  // a * b - c
inline Vec vsub(Vec a, Vec b) { return _mm512_sub_ps(a, b); }
inline Vec vmax(Vec a, Vec b) { return _mm512_max_ps(a, b); }  // b where either is NaN
inline Vec vmin(Vec a, Vec b) { return _mm512_min_ps(a, b); }  // b where either is NaN
inline float vreduce_max(Vec v) { return _mm512_reduce_max_ps(v); }
inline float vreduce_add(Vec v) { return _mm512_reduce_add_ps(v); }
inline bool vany_above(Vec v, float bound) {
  return _mm512_cmp_ps_mask(v, vset(bound), _CMP_GT_OQ) != 0;
}
inline Vec vround(Vec v) {
  return _mm512_roundscale_ps(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
inline Vec vscale2(Vec v, Vec n) { return _mm512_scalef_ps(v, n); }  // v * 2^n, n an integer
inline Vec viota() { return _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15); }
// Lanes [lo, hi) of v, and `fill` elsewhere; lo and hi may lie outside [0, kLanes].
inline Vec vkeep(Vec v, int lo, int hi, Vec fill) {
  const uint32_t from = lo <= 0 ? 0xffffu : lo >= 16 ? 0u : 0xffffu << lo;
  const uint32_t to = hi >= 16 ? 0xffffu : hi <= 0 ? 0u : 0xffffu >> (16 - hi);
  return _mm512_mask_blend_ps(static_cast<__mmask16>(from & to), fill, v);
}
// v, and -inf where `bias` is -inf, even for a NaN.
inline Vec vhide(Vec v, Vec bias) {
  const Vec none = _mm512_set1_ps(-std::numeric_limits<float>::infinity());
  return _mm512_mask_mov_ps(v, _mm512_cmp_ps_mask(bias, none, _CMP_EQ_OQ), none);
}
inline Vec vload(const bf16* p) {
  const __m256i raw = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(raw), 16));
}
inline Vec vload(const f16* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
inline void vstore(f16* p, Vec v) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                      _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
inline __m256i to_bf16_bits(Vec v) {
#if LMINF_BF16
  return (__m256i)_mm512_cvtneps_pbh(v);
#else
  const __m512i bits = _mm512_castps_si512(v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  __m512i r = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
  r = _mm512_mask_or_epi32(r, nan, bits, _mm512_set1_epi32(0x400000));
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(r, 16));
#endif
}
inline void vstore(bf16* p, Vec v) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), to_bf16_bits(v));
}
#if LMINF_BF16
inline void vstore2(bf16* p, Vec a, Vec b) {
  _mm512_storeu_si512(p, (__m512i)_mm512_cvtne2ps_pbh(b, a));
}
#endif

#elif LMINF_LANES == 8

using Vec = __m256;
inline Vec vload(const float* p) { return _mm256_loadu_ps(p); }
inline void vstore(float* p, Vec v) { _mm256_storeu_ps(p, v); }
inline Vec vset(float x) { return _mm256_set1_ps(x); }
inline Vec vadd(Vec a, Vec b) { return _mm256_add_ps(a, b); }
inline Vec vsub(Vec a, Vec b) { return _mm256_sub_ps(a, b); }
inline Vec vmul(Vec a, Vec b) { return _mm256_mul_ps(a, b); }
inline Vec vdiv(Vec a, Vec b) { return _mm256_div_ps(a, b); }
inline Vec vfma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
inline Vec vfms(Vec a, Vec b, Vec c) { return _mm256_fmsub_ps(a, b, c); }
inline Vec vmax(Vec a, Vec b) { return _mm256_max_ps(a, b); }
inline Vec vmin(Vec a, Vec b) { return _mm256_min_ps(a, b); }
inline float vreduce_add(Vec v) {
  __m128 x = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  x = _mm_add_ps(x, _mm_movehl_ps(x, x));
  return _mm_cvtss_f32(_mm_add_ss(x, _mm_movehdup_ps(x)));
}
inline float vreduce_max(Vec v) {
  __m128 x = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  x = _mm_max_ps(x, _mm_movehl_ps(x, x));
  return _mm_cvtss_f32(_mm_max_ss(x, _mm_movehdup_ps(x)));
}
inline bool vany_above(Vec v, float bound) {
  return _mm256_movemask_ps(_mm256_cmp_ps(v, vset(bound), _CMP_GT_OQ)) != 0;
}
inline Vec vround(Vec v) {
  return _mm256_round_ps(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
// n in [-252, 126]: two factors, since one would leave the exponent's range.
inline Vec vscale2(Vec v, Vec n) {
  const __m256i e = _mm256_cvtps_epi32(n);
  const __m256i half = _mm256_srai_epi32(e, 1);
  const __m256i bias = _mm256_set1_epi32(127);
  const Vec a = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(half, bias), 23));
  const Vec b =
      _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(_mm256_sub_epi32(e, half), bias), 23));
  return _mm256_mul_ps(_mm256_mul_ps(v, a), b);
}
// v where x is at least `bound` or NaN, else 0.
inline Vec vzero_below(Vec x, float bound, Vec v) {
  return _mm256_and_ps(v, _mm256_cmp_ps(x, _mm256_set1_ps(bound), _CMP_NLT_UQ));
}
inline Vec viota() { return _mm256_setr_ps(0, 1, 2, 3, 4, 5, 6, 7); }
inline Vec vkeep(Vec v, int lo, int hi, Vec fill) {
  const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  const __m256i keep = _mm256_and_si256(_mm256_cmpgt_epi32(lane, _mm256_set1_epi32(lo - 1)),
                                        _mm256_cmpgt_epi32(_mm256_set1_epi32(hi), lane));
  return _mm256_blendv_ps(fill, v, _mm256_castsi256_ps(keep));
}
inline Vec vhide(Vec v, Vec bias) {
  const Vec none = vset(-std::numeric_limits<float>::infinity());
  return _mm256_blendv_ps(v, none, _mm256_cmp_ps(bias, none, _CMP_EQ_OQ));
}
inline Vec vload(const bf16* p) {
  const __m128i raw = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(raw), 16));
}
inline Vec vload(const f16* p) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
inline void vstore(f16* p, Vec v) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                   _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
inline void vstore(bf16* p, Vec v) {
  float lanes[8];
  _mm256_storeu_ps(lanes, v);
  for (int i = 0; i < 8; ++i) from_float(lanes[i], p[i]);
}

#else

typedef float Vec __attribute__((vector_size(16)));
typedef int32_t VecInt __attribute__((vector_size(16)));
inline Vec vload(const float* p) {
  Vec v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
inline void vstore(float* p, Vec v) { std::memcpy(p, &v, sizeof v); }
inline Vec vset(float x) { return Vec{x, x, x, x}; }
inline Vec vadd(Vec a, Vec b) { return a + b; }
inline Vec vsub(Vec a, Vec b) { return a - b; }
inline Vec vmul(Vec a, Vec b) { return a * b; }
inline Vec vdiv(Vec a, Vec b) { return a / b; }
inline Vec vfma(Vec a, Vec b, Vec c) { return a * b + c; }
inline Vec vfms(Vec a, Vec b, Vec c) { return a * b - c; }
inline Vec vmax(Vec a, Vec b) { return a > b ? a : b; }
inline Vec vmin(Vec a, Vec b) { return a < b ? a : b; }
inline float vreduce_add(Vec v) { return (v[0] + v[2]) + (v[1] + v[3]); }
inline float vreduce_max(Vec v) { return std::max(std::max(v[0], v[2]), std::max(v[1], v[3])); }
inline bool vany_above(Vec v, float bound) { return vreduce_max(v) > bound; }
// |v| < 2^22, as exp2 guarantees: adding and taking away 1.5 * 2^23 rounds to an integer.
inline Vec vround(Vec v) {
  const Vec magic = vset(12582912.0f);
  return (v + magic) - magic;
}
inline Vec vscale2(Vec v, Vec n) {
  const VecInt e = __builtin_convertvector(n, VecInt);
  const VecInt half = e >> 1;
  return v * (Vec)((half + 127) << 23) * (Vec)((e - half + 127) << 23);
}
inline Vec vzero_below(Vec x, float bound, Vec v) { return x < vset(bound) ? vset(0.0f) : v; }
inline Vec viota() { return Vec{0, 1, 2, 3}; }
inline Vec vkeep(Vec v, int lo, int hi, Vec fill) {
  const VecInt lane = {0, 1, 2, 3};
  const VecInt keep = (lane >= lo) & (lane < hi);
  return keep ? v : fill;
}
inline Vec vhide(Vec v, Vec bias) {
  const Vec none = vset(-std::numeric_limits<float>::infinity());
  return bias == none ? none : v;
}
inline Vec vload(const bf16* p) {
  return Vec{to_float(p[0]), to_float(p[1]), to_float(p[2]), to_float(p[3])};
}
inline Vec vload(const f16* p) {
  return Vec{to_float(p[0]), to_float(p[1]), to_float(p[2]), to_float(p[3])};
}
inline void vstore(bf16* p, Vec v) {
  for (int i = 0; i < 4; ++i) from_float(v[i], p[i]);
}
inline void vstore(f16* p, Vec v) {
  for (int i = 0; i < 4; ++i) from_float(v[i], p[i]);
}

#endif

inline void vstore2(float* p, Vec a, Vec b) {
  vstore(p, a);
  vstore(p + kLanes, b);
}

// For as long as it lives, this thread takes subnormal numbers for 0: results that a later, larger
// score has scaled down to nothing would otherwise slow every operation on them down.
#if defined(__x86_64__)
class FlushSubnormals {
 public:
  FlushSubnormals() : before_(_mm_getcsr()) { _mm_setcsr(before_ | kFlushToZero | kTakeForZero); }
  ~FlushSubnormals() { _mm_setcsr(before_); }
  FlushSubnormals(const FlushSubnormals&) = delete;
  FlushSubnormals& operator=(const FlushSubnormals&) = delete;

 private:
  static constexpr uint32_t kFlushToZero = 0x8000, kTakeForZero = 0x0040;
  uint32_t before_;
};
#else
struct FlushSubnormals {};
#endif

// Lane i of the result is the sum of the lanes of v[i].
#if LMINF_LANES == 16
inline Vec vreduce_add_each(const Vec* v) {
  Vec pairs[8], quads[4];
  LMINF_UNROLL
  for (int i = 0; i < 8; ++i)
    pairs[i] = vadd(_mm512_unpacklo_ps(v[2 * i], v[2 * i + 1]),
                    _mm512_unpackhi_ps(v[2 * i], v[2 * i + 1]));
  LMINF_UNROLL
  for (int i = 0; i < 4; ++i) {
    const __m512d a = _mm512_castps_pd(pairs[2 * i]), b = _mm512_castps_pd(pairs[2 * i + 1]);
    quads[i] = vadd(_mm512_castpd_ps(_mm512_unpacklo_pd(a, b)),
                    _mm512_castpd_ps(_mm512_unpackhi_pd(a, b)));
  }
  // Each quad now holds four sums in each 128-bit lane; add the four lanes up.
  const Vec low = vadd(_mm512_shuffle_f32x4(quads[0], quads[1], 0x88),
                       _mm512_shuffle_f32x4(quads[0], quads[1], 0xdd));
  const Vec high = vadd(_mm512_shuffle_f32x4(quads[2], quads[3], 0x88),
                        _mm512_shuffle_f32x4(quads[2], quads[3], 0xdd));
  return vadd(_mm512_shuffle_f32x4(low, high, 0x88), _mm512_shuffle_f32x4(low, high, 0xdd));
}
#elif LMINF_LANES == 8
inline Vec vreduce_add_each(const Vec* v) {
  Vec pairs[4], quads[2];
  LMINF_UNROLL
  for (int i = 0; i < 4; ++i)
    pairs[i] = vadd(_mm256_unpacklo_ps(v[2 * i], v[2 * i + 1]),
                    _mm256_unpackhi_ps(v[2 * i], v[2 * i + 1]));
  LMINF_UNROLL
  for (int i = 0; i < 2; ++i) {
    const __m256d a = _mm256_castps_pd(pairs[2 * i]), b = _mm256_castps_pd(pairs[2 * i + 1]);
    quads[i] = vadd(_mm256_castpd_ps(_mm256_unpacklo_pd(a, b)),
                    _mm256_castpd_ps(_mm256_unpackhi_pd(a, b)));
  }
  return vadd(_mm256_permute2f128_ps(quads[0], quads[1], 0x20),
              _mm256_permute2f128_ps(quads[0], quads[1], 0x31));
}
#else
inline Vec vreduce_add_each(const Vec* v) {
  return Vec{vreduce_add(v[0]), vreduce_add(v[1]), vreduce_add(v[2]), vreduce_add(v[3])};
}
#endif

// 2^f - 1 for f in [-0.5, 0.5]. Largest relative error of 2^f by degree: 5: 1e-7, 6: 2e-9.
template <int kDegree>
inline Vec vexp2m1_poly(Vec f) {
  // Weighted least squares on Chebyshev nodes for the relative error of 2^f, with 2^0 = 1 exactly.
  constexpr float c[2][6] = {
      {6.931469776e-01f, 2.402224208e-01f, 5.550733749e-02f, 9.671512768e-03f, 1.326472542e-03f, 0},
      {6.931472029e-01f, 2.402264791e-01f, 5.550332470e-02f, 9.618437363e-03f, 1.339887466e-03f,
       1.535336117e-04f}};
  Vec p = vset(c[kDegree - 5][kDegree - 1]);
  LMINF_UNROLL
  for (int k = kDegree - 2; k >= 0; --k) p = vfma(p, f, vset(c[kDegree - 5][k]));
  return vmul(p, f);
}

#if LMINF_LANES == 16
// 2^f for f in [0, 1], 1 at 0. Largest relative error by degree: 4: 3e-6, 5: 8e-8.
template <int kDegree>
inline Vec vexp2_poly(Vec f) {
  // Weighted least squares, the weights moved toward equal relative errors.
  constexpr float c[2][5] = {
      {6.930448420e-01f, 2.412802180e-01f, 5.224245561e-02f, 1.342669250e-02f, 0},
      {6.931513120e-01f, 2.401644491e-01f, 5.579991578e-02f, 9.017027603e-03f, 1.867131047e-03f}};
  Vec p = vset(c[kDegree - 4][kDegree - 1]);
  LMINF_UNROLL
  for (int k = kDegree - 2; k >= 0; --k) p = vfma(p, f, vset(c[kDegree - 4][k]));
  return vfma(p, f, vset(1.0f));
}
#endif

// 2^x. Results below the smallest normal number are 0, since subnormal factors would slow every
// product down; NaN stays NaN. Above the range, 128 <= x, infinity or a number above 2^100.
inline Vec vexp2(Vec x) {
#if LMINF_LANES == 16
  // x - floor(x), and scalef takes the floor of its exponent: no rounding is spelt out.
  const Vec f = _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
  const __mmask16 normal = _mm512_cmp_ps_mask(x, vset(-126.0f), _CMP_NLT_UQ);
  return _mm512_maskz_scalef_ps(normal, vexp2_poly<5>(f), x);
#else
  const Vec clamped = vmin(vset(126.0f), vmax(vset(-127.0f), x));  // the second operand wins on NaN
  const Vec n = vround(clamped);
  const Vec power = vscale2(vadd(vexp2m1_poly<5>(vsub(clamped, n)), vset(1.0f)), n);
  return vzero_below(x, -126.0f, power);
#endif
}

#if LMINF_BF16
// 2^x within 3e-6, a hundredth of what rounding to bf16 costs. Subnormal results are up to the mode
// the thread is in (FlushSubnormals).
inline Vec vexp2_rough(Vec x) {
  const Vec f = _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
  return _mm512_scalef_ps(vexp2_poly<4>(f), x);
}
#endif

// tanh(x) = t / (t + 2), t = e^(2x) - 1, to a few units in the last place also near 0.
inline Vec vtanh(Vec x) {
  const Vec bound = vset(60.0f);  // of the exponent in base 2; tanh has long been 1
  Vec y = vmul(vset(2.0f * kLog2e), x);
  y = vmin(bound, vmax(vset(-60.0f), y));
  const Vec n = vround(y);
  const Vec power = vscale2(vset(1.0f), n);
  const Vec t = vfma(power, vexp2m1_poly<6>(vsub(y, n)), vsub(power, vset(1.0f)));
  return vdiv(t, vadd(t, vset(2.0f)));
}

#if LMINF_BF16
// tanh(x) within 1.5e-4 of itself, a tenth of what rounding x to bf16 costs: a rational function in
// x^2 (weighted least squares for the relative error on [0, 5]) and an approximate reciprocal.
inline Vec vtanh_rough(Vec x) {
  const Vec bound = vset(5.0f), one = vset(1.0f);
  x = vmin(bound, vmax(vset(-5.0f), x));  // the second operand wins on NaN
  const Vec z = vmul(x, x);
  const Vec p = vfma(vfma(vset(6.779e-4f), z, vset(1.027358e-1f)), z, one);
  const Vec q = vfma(vfma(vset(1.290384e-2f), z, vset(4.3584784e-1f)), z, one);
  return vmul(vmul(x, p), _mm512_rcp14_ps(q));
}
#endif
