// Tile sizes.
// Included inside namespace lminf::cpu::LMINF_ISA, before gemm.h has named what one product takes.

// Products of bf16 on matrix tiles.
template <typename E>
constexpr bool kOnMatrixTiles = LMINF_AMX && std::is_same_v<E, bf16>;

// Keys of a packed tile. Each tile of a row costs one turn of reading and writing the row's
// outputs, which weighs more the faster the products are.
template <typename E>
constexpr int kTileKeys = kOnMatrixTiles<E> ? 256 : 128;

// Rows of a block: a multiple of what the micro-kernels take at once (gemm.h), few enough for
// queries, probabilities and outputs to stay near the first cache level.
template <typename E>
constexpr int kBlockRows = kOnMatrixTiles<E> ? 32 : 48;

// Columns are skipped in steps of this: a multiple of the lanes, of what one step of a bf16 product
// takes, and of the two keys of a pair.
template <typename E>
constexpr int kColGrain = std::is_same_v<E, float> ? kLanes : 32;

// Keys whose scores stand in memory at one time: a multiple of kColGrain, so few that scores are
// read back from the first cache level, so many that a row's part of a strip is worth its overhead.
constexpr int kStripKeys = 64;

// Probabilities from one row to the next: a power of two would put the rows of a block into a few
// sets of the cache.
template <typename E>
constexpr int kProbStride = kTileKeys<E> + 64 / static_cast<int>(sizeof(E));

// What a thread keeps of packed tiles, and of queries with their outputs; with the rest of its
// scratch it stays under 4 MB.
constexpr int64_t kTileCacheBytes = int64_t{5} << 19;
constexpr int64_t kRowBytes = int64_t{1} << 20;

// Rows of a task: a multiple of the rows of a block.
constexpr int64_t kTaskRows = 288;
constexpr int64_t kMaxHeadsPerTask = 16;
