// One decode step over the fixed cache: rotate, append, attend.
// Included inside namespace lminf::cpu::LMINF_ISA.
//
// A step reads every key and value of the window once, so it is bound by memory: the query heads of
// a key head go over the cache together, and the keys of one row are split among threads when there
// are few heads. Each split leaves an unnormalised output with its softmax state; the last to
// finish merges them.

constexpr int64_t kDecodeMinSplitKeys = 256;  // a split shorter than this costs more than it gains

#if LMINF_BF16
template <typename T>
using RingProduct =
    std::conditional_t<std::is_same_v<T, bf16>, DecodeProductBf16, DecodeProduct<T>>;
#else
template <typename T>
using RingProduct = DecodeProduct<T>;
#endif

template <typename T>
class LambdaDecodeStep {
  using Ring = RingProduct<T>;

 public:
  LambdaDecodeStep(const LambdaDecodeParams& params, const Rotary& rotary)
      : p_(params),
        rotary_(rotary),
        map_(params.score),
        dim_(static_cast<int>(params.head_dim)),
        dim_padded_((dim_ + kLanes - 1) / kLanes * kLanes),
        group_(static_cast<int>(params.heads_q / params.heads_kv)) {
    ring_reads_ = Ring::reads(dim_);
  }

  void run(const Threads& threads) const {
    append();
    const int64_t pairs = p_.batch * p_.heads_kv;  // of a row and a key head
    const int64_t splits =
        max64(1, min64((4 * threads.count + pairs - 1) / pairs, p_.window / kDecodeMinSplitKeys));
    // The global branches are parts of their own and come first, pair after pair: what they need
    // stays in the cache, where a window's keys going by would push it out.
    const int64_t global_parts = p_.n_global > 0 ? 1 : 0;
    const int64_t parts = global_parts + splits;
    const int64_t items = pairs * parts;
    Scratch partial(Scratch::bytes<float>(items * group_) +
                    Scratch::bytes<float>(items * group_ * kLanes) +
                    Scratch::bytes<float>(items * group_ * dim_padded_) +
                    Scratch::bytes<std::atomic<int64_t>>(pairs));
    RowStates all;
    all.max = partial.take<float>(items * group_);
    all.sum = partial.take<float>(items * group_ * kLanes);
    all.out = partial.take<float>(items * group_ * dim_padded_);
    auto* unfinished = partial.take<std::atomic<int64_t>>(pairs);  // parts of each pair
    for (int64_t pair = 0; pair < pairs; ++pair)
      new (unfinished + pair) std::atomic<int64_t>(parts);

    const int64_t workers = std::min<int64_t>(threads.count, items);
    std::atomic<int64_t> next{0};
    threads.parallel_for(workers, [&](int64_t begin, int64_t end) {
      [[maybe_unused]] const FlushSubnormals flush_subnormals;
      ItemScratch s(*this);
      for (int64_t worker = begin; worker < end; ++worker) {
        for (int64_t item; (item = next.fetch_add(1)) < items;) {
          const int64_t ring_item = item - pairs * global_parts;
          const int64_t pair = ring_item < 0 ? item : ring_item / splits;
          const int64_t part = ring_item < 0 ? 0 : global_parts + ring_item % splits;
          const RowStates rows = rows_of(all, pair * parts + part);
          std::fill(rows.max, rows.max + group_, minus_infinity());
          std::fill(rows.sum, rows.sum + group_ * kLanes, 0.0f);
          std::fill(rows.out, rows.out + group_ * dim_padded_, 0.0f);
          if (p_.positions[pair / p_.heads_kv] >= 0) {
            if (ring_item < 0) {
              attend_global(pair, rows, s);
            } else {
              // The other threads take the items up to `upcoming`, if all are equally fast.
              const int64_t upcoming = std::min(ring_item + workers, pairs * splits - 1);
              attend_ring(ring_split(ring_item, splits), ring_split(upcoming, splits), rows, s);
            }
          }
          // Whoever finishes the last part of a pair merges them.
          if (unfinished[pair].fetch_sub(1) == 1) combine(pair, parts, all);
        }
      }
    });
  }

  // Multiply-adds of a step at the most.
  int64_t work() const {
    return p_.batch * p_.heads_q * min64(p_.window, p_.capacity) * p_.head_dim * 2;
  }

 private:
  // What one thread works in.
  struct ItemScratch {
    explicit ItemScratch(const LambdaDecodeStep& step)
        : memory(bytes(step)), ring(memory, step.group_, step.dim_padded_) {
      const int rows = step.group_ * step.dim_padded_;
      cos = memory.take<float>(step.rotary_.pairs);
      sin = memory.take<float>(step.rotary_.pairs);
      q = memory.take<float>(rows);
      q_ring = memory.take<typename Ring::Operand>(Ring::query_size(step.group_, step.dim_padded_));
      scores = memory.take<float>(step.group_ * kScoreColumns);
      k_rows = memory.take<float>(kDecodeBlock * step.dim_padded_);
      v_rows = memory.take<float>(kDecodeBlock * step.dim_padded_);
      biases = memory.take<float>(bias_count(step));
    }

    static size_t bytes(const LambdaDecodeStep& step) {
      const int rows = step.group_ * step.dim_padded_;
      return Ring::bytes(step.group_, step.dim_padded_) +
             2 * Scratch::bytes<float>(step.rotary_.pairs) + Scratch::bytes<float>(rows) +
             Scratch::bytes<typename Ring::Operand>(
                 Ring::query_size(step.group_, step.dim_padded_)) +
             Scratch::bytes<float>(step.group_ * kScoreColumns) +
             2 * Scratch::bytes<float>(kDecodeBlock * step.dim_padded_) +
             Scratch::bytes<float>(bias_count(step));
    }
    static int bias_count(const LambdaDecodeStep& step) {
      return step.p_.score.has_table() ? step.group_ * kScoreColumns : 0;
    }
    static constexpr int kScoreColumns = std::max(Ring::kBlock, kDecodeBlock);

    Scratch memory;
    Ring ring;
    float *cos, *sin;                // [pairs]
    float* q;                        // [group][Dp], rotated for the branch in hand
    typename Ring::Operand* q_ring;  // the same, packed for `ring`
    float* scores;           // [group][kBlock of the product in hand], then their probabilities
    float *k_rows, *v_rows;  // [kDecodeBlock][Dp], for keys that cannot be read where they stand
    float* biases;           // [group][kBlock of the product in hand], by distance, if there is
  };

  RowStates rows_of(const RowStates& all, int64_t item) const {
    return {all.max + item * group_, all.sum + item * group_ * kLanes,
            all.out + item * group_ * dim_padded_};
  }

  // The new key and value of every row, into the ring and, for a global token, into its slot.
  void append() const {
    Scratch memory(2 * Scratch::bytes<float>(rotary_.pairs) + Scratch::bytes<float>(dim_padded_));
    float* cos = memory.take<float>(rotary_.pairs);
    float* sin = memory.take<float>(rotary_.pairs);
    float* row = memory.take<float>(dim_padded_);
    for (int64_t b = 0; b < p_.batch; ++b) {
      const int64_t position = p_.positions[b];
      if (position < 0) continue;
      rotation_table(position, rotary_, rotary_.scaling, cos, sin);
      const int64_t slot = position % p_.capacity;
      for (int64_t h = 0; h < p_.heads_kv; ++h) {
        const T* k = row_at<const T>(p_.k, p_.k_stride, b, h, 0);
        const T* v = row_at<const T>(p_.v, p_.v_stride, b, h, 0);
        load_row(k, dim_, row, dim_padded_);
        rotate_row(rotary_, cos, sin, row);
        store_row(row, dim_, row_at<T>(p_.ring_k, p_.ring_k_stride, b, h, slot));
        std::memcpy(row_at<T>(p_.ring_v, p_.ring_v_stride, b, h, slot), v, dim_ * sizeof(T));
        if (position >= p_.n_global) continue;
        std::memcpy(row_at<T>(p_.global_k, p_.global_k_stride, b, h, position), k,
                    dim_ * sizeof(T));
        std::memcpy(row_at<T>(p_.global_v, p_.global_v_stride, b, h, position), v,
                    dim_ * sizeof(T));
      }
    }
  }

  // The queries of a pair, rotated by so many positions.
  void load_queries(int64_t pair, int64_t positions, ItemScratch& s) const {
    rotation_table(positions, rotary_, rotary_.scaling, s.cos, s.sin);
    const int64_t b = pair / p_.heads_kv, head = pair % p_.heads_kv * group_;
    for (int g = 0; g < group_; ++g) {
      float* q = s.q + g * dim_padded_;
      load_row(row_at<const T>(p_.q, p_.q_stride, b, head + g, 0), dim_, q, dim_padded_);
      rotate_row(rotary_, s.cos, s.sin, q);
    }
  }

  void attend_global(int64_t pair, const RowStates& rows, ItemScratch& s) const {
    const int64_t position = p_.positions[pair / p_.heads_kv];
    const Range self = {position, position + 1}, held = {0, p_.n_global};
    attend_far(pair, far_branch(held, p_.n_global, p_.max_distance).visible_keys(self), rows, s);
    attend_near(pair, near_branch(held, p_.n_global, p_.window, p_.max_distance).visible_keys(self),
                rows, s);
  }

  // Global keys at the largest distance: the query takes all of the rotation, and the keys, of
  // which there are more, none.
  void attend_far(int64_t pair, Range keys, const RowStates& rows, ItemScratch& s) const {
    if (keys.lo >= keys.hi) return;
    load_queries(pair, p_.max_distance, s);
    for (int g = 0; g < group_; ++g)
      scale_rotary_dims(rotary_, s.q + g * dim_padded_);  // the keys'
    for (int64_t first = keys.lo; first < keys.hi; first += kDecodeBlock) {
      const int n = static_cast<int>(min64(kDecodeBlock, keys.hi - first));
      const BlockRows<T> k = global_rows(p_.global_k, p_.global_k_stride, pair, first, n);
      const BlockRows<T> v = global_rows(p_.global_v, p_.global_v_stride, pair, first, n);
      attend_rows(pair, k, v, KeyFrame::kMaxDistance, first, rows, s);
    }
  }

  // A block in float products, where it stands if it can be read there.
  void attend_rows(int64_t pair, const BlockRows<T>& k, const BlockRows<T>& v, KeyFrame frame,
                   int64_t first, const RowStates& rows, ItemScratch& s) const {
    if (DecodeProduct<T>::reads(dim_)) {
      attend_block(DecodeProduct<T>(), pair, s.q, k, v, frame, first, rows, s);
    } else {
      attend_block(DecodeProduct<float>(), pair, s.q, copied(k, s.k_rows), copied(v, s.v_rows),
                   frame, first, rows, s);
    }
  }

  // Global keys at their own distance.
  void attend_near(int64_t pair, Range keys, const RowStates& rows, ItemScratch& s) const {
    if (keys.lo >= keys.hi) return;
    load_queries(pair, p_.positions[pair / p_.heads_kv], s);
    for (int64_t first = keys.lo; first < keys.hi; first += kDecodeBlock) {
      const int n = static_cast<int>(min64(kDecodeBlock, keys.hi - first));
      const BlockRows<float> k =
          copied(global_rows(p_.global_k, p_.global_k_stride, pair, first, n), s.k_rows);
      const BlockRows<float> v =
          copied(global_rows(p_.global_v, p_.global_v_stride, pair, first, n), s.v_rows);
      for (int c = 0; c < n; ++c) {
        rotation_table(first + c, rotary_, rotary_.scaling, s.cos, s.sin);
        rotate_row(rotary_, s.cos, s.sin, s.k_rows + c * dim_padded_);
      }
      attend_block(DecodeProduct<float>(), pair, s.q, k, v, KeyFrame::kOwnPosition, first, rows, s);
    }
  }

  BlockRows<T> global_rows(const void* cache, const Strides& stride, int64_t pair, int64_t first,
                           int n) const {
    const T* row = row_at<const T>(cache, stride, pair / p_.heads_kv, pair % p_.heads_kv, first);
    return {row, stride.seq, n, nullptr};
  }

  // Rows that cannot be read where they stand, as floats in whole vectors.
  BlockRows<float> copied(const BlockRows<T>& rows, float* to) const {
    for (int c = 0; c < rows.n; ++c) load_row(rows.row(c), dim_, to + c * dim_padded_, dim_padded_);
    return {to, dim_padded_, rows.n, nullptr};
  }

  // So many keys of one pair's window.
  struct RingSplit {
    int64_t pair;
    Range keys;
  };

  RingSplit ring_split(int64_t index, int64_t splits) const {
    const int64_t pair = index / splits, split = index % splits;
    const int64_t position = p_.positions[pair / p_.heads_kv];
    if (position < 0) return {pair, {0, 0}};
    const Range window =
        window_branch({0, position + 1}, p_.window).visible_keys({position, position + 1});
    const int64_t count = window.hi - window.lo;
    return {pair, {window.lo + count * split / splits, window.lo + count * (split + 1) / splits}};
  }

  const T* ring_row(const void* ring, const Strides& stride, int64_t pair, int64_t j) const {
    return row_at<const T>(ring, stride, pair / p_.heads_kv, pair % p_.heads_kv, j % p_.capacity);
  }

  // `upcoming` is what this thread is likely to take next.
  void attend_ring(const RingSplit& split, const RingSplit& upcoming, const RowStates& rows,
                   ItemScratch& s) const {
    load_queries(split.pair, p_.positions[split.pair / p_.heads_kv], s);
    if (ring_reads_) Ring::pack_queries(s.q, group_, dim_padded_, s.q_ring);
    const Range& keys = split.keys;
    for (int64_t first = keys.lo; first < keys.hi;) {
      const int64_t in_a_row = min64(p_.capacity - first % p_.capacity, keys.hi - first);
      const int n = static_cast<int>(min64(ring_reads_ ? Ring::kBlock : kDecodeBlock, in_a_row));
      const auto block = [&](const void* ring, const Strides& stride) {
        const T* next = first + n < keys.hi
                            ? ring_row(ring, stride, split.pair, first + n)
                            : ring_row(ring, stride, upcoming.pair, upcoming.keys.lo);
        return BlockRows<T>{ring_row(ring, stride, split.pair, first), stride.seq, n, next};
      };
      const BlockRows<T> k = block(p_.ring_k, p_.ring_k_stride);
      const BlockRows<T> v = block(p_.ring_v, p_.ring_v_stride);
      if (ring_reads_) {
        attend_block(s.ring, split.pair, s.q_ring, k, v, KeyFrame::kOwnPosition, first, rows, s);
      } else {
        attend_rows(split.pair, k, v, KeyFrame::kOwnPosition, first, rows, s);
      }
      first += n;
    }
  }

  // The keys at positions first, first + 1, ...
  template <typename Product, typename K>
  void attend_block(const Product& product, int64_t pair, const typename Product::Operand* q,
                    const BlockRows<K>& k, const BlockRows<K>& v, KeyFrame frame, int64_t first,
                    const RowStates& rows, ItemScratch& s) const {
    const int64_t head = pair % p_.heads_kv * group_, position = p_.positions[pair / p_.heads_kv];
    product.scores(q, group_, dim_padded_, k, s.scores);
    const int end = (k.n + Product::kGrain - 1) / Product::kGrain * Product::kGrain;
    for (int g = 0; g < group_; ++g) {
      float* scores = s.scores + g * Product::kBlock;
      const RowBias added =
          bias(head + g, frame, position - first, end, s.biases + g * Product::kBlock);
      const float largest = scores_max(map_, added, scores, 0, k.n);
      softmax_row(rows, g, dim_padded_, scores, scores, 0, k.n, 0, end, map_.factor, largest);
    }
    product.add_values(s.scores, group_, dim_padded_, v, rows.out);
  }

  // Of `columns` keys, the first of them at `distance`; `table` is room for their biases.
  RowBias bias(int64_t head, KeyFrame frame, int64_t distance, int columns, float* table) const {
    const bool far = frame == KeyFrame::kMaxDistance;
    RowBias bias = {slope_of(p_.score, head), static_cast<float>(far ? p_.max_distance : distance),
                    far ? 0.0f : 1.0f};
    if (p_.score.has_table()) {
      biases_by_column(p_.score, head, distance, columns, table);
      bias.table = table;
    }
    return bias;
  }

  void combine(int64_t pair, int64_t parts, const RowStates& all) const {
    const int64_t b = pair / p_.heads_kv, h = pair % p_.heads_kv;
    for (int g = 0; g < group_; ++g) {
      SoftmaxState state = empty_softmax();
      float* out = rows_of(all, pair * parts).out + g * dim_padded_;
      for (int64_t part = 0; part < parts; ++part) {
        const RowStates rows = rows_of(all, pair * parts + part);
        const SoftmaxMerge m =
            merge(state, {rows.max[g], vreduce_add(vload(rows.sum + g * kLanes))});
        const float* added = rows.out + g * dim_padded_;
        if (part == 0) {
          scale_row(out, dim_padded_, m.weight_b);
        } else {
          for (int d = 0; d < dim_padded_; ++d)
            out[d] = out[d] * m.weight_a + added[d] * m.weight_b;
        }
        state = m.state;
      }
      const int64_t head = h * group_ + g;
      const SoftmaxEnd end = finish(state, p_.score, head);
      scale_row(out, dim_padded_, end.out_scale);
      store_row(out, dim_, row_at<T>(p_.out, p_.out_stride, b, head, 0));
      p_.lse[b * p_.heads_q + head] = end.lse;
    }
  }

  const LambdaDecodeParams& p_;
  const Rotary& rotary_;
  ScoreMap map_;
  int dim_;
  int dim_padded_;
  int group_;        // query heads per key head
  bool ring_reads_;  // whether the product for the ring takes rows of this length
};

template <typename T>
void run(const LambdaDecodeParams& p, const Rotary& rotary, const Threads& threads) {
  LambdaDecodeStep<T>(p, rotary).run(threads);
}
