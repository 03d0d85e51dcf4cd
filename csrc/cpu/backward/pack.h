// What the five products of a backward multiply by: tiles of keys and values, and blocks of rows,
// in the layouts of gemm.h. Included inside namespace lminf::cpu::LMINF_ISA.
//
//   keys, values : transposed, B of Q Kᵀ and of dO Vᵀ      as pack.h has keys
//   key_rows     : B of dS K                               as pack.h has values
//   columns      : of queries or dO, A of Qᵀ dS and dOᵀ P  [Dp][kColumnStride<E>]
//   panels       : of P or dS, B of the same               float [keys / kLanes][rows][kLanes]
//                                                          bf16  [keys / 16][rows / 2][16][2]

// Rows (of queries and heads) of a block: each meeting with a tile reads and writes the tile's
// gradients once, which weighs more the faster the products are.
template <typename E>
constexpr int kGradRows = kOnMatrixTiles<E> ? 256 : 192;

// A multiple of this many rows goes through the products; the rows beyond the last are zeros.
template <typename E>
constexpr int kRowGrain = std::is_same_v<E, float> ? kLanes : 32;

// Not a power of two, which would put the rows of a block into a few sets of the cache.
template <typename E>
constexpr int kColumnStride = kGradRows<E> + 64 / static_cast<int>(sizeof(E));

inline int rows_padded(int rows, int grain) { return (rows + grain - 1) / grain * grain; }

// `rows` rows [Dp], a multiple of kRowGrain, as columns.
inline void pack_columns(const float* rows, int n, int dim_padded, float* columns) {
  for (int r = 0; r < n; r += kLanes)
    for (int d = 0; d < dim_padded; d += kLanes)
      transpose_square(reinterpret_cast<const uint32_t*>(rows + r * dim_padded + d), dim_padded,
                       reinterpret_cast<uint32_t*>(columns + d * kColumnStride<float> + r),
                       kColumnStride<float>);
}

// One row's next vector of a panel. Rows come in ascending order.
inline void store_in_panel(float* panel, int row, Vec x) { vstore(panel + row * kLanes, x); }

#if LMINF_BF16
inline void pack_columns(const bf16* rows, int n, int dim_padded, bf16* columns) {
  uint32_t pairs[16 * 16];  // [pairs of rows][dims], two rows a dword
  for (int r = 0; r < n; r += 32) {
    for (int d = 0; d < dim_padded; d += 16) {
      const bf16* row = rows + r * dim_padded + d;
      for (int p = 0; p < 16; ++p, row += 2 * dim_padded) {
        const auto load = [&](const bf16* x) {
          return _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x)));
        };
        const __m512i odd = _mm512_slli_epi32(load(row + dim_padded), 16);
        _mm512_storeu_si512(pairs + 16 * p, _mm512_or_si512(load(row), odd));
      }
      transpose_square(pairs, 16,
                       reinterpret_cast<uint32_t*>(columns + d * kColumnStride<bf16>) + r / 2,
                       kColumnStride<bf16> / 2);
    }
  }
}

// An even row leaves zeros for the odd one, which then joins it.
inline void store_in_panel(bf16* panel, int row, Vec x) {
  bf16* pair = panel + row / 2 * 32;
  const __m512i bits = _mm512_cvtepu16_epi32(to_bf16_bits(x));
  _mm512_storeu_si512(
      pair,
      row % 2 == 0 ? bits : _mm512_or_si512(_mm512_loadu_si512(pair), _mm512_slli_epi32(bits, 16)));
}
#endif

template <typename E>
constexpr int64_t kPanelStride = int64_t{kGradRows<E>} * kLanes;

// Of a tile of keys, what the products read.
template <typename E>
struct GradTile {
  E* keys;    // transposed
  E* values;  // transposed
  E* key_rows;
  int64_t index;  // which tile it holds; -1: none

  static size_t bytes(int dim_padded) { return 3 * Scratch::bytes<E>(kTileKeys<E> * dim_padded); }
  GradTile(Scratch& memory, int dim_padded)
      : keys(memory.take<E>(kTileKeys<E> * dim_padded)),
        values(memory.take<E>(kTileKeys<E> * dim_padded)),
        key_rows(memory.take<E>(kTileKeys<E> * dim_padded)),
        index(-1) {}
};

// Packs the keys at positions [tile_first, tile_first + kTileKeys<E>) of which only `wanted` are
// keys; the others become zeros, whatever memory holds there. `row` is room for a key in float,
// `rows` for a tile of them.
template <typename T, typename E>
inline void pack_grad_tile(const KeySource<T>& source, int64_t tile_first, Range wanted, int dim,
                           int dim_padded, const Rotary& rotary, int64_t max_distance,
                           const TileRotation& rotation, float* row, E* rows,
                           const GradTile<E>& tile) {
  const int lo = static_cast<int>(wanted.lo - tile_first);
  const int hi = static_cast<int>(wanted.hi - tile_first);
  if (rotary.pairs > 0) {
    const int64_t base = source.frame == KeyFrame::kMaxDistance ? -max_distance : tile_first;
    rotation_table(base, rotary, rotary.scaling, rotation.base_cos, rotation.base_sin);
  }
  const int64_t index0 = tile_first - source.first;  // of the tile's first key; may be negative
  const int begin = lo / kColGrain<E> * kColGrain<E>;
  const int end = (hi + kColGrain<E> - 1) / kColGrain<E> * kColGrain<E>;
  const auto fill = [&](const T* from, int64_t stride, bool is_key) {
    for (int key = begin; key < end; ++key) {
      E* out = rows + key * dim_padded;
      if (key < lo || key >= hi) {
        std::memset(out, 0, dim_padded * sizeof(E));
        continue;
      }
      const bool rotate = is_key && rotary.pairs > 0 && index0 + key >= source.n_rotated;
      prepare_key(from + (index0 + key) * stride, key, rotate, source.frame, dim, dim_padded,
                  rotary, rotation, row, out);
    }
  };
  fill(source.k, source.k_stride, true);
  for (int block = begin; block < end; block += kLanes)
    pack_key_rows(rows + block * dim_padded, dim_padded, dim_padded, tile.keys, block);
  pack_values(rows, dim_padded, begin, end, begin, end, dim_padded, dim_padded, tile.key_rows);
  fill(source.v, source.v_stride, false);
  for (int block = begin; block < end; block += kLanes)
    pack_key_rows(rows + block * dim_padded, dim_padded, dim_padded, tile.values, block);
}

// Rotates `row` back by the angles a + b, or a: what a gradient goes through where its vector was
// rotated. `cos` and `sin` are room for the tables.
inline void rotate_back(const Rotary& rotary, Angles a, const Angles* b, float* cos, float* sin,
                        float* row) {
  if (b != nullptr) {
    compose_tables(rotary.pairs, a.cos, a.sin, b->cos, b->sin, cos, sin);
  } else {
    std::copy_n(a.cos, rotary.pairs, cos), std::copy_n(a.sin, rotary.pairs, sin);
  }
  for (int t = 0; t < rotary.pairs; ++t) sin[t] = -sin[t];
  rotate_row(rotary, cos, sin, row);
}
