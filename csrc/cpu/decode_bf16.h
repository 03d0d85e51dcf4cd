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

  void prepare_values(const bf16*, int64_t, int, int) const {}

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

  DecodeProductBf16(Scratch& scratch, int /*heads*/, int dim) {
    keys_ = scratch.take<bf16>(16 * dim);
    values_ = scratch.take<bf16>(kDecodeBlock * dim);
    scores_ = scratch.take<float>(kDecodeBlock * kHeads);
    out_ = scratch.take<float>(kHeads * dim);
    const TileConfig config;
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

  // values_ = panels [dim / 16][kDecodeBlock / 2][16][2] of pairs of keys, zeros up to a multiple
  // of 32 keys. Long before add_values: tiles cannot be loaded from stores that are still on their
  // way.
  void prepare_values(const bf16* v, int64_t stride, int n, int dim) const {
    const __m512i none = _mm512_setzero_si512();
    const int filled = (n + 31) / 32 * 32;
    bf16* values = values_;
    for (int c = 0; c < filled; c += 2) {
      const bf16* even = v + c * stride;
      const bf16* odd = even + stride;
      const bool has_even = c < n, has_odd = c + 1 < n;
      bf16* pair = values + c * 16;
      for (int d = 0; d < dim; d += 32) {
        const __m512i a = has_even ? _mm512_loadu_si512(even + d) : none;
        const __m512i b = has_odd ? _mm512_loadu_si512(odd + d) : none;
        _mm512_storeu_si512(pair, _mm512_unpacklo_epi16(a, b));
        _mm512_storeu_si512(pair + kDecodeBlock * 16, _mm512_unpackhi_epi16(a, b));
        pair += 2 * kDecodeBlock * 16;
      }
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
      for (; c + 64 <= whole * 16; c += 64)
        score_tiles<4>(queries, dim, k + c * stride, stride, out + h * kDecodeBlock + c);
      for (; c < whole * 16; c += 16)
        score_tiles<1>(queries, dim, k + c * stride, stride, out + h * kDecodeBlock + c);
      if (c < n) score_tiles<1>(queries, dim, keys_, dim, out + h * kDecodeBlock + c);
    }
  }

  void add_values(const bf16* probs, int heads, const bf16* /*v*/, int64_t /*stride*/, int n,
                  int dim, float* out) const {
    const __m512i first = unpacked_first(), second = unpacked_second();
    for (int h = 0; h < heads; h += kHeads) {
      // dim is a multiple of 32, so two panels at a time, four where there are.
      int panel = 0;
      for (; panel + 4 <= dim / 16; panel += 4)
        value_tiles<4>(probs + h * kDecodeBlock, n, dim, panel);
      for (; panel < dim / 16; panel += 2) value_tiles<2>(probs + h * kDecodeBlock, n, dim, panel);
      for (int r = 0; r < std::min(kHeads, heads - h); ++r) {
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
  // Four sums at a time, where there are so many, hide the latency of a product.
  // 16 * kTiles keys against 16 heads, into rows of `out`, one a head.
  template <int kTiles>
  void score_tiles(const bf16* q, int dim, const bf16* k, int64_t stride, float* out) const {
    _tile_zero(0);
    if (kTiles == 4) {
      _tile_zero(1);
      _tile_zero(2);
      _tile_zero(3);
    }
    for (int d = 0; d < dim; d += 32) {
      _tile_loadd(7, q + d * 16, 64);
      _tile_loadd(4, k + d, stride * 2);
      _tile_dpbf16ps(0, 4, 7);
      if (kTiles == 4) {
        _tile_loadd(5, k + 16 * stride + d, stride * 2);
        _tile_dpbf16ps(1, 5, 7);
        _tile_loadd(6, k + 32 * stride + d, stride * 2);
        _tile_dpbf16ps(2, 6, 7);
        _tile_loadd(4, k + 48 * stride + d, stride * 2);
        _tile_dpbf16ps(3, 4, 7);
      }
    }
    _tile_stored(0, scores_, 64);
    if (kTiles == 4) {
      _tile_stored(1, scores_ + 256, 64);
      _tile_stored(2, scores_ + 512, 64);
      _tile_stored(3, scores_ + 768, 64);
    }
    for (int t = 0; t < kTiles; ++t)
      transpose_square(reinterpret_cast<const uint32_t*>(scores_ + t * 256), 16,
                       reinterpret_cast<uint32_t*>(out + t * 16), kDecodeBlock);
  }

  // 16 rows of probabilities against the interleaved values of kPanels panels, into out_.
  template <int kPanels>
  void value_tiles(const bf16* probs, int n, int dim, int panel) const {
    _tile_zero(0);
    _tile_zero(1);
    if (kPanels == 4) {
      _tile_zero(2);
      _tile_zero(3);
    }
    for (int c = 0; c < n; c += 32) {
      const bf16* values = values_ + (panel * kDecodeBlock + c) * 16;
      _tile_loadd(7, probs + c, kDecodeBlock * 2);
      _tile_loadd(4, values, 64);
      _tile_dpbf16ps(0, 7, 4);
      _tile_loadd(5, values + kDecodeBlock * 16, 64);
      _tile_dpbf16ps(1, 7, 5);
      if (kPanels == 4) {
        _tile_loadd(6, values + 2 * kDecodeBlock * 16, 64);
        _tile_dpbf16ps(2, 7, 6);
        _tile_loadd(4, values + 3 * kDecodeBlock * 16, 64);
        _tile_dpbf16ps(3, 7, 4);
      }
    }
    float* out = out_ + panel * 16;
    _tile_stored(0, out, dim * 4);
    _tile_stored(1, out + 16, dim * 4);
    if (kPanels == 4) {
      _tile_stored(2, out + 32, dim * 4);
      _tile_stored(3, out + 48, dim * 4);
    }
  }

  bf16* keys_;     // [16][dim], the last keys of a block
  bf16* values_;   // see prepare_values
  float* scores_;  // two tiles, one row a key
  float* out_;     // [16][dim], dims as the unpacking left them
};

#endif
