// The decode products in bf16, on vectors or on matrix tiles. Dims are a multiple of 32.
// Included inside namespace lminf::cpu::LMINF_ISA, where there is a bf16 dot product.

// Interleaved rows come out of the unpack instructions with their dims in groups of four, even
// groups first. These index pairs of such vectors put 32 dims back in order.
inline __m512i unpacked_first() {
  return _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
}
inline __m512i unpacked_second() {
  return _mm512_setr_epi32(8, 9, 10, 11, 24, 25, 26, 27, 12, 13, 14, 15, 28, 29, 30, 31);
}

#if !LMINF_AMX

struct DecodeProductBf16 {
  using Operand = bf16;
  static constexpr int kProbGrain = kLanes;

  explicit DecodeProductBf16(Scratch&, int /*heads*/, int /*dim*/) {}
  static size_t bytes(int /*heads*/, int /*dim*/) { return 0; }
  static int64_t query_size(int heads, int dim) { return int64_t{heads} * dim; }

  static void pack_queries(const float* q, int heads, int dim, bf16* out) {
    for (int h = 0; h < heads; ++h) store_row(q + h * dim, dim, out + h * dim);
  }

  void scores(const bf16* q, int heads, int dim, const bf16* k, int64_t stride, int n,
              float* out) const {
    for_head_groups(heads, [&](int h, auto count) {
      dot_keys<decltype(count)::value>(q + h * dim, dim, k, stride, n, out + h * kDecodeBlock);
    });
  }

  void add_values(const bf16* probs, int heads, const bf16* v, int64_t stride, int n, int dim,
                  float* out) const {
    for_head_groups(heads, [&](int h, auto count) {
      add_rows<decltype(count)::value>(probs + h * kDecodeBlock, v, stride, n, dim, out + h * dim);
    });
  }

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
  static void add_rows(const bf16* probs, const bf16* v, int64_t stride, int n, int dim,
                       float* out) {
    const __m512i first = unpacked_first(), second = unpacked_second();
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

#else

// Keys are read by tiles as they stand, 16 keys by 32 dims, against queries packed once a step;
// values are interleaved in pairs of keys on their way. A tile takes up to 16 query heads.
class DecodeProductBf16 {
 public:
  using Operand = bf16;
  static constexpr int kProbGrain = 32;
  static constexpr int kHeads = 16;

  DecodeProductBf16(Scratch& scratch, int heads, int dim) {
    keys_ = scratch.take<bf16>(16 * dim);
    values_ = scratch.take<bf16>(kDecodeBlock * dim);
    scores_ = scratch.take<float>(kHeads * kDecodeBlock);
    out_ = scratch.take<float>(kHeads * dim);
    TileConfig config;
    // Tiles 6 and 7 hold a row per query head.
    config.rows[6] = config.rows[7] = static_cast<uint8_t>(std::min(heads, kHeads));
    _tile_loadconfig(&config);
  }
  ~DecodeProductBf16() { _tile_release(); }
  DecodeProductBf16(const DecodeProductBf16&) = delete;
  DecodeProductBf16& operator=(const DecodeProductBf16&) = delete;

  static size_t bytes(int /*heads*/, int dim) {
    return Scratch::bytes<bf16>(16 * dim) + Scratch::bytes<bf16>(kDecodeBlock * dim) +
           Scratch::bytes<float>(kHeads * kDecodeBlock) + Scratch::bytes<float>(kHeads * dim);
  }
  static int64_t query_size(int heads, int dim) {
    return int64_t{(heads + kHeads - 1) / kHeads * kHeads} * dim;
  }

  // For each 16 heads: [dim / 2][16 heads][2], zeros where there is no head.
  static void pack_queries(const float* q, int heads, int dim, bf16* out) {
    std::memset(out, 0, query_size(heads, dim) * sizeof(bf16));
    for (int h = 0; h < heads; ++h) {
      bf16* column = out + h / kHeads * kHeads * dim + h % kHeads * 2;
      for (int d = 0; d < dim; ++d) from_float(q[h * dim + d], column[d / 2 * 32 + d % 2]);
    }
  }

  void scores(const bf16* q, int heads, int dim, const bf16* k, int64_t stride, int n,
              float* out) const {
    const int whole = n / 16;
    const bf16* tail = k + whole * 16 * stride;
    if (n % 16 != 0) {  // the rows behind the last key may not be ours to read
      std::memset(keys_, 0, 16 * dim * sizeof(bf16));
      for (int c = 0; c < n % 16; ++c)
        std::memcpy(keys_ + c * dim, tail + c * stride, dim * sizeof(bf16));
    }
    for (int h = 0; h < heads; h += kHeads) {
      const bf16* queries = q + h * dim;
      int c = 0;
      for (; c + 32 <= whole * 16; c += 32)
        score_tiles<2>(queries, dim, k + c * stride, stride, out + h * kDecodeBlock + c);
      if (c < whole * 16) {
        score_tiles<1>(queries, dim, k + c * stride, stride, out + h * kDecodeBlock + c);
        c += 16;
      }
      if (c < n) score_tiles<1>(queries, dim, keys_, dim, out + h * kDecodeBlock + c);
    }
  }

  void add_values(const bf16* probs, int heads, const bf16* v, int64_t stride, int n, int dim,
                  float* out) const {
    interleave(v, stride, n, dim);
    const __m512i first = unpacked_first(), second = unpacked_second();
    const int rows = std::min(heads, kHeads);
    for (int h = 0; h < heads; h += kHeads) {
      for (int panel = 0; panel < dim / 16; ++panel) {
        _tile_zero(7);
        for (int c = 0; c < n; c += 32) {
          _tile_loadd(6, probs + h * kDecodeBlock + c, kDecodeBlock * 2);
          _tile_loadd(5, values_ + (panel * kDecodeBlock + c) * 16, 64);
          _tile_dpbf16ps(7, 6, 5);
        }
        _tile_stored(7, out_ + panel * 16, dim * 4);
      }
      for (int r = 0; r < std::min(rows, heads - h); ++r) {
        for (int d = 0; d < dim; d += 32) {
          const Vec low = vload(out_ + r * dim + d), high = vload(out_ + r * dim + d + 16);
          float* row = out + (h + r) * dim + d;
          vstore(row, vadd(vload(row), _mm512_permutex2var_ps(low, first, high)));
          vstore(row + 16, vadd(vload(row + 16), _mm512_permutex2var_ps(low, second, high)));
        }
      }
    }
  }

 private:
  // 16 * kTiles keys against 16 heads, into rows of `out`, one a head.
  template <int kTiles>
  void score_tiles(const bf16* q, int dim, const bf16* k, int64_t stride, float* out) const {
    _tile_zero(0);
    if (kTiles > 1) _tile_zero(1);
    for (int d = 0; d < dim; d += 32) {
      _tile_loadd(4, q + d * 16, 64);
      _tile_loadd(2, k + d, stride * 2);
      _tile_dpbf16ps(0, 2, 4);
      if (kTiles > 1) {
        _tile_loadd(3, k + 16 * stride + d, stride * 2);
        _tile_dpbf16ps(1, 3, 4);
      }
    }
    _tile_stored(0, scores_, 64);
    if (kTiles > 1) _tile_stored(1, scores_ + 256, 64);
    for (int t = 0; t < kTiles; ++t)
      transpose_square(reinterpret_cast<const uint32_t*>(scores_ + t * 256), 16,
                       reinterpret_cast<uint32_t*>(out + t * 16), kDecodeBlock);
  }

  // values_ = panels [dim / 16][kDecodeBlock / 2][16][2] of pairs of keys, zeros up to a multiple
  // of 32 keys.
  void interleave(const bf16* v, int64_t stride, int n, int dim) const {
    const __m512i none = _mm512_setzero_si512();
    for (int c = 0; c < (n + 31) / 32 * 32; c += 2) {
      for (int d = 0; d < dim; d += 32) {
        const __m512i even = c < n ? _mm512_loadu_si512(v + c * stride + d) : none;
        const __m512i odd = c + 1 < n ? _mm512_loadu_si512(v + (c + 1) * stride + d) : none;
        bf16* pair = values_ + (d / 16 * kDecodeBlock + c) * 16;
        _mm512_storeu_si512(pair, _mm512_unpacklo_epi16(even, odd));
        _mm512_storeu_si512(pair + kDecodeBlock * 16, _mm512_unpackhi_epi16(even, odd));
      }
    }
  }

  bf16* keys_;     // [16][dim], the last keys of a block
  bf16* values_;   // see interleave
  float* scores_;  // two tiles, one row a key
  float* out_;     // [16][dim], dims as the unpacking left them
};

#endif
