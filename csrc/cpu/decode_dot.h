// The two products of a decode step over rows that stand where the cache keeps them: a few query
// heads against many keys, then their probabilities against the values. Included inside namespace
// lminf::cpu::LMINF_ISA.

constexpr int kDecodeBlock = 64;  // keys between two softmax steps

// Scores and values as the products want them: K is the element type of the cache.
//   float: queries and probabilities in float, keys and values converted as they are read
//   bf16 where there is a bf16 dot product: everything in bf16, sums in float
template <typename K>
struct DecodeProduct {
  using Operand = float;  // of queries and probabilities

  // scores[h][c] = <q[h], k[c]> for n keys; rows of q are `dim` apart, rows of scores kDecodeBlock.
  template <int kHeads>
  static void dot_keys(const float* q, int dim, const K* k, int64_t stride, int n, float* scores) {
    constexpr int kKeys = kLanes / kHeads;  // as many sums as a vector has lanes
    for (int c0 = 0; c0 < n; c0 += kKeys) {
      const K* key[kKeys];  // past the end the last key again, for sums that nobody reads
      for (int c = 0; c < kKeys; ++c) key[c] = k + std::min(c0 + c, n - 1) * stride;
      Vec sum[kLanes];
      LMINF_UNROLL
      for (int i = 0; i < kLanes; ++i) sum[i] = vset(0.0f);
      for (int d = 0; d < dim; d += kLanes) {
        Vec row[kKeys];
        LMINF_UNROLL
        for (int c = 0; c < kKeys; ++c) row[c] = vload(key[c] + d);
        LMINF_UNROLL
        for (int h = 0; h < kHeads; ++h) {
          const Vec query = vload(q + h * dim + d);
          LMINF_UNROLL
          for (int c = 0; c < kKeys; ++c)
            sum[h * kKeys + c] = vfma(query, row[c], sum[h * kKeys + c]);
        }
      }
      store_sums<kHeads>(sum, scores + c0);
    }
  }

  // out[h] += sum_c probs[h][c] v[c]; rows of out are `dim` apart, rows of probs kDecodeBlock.
  template <int kHeads>
  static void add_values(const float* probs, const K* v, int64_t stride, int n, int dim,
                         float* out) {
    constexpr int kVecs = LMINF_LANES == 16 ? std::max(1, 16 / kHeads) : std::max(1, 8 / kHeads);
    int d = 0;
    for (; d + kVecs * kLanes <= dim; d += kVecs * kLanes)
      add_columns<kHeads, kVecs>(probs, v + d, stride, n, dim, out + d);
    for (; d < dim; d += kLanes) add_columns<kHeads, 1>(probs, v + d, stride, n, dim, out + d);
  }

  template <int kHeads>
  static void store_sums(const Vec* sum, float* scores) {
    constexpr int kKeys = kLanes / kHeads;
    float lanes[kLanes];
    vstore(lanes, vreduce_add_each(sum));
    LMINF_UNROLL
    for (int h = 0; h < kHeads; ++h)
      std::memcpy(scores + h * kDecodeBlock, lanes + h * kKeys, kKeys * sizeof(float));
  }

 private:
  template <int kHeads, int kVecs>
  static void add_columns(const float* probs, const K* v, int64_t stride, int n, int dim,
                          float* out) {
    Vec sum[kHeads][kVecs];
    LMINF_UNROLL
    for (int h = 0; h < kHeads; ++h) {
      LMINF_UNROLL
      for (int i = 0; i < kVecs; ++i) sum[h][i] = vload(out + h * dim + i * kLanes);
    }
    for (int c = 0; c < n; ++c) {
      Vec value[kVecs];
      LMINF_UNROLL
      for (int i = 0; i < kVecs; ++i) value[i] = vload(v + c * stride + i * kLanes);
      LMINF_UNROLL
      for (int h = 0; h < kHeads; ++h) {
        const Vec p = vset(probs[h * kDecodeBlock + c]);
        LMINF_UNROLL
        for (int i = 0; i < kVecs; ++i) sum[h][i] = vfma(p, value[i], sum[h][i]);
      }
    }
    LMINF_UNROLL
    for (int h = 0; h < kHeads; ++h) {
      LMINF_UNROLL
      for (int i = 0; i < kVecs; ++i) vstore(out + h * dim + i * kLanes, sum[h][i]);
    }
  }
};

#if LMINF_BF16
// Dims are a multiple of 32: one vector of a row.
struct DecodeProductBf16 {
  using Operand = bf16;

  template <int kHeads>
  static void dot_keys(const bf16* q, int dim, const bf16* k, int64_t stride, int n,
                       float* scores) {
    constexpr int kKeys = kLanes / kHeads;
    for (int c0 = 0; c0 < n; c0 += kKeys) {
      const bf16* key[kKeys];
      for (int c = 0; c < kKeys; ++c) key[c] = k + std::min(c0 + c, n - 1) * stride;
      Vec sum[kLanes];
      LMINF_UNROLL
      for (int i = 0; i < kLanes; ++i) sum[i] = vset(0.0f);
      for (int d = 0; d < dim; d += 32) {
        __m512i row[kKeys];
        LMINF_UNROLL
        for (int c = 0; c < kKeys; ++c) row[c] = _mm512_loadu_si512(key[c] + d);
        LMINF_UNROLL
        for (int h = 0; h < kHeads; ++h) {
          const __m512i query = _mm512_loadu_si512(q + h * dim + d);
          LMINF_UNROLL
          for (int c = 0; c < kKeys; ++c)
            sum[h * kKeys + c] =
                _mm512_dpbf16_ps(sum[h * kKeys + c], (__m512bh)query, (__m512bh)row[c]);
        }
      }
      DecodeProduct<bf16>::store_sums<kHeads>(sum, scores + c0);
    }
  }

  // Two keys at a time: their rows are interleaved, so that one product takes both.
  template <int kHeads>
  static void add_values(const bf16* probs, const bf16* v, int64_t stride, int n, int dim,
                         float* out) {
    // Dims as the interleaving leaves them: of each group of 8, the first 4 go low, the others
    // high.
    const __m512i first = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
    const __m512i second =
        _mm512_setr_epi32(8, 9, 10, 11, 24, 25, 26, 27, 12, 13, 14, 15, 28, 29, 30, 31);
    for (int d = 0; d < dim; d += 32) {
      Vec low[kHeads], high[kHeads];
      LMINF_UNROLL
      for (int h = 0; h < kHeads; ++h) low[h] = high[h] = vset(0.0f);
      for (int c = 0; c < n; c += 2) {
        const __m512i even = _mm512_loadu_si512(v + c * stride + d);
        const __m512i odd =
            c + 1 < n ? _mm512_loadu_si512(v + (c + 1) * stride + d) : _mm512_setzero_si512();
        const __m512i pair_low = _mm512_unpacklo_epi16(even, odd);
        const __m512i pair_high = _mm512_unpackhi_epi16(even, odd);
        LMINF_UNROLL
        for (int h = 0; h < kHeads; ++h) {
          int32_t pair;
          std::memcpy(&pair, probs + h * kDecodeBlock + c, 4);
          const __m512i p = _mm512_set1_epi32(pair);
          low[h] = _mm512_dpbf16_ps(low[h], (__m512bh)p, (__m512bh)pair_low);
          high[h] = _mm512_dpbf16_ps(high[h], (__m512bh)p, (__m512bh)pair_high);
        }
      }
      LMINF_UNROLL
      for (int h = 0; h < kHeads; ++h) {
        float* row = out + h * dim + d;
        vstore(row, vadd(vload(row), _mm512_permutex2var_ps(low[h], first, high[h])));
        vstore(row + 16, vadd(vload(row + 16), _mm512_permutex2var_ps(low[h], second, high[h])));
      }
    }
  }
};
#endif

// Calls f(first head, how many as a constant) over `heads` in the largest steps there are.
template <typename F>
inline void for_head_groups(int heads, const F& f) {
  int h = 0;
  if constexpr (kLanes >= 8)
    for (; h + 8 <= heads; h += 8) f(h, std::integral_constant<int, 8>{});
  for (; h + 4 <= heads; h += 4) f(h, std::integral_constant<int, 4>{});
  for (; h + 2 <= heads; h += 2) f(h, std::integral_constant<int, 2>{});
  for (; h < heads; ++h) f(h, std::integral_constant<int, 1>{});
}
