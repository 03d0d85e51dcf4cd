// The decode products in bf16, on vectors or on matrix tiles. Dims are a multiple of 32.
// Included inside namespace lminf::cpu::LMINF_ISA, where there is a bf16 dot product.

#if !LMINF_AMX

// Interleaved rows come out of the unpack instructions with their dims in groups of four, even
// groups first. These index pairs of such vectors put 32 dims back in order.
inline __m512i unpacked_first() {
  return _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
}
inline __m512i unpacked_second() {
  return _mm512_setr_epi32(8, 9, 10, 11, 24, 25, 26, 27, 12, 13, 14, 15, 28, 29, 30, 31);
}

class DecodeProductBf16 {
 public:
  static constexpr int kBlock = kDecodeBlock;
  static constexpr int kGrain = kLanes;
  using Operand = bf16;

  DecodeProductBf16(Scratch& scratch, int heads, int /*dim*/) {
    probs_ = scratch.take<bf16>(heads * kBlock);
  }
  static size_t bytes(int heads, int /*dim*/) { return Scratch::bytes<bf16>(heads * kBlock); }
  static bool reads(int dim) { return dim % 32 == 0; }
  static int64_t query_size(int heads, int dim) { return int64_t{heads} * dim; }

  static void pack_queries(const float* q, int heads, int dim, bf16* out) {
    for (int h = 0; h < heads; ++h) store_row(q + h * dim, dim, out + h * dim);
  }

  void scores(const bf16* q, int heads, int dim, const BlockRows<bf16>& k, float* out) const {
    for_head_groups(heads, [&](int h, auto count) {
      dot_keys<decltype(count)::value>(q + h * dim, dim, k, h == 0, out + h * kBlock);
    });
  }

  void add_values(const float* probs, int heads, int dim, const BlockRows<bf16>& v,
                  float* out) const {
    for (int h = 0; h < heads; ++h) {
      for (int c = 0; c < v.n; c += kLanes)
        vstore(probs_ + h * kBlock + c, vload(probs + h * kBlock + c));
    }
    for_head_groups(heads, [&](int h, auto count) {
      add_rows<decltype(count)::value>(probs_ + h * kBlock, dim, v, h == 0, out + h * dim);
    });
  }

 private:
  template <int kHeads>
  static void dot_keys(const bf16* q, int dim, const BlockRows<bf16>& k, bool first,
                       float* scores) {
    constexpr int kKeys = kLanes / kHeads;
    for (int c0 = 0; c0 < k.n; c0 += kKeys) {
      if (kHeads > 1 && first) prefetch_rows(k.ahead(c0, kPrefetchRows), k.stride, kKeys, dim);
      const bf16* key[kKeys];
      for (int c = 0; c < kKeys; ++c) key[c] = k.row(std::min(c0 + c, k.n - 1));
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
      store_sums<kHeads, kBlock>(sum, scores + c0);
    }
  }

  // Two keys at a time: their rows are interleaved, so that one product takes both.
  template <int kHeads>
  static void add_rows(const bf16* probs, int dim, const BlockRows<bf16>& v, bool first,
                       float* out) {
    const __m512i low_dims = unpacked_first(), high_dims = unpacked_second();
    for (int d = 0; d < dim; d += 32) {
      Vec low[kHeads], high[kHeads];
      LMINF_UNROLL
      for (int h = 0; h < kHeads; ++h) low[h] = high[h] = vset(0.0f);
      for (int c = 0; c < v.n; c += 2) {
        if (kHeads > 1 && first) prefetch_rows(v.ahead(c, kPrefetchRows) + d, v.stride, 2, 32);
        const __m512i even = _mm512_loadu_si512(v.row(c) + d);
        const __m512i odd =
            c + 1 < v.n ? _mm512_loadu_si512(v.row(c + 1) + d) : _mm512_setzero_si512();
        const __m512i pair_low = _mm512_unpacklo_epi16(even, odd);
        const __m512i pair_high = _mm512_unpackhi_epi16(even, odd);
        LMINF_UNROLL
        for (int h = 0; h < kHeads; ++h) {
          int32_t pair;
          std::memcpy(&pair, probs + h * kBlock + c, 4);
          const __m512i p = _mm512_set1_epi32(pair);
          low[h] = _mm512_dpbf16_ps(low[h], (__m512bh)p, (__m512bh)pair_low);
          high[h] = _mm512_dpbf16_ps(high[h], (__m512bh)p, (__m512bh)pair_high);
        }
      }
      LMINF_UNROLL
      for (int h = 0; h < kHeads; ++h) {
        float* row = out + h * dim + d;
        vstore(row, vadd(vload(row), _mm512_permutex2var_ps(low[h], low_dims, high[h])));
        vstore(row + 16, vadd(vload(row + 16), _mm512_permutex2var_ps(low[h], high_dims, high[h])));
      }
    }
  }

  bf16* probs_;  // [heads][kBlock]
};

#else

// Keys and values are read by tiles as they stand, 16 rows by 32 dims. Queries are packed once a
// step. A tile of values takes its columns in pairs of neighbouring dims and wants its rows in
// pairs of keys; rows that are not interleaved serve as well when every probability stands beside a
// zero: (p, 0) picks the even dims out of the pairs, (0, p) the odd ones, and one product of twice
// the heads' rows does both.
class DecodeProductBf16 {
 public:
  static constexpr int kBlock = 2048;  // long, so that softmax seldom interrupts the stream
  static constexpr int kTiles = 4;     // of keys at a time
  static constexpr int kGrain = 64;    // keys of a step, as many as those tiles hold
  static constexpr int kHeads = 8;     // of a slice: two rows each fill a tile
  using Operand = bf16;

  DecodeProductBf16(Scratch& scratch, int /*heads*/, int dim) {
    rows_ = scratch.take<bf16>(16 * dim);
    scores_ = scratch.take<float>(2 * kGrain * kHeads);
    probs_ = scratch.take<uint32_t>(2 * kGrain * 2 * kHeads);
    out_ = scratch.take<float>(kHeads * dim);
  }
  ~DecodeProductBf16() { _tile_release(); }
  DecodeProductBf16(const DecodeProductBf16&) = delete;
  DecodeProductBf16& operator=(const DecodeProductBf16&) = delete;

  static size_t bytes(int /*heads*/, int dim) {
    return Scratch::bytes<bf16>(16 * dim) + Scratch::bytes<float>(2 * kGrain * kHeads) +
           Scratch::bytes<uint32_t>(2 * kGrain * 2 * kHeads) + Scratch::bytes<float>(kHeads * dim);
  }
  static bool reads(int dim) { return dim % 32 == 0; }
  static int64_t query_size(int heads, int dim) {
    return int64_t{(heads + kHeads - 1) / kHeads} * slice_width(heads) * dim;
  }

  // For each slice: [dim / 2][width][2], zeros where there is no head.
  static void pack_queries(const float* q, int heads, int dim, bf16* out) {
    const int width = slice_width(heads);
    std::memset(out, 0, query_size(heads, dim) * sizeof(bf16));
    for (int h = 0; h < heads; ++h) {
      bf16* column = out + h / kHeads * width * dim + h % kHeads * 2;
      for (int d = 0; d < dim; d += kLanes) {
        bf16 row[kLanes];
        vstore(row, vload(q + h * dim + d));
        for (int i = 0; i < kLanes; i += 2) std::memcpy(column + (d + i) * width, row + i, 4);
      }
    }
  }

  void scores(const bf16* q, int heads, int dim, const BlockRows<bf16>& k, float* out) const {
    const int width = slice_width(heads);
    configure(16, width * 4);
    for (int h = 0; h < heads; h += kHeads) {
      const bf16* slice = q + h / kHeads * width * dim;
      const int count = std::min(kHeads, heads - h);
      for (int c = 0; c < k.n + kGrain; c += kGrain) {
        if (c < k.n) score_tiles(slice, width, dim, k, c, scores_of(c));
        // A step later, since stores by tile take a while until they can be read back.
        if (c > 0)
          split_columns(scores_of(c - kGrain), width, count, out + h * kBlock + c - kGrain);
      }
    }
  }

  void add_values(const float* probs, int heads, int dim, const BlockRows<bf16>& v,
                  float* out) const {
    for (int h = 0; h < heads; h += kHeads) {
      const int count = std::min(kHeads, heads - h);
      const float* slice = probs + h * kBlock;
      configure(2 * count, 64);
      int d = 0;
      for (; d + 128 <= dim; d += 128) value_tiles<4>(slice, count, dim, v, d);
      for (; d + 64 <= dim; d += 64) value_tiles<2>(slice, count, dim, v, d);
      if (d < dim) value_tiles<1>(slice, count, dim, v, d);
      add_dims(count, dim, out + h * dim);
    }
  }

 private:
  // The 16 rows that one tile takes 32 dims of.
  struct TileRows {
    const bf16* at;
    int64_t stride;
  };

  // Columns of a slice's score tiles: a power of two that holds its heads.
  static int slice_width(int heads) { return heads > 4 ? 8 : heads > 2 ? 4 : heads; }

  // Registers 0 to 3 sum up, 4 to 6 take 16 rows by 32 dims of keys or values, 7 takes the other
  // operand, which has the shape of the sums.
  static void configure(int rows, int bytes_per_row) {
    TileConfig config;
    for (int t : {0, 1, 2, 3, 7}) {
      config.rows[t] = static_cast<uint8_t>(rows);
      config.bytes_per_row[t] = static_cast<uint16_t>(bytes_per_row);
    }
    load_tile_config(config);
  }

  // The rows of the step that starts at row c: where they stand, or the last few copied, with zeros
  // behind them, since what follows in memory may not be ours to read. Tiles that have no keys take
  // those of the first: nobody reads their scores, and their probabilities are 0.
  void step_rows(const BlockRows<bf16>& rows, int c, int dim, TileRows* tiles) const {
    for (int t = 0; t < kTiles; ++t) {
      const int first = c + 16 * t;
      if (first >= rows.n) {
        tiles[t] = tiles[0];
      } else if (first + 16 <= rows.n) {
        tiles[t] = {rows.row(first), rows.stride};
      } else {
        std::memset(rows_, 0, 16 * dim * sizeof(bf16));
        for (int r = 0; first + r < rows.n; ++r)
          std::memcpy(rows_ + r * dim, rows.row(first + r), dim * sizeof(bf16));
        settle_stores();
        tiles[t] = {rows_, dim};
      }
    }
  }

  // The j-th share of 16 rows by 32 kWide dims, row after row, as they stand in memory.
  template <int kWide>
  static void prefetch_share(const bf16* rows, int64_t stride, int j) {
    const bf16* row = rows + 16 / kWide * j * stride;
    LMINF_NO_UNROLL
    for (int r = 0; r < 16 / kWide; ++r, row += stride) {
      LMINF_UNROLL
      for (int t = 0; t < kWide; ++t) prefetch(row + t * 32);
    }
  }

  // The keys of the step that starts at row c against `width` heads: out[key][head].
  void score_tiles(const bf16* q, int width, int dim, const BlockRows<bf16>& k, int c,
                   float* out) const {
    TileRows tiles[kTiles];
    step_rows(k, c, dim, tiles);
    const bf16* ahead = k.ahead(c, kGrain);
    const int64_t width_bytes = width * 4;
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    int d = 0;
    for (; d + 128 <= dim; d += 128) add_scores<4>(q, width, tiles, ahead, k.stride, d);
    for (; d + 64 <= dim; d += 64) add_scores<2>(q, width, tiles, ahead, k.stride, d);
    if (d < dim) add_scores<1>(q, width, tiles, ahead, k.stride, d);
    _tile_stored(0, out, width_bytes);
    _tile_stored(1, out + 16 * width, width_bytes);
    _tile_stored(2, out + 32 * width, width_bytes);
    _tile_stored(3, out + 48 * width, width_bytes);
  }

  // What dims [d, d + 32 kWide) contribute.
  template <int kWide>
  static void add_scores(const bf16* q, int width, const TileRows* tiles, const bf16* ahead,
                         int64_t stride, int d) {
    for (int j = 0; j < kWide; ++j) {
      const int at = d + 32 * j;
      _tile_loadd(7, q + at * width, int64_t{width} * 4);
      _tile_loadd(4, tiles[0].at + at, tiles[0].stride * 2);
      _tile_dpbf16ps(0, 4, 7);
      prefetch_share<kWide>(ahead + d, stride, j);
      _tile_loadd(5, tiles[1].at + at, tiles[1].stride * 2);
      _tile_dpbf16ps(1, 5, 7);
      prefetch_share<kWide>(ahead + 16 * stride + d, stride, j);
      _tile_loadd(6, tiles[2].at + at, tiles[2].stride * 2);
      _tile_dpbf16ps(2, 6, 7);
      prefetch_share<kWide>(ahead + 32 * stride + d, stride, j);
      _tile_loadd(4, tiles[3].at + at, tiles[3].stride * 2);
      _tile_dpbf16ps(3, 4, 7);
      prefetch_share<kWide>(ahead + 48 * stride + d, stride, j);
    }
  }

  // One step's scores[key][width] into out[head][key].
  static void split_columns(const float* scores, int width, int count, float* out) {
    switch (width) {
      case 1:
        return split_columns<1>(scores, count, out);
      case 2:
        return split_columns<2>(scores, count, out);
      case 4:
        return split_columns<4>(scores, count, out);
      default:
        return split_columns<8>(scores, count, out);
    }
  }

  template <int kWidth>
  static void split_columns(const float* scores, int count, float* out) {
    for (int c = 0; c < kGrain; c += 16) {
      Vec columns[kWidth];
      LMINF_UNROLL
      for (int i = 0; i < kWidth; ++i) columns[i] = vload(scores + c * kWidth + 16 * i);
      split_even_odd<kWidth>(columns);
      for (int h = 0; h < count; ++h) vstore(out + h * kBlock + c, columns[h]);
    }
  }

  // Vectors that hold [16][kWidth] elements in a row become its columns.
  template <int kWidth>
  static void split_even_odd(Vec* v) {
    if constexpr (kWidth > 1) {
      const __m512i even =
          _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
      const __m512i odd = _mm512_add_epi32(even, _mm512_set1_epi32(1));
      constexpr int kHalf = kWidth / 2;
      Vec evens[kHalf], odds[kHalf];
      LMINF_UNROLL
      for (int i = 0; i < kHalf; ++i) {
        evens[i] = _mm512_permutex2var_ps(v[2 * i], even, v[2 * i + 1]);
        odds[i] = _mm512_permutex2var_ps(v[2 * i], odd, v[2 * i + 1]);
      }
      split_even_odd<kHalf>(evens);
      split_even_odd<kHalf>(odds);
      LMINF_UNROLL
      for (int i = 0; i < kHalf; ++i) {
        v[2 * i] = evens[i];
        v[2 * i + 1] = odds[i];
      }
    }
  }

  // One step's probabilities: for each 16 keys, rows of (p, 0), one a head, then rows of (0, p).
  static void pack_probs(const float* probs, int count, uint32_t* out) {
    for (int h = 0; h < count; ++h) {
      LMINF_UNROLL
      for (int c = 0; c < kGrain; c += 16) {
        const __m512i p = _mm512_cvtepu16_epi32(to_bf16_bits(vload(probs + h * kBlock + c)));
        uint32_t* row = out + c * 2 * count + h * 16;
        _mm512_store_si512(row, p);
        _mm512_store_si512(row + count * 16, _mm512_slli_epi32(p, 16));
      }
    }
    settle_stores();
  }

  // Two steps take turns.
  float* scores_of(int c) const { return scores_ + c / kGrain % 2 * kGrain * kHeads; }
  uint32_t* probs_of(int c) const { return probs_ + c / kGrain % 2 * kGrain * 2 * kHeads; }

  // out_[2 count][dim / 2]: the products of dims [d, d + 32 kWide), the even ones in the
  // first `count` rows, the odd ones in the others.
  template <int kWide>
  void value_tiles(const float* probs, int count, int dim, const BlockRows<bf16>& v, int d) const {
    _tile_zero(0);
    if (kWide > 1) _tile_zero(1);
    if (kWide > 2) {
      _tile_zero(2);
      _tile_zero(3);
    }
    pack_probs(probs, count, probs_of(0));
    for (int c = 0; c < v.n; c += kGrain) {
      // A step ahead, since tiles cannot be loaded from stores that are still on their way.
      const int next = c + kGrain;
      if (next < v.n) pack_probs(probs + next, count, probs_of(next));
      TileRows tiles[kTiles];
      step_rows(v, c, dim, tiles);
      for (int t = 0; t < kTiles; ++t) {
        const bf16* value = tiles[t].at + d;
        const int64_t bytes = tiles[t].stride * 2;
        const bf16* ahead = v.ahead(c, kGrain) + 16 * t * v.stride + d;
        _tile_loadd(7, probs_of(c) + 16 * t * 2 * count, 64);
        _tile_loadd(4, value, bytes);
        _tile_dpbf16ps(0, 7, 4);
        prefetch_share<kWide>(ahead, v.stride, 0);
        if (kWide > 1) {
          _tile_loadd(5, value + 32, bytes);
          _tile_dpbf16ps(1, 7, 5);
          prefetch_share<kWide>(ahead, v.stride, 1);
        }
        if (kWide > 2) {
          _tile_loadd(6, value + 64, bytes);
          _tile_dpbf16ps(2, 7, 6);
          prefetch_share<kWide>(ahead, v.stride, 2);
          _tile_loadd(4, value + 96, bytes);
          _tile_dpbf16ps(3, 7, 4);
          prefetch_share<kWide>(ahead, v.stride, 3);
        }
      }
    }
    float* out = out_ + d / 2;
    const int64_t bytes = dim * 2;
    _tile_stored(0, out, bytes);
    if (kWide > 1) _tile_stored(1, out + 16, bytes);
    if (kWide > 2) {
      _tile_stored(2, out + 32, bytes);
      _tile_stored(3, out + 48, bytes);
    }
  }

  void add_dims(int count, int dim, float* out) const {
    const __m512i low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    const __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(8));
    const int half = dim / 2;
    for (int h = 0; h < count; ++h) {
      for (int d = 0; d < dim; d += 32) {
        const Vec even = vload(out_ + h * half + d / 2);
        const Vec odd = vload(out_ + (count + h) * half + d / 2);
        float* row = out + h * dim + d;
        vstore(row, vadd(vload(row), _mm512_permutex2var_ps(even, low, odd)));
        vstore(row + 16, vadd(vload(row + 16), _mm512_permutex2var_ps(even, high, odd)));
      }
    }
  }

  bf16* rows_;       // [16][dim], see step_rows
  float* scores_;    // two steps of [kGrain][width]
  uint32_t* probs_;  // two steps, see pack_probs
  float* out_;       // see value_tiles
};

#endif
