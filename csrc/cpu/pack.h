// Key and value tiles in the layouts that gemm.h multiplies by.
// Included inside namespace lminf::cpu::LMINF_ISA.
//
//   keys   : transposed, B of Q Kᵀ    float [keys / kLanes][Dp][kLanes]
//                                     bf16  [keys / 16][Dp / 2][16][2]
//   values : B of P V                 float [Dp / kLanes][keys][kLanes]
//                                     bf16  [Dp / 16][keys / 2][16][2]

// dst[c][r] = src[r][c] for a square of kLanes x kLanes dwords.
#if LMINF_LANES == 16
inline void transpose_square(const uint32_t* src, int64_t lds, uint32_t* dst, int64_t ldd) {
  __m512i a[16], b[16];
  LMINF_UNROLL
  for (int r = 0; r < 16; ++r) a[r] = _mm512_loadu_si512(src + r * lds);
  LMINF_UNROLL
  for (int r = 0; r < 16; r += 2) {
    b[r] = _mm512_unpacklo_epi32(a[r], a[r + 1]);
    b[r + 1] = _mm512_unpackhi_epi32(a[r], a[r + 1]);
  }
  LMINF_UNROLL
  for (int r = 0; r < 16; r += 4) {
    a[r] = _mm512_unpacklo_epi64(b[r], b[r + 2]);
    a[r + 1] = _mm512_unpackhi_epi64(b[r], b[r + 2]);
    a[r + 2] = _mm512_unpacklo_epi64(b[r + 1], b[r + 3]);
    a[r + 3] = _mm512_unpackhi_epi64(b[r + 1], b[r + 3]);
  }
  // a[4 g + m] now holds, in its 128-bit lane l, rows 4 g .. 4 g + 3 of column 4 l + m.
  LMINF_UNROLL
  for (int m = 0; m < 4; ++m) {
    const __m512i even01 = _mm512_shuffle_i32x4(a[m], a[4 + m], 0x88);  // lanes 0, 2 of groups 0, 1
    const __m512i odd01 = _mm512_shuffle_i32x4(a[m], a[4 + m], 0xdd);   // lanes 1, 3
    const __m512i even23 = _mm512_shuffle_i32x4(a[8 + m], a[12 + m], 0x88);
    const __m512i odd23 = _mm512_shuffle_i32x4(a[8 + m], a[12 + m], 0xdd);
    _mm512_storeu_si512(dst + m * ldd, _mm512_shuffle_i32x4(even01, even23, 0x88));
    _mm512_storeu_si512(dst + (4 + m) * ldd, _mm512_shuffle_i32x4(odd01, odd23, 0x88));
    _mm512_storeu_si512(dst + (8 + m) * ldd, _mm512_shuffle_i32x4(even01, even23, 0xdd));
    _mm512_storeu_si512(dst + (12 + m) * ldd, _mm512_shuffle_i32x4(odd01, odd23, 0xdd));
  }
}
#elif LMINF_LANES == 8
inline void transpose_square(const uint32_t* src, int64_t lds, uint32_t* dst, int64_t ldd) {
  __m256i a[8], b[8];
  LMINF_UNROLL
  for (int r = 0; r < 8; ++r)
    a[r] = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(src + r * lds));
  LMINF_UNROLL
  for (int r = 0; r < 8; r += 2) {
    b[r] = _mm256_unpacklo_epi32(a[r], a[r + 1]);
    b[r + 1] = _mm256_unpackhi_epi32(a[r], a[r + 1]);
  }
  LMINF_UNROLL
  for (int r = 0; r < 8; r += 4) {
    a[r] = _mm256_unpacklo_epi64(b[r], b[r + 2]);
    a[r + 1] = _mm256_unpackhi_epi64(b[r], b[r + 2]);
    a[r + 2] = _mm256_unpacklo_epi64(b[r + 1], b[r + 3]);
    a[r + 3] = _mm256_unpackhi_epi64(b[r + 1], b[r + 3]);
  }
  LMINF_UNROLL
  for (int m = 0; m < 4; ++m) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(dst + m * ldd),
                        _mm256_permute2x128_si256(a[m], a[4 + m], 0x20));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(dst + (4 + m) * ldd),
                        _mm256_permute2x128_si256(a[m], a[4 + m], 0x31));
  }
}
#else
inline void transpose_square(const uint32_t* src, int64_t lds, uint32_t* dst, int64_t ldd) {
  for (int r = 0; r < kLanes; ++r)
    for (int c = 0; c < kLanes; ++c) std::memcpy(dst + c * ldd + r, src + r * lds + c, 4);
}
#endif

// kLanes finished rows of keys, [kLanes][Dp], into columns of the packed tile.
inline void pack_key_rows(const float* rows, int64_t stride, int dim_padded, float* tile,
                          int column) {
  for (int d = 0; d < dim_padded; d += kLanes)
    transpose_square(reinterpret_cast<const uint32_t*>(rows) + d, stride,
                     reinterpret_cast<uint32_t*>(tile) + column * dim_padded + d * kLanes, kLanes);
}

// Values of keys [lo, hi) of a tile into its rows [begin, end), zeros where no key is wanted; `v`
// is the row of key 0.
template <typename T>
inline void pack_values(const T* v, int64_t stride, int lo, int hi, int begin, int end, int dim,
                        int dim_padded, float* tile) {
  for (int key = begin; key < end; ++key) {
    const T* row = key < lo || key >= hi ? nullptr : v + key * stride;
    float* column = tile + key * kLanes;
    for (int d = 0; d < dim_padded; d += kLanes, column += kTileKeys<float> * kLanes) {
      Vec x = vset(0.0f);
      if (row != nullptr && d + kLanes <= dim) {
        x = vload(row + d);
      } else if (row != nullptr) {
        float left[kLanes] = {};
        for (int n = d; n < dim; ++n) left[n - d] = to_float(row[n]);
        x = vload(left);
      }
      vstore(column, x);
    }
  }
}

#if LMINF_BF16
inline void pack_key_rows(const bf16* rows, int64_t stride, int dim_padded, bf16* tile,
                          int column) {
  const int pairs = dim_padded / 2;  // two dims a dword
  for (int d = 0; d < pairs; d += 16)
    transpose_square(reinterpret_cast<const uint32_t*>(rows + 2 * d), stride / 2,
                     reinterpret_cast<uint32_t*>(tile) + (column / 16 * pairs + d) * 16, 16);
}

inline void pack_values(const bf16* v, int64_t stride, int lo, int hi, int begin, int end, int dim,
                        int dim_padded, bf16* tile) {
  for (int key = begin; key < end; key += 2) {
    const bf16* even = key >= lo && key < hi ? v + key * stride : nullptr;
    const bf16* odd = key + 1 >= lo && key + 1 < hi ? v + (key + 1) * stride : nullptr;
    for (int d = 0; d < dim_padded; d += 16) {
      const int left = dim - d;
      const __mmask16 in = left >= 16  ? 0xffff
                           : left <= 0 ? 0
                                       : static_cast<__mmask16>((1u << left) - 1);
      const __m256i a = even ? _mm256_maskz_loadu_epi16(in, even + d) : _mm256_setzero_si256();
      const __m256i b = odd ? _mm256_maskz_loadu_epi16(in, odd + d) : _mm256_setzero_si256();
      const __m512i pair = _mm512_or_si512(_mm512_cvtepu16_epi32(a),
                                           _mm512_slli_epi32(_mm512_cvtepu16_epi32(b), 16));
      _mm512_storeu_si512(tile + d * kTileKeys<bf16> + key * 16, pair);
    }
  }
}
#endif

// The part of a packed tile from key `begin` on, as an operand of gemm: where it starts and its
// ldb.
template <typename E>
struct Operand {
  const E* data;
  int64_t ld;
};

template <typename E>
inline Operand<E> keys_from(const E* tile, int begin, int dim_padded) {
  return {tile + begin * dim_padded, kLanes * dim_padded};
}

template <typename E>
inline Operand<E> values_from(const E* tile, int begin) {
  return {tile + begin * kLanes, kLanes * kTileKeys<E>};
}

// Rotations for the keys of one tile: the angle at the tile's first position, from float64, and the
// angles of the offsets within a tile, which are the same for every tile of a call.
struct TileRotation {
  float* base_cos;  // [pairs]
  float* base_sin;
  float* offset_cos;  // [keys][pairs]
  float* offset_sin;
  float* cos;  // [pairs] of the row at hand
  float* sin;

  TileRotation(Scratch& scratch, const Rotary& rotary, int keys) {
    const size_t n = rotary.pairs;
    base_cos = scratch.take<float>(n), base_sin = scratch.take<float>(n);
    cos = scratch.take<float>(n), sin = scratch.take<float>(n);
    offset_cos = scratch.take<float>(n * keys), offset_sin = scratch.take<float>(n * keys);
    for (int o = 0; o < keys; ++o)
      rotation_table(o, rotary, 1.0f, offset_cos + o * n, offset_sin + o * n);
  }

  Angles offset(const Rotary& rotary, int64_t rows) const {
    return {offset_cos + rows * rotary.pairs, offset_sin + rows * rotary.pairs};
  }

  static size_t bytes(const Rotary& rotary, int keys) {
    return 4 * Scratch::bytes<float>(rotary.pairs) + 2 * Scratch::bytes<float>(rotary.pairs * keys);
  }
};

// How the keys of a branch are rotated before they meet the queries.
enum class KeyFrame {
  kOwnPosition,  // by their own position, for rotated queries
  kMaxDistance,  // by -max_distance, for raw queries
};

// Where the keys of a branch stand: key at position j is row j - first.
template <typename T>
struct KeySource {
  const T* k;
  const T* v;
  int64_t k_stride, v_stride;
  int64_t first;      // position of row 0
  int64_t n_rotated;  // so many leading rows carry their rotation already
  KeyFrame frame;
};

// One key as it will meet the queries, Dp elements of E; `row` is room for Dp floats.
template <typename T, typename E>
inline void prepare_key(const T* k, int key, bool rotate, KeyFrame frame, int dim, int dim_padded,
                        const Rotary& rotary, const TileRotation& r, float* row, E* out) {
  if (!rotate && std::is_same_v<T, E> && dim == dim_padded) {
    std::memcpy(out, k, dim * sizeof(E));
    return;
  }
  if (!rotate) {
    load_row(k, dim, row, dim_padded);
    store_row(row, dim_padded, out);
    return;
  }
  const Angles base = {r.base_cos, r.base_sin}, offset = r.offset(rotary, key);
  rotate_into(rotary, base, frame == KeyFrame::kMaxDistance ? nullptr : &offset, k, dim, dim_padded,
              r.cos, r.sin, row, out);
}

// Packs the keys at positions [tile_first, tile_first + kTileKeys<E>) of which only `wanted` are
// keys; the others become zeros, whatever memory holds there. `rows` is room for kLanes keys, `row`
// for one in float.
template <typename T, typename E>
inline void pack_tile(const KeySource<T>& source, int64_t tile_first, Range wanted, int dim,
                      int dim_padded, const Rotary& rotary, int64_t max_distance,
                      const TileRotation& rotation, float* row, E* rows, E* k_tile, E* v_tile) {
  const int lo = static_cast<int>(wanted.lo - tile_first);
  const int hi = static_cast<int>(wanted.hi - tile_first);
  if (rotary.pairs > 0) {
    const int64_t base = source.frame == KeyFrame::kMaxDistance ? -max_distance : tile_first;
    rotation_table(base, rotary, rotary.scaling, rotation.base_cos, rotation.base_sin);
  }
  const int64_t index0 = tile_first - source.first;  // of the tile's first key; may be negative
  const int begin = lo / kColGrain<E> * kColGrain<E>;
  const int end = (hi + kColGrain<E> - 1) / kColGrain<E> * kColGrain<E>;
  // Rows that are packed just as they stand need no copy. (An odd stride splits pairs of bf16.)
  const bool as_they_stand = std::is_same_v<T, E> && rotary.pairs == 0 && dim == dim_padded &&
                             source.k_stride * sizeof(E) % 4 == 0;
  for (int block = begin; block < end; block += kLanes) {
    if constexpr (std::is_same_v<T, E>) {
      if (as_they_stand && lo <= block && block + kLanes <= hi) {
        pack_key_rows(source.k + (index0 + block) * source.k_stride, source.k_stride, dim_padded,
                      k_tile, block);
        continue;
      }
    }
    for (int r = 0; r < kLanes; ++r) {
      const int key = block + r;
      E* out = rows + r * dim_padded;
      if (key < lo || key >= hi) {
        std::memset(out, 0, dim_padded * sizeof(E));
        continue;
      }
      const bool rotate = rotary.pairs > 0 && index0 + key >= source.n_rotated;
      prepare_key(source.k + (index0 + key) * source.k_stride, key, rotate, source.frame, dim,
                  dim_padded, rotary, rotation, row, out);
    }
    pack_key_rows(rows, dim_padded, dim_padded, k_tile, block);
  }
  pack_values(source.v + index0 * source.v_stride, source.v_stride, lo, hi, begin, end, dim,
              dim_padded, v_tile);
}

// The packed tiles that a thread keeps from one task to the next: neighbouring runs of queries see
// mostly the same keys. Tile t of the window branch has slot t % (number of slots), the other
// branches one slot each.
template <typename E>
class TileCache {
 public:
  struct Tile {
    E* keys;
    E* values;
    int64_t sequence, head, index;  // what it holds; index -1: nothing
    BranchIndex kind;
  };

  TileCache(Scratch& scratch, int64_t slots, int dim_padded) : slots_(slots) {
    tiles_ = scratch.take<Tile>(slots + 2);
    for (int64_t n = 0; n < slots + 2; ++n) {
      E* keys = scratch.take<E>(dim_padded * kTileKeys<E>);
      E* values = scratch.take<E>(dim_padded * kTileKeys<E>);
      tiles_[n] = {keys, values, 0, 0, -1, kWindow};
    }
  }

  // Slots for a window and the queries of a task, as far as kTileCacheBytes go.
  static int64_t slots_for(int64_t window, int64_t queries, int dim_padded) {
    const int64_t most =
        kTileCacheBytes / (2 * kTileKeys<E> * dim_padded * static_cast<int64_t>(sizeof(E))) - 2;
    const int64_t wanted = window / kTileKeys<E> + queries / kTileKeys<E> + 3;
    return max64(1, min64(wanted, most));
  }

  static size_t bytes(int64_t slots, int dim_padded) {
    return Scratch::bytes<Tile>(slots + 2) +
           2 * (slots + 2) * Scratch::bytes<E>(dim_padded * kTileKeys<E>);
  }

  // Tiles of one kind that it keeps together.
  int64_t slots(BranchIndex kind) const { return kind == kWindow ? slots_ : 1; }

  // The tile, packed by `pack(tile)` unless it is here already.
  template <typename Pack>
  const Tile& get(BranchIndex kind, int64_t sequence, int64_t head, int64_t index,
                  const Pack& pack) {
    Tile& tile = tiles_[kind == kWindow ? index % slots_ : slots_ + kind];
    if (tile.index != index || tile.head != head || tile.sequence != sequence ||
        tile.kind != kind) {
      pack(tile);
      tile.sequence = sequence, tile.head = head, tile.index = index, tile.kind = kind;
    }
    return tile;
  }

 private:
  int64_t slots_;
  Tile* tiles_;
};
