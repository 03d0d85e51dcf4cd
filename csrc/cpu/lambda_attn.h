// Λ attention forward, tile by tile.
// Included inside namespace lminf::cpu::LMINF_ISA.
//
// A task holds some hundred rows (queries x heads that share one key head) and walks the key tiles
// of the three branches of core/lambda_mask.h: first the far branch, raw queries against keys
// rotated by -max_distance, then the queries are rotated in place and meet the near and the window
// branch. A key tile is rotated and packed once for all rows of the task, and kept for the thread's
// next tasks, which are the neighbouring queries. Within a tile, a block of kBlockRows<E> rows
// multiplies only the columns that one of its rows sees; since a branch is a band of distances,
// what a row sees of a tile is one range of columns, and only the ends of that range are masked.
//
// A block takes a tile in strips of kStripKeys keys: their scores become probabilities at once,
// relative to the reference that the row has already, which mostly serves; no maximum is looked
// for. The values follow for the whole tile. Where a score is far above the reference, the values
// of the strips so far come first, and the reference moves.

template <typename T>
using PackedType = std::conditional_t<LMINF_BF16 && std::is_same_v<T, bf16>, bf16, float>;

// Distances that the queries of a block have to the keys of a tile.
template <typename E>
constexpr int64_t kBiasStride = kBlockRows<E> + kTileKeys<E>;

// What one thread needs for its tasks.
template <typename E>
struct AttnScratch {
  AttnScratch(int64_t rows, int64_t slots, int dim_padded, const Rotary& rotary)
      : memory(bytes(rows, slots, dim_padded, rotary)),
        rotation(memory, rotary, kTileKeys<E>),
        tiles(memory, slots, dim_padded) {
    queries = memory.take<E>(rows * dim_padded);
    states.max = memory.take<float>(rows);
    states.sum = memory.take<float>(rows * kLanes);
    states.out = memory.take<float>(rows * dim_padded);
    scores = memory.take<float>(kBlockRows<E> * kStripKeys);
    probs = memory.take<E>(kBlockRows<E> * kProbStride<E>);
    key_rows = memory.take<E>(kLanes * dim_padded);
    row = memory.take<float>(dim_padded);
    biases = memory.take<float>(kMaxHeadsPerTask * kBiasStride<E>);
  }

  static size_t bytes(int64_t rows, int64_t slots, int dim_padded, const Rotary& rotary) {
    return TileRotation::bytes(rotary, kTileKeys<E>) + TileCache<E>::bytes(slots, dim_padded) +
           Scratch::bytes<E>(rows * dim_padded) + Scratch::bytes<float>(rows) +
           Scratch::bytes<float>(rows * kLanes) + Scratch::bytes<float>(rows * dim_padded) +
           Scratch::bytes<float>(kBlockRows<E> * kStripKeys) +
           Scratch::bytes<E>(kBlockRows<E> * kProbStride<E>) +
           Scratch::bytes<E>(kLanes * dim_padded) + Scratch::bytes<float>(dim_padded) +
           Scratch::bytes<float>(kMaxHeadsPerTask * kBiasStride<E>);
  }

  Scratch memory;
  TileRotation rotation;
  TileCache<E> tiles;
  RowStates states;
  E* queries;     // [rows][Dp]
  float* scores;  // [kBlockRows<E>][kStripKeys]
  E* probs;       // [kBlockRows<E>][kProbStride<E>]
  E* key_rows;    // [kLanes][Dp] on their way into a tile
  float* row;     // [Dp]
  ReadAhead ahead;
  float* biases;  // [heads of a task][kBiasStride<E>], see fill_biases
};

template <typename T>
class LambdaAttnForward {
  using E = PackedType<T>;

 public:
  LambdaAttnForward(const LambdaAttnParams& params, const Rotary& rotary)
      : p_(params), rotary_(rotary), map_(params.score), dim_(static_cast<int>(params.head_dim)) {
    const int grain = std::max(kKGrain<E>, kLanes);
    dim_padded_ = (dim_ + grain - 1) / grain * grain;
  }

  void run(const Threads& threads) const {
    const AttnTasks tasks = attn_tasks(threads.count);
    // Neighbouring tasks go to one thread, in portions that leave every thread several.
    const int64_t portion = max64(1, tasks.count() / (4 * threads.count));
    const int64_t workers =
        std::min<int64_t>(threads.count, (tasks.count() + portion - 1) / portion);
    const int64_t slots = TileCache<E>::slots_for(min64(p_.window, p_.seqlen_k),
                                                  tasks.queries_per_task(), dim_padded_);
    std::atomic<int64_t> next{0};
    threads.parallel_for(workers, [&](int64_t begin, int64_t end) {
      [[maybe_unused]] const MatrixUnit matrix_unit;
      [[maybe_unused]] const FlushSubnormals flush_subnormals;
      AttnScratch<E> scratch(tasks.rows_per_task(), slots, dim_padded_, rotary_);
      for (int64_t worker = begin; worker < end; ++worker)
        for (int64_t t; (t = next.fetch_add(portion)) < tasks.count();)
          for (int64_t n = t; n < min64(t + portion, tasks.count()); ++n)
            run_task(tasks.task(n), scratch);
    });
  }

  KernelPlan plan(int threads) const {
    const AttnTasks tasks = attn_tasks(threads);
    KernelPlan plan;
    plan.block_m = tasks.rows_per_task();
    plan.block_n = kTileKeys<E>;
    plan.blocks = tasks.count();
    plan.threads = threads;
    return plan;
  }

  // Multiply-adds of a forward at the most.
  int64_t work() const {
    const int64_t keys =
        min64(p_.seqlen_k, min64(p_.window, kUnbounded) + min64(p_.n_global, kUnbounded));
    return p_.batch * p_.heads_q * p_.seqlen_q * keys * p_.head_dim * 2;
  }

 private:
  // One branch of a task: its keys, and the key tiles that are still to be met.
  struct Walk {
    BranchIndex kind;
    KeySource<T> source;
    BranchWalk met;
    int64_t begin = met.tiles.begin, end = met.tiles.end;

    bool done() const { return end <= begin; }

    // The last tiles that are left, `most` at most.
    Range take(int64_t most) {
      const Range taken = {max64(begin, end - most), end};
      end = taken.lo;
      return taken;
    }
  };

  AttnTasks attn_tasks(int threads) const {
    const int64_t row_bytes = dim_padded_ * static_cast<int64_t>(sizeof(float) + sizeof(E));
    const int64_t blocks = min64(kTaskRows, kRowBytes / row_bytes) / kBlockRows<E>;
    return AttnTasks(p_, threads, max64(1, blocks) * kBlockRows<E>, kMaxHeadsPerTask);
  }

  void run_task(const AttnTask& t, AttnScratch<E>& s) const {
    const Range held = {t.key_position, t.key_position + t.keys};
    const KeySource<T> own = {row_at<const T>(p_.k, p_.k_stride, t.batch, t.head_kv, t.key_index),
                              row_at<const T>(p_.v, p_.v_stride, t.batch, t.head_kv, t.key_index),
                              p_.k_stride.seq,
                              p_.v_stride.seq,
                              t.key_position,
                              p_.k_rotated,
                              KeyFrame::kOwnPosition};
    KeySource<T> global = own;
    Range globals = held;
    if (p_.global_k != nullptr) {
      global = {row_at<const T>(p_.global_k, p_.global_k_stride, t.batch, t.head_kv),
                row_at<const T>(p_.global_v, p_.global_v_stride, t.batch, t.head_kv),
                p_.global_k_stride.seq,
                p_.global_v_stride.seq,
                0,
                0,
                KeyFrame::kOwnPosition};
      globals = {0, p_.n_global};
    }
    // Tiles are packed for all tasks of a sequence. What none of its queries sees, like a global
    // slot that no token has reached, becomes zeros.
    const Range all = {held.hi - (p_.cu_seqlens != nullptr ? t.keys : p_.seqlen_q), held.hi};
    const Range queries = {t.position, t.position + t.queries};
    auto walk = [&](BranchIndex kind, KeySource<T> source, KeyFrame frame) {
      source.frame = frame;
      const Branch branch =
          branch_at(kind, held, globals, p_.n_global, p_.window, p_.max_distance).seen_by(all);
      return Walk{kind, source, branch_walk(branch, queries, source.first, kTileKeys<E>)};
    };
    Walk far = walk(kFar, global, KeyFrame::kMaxDistance);
    Walk near = walk(kNear, global, KeyFrame::kOwnPosition);
    Walk window = walk(kWindow, own, KeyFrame::kOwnPosition);

    // Every block of rows meets as many tiles in one go as are kept at the same time; mostly that
    // is all of them, and the block's queries and outputs stay in the first cache level.
    const int64_t rows = t.queries * t.heads;
    for (bool first = true, last = false; !last; first = false) {
      const bool raw = !far.done();
      const Range far_tiles = far.take(s.tiles.slots(far.kind));
      const bool to_rotate = far.done() && (first || raw) && !(raw && rotary_.pairs == 0);
      const Range near_tiles = far.done() ? near.take(s.tiles.slots(near.kind)) : Range{0, 0};
      const Range window_tiles =
          far.done() && near.done() ? window.take(s.tiles.slots(window.kind)) : Range{0, 0};
      last = far.done() && near.done() && window.done();
      for (int64_t row = 0; row < rows; row += kBlockRows<E>) {
        const RowBlock b = {row, std::min<int64_t>(kBlockRows<E>, rows - row)};
        if (first) {
          std::fill_n(s.states.max + b.row, b.rows, minus_infinity());
          std::fill_n(s.states.sum + b.row * kLanes, b.rows * kLanes, 0.0f);
          std::fill_n(s.states.out + b.row * dim_padded_, b.rows * dim_padded_, 0.0f);
          if (raw) load_queries(t, b, /*rotate=*/false, s);
          read_ahead(t, b, s);
        }
        if (raw) meet(t, far, far_tiles, b, s);
        if (to_rotate) load_queries(t, b, /*rotate=*/true, s);
        meet(t, near, near_tiles, b, s);
        meet(t, window, window_tiles, b, s);
        if (last) store(t, b, s);
      }
    }
  }

  // Some neighbouring rows of a task.
  struct RowBlock {
    int64_t row, rows;
  };

  void load_queries(const AttnTask& t, RowBlock b, bool rotate, AttnScratch<E>& s) const {
    const TileRotation& r = s.rotation;
    const int64_t first = b.row / t.heads;
    if (rotate && rotary_.pairs > 0)
      rotation_table(t.position + first, rotary_, rotary_.scaling, r.base_cos, r.base_sin);
    int64_t n = first, h = b.row % t.heads;
    for (int64_t row = b.row; row < b.row + b.rows; ++row) {
      const T* q = row_at<const T>(p_.q, p_.q_stride, t.batch, t.head_q + h, t.query + n);
      E* out = s.queries + row * dim_padded_;
      if (std::is_same_v<T, E> && rotary_.pairs == 0 && dim_ == dim_padded_) {
        std::memcpy(out, q, dim_ * sizeof(E));
      } else if (rotate && rotary_.pairs > 0) {
        const Angles offset = r.offset(rotary_, n - first);
        rotate_into(rotary_, {r.base_cos, r.base_sin}, &offset, q, dim_, dim_padded_, r.cos, r.sin,
                    s.row, out);
      } else {
        load_row(q, dim_, s.row, dim_padded_);
        scale_rotary_dims(rotary_, s.row);
        store_row(s.row, dim_padded_, out);
      }
      if (++h == t.heads) h = 0, ++n;
    }
  }

  // What will be wanted next and does not stand in a cache: the outputs' memory, the queries of the
  // next block, the keys and values that the next task sees beyond this one.
  void read_ahead(const AttnTask& t, RowBlock b, AttnScratch<E>& s) const {
    const int64_t first = b.row / t.heads;
    const int64_t last = (b.row + b.rows - 1) / t.heads, queries = last + 1 - first;
    const auto add = [&](const void* base, const Strides& stride, int64_t head, int64_t n,
                         int64_t rows) {
      s.ahead.add(row_at<const T>(base, stride, t.batch, head, n),
                  stride.seq * static_cast<int64_t>(sizeof(T)), rows);
    };
    s.ahead.restart(dim_ * static_cast<int64_t>(sizeof(T)));
    for (int64_t h = t.head_q; h < t.head_q + t.heads; ++h) {
      add(p_.out, p_.out_stride, h, t.query + first, queries);
      add(p_.q, p_.q_stride, h, t.query + last + 1, min64(queries, t.queries - last - 1));
    }
    const int64_t key = t.position - t.key_position + first + t.queries;
    const int64_t keys = min64(queries, t.keys - key);
    add(p_.k, p_.k_stride, t.head_kv, t.key_index + key, keys);
    add(p_.v, p_.v_stride, t.head_kv, t.key_index + key, keys);
    s.ahead.spread(b.rows * ((min64(p_.window, t.keys) + queries) / kStripKeys + 1));
  }

  // One block of rows against some tiles of a branch. The latest keys come first: with ALiBi they
  // have the largest scores, which then stay the reference.
  void meet(const AttnTask& t, const Walk& walk, Range tiles, RowBlock b, AttnScratch<E>& s) const {
    for (int64_t index = tiles.hi - 1; index >= tiles.lo; --index) {
      const int64_t first = walk.met.position(index);
      const Range wanted = intersect(walk.met.branch.keys, {first, first + kTileKeys<E>});
      const auto& tile = s.tiles.get(walk.kind, t.sequence, t.head_kv, index, [&](auto& slot) {
        pack_tile(walk.source, first, wanted, dim_, dim_padded_, rotary_, p_.max_distance,
                  s.rotation, s.row, s.key_rows, slot.keys, slot.values);
      });
      run_block(t, walk.met.branch, walk.source.frame, tile, first, b.row, b.rows, s);
    }
  }

  // One block of rows against one packed tile of keys, and what each row sees of it.
  struct Meeting {
    const AttnTask& t;
    const typename TileCache<E>::Tile& tile;
    KeyFrame frame;
    int64_t tile_first;  // position of the tile's first key
    int64_t row0, rows;
    Range queries;
    int lo[kBlockRows<E>], hi[kBlockRows<E>];  // columns of the tile that a row sees
    int all_lo, all_hi;                        // columns that all rows see

    int64_t query(int64_t r) const { return t.position + (row0 + r) / t.heads; }
    int64_t head(int64_t r) const { return (row0 + r) % t.heads; }
  };

  void run_block(const AttnTask& t, const Branch& branch, KeyFrame frame,
                 const typename TileCache<E>::Tile& tile, int64_t tile_first, int64_t row0,
                 int64_t rows, AttnScratch<E>& s) const {
    Meeting m = {t, tile, frame, tile_first, row0, rows, {}, {}, {}, 0, kTileKeys<E>};
    m.queries = {m.query(0), m.query(rows - 1) + 1};
    const Range seen =
        intersect(branch.visible_keys(m.queries), {tile_first, tile_first + kTileKeys<E>});
    if (seen.empty()) return;
    for (int64_t i = m.queries.lo, r = 0; r < rows; ++i) {
      const Range row_sees = intersect(branch.visible_keys({i, i + 1}), seen);
      const int lo = static_cast<int>(row_sees.lo - tile_first);
      const int hi = static_cast<int>(row_sees.hi - tile_first);
      for (int64_t h = m.head(r); h < t.heads && r < rows; ++h, ++r) m.lo[r] = lo, m.hi[r] = hi;
      m.all_lo = std::max(m.all_lo, lo), m.all_hi = std::min(m.all_hi, hi);
    }
    if (p_.score.has_table()) fill_biases(t, m.queries.hi - 1 - tile_first, s);

    const int begin = static_cast<int>(seen.lo - tile_first) / kColGrain<E> * kColGrain<E>;
    const int end =
        (static_cast<int>(seen.hi - tile_first) + kColGrain<E> - 1) / kColGrain<E> * kColGrain<E>;
    with_scores<E>(map_, [&](auto scores) { run_strips(m, begin, end, scores, s); });
  }

  // Strip by strip of the columns [begin, end), the latest keys first: scores, then probabilities.
  // The values follow for all strips at once, or before a row's reference moves.
  template <typename Scores>
  void run_strips(const Meeting& m, int begin, int end, Scores scores, AttnScratch<E>& s) const {
    int done = end;  // columns from here on are in the outputs
    for (int to = end, from; to > begin; to = from) {
      from = std::max(begin, to - kStripKeys);
      const Operand<E> keys = keys_from(m.tile.keys, from, dim_padded_);
      gemm<false>(static_cast<int>(m.rows), to - from, dim_padded_,
                  s.queries + m.row0 * dim_padded_, dim_padded_, keys.data, keys.ld, s.scores,
                  kStripKeys);
      const bool full = to - from == kStripKeys && m.all_lo <= from && to <= m.all_hi;
      int64_t i = m.queries.lo, h = m.head(0);
      for (int64_t r = 0; r < m.rows; ++r) {
        const int row = static_cast<int>(m.row0 + r);
        const int lo = std::max(m.lo[r] - from, 0), hi = std::min(m.hi[r], to) - from;
        float* products = s.scores + r * kStripKeys;
        E* probs = s.probs + r * kProbStride<E> + from;
        if constexpr (scores.kMapped) scores.set_row(bias(m, i, h, from, s));
        if (++h == m.t.heads) h = 0, ++i;
        s.ahead.step();
        if (full ? soften_row<true>(s.states, row, scores, products, probs, lo, hi, to - from)
                 : soften_row<false>(s.states, row, scores, products, probs, lo, hi, to - from))
          continue;
        add_values(m, to, done, s);
        done = to;
        if constexpr (scores.kMapped) scores.map(products, lo, hi);
        softmax_row(s.states, row, dim_padded_, products, probs, lo, hi, 0, to - from, map_.factor,
                    row_max(products, lo, hi) * map_.factor);
      }
    }
    add_values(m, begin, done, s);
  }

  // The probabilities of the columns [begin, end) times their values.
  void add_values(const Meeting& m, int begin, int end, AttnScratch<E>& s) const {
    if (begin >= end) return;
    const Operand<E> values = values_from(m.tile.values, begin);
    gemm<true>(static_cast<int>(m.rows), dim_padded_, end - begin, s.probs + begin, kProbStride<E>,
               values.data, values.ld, s.states.out + m.row0 * dim_padded_, dim_padded_);
  }

  // The biases of each head for one block: of the block's last query, at `distance` to the tile's
  // first key, and for the queries before it the same from a later entry on.
  void fill_biases(const AttnTask& t, int64_t distance, AttnScratch<E>& s) const {
    for (int64_t h = 0; h < t.heads; ++h)
      biases_by_column(p_.score, t.head_q + h, distance, kBiasStride<E>,
                       s.biases + h * kBiasStride<E>);
  }

  // Of head h of the query at position i, from a column of the tile on.
  RowBias bias(const Meeting& m, int64_t i, int64_t h, int column, const AttnScratch<E>& s) const {
    const bool far = m.frame == KeyFrame::kMaxDistance;
    const int64_t distance = far ? p_.max_distance : i - m.tile_first - column;
    RowBias bias = {slope_of(p_.score, m.t.head_q + h), static_cast<float>(distance),
                    far ? 0.0f : 1.0f};
    if (p_.score.has_table())
      bias.table = s.biases + h * kBiasStride<E> + m.queries.hi - 1 - i + column;
    return bias;
  }

  void store(const AttnTask& t, RowBlock b, AttnScratch<E>& s) const {
    int64_t n = t.query + b.row / t.heads, h = b.row % t.heads;
    for (int64_t row = b.row; row < b.row + b.rows; ++row) {
      const int64_t head = t.head_q + h;
      const SoftmaxState state = {s.states.max[row],
                                  vreduce_add(vload(s.states.sum + row * kLanes))};
      const SoftmaxEnd end = finish(state, p_.score, head);
      store_row(s.states.out + row * dim_padded_, dim_,
                row_at<T>(p_.out, p_.out_stride, t.batch, head, n), end.out_scale);
      p_.lse[(t.batch * p_.heads_q + head) * p_.seqlen_q + n] = end.lse;
      if (++h == t.heads) h = 0, ++n;
    }
  }

  const LambdaAttnParams& p_;
  const Rotary& rotary_;
  ScoreMap map_;
  int dim_;
  int dim_padded_;
};

template <typename T>
void run(const LambdaAttnParams& p, const Rotary& rotary, const Threads& threads) {
  LambdaAttnForward<T>(p, rotary).run(threads);
}
