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
  using RingOperand = typename Ring::Operand;

 public:
  LambdaDecodeStep(const LambdaDecodeParams& params, const Rotary& rotary)
      : p_(params),
        rotary_(rotary),
        dim_(static_cast<int>(params.head_dim)),
        dim_padded_((dim_ + kLanes - 1) / kLanes * kLanes),
        group_(static_cast<int>(params.heads_q / params.heads_kv)) {
    reads_in_place_ = dim_ % (std::is_same_v<RingOperand, float> ? kLanes : 32) == 0;
    map_.scale = p_.score.scale;
    map_.softcap = p_.score.softcap;
    map_.general = p_.score.alibi_slopes != nullptr || p_.score.distance_bias != nullptr ||
                   map_.softcap > 0.0f || map_.scale < 0.0f;
    map_.factor = map_.general ? 1.0f : map_.scale * kLog2e;
  }

  void run(const Threads& threads) const {
    append();
    const int64_t pairs = p_.batch * p_.heads_kv;  // of a row and a key head
    const int64_t splits =
        max64(1, min64((4 * threads.count + pairs - 1) / pairs, p_.window / kDecodeMinSplitKeys));
    const int64_t items = pairs * splits;
    Scratch partial(Scratch::bytes<float>(items * group_) +
                    Scratch::bytes<float>(items * group_ * kLanes) +
                    Scratch::bytes<float>(items * group_ * dim_padded_) +
                    Scratch::bytes<std::atomic<int64_t>>(pairs));
    RowStates all;
    all.max = partial.take<float>(items * group_);
    all.sum = partial.take<float>(items * group_ * kLanes);
    all.out = partial.take<float>(items * group_ * dim_padded_);
    auto* unfinished = partial.take<std::atomic<int64_t>>(pairs);  // splits of each pair
    for (int64_t pair = 0; pair < pairs; ++pair)
      new (unfinished + pair) std::atomic<int64_t>(splits);

    const int64_t workers = std::min<int64_t>(threads.count, items);
    std::atomic<int64_t> next{0};
    threads.parallel_for(workers, [&](int64_t begin, int64_t end) {
      [[maybe_unused]] const FlushSubnormals flush_subnormals;
      ItemScratch s(*this);
      for (int64_t worker = begin; worker < end; ++worker) {
        for (int64_t item; (item = next.fetch_add(1)) < items;) {
          const int64_t pair = item / splits;
          attend(pair, item % splits, splits, rows_of(all, item), s);
          // Whoever finishes the last split of a pair merges them.
          if (unfinished[pair].fetch_sub(1) == 1) combine(pair, splits, all);
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
      q_raw = memory.take<float>(rows);
      q_rot = memory.take<float>(rows);
      q_ring = memory.take<RingOperand>(Ring::query_size(step.group_, step.dim_padded_));
      scores = memory.take<float>(padded(step.group_) * kDecodeBlock);
      probs = memory.take<RingOperand>(padded(step.group_) * kDecodeBlock);
      k_rows = memory.take<float>(kDecodeBlock * step.dim_padded_);
      v_rows = memory.take<float>(kDecodeBlock * step.dim_padded_);
      biases = memory.take<float>(step.group_ * kDecodeBlock);
    }

    static size_t bytes(const LambdaDecodeStep& step) {
      const int rows = step.group_ * step.dim_padded_;
      return Ring::bytes(step.group_, step.dim_padded_) +
             2 * Scratch::bytes<float>(step.rotary_.pairs) + 2 * Scratch::bytes<float>(rows) +
             Scratch::bytes<RingOperand>(Ring::query_size(step.group_, step.dim_padded_)) +
             Scratch::bytes<float>(padded(step.group_) * kDecodeBlock) +
             Scratch::bytes<RingOperand>(padded(step.group_) * kDecodeBlock) +
             2 * Scratch::bytes<float>(kDecodeBlock * step.dim_padded_) +
             Scratch::bytes<float>(step.group_ * kDecodeBlock);
    }
    // Matrix tiles write 16 heads at a time.
    static int padded(int heads) { return (heads + 15) / 16 * 16; }

    Scratch memory;
    Ring ring;
    float *cos, *sin;      // [pairs]
    float *q_raw, *q_rot;  // [group][Dp]
    RingOperand* q_ring;   // the rotated queries, packed for `ring`
    float* scores;         // [group][kDecodeBlock]
    RingOperand* probs;    // [group][kDecodeBlock], of `ring`; other products write over the scores
    float *k_rows, *v_rows;  // [kDecodeBlock][Dp], for keys that cannot be read where they stand
    float* biases;           // [group][kDecodeBlock], of distance_bias
  };

  template <typename U>
  static U* at(U* base, const Strides& stride, int64_t b, int64_t h, int64_t s) {
    return base + b * stride.batch + h * stride.head + s * stride.seq;
  }

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
        const T* k = at(static_cast<const T*>(p_.k), p_.k_stride, b, h, 0);
        const T* v = at(static_cast<const T*>(p_.v), p_.v_stride, b, h, 0);
        load_row(k, dim_, row, dim_padded_);
        rotate_row(rotary_, cos, sin, row);
        store_row(row, dim_, at(static_cast<T*>(p_.ring_k), p_.ring_k_stride, b, h, slot));
        std::memcpy(at(static_cast<T*>(p_.ring_v), p_.ring_v_stride, b, h, slot), v,
                    dim_ * sizeof(T));
        if (position >= p_.n_global) continue;
        std::memcpy(at(static_cast<T*>(p_.global_k), p_.global_k_stride, b, h, position), k,
                    dim_ * sizeof(T));
        std::memcpy(at(static_cast<T*>(p_.global_v), p_.global_v_stride, b, h, position), v,
                    dim_ * sizeof(T));
      }
    }
  }

  // One split of one row's keys for one key head. The first split takes the global branches, too.
  void attend(int64_t pair, int64_t split, int64_t splits, const RowStates& rows,
              ItemScratch& s) const {
    const int64_t b = pair / p_.heads_kv, h = pair % p_.heads_kv;
    std::fill(rows.max, rows.max + group_, minus_infinity());
    std::fill(rows.sum, rows.sum + group_ * kLanes, 0.0f);
    std::fill(rows.out, rows.out + group_ * dim_padded_, 0.0f);
    const int64_t position = p_.positions[b];
    if (position < 0) return;

    rotation_table(position, rotary_, rotary_.scaling, s.cos, s.sin);
    for (int g = 0; g < group_; ++g) {
      const T* q = at(static_cast<const T*>(p_.q), p_.q_stride, b, h * group_ + g, 0);
      float* raw = s.q_raw + g * dim_padded_;
      float* rot = s.q_rot + g * dim_padded_;
      load_row(q, dim_, raw, dim_padded_);
      std::memcpy(rot, raw, dim_padded_ * sizeof(float));
      scale_rotary_dims(rotary_, raw);
      rotate_row(rotary_, s.cos, s.sin, rot);
    }
    if (reads_in_place_) Ring::pack_queries(s.q_rot, group_, dim_padded_, s.q_ring);

    const Range self = {position, position + 1};
    if (split == 0) {
      const Range held = {0, p_.n_global};
      attend_global(b, h, far_branch(held, p_.n_global, p_.max_distance).visible_keys(self),
                    KeyFrame::kMaxDistance, position, rows, s);
      attend_global(b, h,
                    near_branch(held, p_.n_global, p_.window, p_.max_distance).visible_keys(self),
                    KeyFrame::kOwnPosition, position, rows, s);
    }
    const Range keys = window_branch({0, position + 1}, p_.window).visible_keys(self);
    const int64_t count = keys.hi - keys.lo;
    attend_ring(b, h, {keys.lo + count * split / splits, keys.lo + count * (split + 1) / splits},
                position, rows, s);
  }

  void attend_global(int64_t b, int64_t h, Range keys, KeyFrame frame, int64_t position,
                     const RowStates& rows, ItemScratch& s) const {
    for (int64_t first = keys.lo; first < keys.hi; first += kDecodeBlock) {
      const int n = static_cast<int>(min64(kDecodeBlock, keys.hi - first));
      for (int c = 0; c < n; ++c) {
        const int64_t j = first + c;
        float* key = s.k_rows + c * dim_padded_;
        load_row(at(static_cast<const T*>(p_.global_k), p_.global_k_stride, b, h, j), dim_, key,
                 dim_padded_);
        load_row(at(static_cast<const T*>(p_.global_v), p_.global_v_stride, b, h, j), dim_,
                 s.v_rows + c * dim_padded_, dim_padded_);
        if (frame == KeyFrame::kOwnPosition || c == 0)
          rotation_table(frame == KeyFrame::kOwnPosition ? j : -p_.max_distance, rotary_,
                         rotary_.scaling, s.cos, s.sin);
        rotate_row(rotary_, s.cos, s.sin, key);
      }
      const bool far = frame == KeyFrame::kMaxDistance;
      attend_block(DecodeProduct<float>(), h, far ? s.q_raw : s.q_rot, s.k_rows, dim_padded_,
                   s.v_rows, dim_padded_, n, s.scores, frame, first, position, rows, s);
    }
  }

  void attend_ring(int64_t b, int64_t h, Range keys, int64_t position, const RowStates& rows,
                   ItemScratch& s) const {
    for (int64_t first = keys.lo; first < keys.hi;) {
      const int64_t slot = first % p_.capacity;
      const int64_t in_a_row = min64(p_.capacity - slot, keys.hi - first);
      const int n = static_cast<int>(min64(kDecodeBlock, in_a_row));
      const T* k = at(static_cast<const T*>(p_.ring_k), p_.ring_k_stride, b, h, slot);
      const T* v = at(static_cast<const T*>(p_.ring_v), p_.ring_v_stride, b, h, slot);
      const int64_t k_stride = p_.ring_k_stride.seq, v_stride = p_.ring_v_stride.seq;
      if (reads_in_place_) {
        attend_block(s.ring, h, s.q_ring, k, k_stride, v, v_stride, n, s.probs,
                     KeyFrame::kOwnPosition, first, position, rows, s);
      } else {
        for (int c = 0; c < n; ++c) {
          load_row(k + c * k_stride, dim_, s.k_rows + c * dim_padded_, dim_padded_);
          load_row(v + c * v_stride, dim_, s.v_rows + c * dim_padded_, dim_padded_);
        }
        attend_block(DecodeProduct<float>(), h, s.q_rot, s.k_rows, dim_padded_, s.v_rows,
                     dim_padded_, n, s.scores, KeyFrame::kOwnPosition, first, position, rows, s);
      }
      first += n;
    }
  }

  // n keys at positions first, first + 1, ... that stand `stride` apart. `probs` may be the scores'
  // own room.
  template <typename Product, typename K>
  void attend_block(const Product& product, int64_t h, const typename Product::Operand* q,
                    const K* k, int64_t k_stride, const K* v, int64_t v_stride, int n,
                    typename Product::Operand* probs, KeyFrame frame, int64_t first,
                    int64_t position, const RowStates& rows, ItemScratch& s) const {
    product.prepare_values(v, v_stride, n, dim_padded_);
    product.scores(q, group_, dim_padded_, k, k_stride, n, s.scores);
    const int end = (n + Product::kProbGrain - 1) / Product::kProbGrain * Product::kProbGrain;
    bool hides = false;
    for (int g = 0; g < group_; ++g) {
      float* scores = s.scores + g * kDecodeBlock;
      const RowBias added =
          bias(h * group_ + g, frame, first, position, s.biases + g * kDecodeBlock);
      if (added.table != nullptr) hides |= row_hides(added.table, n);
      const float largest = scores_max(map_, added, scores, 0, n);
      softmax_row<5>(rows, g, dim_padded_, scores, probs + g * kDecodeBlock, 0, n, 0, end,
                     map_.factor, largest);
    }
    if (!hides) return product.add_values(probs, group_, v, v_stride, n, dim_padded_, rows.out);
    // An infinite or NaN value must not reach a head that does not see its key, not even times 0.
    for (int g = 0; g < group_; ++g) {
      for (int c = 0; c < n; ++c) {
        if (s.biases[g * kDecodeBlock + c] == minus_infinity()) continue;
        const float p = to_float(probs[g * kDecodeBlock + c]);
        DecodeProduct<K>().add_values(&p, 1, v + c * v_stride, v_stride, 1, dim_padded_,
                                      rows.out + g * dim_padded_);
      }
    }
  }

  // `table` is room for the biases of a block.
  RowBias bias(int64_t head, KeyFrame frame, int64_t first, int64_t position, float* table) const {
    const bool far = frame == KeyFrame::kMaxDistance;
    RowBias bias = {0.0f, static_cast<float>(far ? p_.max_distance : position - first),
                    far ? 0.0f : 1.0f};
    if (p_.score.alibi_slopes != nullptr) bias.slope = p_.score.alibi_slopes[head];
    if (p_.score.distance_bias != nullptr) {
      biases_by_column(p_.score, head, position - first, kDecodeBlock, table);
      bias.table = table;
    }
    return bias;
  }

  static bool row_hides(const float* table, int n) {
    int hidden = 0;  // counted to the end, in whole vectors
    for (int c = 0; c < n; ++c) hidden += table[c] == minus_infinity();
    return hidden > 0;
  }

  void combine(int64_t pair, int64_t splits, const RowStates& all) const {
    const int64_t b = pair / p_.heads_kv, h = pair % p_.heads_kv;
    for (int g = 0; g < group_; ++g) {
      SoftmaxState state = empty_softmax();
      float* out = rows_of(all, pair * splits).out + g * dim_padded_;
      for (int64_t split = 0; split < splits; ++split) {
        const RowStates rows = rows_of(all, pair * splits + split);
        const SoftmaxMerge m =
            merge(state, {rows.max[g], vreduce_add(vload(rows.sum + g * kLanes))});
        const float* added = rows.out + g * dim_padded_;
        if (split == 0) {
          scale_row(out, dim_padded_, m.weight_b);
        } else {
          for (int d = 0; d < dim_padded_; ++d)
            out[d] = out[d] * m.weight_a + added[d] * m.weight_b;
        }
        state = m.state;
      }
      const int64_t head = h * group_ + g;
      const bool has_sink = p_.score.sink_logits != nullptr;
      const SoftmaxEnd end = finish(state, has_sink, has_sink ? p_.score.sink_logits[head] : 0.0f);
      scale_row(out, dim_padded_, end.out_scale);
      store_row(out, dim_, at(static_cast<T*>(p_.out), p_.out_stride, b, head, 0));
      p_.lse[b * p_.heads_q + head] = end.lse;
    }
  }

  const LambdaDecodeParams& p_;
  const Rotary& rotary_;
  ScoreMap map_;
  int dim_;
  int dim_padded_;
  int group_;            // query heads per key head
  bool reads_in_place_;  // rows of the ring are whole vectors; else they are copied and padded
};
