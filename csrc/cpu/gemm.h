// The inner products: C[M, N] = A[M, K] B[K, N], or +=, over packed tiles that fit the first cache
// levels. Included inside namespace lminf::cpu::LMINF_ISA.
//
// A and C are row-major with lda and ldc elements from row to row. B stands in panels of kLanes
// columns, ldb elements from panel to panel, so that a walk down some columns reads memory in one
// piece:
//
//   float : [N / kLanes][K][kLanes]
//   bf16  : [N / 16][K / 2][16][2], so that one dword holds two consecutive k of a column
//
// M is anything; N is a multiple of kLanes; K is a multiple of kKGrain<T>.

template <typename T>
constexpr int kKGrain = 1;

// A block of kRows x (kCols vectors) of C held in registers.
template <bool kAccumulate, int kRows, int kCols>
inline void block_f32(int K, const float* A, int64_t lda, const float* B, int64_t ldb, float* C,
                      int64_t ldc) {
  Vec acc[kRows][kCols];
  LMINF_UNROLL
  for (int r = 0; r < kRows; ++r) {
    LMINF_UNROLL
    for (int c = 0; c < kCols; ++c)
      acc[r][c] = kAccumulate ? vload(C + r * ldc + c * kLanes) : vset(0.0f);
  }
  for (int k = 0; k < K; ++k) {
    Vec b[kCols];
    LMINF_UNROLL
    for (int c = 0; c < kCols; ++c) b[c] = vload(B + k * kLanes + c * ldb);
    LMINF_UNROLL
    for (int r = 0; r < kRows; ++r) {
      const Vec a = vset(A[r * lda + k]);
      LMINF_UNROLL
      for (int c = 0; c < kCols; ++c) acc[r][c] = vfma(a, b[c], acc[r][c]);
    }
  }
  LMINF_UNROLL
  for (int r = 0; r < kRows; ++r) {
    LMINF_UNROLL
    for (int c = 0; c < kCols; ++c) vstore(C + r * ldc + c * kLanes, acc[r][c]);
  }
}

// Registers: 32 vectors hold 12 x 2 sums with their operands, 16 hold 6 x 2.
constexpr int kUnitRows = LMINF_LANES == 16 ? 12 : 6;
constexpr int kUnitCols = 2;

// Walks C in blocks: `Block::run<kRows, kCols>(row, col)` computes one of them. One strip of B at a
// time, so that it stays in the first cache level for all the rows.
template <typename Block>
inline void for_each_block(int M, int N, const Block& block) {
  const auto strip = [&](int n, auto cols) {
    constexpr int kCols = decltype(cols)::value;
    int m = 0;
    for (; m + kUnitRows <= M; m += kUnitRows) block.template run<kUnitRows, kCols>(m, n);
    for (; m + 4 <= M; m += 4) block.template run<4, kCols>(m, n);
    for (; m < M; ++m) block.template run<1, kCols>(m, n);
  };
  int n = 0;
  for (; n + kUnitCols * kLanes <= N; n += kUnitCols * kLanes)
    strip(n, std::integral_constant<int, kUnitCols>{});
  for (; n < N; n += kLanes) strip(n, std::integral_constant<int, 1>{});
}

template <bool kAccumulate>
struct BlockF32 {
  int K;
  const float* A;
  int64_t lda;
  const float* B;
  int64_t ldb;
  float* C;
  int64_t ldc;
  template <int kRows, int kCols>
  void run(int m, int n) const {
    block_f32<kAccumulate, kRows, kCols>(K, A + m * lda, lda, B + n / kLanes * ldb, ldb,
                                         C + m * ldc + n, ldc);
  }
};

template <bool kAccumulate>
inline void gemm(int M, int N, int K, const float* A, int64_t lda, const float* B, int64_t ldb,
                 float* C, int64_t ldc) {
  for_each_block(M, N, BlockF32<kAccumulate>{K, A, lda, B, ldb, C, ldc});
}

#if LMINF_BF16

template <>
constexpr int kKGrain<bf16> = 32;

template <bool kAccumulate, int kRows, int kCols>
inline void block_bf16(int K, const bf16* A, int64_t lda, const bf16* B, int64_t ldb, float* C,
                       int64_t ldc) {
  Vec acc[kRows][kCols];
  LMINF_UNROLL
  for (int r = 0; r < kRows; ++r) {
    LMINF_UNROLL
    for (int c = 0; c < kCols; ++c)
      acc[r][c] = kAccumulate ? vload(C + r * ldc + c * kLanes) : vset(0.0f);
  }
  for (int k = 0; k < K; k += 2) {
    __m512i b[kCols];
    LMINF_UNROLL
    for (int c = 0; c < kCols; ++c) b[c] = _mm512_loadu_si512(B + k * 16 + c * ldb);
    LMINF_UNROLL
    for (int r = 0; r < kRows; ++r) {
      int32_t pair;
      std::memcpy(&pair, A + r * lda + k, 4);
      const __m512i a = _mm512_set1_epi32(pair);
      LMINF_UNROLL
      for (int c = 0; c < kCols; ++c)
        acc[r][c] = _mm512_dpbf16_ps(acc[r][c], (__m512bh)a, (__m512bh)b[c]);
    }
  }
  LMINF_UNROLL
  for (int r = 0; r < kRows; ++r) {
    LMINF_UNROLL
    for (int c = 0; c < kCols; ++c) vstore(C + r * ldc + c * kLanes, acc[r][c]);
  }
}

template <bool kAccumulate>
struct BlockBf16 {
  int K;
  const bf16* A;
  int64_t lda;
  const bf16* B;
  int64_t ldb;
  float* C;
  int64_t ldc;
  template <int kRows, int kCols>
  void run(int m, int n) const {
    block_bf16<kAccumulate, kRows, kCols>(K, A + m * lda, lda, B + n / 16 * ldb, ldb,
                                          C + m * ldc + n, ldc);
  }
};

#if LMINF_AMX

// Tile registers, all 16 rows of 64 bytes: C in 0..3, A in 4 and 5, B in 6 and 7.
struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes_per_row[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// Compilers do not know that the tile instructions read memory: stores of ours that they are to see
// have to be done before this.
inline void settle_stores() { asm volatile("" ::: "memory"); }

inline void load_tile_config(const TileConfig& config) {
  asm volatile("" : : "r"(&config) : "memory");
  _tile_loadconfig(&config);
}

// For as long as it lives, this thread's tile registers are configured.
struct MatrixUnit {
  MatrixUnit() { load_tile_config(TileConfig()); }
  ~MatrixUnit() { _tile_release(); }
};

// 16 or 32 rows by 16 or 32 columns of C in tile registers.
template <bool kAccumulate, bool kTwoRows, bool kTwoCols>
inline void tile_block(int K, const bf16* A, int64_t lda, const bf16* B, int64_t ldb, float* C,
                       int64_t ldc) {
  const int64_t c_bytes = ldc * 4, a_bytes = lda * 2;
  float* C1 = C + 16 * ldc;
  if (kAccumulate) {
    _tile_loadd(0, C, c_bytes);
    if (kTwoCols) _tile_loadd(1, C + 16, c_bytes);
    if (kTwoRows) _tile_loadd(2, C1, c_bytes);
    if (kTwoRows && kTwoCols) _tile_loadd(3, C1 + 16, c_bytes);
  } else {
    _tile_zero(0);
    if (kTwoCols) _tile_zero(1);
    if (kTwoRows) _tile_zero(2);
    if (kTwoRows && kTwoCols) _tile_zero(3);
  }
  for (int k = 0; k < K; k += 32) {
    _tile_loadd(4, A + k, a_bytes);
    _tile_loadd(6, B + k * 16, 64);
    _tile_dpbf16ps(0, 4, 6);
    if (kTwoCols) {
      _tile_loadd(7, B + ldb + k * 16, 64);
      _tile_dpbf16ps(1, 4, 7);
    }
    if (kTwoRows) {
      _tile_loadd(5, A + 16 * lda + k, a_bytes);
      _tile_dpbf16ps(2, 5, 6);
      if (kTwoCols) _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, C, c_bytes);
  if (kTwoCols) _tile_stored(1, C + 16, c_bytes);
  if (kTwoRows) _tile_stored(2, C1, c_bytes);
  if (kTwoRows && kTwoCols) _tile_stored(3, C1 + 16, c_bytes);
}

template <bool kAccumulate>
inline void gemm(int M, int N, int K, const bf16* A, int64_t lda, const bf16* B, int64_t ldb,
                 float* C, int64_t ldc) {
  settle_stores();
  int n = 0;
  const int tiled = M / 16 * 16;
  // One strip of B at a time, so that it stays in the first cache level for all the rows.
  for (; n < N; n += 32) {
    const bool two_cols = n + 32 <= N;
    int m = 0;
    for (; m + 32 <= tiled; m += 32) {
      const bf16* a = A + m * lda;
      float* c = C + m * ldc + n;
      two_cols ? tile_block<kAccumulate, true, true>(K, a, lda, B + n / 16 * ldb, ldb, c, ldc)
               : tile_block<kAccumulate, true, false>(K, a, lda, B + n / 16 * ldb, ldb, c, ldc);
    }
    if (m < tiled) {
      const bf16* a = A + m * lda;
      float* c = C + m * ldc + n;
      two_cols ? tile_block<kAccumulate, false, true>(K, a, lda, B + n / 16 * ldb, ldb, c, ldc)
               : tile_block<kAccumulate, false, false>(K, a, lda, B + n / 16 * ldb, ldb, c, ldc);
    }
  }
  for_each_block(M - tiled, N,
                 BlockBf16<kAccumulate>{K, A + tiled * lda, lda, B, ldb, C + tiled * ldc, ldc});
}

#else

template <bool kAccumulate>
inline void gemm(int M, int N, int K, const bf16* A, int64_t lda, const bf16* B, int64_t ldb,
                 float* C, int64_t ldc) {
  for_each_block(M, N, BlockBf16<kAccumulate>{K, A, lda, B, ldb, C, ldc});
}

#endif
#endif

#if !LMINF_AMX
struct MatrixUnit {};
#endif
