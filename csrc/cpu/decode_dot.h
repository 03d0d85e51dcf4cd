// The two products of a decode step over rows that stand where the cache keeps them: a few query
// heads against many keys, then their probabilities against the values. Included inside namespace
// lminf::cpu::LMINF_ISA.

constexpr int kDecodeBlock = 64;   // keys that vectors take between two softmax steps
constexpr int kPrefetchRows = 16;  // that vectors ask for ahead of those they work on

// Calls f(first head, how many as a constant) over `heads` in the largest steps there are.
template <typename F>
inline void for_head_groups(int heads, const F& f) {
  int h = 0;
  if constexpr (kLanes >= 8)
    for (; h + 8 <= heads; h += 8) f(h, std::integral_constant<int, 8>{});
  for (; h + 4 <= heads; h += 4) f(h, std::integral_constant<int, 4>{});
  for (; h + 2 <= heads; h += 2) f(h, std::integral_constant<int, 2>{});
  for (; h < heads; ++h) f(h, std::integral_constant<int, 1>{});
}

// The n keys or values of one block, in rows that stand `stride` apart.
template <typename K>
struct BlockRows {
  const K* first;
  int64_t stride;
  int n;
  const K* next;  // the first row of the block after this one, or null

  const K* row(int c) const { return first + c * stride; }

  // The row to prefetch while row c is at work: the one so many `rows` later, at the end of the
  // block the next block's first; where there is none the one at work, which costs nothing.
  const K* ahead(int c, int rows) const {
    if (c + rows < n) return row(c + rows);
    return next != nullptr ? next + (c + rows - n) * stride : row(c);
  }
};

// Asks for the first `dims` elements of `count` rows, which may lie past the last.
template <typename K>
inline void prefetch_rows(const K* rows, int64_t stride, int count, int dims) {
  for (int r = 0; r < count; ++r) {
    for (int d = 0; d < dims; d += 64 / static_cast<int>(sizeof(K)))
      prefetch(rows + r * stride + d);
  }
}

// A product offers, for `heads` query heads and rows of `dim` elements:
//
//   kBlock         most keys of a block, and floats from one head's row of scores to the next
//   kGrain         probabilities are read up to a multiple of this, zeros past n
//   reads(dim)     whether rows of so many elements can be read where they stand
//   Operand        element type of packed queries
//   query_size     how many there are
//   pack_queries   from floats [heads][dim]
//   bytes          of the scratch that the constructor takes
//   scores         scores[h][c] = <q[h], k[c]>
//   add_values     out[h] += sum_c probs[h][c] v[c]

// The reductions of kLanes sums, kLanes / kHeads keys of each head, into rows of scores.
template <int kHeads, int kBlock>
inline void store_sums(const Vec* sum, float* scores) {
  constexpr int kKeys = kLanes / kHeads;
  float lanes[kLanes];
  vstore(lanes, vreduce_add_each(sum));
  LMINF_UNROLL
  for (int h = 0; h < kHeads; ++h)
    std::memcpy(scores + h * kBlock, lanes + h * kKeys, kKeys * sizeof(float));
}

// Products in float; keys and values of type K are converted as they are read.
template <typename K, int kBlockKeys = kDecodeBlock>
class DecodeProduct {
 public:
  using Operand = float;
  static constexpr int kBlock = kBlockKeys;
  static constexpr int kGrain = kLanes;

  DecodeProduct() = default;
  DecodeProduct(Scratch&, int /*heads*/, int /*dim*/) {}
  static size_t bytes(int /*heads*/, int /*dim*/) { return 0; }
  static bool reads(int dim) { return dim % kLanes == 0; }
  static int64_t query_size(int heads, int dim) { return int64_t{heads} * dim; }
  static void pack_queries(const float* q, int heads, int dim, float* out) {
    std::memcpy(out, q, query_size(heads, dim) * sizeof(float));
  }

  void scores(const float* q, int heads, int dim, const BlockRows<K>& k, float* out) const {
    for_head_groups(heads, [&](int h, auto count) {
      dot_keys<decltype(count)::value>(q + h * dim, dim, k, h == 0, out + h * kBlock);
    });
  }

  void add_values(const float* probs, int heads, int dim, const BlockRows<K>& v, float* out) const {
    for_head_groups(heads, [&](int h, auto count) {
      add_rows<decltype(count)::value>(probs + h * kBlock, dim, v, h == 0, out + h * dim);
    });
  }

 private:
  // What the first of the head groups reads may come from memory. Of floats, or for one head, there
  // is so much to read for each product that the processor's own prefetching does better alone.
  template <int kHeads>
  static bool prefetches(bool first) {
    return sizeof(K) < sizeof(float) && kHeads > 1 && first;
  }

  template <int kHeads>
  static void dot_keys(const float* q, int dim, const BlockRows<K>& k, bool first, float* scores) {
    constexpr int kKeys = kLanes / kHeads;  // as many sums as a vector has lanes
    for (int c0 = 0; c0 < k.n; c0 += kKeys) {
      if (prefetches<kHeads>(first))
        prefetch_rows(k.ahead(c0, kPrefetchRows), k.stride, kKeys, dim);
      const K* key[kKeys];  // past the end the last key again, for sums that nobody reads
      for (int c = 0; c < kKeys; ++c) key[c] = k.row(std::min(c0 + c, k.n - 1));
      Vec sum[kLanes];
      LMINF_UNROLL
      for (int i = 0; i < kLanes; ++i) sum[i] = vset(0.0f);
      for (int d = 0; d < dim; d += kLanes) {
        Vec row[kKeys];
        LMINF_UNROLL
        for (int c = 0; c < kKeys; ++c) row[c] = vload(key[c] + d);
        LMINF_UNROLL
        for (int h = 0; h < kHeads; ++h) {
          const Vec query = vload(q + h * dim + d);
          LMINF_UNROLL
          for (int c = 0; c < kKeys; ++c)
            sum[h * kKeys + c] = vfma(query, row[c], sum[h * kKeys + c]);
        }
      }
      store_sums<kHeads, kBlock>(sum, scores + c0);
    }
  }

  template <int kHeads>
  static void add_rows(const float* probs, int dim, const BlockRows<K>& v, bool first, float* out) {
    constexpr int kVecs = LMINF_LANES == 16 ? std::max(1, 16 / kHeads) : std::max(1, 8 / kHeads);
    int d = 0;
    for (; d + kVecs * kLanes <= dim; d += kVecs * kLanes)
      add_columns<kHeads, kVecs>(probs, dim, v, first, d, out + d);
    for (; d < dim; d += kLanes) add_columns<kHeads, 1>(probs, dim, v, first, d, out + d);
  }

  // Dims [d, d + kVecs * kLanes).
  template <int kHeads, int kVecs>
  static void add_columns(const float* probs, int dim, const BlockRows<K>& v, bool first, int d,
                          float* out) {
    Vec sum[kHeads][kVecs];
    LMINF_UNROLL
    for (int h = 0; h < kHeads; ++h) {
      LMINF_UNROLL
      for (int i = 0; i < kVecs; ++i) sum[h][i] = vload(out + h * dim + i * kLanes);
    }
    for (int c = 0; c < v.n; ++c) {
      if (prefetches<kHeads>(first))
        prefetch_rows(v.ahead(c, kPrefetchRows) + d, v.stride, 1, kVecs * kLanes);
      Vec value[kVecs];
      LMINF_UNROLL
      for (int i = 0; i < kVecs; ++i) value[i] = vload(v.row(c) + d + i * kLanes);
      LMINF_UNROLL
      for (int h = 0; h < kHeads; ++h) {
        const Vec p = vset(probs[h * kBlock + c]);
        LMINF_UNROLL
        for (int i = 0; i < kVecs; ++i) sum[h][i] = vfma(p, value[i], sum[h][i]);
      }
    }
    LMINF_UNROLL
    for (int h = 0; h < kHeads; ++h) {
      LMINF_UNROLL
      for (int i = 0; i < kVecs; ++i) vstore(out + h * dim + i * kLanes, sum[h][i]);
    }
  }
};
