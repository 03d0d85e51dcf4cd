// The optional middle tokens (arXiv 2308.16137, section 4.2): of the keys between the global tokens
// and the window, each head's top_k with the largest score at distance m join the softmax there.
// Included inside namespace lminf::cpu::LMINF_ISA.
//
//   s_j = scale * <R(m) q, k_j> - slope * m + bias[m], then capped,   j in [n_global, i - window]
//   out = (2^lse_Λ out_Λ + sum over the chosen j of 2^s_j v_j) / (2^lse_Λ + sum of 2^s_j)
//
// All keys stand at one distance, so the query is rotated once and the keys not at all. They stream
// by once; a head keeps its top_k so far and their scores, and a block whose largest score is below
// the least of these costs no more than that comparison. The keys of one row are split among
// threads, and whoever finishes a row's last split merges the lists. Among equal scores the earlier
// key is chosen, however the keys are split.

constexpr int64_t kMiddleMinSplitKeys = 1024;

// The top_k largest scores so far, in falling order, and where they stand.
struct TopList {
  float* score;       // [top_k], -inf where there are fewer
  int64_t* position;  // [top_k], -1 where there are fewer

  void clear(int64_t top_k) const {
    std::fill(score, score + top_k, minus_infinity());
    std::fill(position, position + top_k, int64_t{-1});
  }

  // NaN and -inf are never among the largest.
  void offer(float s, int64_t j, int64_t top_k) const {
    if (!(s > score[top_k - 1])) return;
    int64_t at = top_k - 1;
    for (; at > 0 && s > score[at - 1]; --at) {
      score[at] = score[at - 1];
      position[at] = position[at - 1];
    }
    score[at] = s;
    position[at] = j;
  }
};

template <typename T>
class MiddleTopk {
 public:
  MiddleTopk(const MiddleTopkParams& params, const Rotary& rotary)
      : p_(params),
        rotary_(rotary),
        dim_(static_cast<int>(params.head_dim)),
        dim_padded_((dim_ + kLanes - 1) / kLanes * kLanes),
        group_(static_cast<int>(params.heads_q / params.heads_kv)) {}

  void run(const Threads& threads) const {
    const int64_t pairs = p_.batch * p_.heads_kv;  // of a row and a key head
    const int64_t splits =
        max64(1, min64((4 * threads.count + pairs - 1) / pairs, p_.seqlen_k / kMiddleMinSplitKeys));
    const int64_t items = pairs * splits;
    Scratch memory(Scratch::bytes<float>(items * group_ * p_.top_k) +
                   Scratch::bytes<int64_t>(items * group_ * p_.top_k) +
                   Scratch::bytes<std::atomic<int64_t>>(pairs));
    const TopList all = {memory.take<float>(items * group_ * p_.top_k),
                         memory.take<int64_t>(items * group_ * p_.top_k)};
    auto* unfinished = memory.take<std::atomic<int64_t>>(pairs);  // splits of each pair
    for (int64_t pair = 0; pair < pairs; ++pair)
      new (unfinished + pair) std::atomic<int64_t>(splits);

    const bool short_call = pairs * group_ * p_.seqlen_k * p_.head_dim < kMiddleSerialWork;
    const Threads& pool = short_call ? serial() : threads;
    const int64_t workers = std::min<int64_t>(pool.count, items);
    std::atomic<int64_t> next{0};
    pool.parallel_for(workers, [&](int64_t begin, int64_t end) {
      ItemScratch s(*this);
      for (int64_t worker = begin; worker < end; ++worker) {
        for (int64_t item; (item = next.fetch_add(1)) < items;) {
          const int64_t pair = item / splits;
          select(pair, item % splits, splits, all, s);
          if (unfinished[pair].fetch_sub(1) == 1) combine(pair, splits, all, s);
        }
      }
    });
  }

 private:
  // Multiply-adds below which a call takes less time than waking other threads does.
  static constexpr int64_t kMiddleSerialWork = int64_t{1} << 19;

  struct ItemScratch {
    explicit ItemScratch(const MiddleTopk& op)
        : memory(2 * Scratch::bytes<float>(op.rotary_.pairs) +
                 Scratch::bytes<float>(op.group_ * op.dim_padded_) +
                 Scratch::bytes<float>(op.group_ * kDecodeBlock) +
                 Scratch::bytes<float>(kDecodeBlock * op.dim_padded_) +
                 2 * Scratch::bytes<float>(op.dim_padded_)) {
      cos = memory.take<float>(op.rotary_.pairs);
      sin = memory.take<float>(op.rotary_.pairs);
      q = memory.take<float>(op.group_ * op.dim_padded_);
      scores = memory.take<float>(op.group_ * kDecodeBlock);
      k_rows = memory.take<float>(kDecodeBlock * op.dim_padded_);
      sum = memory.take<float>(op.dim_padded_);
      row = memory.take<float>(op.dim_padded_);
    }
    Scratch memory;
    float *cos, *sin;  // [pairs]
    float* q;          // [group][Dp], rotated by m and scaled
    float* scores;     // [group][kDecodeBlock]
    float* k_rows;     // [kDecodeBlock][Dp], for keys that cannot be read where they stand
    float *sum, *row;  // [Dp]
  };

  TopList list(const TopList& all, int64_t item, int g) const {
    const int64_t offset = (item * group_ + g) * p_.top_k;
    return {all.score + offset, all.position + offset};
  }

  int64_t first_position(int64_t b) const { return p_.k_start == nullptr ? 0 : p_.k_start[b]; }

  // The keys to choose from, by position; none where they are fewer than top_k.
  Range candidates(int64_t b) const {
    const int64_t i = p_.positions[b], first = first_position(b);
    if (i < 0) return {0, 0};
    const Range keys = middle_keys({first, first + p_.seqlen_k}, i, p_.n_global, p_.window);
    return keys.hi - keys.lo < p_.top_k ? Range{0, 0} : keys;
  }

  // The largest of one split of one row's keys, for the query heads of one key head.
  void select(int64_t pair, int64_t split, int64_t splits, const TopList& all,
              ItemScratch& s) const {
    const int64_t b = pair / p_.heads_kv, h = pair % p_.heads_kv, item = pair * splits + split;
    for (int g = 0; g < group_; ++g) list(all, item, g).clear(p_.top_k);
    const Range keys = candidates(b);
    if (keys.empty()) return;

    rotation_table(p_.distance, rotary_, rotary_.scaling * rotary_.scaling * p_.score.scale, s.cos,
                   s.sin);
    for (int g = 0; g < group_; ++g) {
      float* q = s.q + g * dim_padded_;
      load_row(row_at<const T>(p_.q, p_.q_stride, b, h * group_ + g, 0), dim_, q, dim_padded_);
      rotate_row(rotary_, s.cos, s.sin, q);
      for (int d = 2 * rotary_.pairs; d < dim_; ++d) q[d] *= p_.score.scale;
    }
    const int64_t count = keys.hi - keys.lo, first = first_position(b);
    const int64_t end = keys.lo + count * (split + 1) / splits;
    for (int64_t j = keys.lo + count * split / splits; j < end; j += kDecodeBlock) {
      const int n = static_cast<int>(min64(kDecodeBlock, end - j));
      const T* k = row_at<const T>(p_.k, p_.k_stride, b, h, j - first);
      if (dim_ == dim_padded_) {
        score_block<T>(k, p_.k_stride.seq, n, s);
      } else {
        for (int c = 0; c < n; ++c)
          load_row(k + c * p_.k_stride.seq, dim_, s.k_rows + c * dim_padded_, dim_padded_);
        score_block<float>(s.k_rows, dim_padded_, n, s);
      }
      for (int g = 0; g < group_; ++g) {
        const float* scores = s.scores + g * kDecodeBlock;
        const TopList top = list(all, item, g);
        if (bias_at(p_.score, h * group_ + g, p_.distance) == minus_infinity())
          continue;  // it hides all of them
        if (!(row_max(scores, 0, n) > top.score[p_.top_k - 1])) continue;
        for (int c = 0; c < n; ++c) top.offer(scores[c], j + c, p_.top_k);
      }
    }
  }

  template <typename K>
  void score_block(const K* k, int64_t stride, int n, ItemScratch& s) const {
    DecodeProduct<K>{}.scores(s.q, group_, dim_padded_, {k, stride, n, nullptr}, s.scores);
  }

  float finished(float product, int64_t head) const {
    return whole_score(p_.score, product, head, p_.distance);
  }

  // Merges the splits' lists, and their softmax with that of the Λ result.
  void combine(int64_t pair, int64_t splits, const TopList& all, ItemScratch& s) const {
    const int64_t b = pair / p_.heads_kv, h = pair % p_.heads_kv;
    for (int g = 0; g < group_; ++g) {
      const int64_t head = h * group_ + g;
      const TopList top = list(all, pair * splits, g);
      for (int64_t split = 1; split < splits; ++split) {
        const TopList other = list(all, pair * splits + split, g);
        for (int64_t n = 0; n < p_.top_k; ++n)
          top.offer(other.score[n], other.position[n], p_.top_k);
      }
      std::copy(top.position, top.position + p_.top_k,
                p_.chosen + (b * p_.heads_q + head) * p_.top_k);
      merge_into_lambda(b, h, head, top, s);
    }
  }

  void merge_into_lambda(int64_t b, int64_t h, int64_t head, const TopList& top,
                         ItemScratch& s) const {
    const T* lambda_out = row_at<const T>(p_.lambda_out, p_.lambda_out_stride, b, head, 0);
    T* out = row_at<T>(p_.out, p_.out_stride, b, head, 0);
    const float lambda_lse = p_.lambda_lse[b * p_.heads_q + head];
    float& lse = p_.lse[b * p_.heads_q + head];
    if (top.position[0] < 0) {
      std::memcpy(out, lambda_out, dim_ * sizeof(T));
      lse = lambda_lse;
      return;
    }
    // The sink's logit is in the denominator of `lambda_out`, and stays in that of `out`.
    const float lambda = lambda_lse * kLog2e;
    const float sink = sink_of(p_.score, head) * kLog2e;
    // Softcap keeps the order of the products, so the first score is the largest.
    const float visible_max = std::max(finished(top.score[0], head), lambda);
    const float max = std::max(visible_max, sink);
    const float seen = exp2f(lambda - max), sunk = exp2f(sink - max);
    float sum = 0.0f, visible = exp2f(lambda - visible_max);  // which a large sink leaves alone
    load_row(lambda_out, dim_, s.sum, dim_padded_);
    scale_row(s.sum, dim_padded_, seen + sunk);
    for (int64_t n = 0; n < p_.top_k && top.position[n] >= 0; ++n) {
      const float score = finished(top.score[n], head), weight = exp2f(score - max);
      sum += weight;
      visible += exp2f(score - visible_max);
      load_row(row_at<const T>(p_.v, p_.v_stride, b, h, top.position[n] - first_position(b)), dim_,
               s.row, dim_padded_);
      for (int d = 0; d < dim_padded_; ++d) s.sum[d] += weight * s.row[d];
    }
    scale_row(s.sum, dim_padded_, 1.0f / (seen + sunk + sum));
    store_row(s.sum, dim_, out);
    lse = (visible_max + log2f(visible)) * kLn2;
  }

  const MiddleTopkParams& p_;
  const Rotary& rotary_;
  int dim_;
  int dim_padded_;
  int group_;  // query heads per key head
};

template <typename T>
void run(const MiddleTopkParams& p, const Rotary& rotary, const Threads& threads) {
  MiddleTopk<T>(p, rotary).run(threads);
}
