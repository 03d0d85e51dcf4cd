// Tile sizes.
// Included inside namespace lminf::cpu::LMINF_ISA.
//
//   kBlockN    keys of a packed tile
//   kBlockM    rows of a block of scores: kBlockM x kBlockN floats (and their rounded copy) fit the
//   first level kColGrain  columns are skipped in steps of this: a multiple of the lanes, of what
//   one step of a bf16
//              product takes, and of the two keys of a pair
//   kScoreStride  floats from one row of scores to the next: a power of two would put the rows of a
//   block into
//              a few sets of the cache
//   kTaskRows  rows that share a packed key tile; their queries and outputs fit the second level

constexpr int kBlockN = 128;
constexpr int kBlockM = 64;
constexpr int kColGrain = 32;
constexpr int kScoreStride = kBlockN + 32;

template <typename E>
constexpr int64_t kTaskRows = sizeof(E) == 2 ? 512 : 256;
