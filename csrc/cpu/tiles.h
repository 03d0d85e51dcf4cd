// Tile sizes.
// Included inside namespace lminf::cpu::LMINF_ISA.

// Keys of a packed tile.
constexpr int kBlockN = 128;

// Rows of a block of scores: kBlockM x kBlockN floats and their rounded copy fit the first level.
constexpr int kBlockM = 64;

// Columns are skipped in steps of this: a multiple of the lanes, of what one step of a bf16 product
// takes, and of the two keys of a pair.
constexpr int kColGrain = 32;

// Floats from one row of scores to the next: a power of two would put the rows of a block into a
// few sets of the cache.
constexpr int kScoreStride = kBlockN + 32;

// What a thread keeps of packed tiles; with the rest of its scratch it stays under 4 MB.
constexpr int64_t kTileCacheBytes = int64_t{5} << 19;

// Rows that meet a tile in one go; their queries and outputs fit the second level.
constexpr int64_t kTaskRows = 256;
constexpr int64_t kMaxHeadsPerTask = 16;
