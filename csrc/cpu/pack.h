// Key and value tiles in the layouts that gemm.h multiplies by.
// Included inside namespace lminf::cpu::LMINF_ISA.
//
//   keys   : transposed, B of Q Kᵀ:  float [Dp][kBlockN]      bf16 [Dp / 2][kBlockN][2]
//   values : B of P V:               float [kBlockN][Dp]      bf16 [kBlockN / 2][Dp][2]

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
    for (int c = 0; c < kLanes; ++c) dst[c * ldd + r] = src[r * lds + c];
}
#endif

// kLanes finished rows of keys, [kLanes][Dp] floats, into columns of the packed tile.
inline void pack_key_rows(const float* rows, int dim_padded, float* tile, int column) {
  for (int d = 0; d < dim_padded; d += kLanes)
    transpose_square(reinterpret_cast<const uint32_t*>(rows) + d, dim_padded,
                     reinterpret_cast<uint32_t*>(tile) + d * kBlockN + column, kBlockN);
}

inline void pack_value_row(const float* row, int dim_padded, float* tile, int key) {
  std::memcpy(tile + key * dim_padded, row, dim_padded * sizeof(float));
}

inline float packed_value(const float* tile, int dim_padded, int key, int d) {
  return tile[key * dim_padded + d];
}

#if LMINF_BF16
inline void pack_key_rows(const float* rows, int dim_padded, bf16* tile, int column) {
  uint32_t pairs[16 * 16];  // two dims a dword
  for (int d = 0; d < dim_padded; d += 32) {
    for (int r = 0; r < 16; ++r) {
      vstore(reinterpret_cast<bf16*>(pairs + r * 16), vload(rows + r * dim_padded + d));
      vstore(reinterpret_cast<bf16*>(pairs + r * 16 + 8), vload(rows + r * dim_padded + d + 16));
    }
    transpose_square(pairs, 16, reinterpret_cast<uint32_t*>(tile) + d / 2 * kBlockN + column,
                     kBlockN);
  }
}

inline void pack_value_row(const float* row, int dim_padded, bf16* tile, int key) {
  // The other key of the pair keeps its half of each dword.
  uint32_t* pairs = reinterpret_cast<uint32_t*>(tile) + key / 2 * dim_padded;
  const int shift = key % 2 * 16;
  const __m512i keep = _mm512_set1_epi32(static_cast<int>(0xffff0000u >> shift));
  for (int d = 0; d < dim_padded; d += 16) {
    const __m512i half =
        _mm512_slli_epi32(_mm512_cvtepu16_epi32(to_bf16_bits(vload(row + d))), shift);
    const __m512i other = _mm512_and_si512(_mm512_loadu_si512(pairs + d), keep);
    _mm512_storeu_si512(pairs + d, _mm512_or_si512(half, other));
  }
}

inline float packed_value(const bf16* tile, int dim_padded, int key, int d) {
  return to_float(tile[(key / 2 * dim_padded + d) * 2 + key % 2]);
}
#endif

// True if any of the row's values is infinite or NaN.
inline bool has_nonfinite(const float* row, int dim_padded) {
  uint32_t found = 0;
  for (int d = 0; d < dim_padded; ++d) {
    uint32_t bits;
    std::memcpy(&bits, row + d, 4);
    found |= (bits & 0x7f800000u) == 0x7f800000u;
  }
  return found != 0;
}

// Rotations for the keys of one tile: the angle at the tile's first position, from float64, and the
// angles of the offsets within a tile, which are the same for every tile of a call.
struct TileRotation {
  float* base_cos;  // [pairs]
  float* base_sin;
  float* offset_cos;  // [kBlockN][pairs]
  float* offset_sin;
  float* cos;  // [pairs] of the row at hand
  float* sin;

  TileRotation(Scratch& scratch, const Rotary& rotary) {
    const size_t n = rotary.pairs;
    base_cos = scratch.take<float>(n), base_sin = scratch.take<float>(n);
    cos = scratch.take<float>(n), sin = scratch.take<float>(n);
    offset_cos = scratch.take<float>(n * kBlockN), offset_sin = scratch.take<float>(n * kBlockN);
    for (int o = 0; o < kBlockN; ++o)
      rotation_table(o, rotary, 1.0f, offset_cos + o * n, offset_sin + o * n);
  }

  static size_t bytes(const Rotary& rotary) {
    return 4 * Scratch::bytes<float>(rotary.pairs) +
           2 * Scratch::bytes<float>(rotary.pairs * kBlockN);
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

// Packs the keys at positions [tile_first, tile_first + kBlockN) of which only `wanted` exist for
// this task; the others become zeros, whatever memory holds there. Returns whether all values are
// finite.
template <typename T, typename E>
inline bool pack_tile(const KeySource<T>& source, int64_t tile_first, Range wanted, int dim,
                      int dim_padded, const Rotary& rotary, int64_t max_distance,
                      TileRotation& rotation, float* rows, E* k_tile, E* v_tile) {
  const int lo = static_cast<int>(wanted.lo - tile_first),
            hi = static_cast<int>(wanted.hi - tile_first);
  const int pairs = rotary.pairs;
  if (pairs > 0) {
    const int64_t base = source.frame == KeyFrame::kMaxDistance ? -max_distance : tile_first;
    rotation_table(base, rotary, rotary.scaling, rotation.base_cos, rotation.base_sin);
  }
  bool finite = true;
  const int begin = lo / kColGrain * kColGrain;
  const int end = (hi + kColGrain - 1) / kColGrain * kColGrain;
  for (int block = begin; block < end; block += kLanes) {
    for (int r = 0; r < kLanes; ++r) {
      const int key = block + r;
      float* row = rows + r * dim_padded;
      if (key < lo || key >= hi) {
        std::memset(row, 0, dim_padded * sizeof(float));
        continue;
      }
      const int64_t index = tile_first + key - source.first;
      load_row(source.k + index * source.k_stride, dim, row, dim_padded);
      if (pairs == 0 || index < source.n_rotated) continue;
      if (source.frame == KeyFrame::kMaxDistance) {
        rotate_row(rotary, rotation.base_cos, rotation.base_sin, row);
      } else {
        compose_tables(pairs, rotation.base_cos, rotation.base_sin,
                       rotation.offset_cos + key * pairs, rotation.offset_sin + key * pairs,
                       rotation.cos, rotation.sin);
        rotate_row(rotary, rotation.cos, rotation.sin, row);
      }
    }
    pack_key_rows(rows, dim_padded, k_tile, block);
    for (int r = 0; r < kLanes; ++r) {
      const int key = block + r;
      if (key < lo || key >= hi) {
        std::memset(rows, 0, dim_padded * sizeof(float));
      } else {
        const int64_t index = tile_first + key - source.first;
        load_row(source.v + index * source.v_stride, dim, rows, dim_padded);
        finite = finite && !has_nonfinite(rows, dim_padded);
      }
      pack_value_row(rows, dim_padded, v_tile, key);
    }
  }
  return finite;
}
