// Λ attention backward, tile by tile.
// Included inside namespace lminf::cpu::LMINF_ISA.
//
//   P = exp(s - lse)    dV = Pᵀ dO    dS = P ∘ (dO Vᵀ - δ)    dQ = scale dS K    dK = scale dSᵀ Q
//
// A unit (plan.h) takes its queries in ascending blocks of some hundred rows, and each block meets
// the tiles of keys that it sees: those of the near and the window branch with its queries rotated,
// then those of the far branch with them raw. A tile's gradients stay with the thread, in the
// tile's own frame and transposed, until the windows have left it behind; then they are rotated
// back and either stored, or kept for the sum over units. All five products run over packed tiles
// (pack.h), each element once.

// What the units of one call sum up for the end.
struct BackwardPartials {
  float* rows;    // [partial_rows][dK, dV][D] un-rotated
  float* sinks;   // [units][heads of a key head]
  float* biases;  // [units][heads of a key head][n_distances]
};

template <typename T>
class LambdaAttnBackward {
  using E = PackedType<T>;
  using S = BackwardScratch<E>;

 public:
  LambdaAttnBackward(const LambdaAttnBackwardParams& params, const Rotary& rotary)
      : b_(params),
        p_(params),
        rotary_(rotary),
        map_(p_.score),
        plan_(p_),
        dim_(static_cast<int>(p_.head_dim)),
        group_(p_.heads_q / p_.heads_kv) {
    const int grain = std::max(kKGrain<E>, kLanes);
    dim_padded_ = (dim_ + grain - 1) / grain * grain;
    // Heads of a query stand next to each other; where there are many, some at a time.
    heads_ = min64(group_, kMaxHeadsPerTask);
    queries_ = max64(1, kGradRows<E> / heads_);
  }

  void run(const Threads& threads) const {
    const int64_t units = static_cast<int64_t>(plan_.units().size());
    std::unique_ptr<float[]> rows(new float[plan_.partial_rows() * 2 * dim_]);
    std::unique_ptr<float[]> sinks(new float[b_.grad_sinks ? units * group_ : 0]);
    std::unique_ptr<float[]> biases(
        new float[b_.grad_biases ? units * group_ * p_.score.n_distances : 0]);
    const BackwardPartials partials = {rows.get(), sinks.get(), biases.get()};

    const typename S::Sizes sizes = scratch_sizes();
    std::atomic<int64_t> next{0};
    threads.parallel_for(min64(threads.count, units), [&](int64_t begin, int64_t end) {
      [[maybe_unused]] const MatrixUnit matrix_unit;
      [[maybe_unused]] const FlushSubnormals flush_subnormals;
      S scratch(sizes, rotary_);
      for (int64_t worker = begin; worker < end; ++worker)
        for (int64_t u; (u = next.fetch_add(1)) < units;) run_unit(u, partials, scratch);
    });
    sum_up(partials, threads);
  }

 private:
  enum Kind { kWindow, kNear, kFar };

  // A branch of a unit: where its keys stand, and where their tiles' gradients.
  struct Walk {
    Kind kind;
    Branch branch;
    KeySource<T> source;
    int64_t first_tile;  // of those of the near and the far branch that are kept
  };

  // Some rows (queries x heads) of a unit.
  struct Block {
    int64_t query;     // of the sequence
    int64_t position;  // of that
    int64_t queries;
    int64_t head_q, heads;  // first query head, and how many of the group
    int rows, padded;
  };

  struct UnitState {
    const BackwardSequence& sequence;
    const BackwardUnit& unit;
    float* rows;    // the call's partial sums
    float* biases;  // [heads of a key head][n_distances] of this unit, or null
    float* sinks;   // [heads of a key head], or null
  };

  typename S::Sizes scratch_sizes() const {
    typename S::Sizes n;
    int64_t longest = 1;
    for (const BackwardUnit& u : plan_.units()) longest = max64(longest, u.queries);
    n.rows = rows_padded(static_cast<int>(min64(queries_, longest) * heads_),
                         std::max(kRowGrain<E>, kLanes));
    n.dim_padded = dim_padded_;
    const auto tiles = [](int64_t keys) { return keys == 0 ? 0 : (keys - 2) / kTileKeys<E> + 2; };
    const int64_t span = min64(plan_.most_seen(), min64(p_.window, kUnbounded) + queries_);
    n.window_tiles = max64(1, tiles(span));
    n.global_tiles = tiles(plan_.most_global());
    const int64_t most = kTileCacheBytes / static_cast<int64_t>(GradTile<E>::bytes(dim_padded_));
    n.window_slots = max64(1, min64(n.window_tiles, most));
    n.global_slots = min64(n.global_tiles, max64(1, most / 4));
    return n;
  }

  template <typename U>
  static U* row(U* base, const Strides& stride, int64_t batch, int64_t head, int64_t n) {
    return base + batch * stride.batch + head * stride.head + n * stride.seq;
  }
  template <typename U>
  static const U* row(const void* base, const Strides& stride, int64_t batch, int64_t head,
                      int64_t n) {
    return row(static_cast<const U*>(base), stride, batch, head, n);
  }

  void run_unit(int64_t index, const BackwardPartials& partials, S& s) const {
    const BackwardUnit& unit = plan_.units()[index];
    const BackwardSequence& sequence = plan_.sequences()[unit.sequence];
    UnitState u = {sequence, unit, partials.rows, nullptr, nullptr};
    if (b_.grad_biases) {
      const int64_t n = group_ * p_.score.n_distances;
      u.biases = partials.biases + index * n;
      std::fill_n(u.biases, n, 0.0f);
    }
    if (b_.grad_sinks) {
      u.sinks = partials.sinks + index * group_;
      std::fill_n(u.sinks, group_, 0.0f);
    }
    for (GradTile<E>& tile : s.tiles) tile.index = -1;
    std::fill(s.held.begin(), s.held.end(), -1);
    const int64_t tile_floats = 2 * kTileKeys<E> * dim_padded_;
    std::fill_n(s.tile_grads + s.sizes.window_tiles * tile_floats,
                2 * s.sizes.global_tiles * tile_floats, 0.0f);

    const Walk window = walk(u, kWindow), near = walk(u, kNear), far = walk(u, kFar);
    for (int64_t n = 0; n < unit.queries; n += queries_) {
      for (int64_t head = 0; head < group_; head += heads_) {
        Block b;
        b.query = unit.first + n;
        b.position = sequence.position + b.query;
        b.queries = min64(queries_, unit.queries - n);
        b.head_q = unit.head_kv * group_ + head;
        b.heads = min64(heads_, group_ - head);
        b.rows = static_cast<int>(b.queries * b.heads);
        b.padded = rows_padded(b.rows, kRowGrain<E>);
        run_block(u, window, near, far, b, s);
      }
    }
    for (int64_t slot = 0; slot < s.sizes.window_tiles; ++slot)
      if (s.held[slot] >= 0) flush(u, window, s.held[slot], s);
    std::fill_n(u.rows + unit.global_rows * 2 * dim_, (unit.global.hi - unit.global.lo) * 2 * dim_,
                0.0f);
    for (const Walk* w : {&near, &far})
      for (int64_t n = 0; n < global_tiles(u, *w); ++n) flush(u, *w, w->first_tile + n, s);
  }

  Walk walk(const UnitState& u, Kind kind) const {
    const BackwardSequence& q = u.sequence;
    const int64_t head = u.unit.head_kv;
    const Range held = {q.key_position, q.key_position + q.keys};
    Walk w = {kind, window_branch(held, p_.window), {}, 0};
    if (kind == kNear)
      w.branch = near_branch(q.global_held, p_.n_global, p_.window, p_.max_distance);
    if (kind == kFar) w.branch = far_branch(q.global_held, p_.n_global, p_.max_distance);
    const bool own = kind == kWindow || p_.global_k == nullptr;
    w.source = {own ? row<T>(p_.k, p_.k_stride, q.batch, head, q.key_index)
                    : row<T>(p_.global_k, p_.global_k_stride, q.batch, head, 0),
                own ? row<T>(p_.v, p_.v_stride, q.batch, head, q.key_index)
                    : row<T>(p_.global_v, p_.global_v_stride, q.batch, head, 0),
                own ? p_.k_stride.seq : p_.global_k_stride.seq,
                own ? p_.v_stride.seq : p_.global_v_stride.seq,
                own ? q.key_position : 0,
                own ? p_.k_rotated : 0,
                kind == kFar ? KeyFrame::kMaxDistance : KeyFrame::kOwnPosition};
    if (kind != kWindow) w.first_tile = (u.unit.global.lo - w.source.first) / kTileKeys<E>;
    return w;
  }

  // Tiles of the unit's global keys.
  int64_t global_tiles(const UnitState& u, const Walk& w) const {
    const Range keys = u.unit.global;
    if (keys.empty()) return 0;
    return (keys.hi - 1 - w.source.first) / kTileKeys<E> + 1 - w.first_tile;
  }

  void run_block(const UnitState& u, const Walk& window, const Walk& near, const Walk& far,
                 const Block& b, S& s) const {
    std::fill_n(s.query_grads, int64_t{b.padded} * dim_padded_, 0.0f);
    load_grads(u, b, s);
    load_queries(u, b, /*rotate=*/true, s);
    meet_all(u, window, b, s);
    meet_all(u, near, b, s);
    if (!far.branch.empty() && rotary_.pairs > 0 &&
        !far.branch.visible_keys({b.position, b.position + b.queries}).empty()) {
      rotate_query_grads_back(b, s);
      load_queries(u, b, /*rotate=*/false, s);
      meet_all(u, far, b, s);
    } else {
      if (rotary_.pairs == 0) meet_all(u, far, b, s);
      rotate_query_grads_back(b, s);
    }
    store_query_grads(u, b, s);
  }

  // Calls f(row, query of the block, query head) for each row of a block.
  template <typename F>
  static void each_row(const Block& b, const F& f) {
    int row = 0;
    for (int64_t n = 0; n < b.queries; ++n)
      for (int64_t h = b.head_q; h < b.head_q + b.heads; ++h) f(row++, n, h);
  }

  int64_t lse_index(const UnitState& u, int64_t head, int64_t query) const {
    return (u.sequence.batch * p_.heads_q + head) * p_.seqlen_q + u.sequence.query + query;
  }

  // dO, and of each row what row_gradients wants. Rows that see nothing become zeros.
  void load_grads(const UnitState& u, const Block& b, S& s) const {
    float* x = s.float_rows;
    each_row(b, [&](int r, int64_t n, int64_t h) {
      E* grads = s.grads + r * dim_padded_;
      const int64_t index = lse_index(u, h, b.query + n);
      const float lse = p_.lse[index];
      if (lse == minus_infinity()) {
        std::memset(grads, 0, dim_padded_ * sizeof(E));
        s.row_state[r] = {-minus_infinity(), 0.0f};
        return;
      }
      const int64_t query = u.sequence.query + b.query + n;
      const T* out = row<T>(p_.out, p_.out_stride, u.sequence.batch, h, query);
      load_row(row<T>(b_.grad_out, b_.grad_out_stride, u.sequence.batch, h, query), dim_, x,
               dim_padded_);
      float delta = dot_row(out, x);
      float share = 1.0f;  // of the keys in the softmax's denominator
      if (p_.score.sink_logits != nullptr) {
        const float sink = p_.score.sink_logits[h];
        share = 1.0f / (1.0f + std::exp(sink - lse));
        if (u.sinks) u.sinks[h - u.unit.head_kv * group_] -= delta / (1.0f + std::exp(lse - sink));
      }
      store_row(x, dim_padded_, grads, share);
      delta *= share;
      if (b_.grad_lse != nullptr) delta -= b_.grad_lse[index];
      s.row_state[r] = {lse * kLog2e, delta};
    });
    zero_rest(b, s.grads);
    pack_columns(s.grads, b.padded, dim_padded_, s.grad_columns);
  }

  float dot_row(const T* x, const float* y) const {
    Vec sum = vset(0.0f);
    int d = 0;
    for (; d + kLanes <= dim_; d += kLanes) sum = vfma(vload(x + d), vload(y + d), sum);
    float rest = 0.0f;
    for (; d < dim_; ++d) rest += to_float(x[d]) * y[d];
    return vreduce_add(sum) + rest;
  }

  void zero_rest(const Block& b, E* rows) const {
    std::memset(rows + int64_t{b.rows} * dim_padded_, 0,
                int64_t{b.padded - b.rows} * dim_padded_ * sizeof(E));
  }

  void load_queries(const UnitState& u, const Block& b, bool rotate, S& s) const {
    const TileRotation& t = s.rotation;
    const bool turn = rotate && rotary_.pairs > 0;
    each_row(b, [&](int r, int64_t n, int64_t h) {
      // The table of offsets has as many rows as a tile has keys.
      const int64_t offset = n % kTileKeys<E>;
      if (turn && offset == 0 && h == b.head_q)
        rotation_table(b.position + n, rotary_, rotary_.scaling, t.base_cos, t.base_sin);
      E* out = s.queries + r * dim_padded_;
      if (s.row_state[r].lse == -minus_infinity()) {
        std::memset(out, 0, dim_padded_ * sizeof(E));
        return;
      }
      const T* q = row<T>(p_.q, p_.q_stride, u.sequence.batch, h, u.sequence.query + b.query + n);
      if (turn) {
        const Angles angles = t.offset(rotary_, offset);
        rotate_into(rotary_, {t.base_cos, t.base_sin}, &angles, q, dim_, dim_padded_, t.cos, t.sin,
                    s.float_rows, out);
      } else {
        load_row(q, dim_, s.float_rows, dim_padded_);
        scale_rotary_dims(rotary_, s.float_rows);
        store_row(s.float_rows, dim_padded_, out);
      }
    });
    zero_rest(b, s.queries);
    pack_columns(s.queries, b.padded, dim_padded_, s.query_columns);
  }

  void rotate_query_grads_back(const Block& b, S& s) const {
    if (rotary_.pairs == 0) return;
    const TileRotation& t = s.rotation;
    each_row(b, [&](int r, int64_t n, int64_t h) {
      const int64_t offset = n % kTileKeys<E>;
      if (offset == 0 && h == b.head_q)
        rotation_table(b.position + n, rotary_, 1.0f, t.base_cos, t.base_sin);
      const Angles angles = t.offset(rotary_, offset);
      rotate_back(rotary_, {t.base_cos, t.base_sin}, &angles, t.cos, t.sin,
                  s.query_grads + r * dim_padded_);
    });
  }

  void store_query_grads(const UnitState& u, const Block& b, S& s) const {
    each_row(b, [&](int r, int64_t n, int64_t h) {
      float* grads = s.query_grads + r * dim_padded_;
      scale_rotary_dims(rotary_, grads);
      store_row(grads, dim_,
                row(static_cast<T*>(b_.grad_q), b_.grad_q_stride, u.sequence.batch, h,
                    u.sequence.query + b.query + n),
                p_.score.scale);
    });
  }

  void meet_all(const UnitState& u, const Walk& w, const Block& b, S& s) const {
    if (w.branch.empty()) return;
    const Range queries = {b.position, b.position + b.queries};
    const TileRanges tiles = key_tiles(w.branch, queries, w.source.first, kTileKeys<E>);
    for (int64_t index = tiles.begin; index < tiles.end; ++index) {
      const int64_t first = w.source.first + index * kTileKeys<E>;
      GradTile<E>& tile = packed_tile(w, index, s);
      if (tile.index != index) {
        const Range wanted = intersect(w.branch.keys, {first, first + kTileKeys<E>});
        pack_grad_tile(w.source, first, wanted, dim_, dim_padded_, rotary_, p_.max_distance,
                       s.rotation, s.float_rows, s.rows, tile);
        tile.index = index;
      }
      meet(u, w, b, tile, first, grads_of(u, w, index, s), s);
    }
  }

  static GradTile<E>& packed_tile(const Walk& w, int64_t index, S& s) {
    const typename S::Sizes& n = s.sizes;
    if (w.kind == kWindow) return s.tiles[index % n.window_slots];
    return s.tiles[n.window_slots + (w.kind == kFar ? n.global_slots : 0) + index % n.global_slots];
  }

  // [dKᵀ, dVᵀ][Dp][kTileKeys] of a tile; one of the window takes the place of one that the windows
  // have left behind.
  float* grads_of(const UnitState& u, const Walk& w, int64_t index, S& s) const {
    if (w.kind != kWindow) return tile_grads(w, index, s);
    int64_t& held = s.held[index % s.sizes.window_tiles];
    if (held != index) {
      if (held >= 0) flush(u, w, held, s);
      held = index;
      std::fill_n(tile_grads(w, index, s), 2 * kTileKeys<E> * dim_padded_, 0.0f);
    }
    return tile_grads(w, index, s);
  }

  float* tile_grads(const Walk& w, int64_t index, const S& s) const {
    const int64_t n = w.kind == kWindow ? index % s.sizes.window_tiles
                                        : s.sizes.window_tiles + index - w.first_tile +
                                              (w.kind == kFar ? s.sizes.global_tiles : 0);
    return s.tile_grads + n * 2 * kTileKeys<E> * dim_padded_;
  }

  // What some neighbouring rows of a block see of a tile.
  struct Sight {
    int first, rows, padded;
    Range queries;       // their positions
    int begin, end;      // columns that one of them sees, in whole grains
    int all_lo, all_hi;  // columns that all of them see
    int lo[kBlockRows<E>], hi[kBlockRows<E>];
  };

  Sight look(const Walk& w, const Block& b, int first, int64_t tile_first) const {
    Sight m;
    m.first = first;
    m.rows = std::min(kBlockRows<E>, b.rows - first);
    m.padded = std::min(kBlockRows<E>, b.padded - first);
    m.queries = {b.position + first / b.heads, b.position + (first + m.rows - 1) / b.heads + 1};
    m.begin = m.end = 0, m.all_lo = 0, m.all_hi = kTileKeys<E>;
    const Range seen =
        intersect(w.branch.visible_keys(m.queries), {tile_first, tile_first + kTileKeys<E>});
    if (seen.empty()) return m;
    m.begin = static_cast<int>(seen.lo - tile_first) / kColGrain<E> * kColGrain<E>;
    m.end = rows_padded(static_cast<int>(seen.hi - tile_first), kColGrain<E>);
    for (int r = 0; r < m.rows; ++r) {
      const int64_t i = b.position + (first + r) / b.heads;
      const Range row_sees = intersect(w.branch.visible_keys({i, i + 1}), seen);
      m.lo[r] = static_cast<int>(row_sees.lo - tile_first);
      m.hi[r] = static_cast<int>(row_sees.hi - tile_first);
      m.all_lo = std::max(m.all_lo, m.lo[r]), m.all_hi = std::min(m.all_hi, m.hi[r]);
    }
    return m;
  }

  void meet(const UnitState& u, const Walk& w, const Block& b, const GradTile<E>& tile,
            int64_t tile_first, float* grads, S& s) const {
    constexpr int kMost = (kGradRows<E> + kMaxHeadsPerTask) / kBlockRows<E> + 1;
    int begin[kMost], end[kMost];
    const int n = (b.rows + kBlockRows<E> - 1) / kBlockRows<E>;
    for (int i = 0; i < n; ++i) {
      const Sight m = look(w, b, i * kBlockRows<E>, tile_first);
      begin[i] = m.begin, end[i] = m.end;
      if (m.begin >= m.end) continue;
      with_scores<E>(map_,
                     [&](auto scores) { run_strips(u, w, b, m, tile, tile_first, scores, s); });
      gemm<true>(m.padded, dim_padded_, m.end - m.begin, s.score_grads + m.begin, kProbStride<E>,
                 values_from(tile.key_rows, m.begin).data, kLanes * kTileKeys<E>,
                 s.query_grads + m.first * dim_padded_, dim_padded_);
    }
    // The tile's own gradients: for each run of columns the rows that have something there, which
    // follow each other since a branch is a band.
    const auto rows_of = [&](int column) {
      int lo = 0, hi = n;
      while (lo < hi && !(begin[lo] <= column && column < end[lo])) ++lo;
      while (lo < hi && !(begin[hi - 1] <= column && column < end[hi - 1])) --hi;
      return Range{lo, hi};
    };
    for (int from = 0, to; from < kTileKeys<E>; from = to) {
      const Range blocks = rows_of(from);
      for (to = from + kColGrain<E>; to < kTileKeys<E>; to += kColGrain<E>) {
        const Range other = rows_of(to);
        if (other.lo != blocks.lo || other.hi != blocks.hi) break;
      }
      if (blocks.empty()) continue;
      const int lo = static_cast<int>(blocks.lo) * kBlockRows<E>;
      const int hi = std::min(static_cast<int>(blocks.hi) * kBlockRows<E>, b.padded);
      const int64_t panel = from / kLanes * kPanelStride<E> + lo * kLanes;
      gemm<true>(dim_padded_, to - from, hi - lo, s.query_columns + lo, kColumnStride<E>,
                 s.grad_panels + panel, kPanelStride<E>, grads + from, kTileKeys<E>);
      gemm<true>(dim_padded_, to - from, hi - lo, s.grad_columns + lo, kColumnStride<E>,
                 s.prob_panels + panel, kPanelStride<E>, grads + kTileKeys<E> * dim_padded_ + from,
                 kTileKeys<E>);
    }
  }

  // P and dS of some rows, strip by strip of a tile's columns.
  template <typename Scores>
  void run_strips(const UnitState& u, const Walk& w, const Block& b, const Sight& m,
                  const GradTile<E>& tile, int64_t tile_first, Scores scores, S& s) const {
    const int64_t distance = m.queries.hi - 1 - tile_first;  // of the last query to column 0
    if (p_.score.distance_bias != nullptr) {
      for (int64_t h = 0; h < b.heads; ++h)
        biases_by_column(p_.score, b.head_q + h, distance, kBiasStride<E>,
                         s.biases + h * kBiasStride<E>);
    }
    if (u.biases) std::fill_n(s.bias_grads, b.heads * kBiasStride<E>, 0.0f);
    for (int from = m.begin, to; from < m.end; from = to) {
      to = std::min(from + kStripKeys, m.end);
      const Operand<E> keys = keys_from(tile.keys, from, dim_padded_);
      const Operand<E> values = keys_from(tile.values, from, dim_padded_);
      gemm<false>(m.padded, to - from, dim_padded_, s.queries + m.first * dim_padded_, dim_padded_,
                  keys.data, keys.ld, s.scores, kStripKeys);
      gemm<false>(m.padded, to - from, dim_padded_, s.grads + m.first * dim_padded_, dim_padded_,
                  values.data, values.ld, s.grad_probs, kStripKeys);
      const bool full = m.padded == m.rows && m.all_lo <= from && to <= m.all_hi;
      const int64_t panel = from / kLanes * kPanelStride<E>;
      for (int r = 0; r < m.padded; ++r) {
        const bool is_row = r < m.rows;
        const int64_t i = b.position + (m.first + r) / b.heads, h = (m.first + r) % b.heads;
        if constexpr (scores.kMapped) scores.set_row(bias(w, b, m, i, h, tile_first, from, s));
        const GradRow state = is_row ? s.row_state[m.first + r] : GradRow{-minus_infinity(), 0.0f};
        const int lo = is_row ? m.lo[r] - from : 0, hi = is_row ? m.hi[r] - from : 0;
        const auto run = [&](auto all_visible) {
          row_gradients<decltype(all_visible)::value>(
              scores, map_, state, m.first + r, s.scores + r * kStripKeys,
              s.grad_probs + r * kStripKeys, lo, hi, to - from, s.prob_panels + panel,
              s.grad_panels + panel, s.score_grads + r * kProbStride<E> + from,
              u.biases && is_row ? s.bias_grads + bias_offset(m, i, h, from) : nullptr);
        };
        full ? run(std::true_type{}) : run(std::false_type{});
      }
    }
    if (u.biases) add_bias_grads(u, b, distance, s);
  }

  // Of head h of the query at position i, where the entry of a column stands in `biases`.
  static int64_t bias_offset(const Sight& m, int64_t i, int64_t h, int column) {
    return h * kBiasStride<E> + m.queries.hi - 1 - i + column;
  }

  RowBias bias(const Walk& w, const Block& b, const Sight& m, int64_t i, int64_t h,
               int64_t tile_first, int column, const S& s) const {
    const bool far = w.kind == kFar;
    const int64_t distance = far ? p_.max_distance : i - tile_first - column;
    RowBias bias = {0.0f, static_cast<float>(distance), far ? 0.0f : 1.0f};
    if (p_.score.alibi_slopes != nullptr) bias.slope = p_.score.alibi_slopes[b.head_q + h];
    if (p_.score.distance_bias != nullptr)
      bias.table = s.biases + bias_offset(m, std::min(i, m.queries.hi - 1), h, column);
    return bias;
  }

  // From columns to distances: entry c of a head is at distance - c.
  void add_bias_grads(const UnitState& u, const Block& b, int64_t distance, S& s) const {
    const int64_t last = p_.score.n_distances - 1;
    for (int64_t h = 0; h < b.heads; ++h) {
      const float* from = s.bias_grads + h * kBiasStride<E>;
      float* to = u.biases + (b.head_q + h - u.unit.head_kv * group_) * p_.score.n_distances;
      for (int64_t c = 0; c < min64(kBiasStride<E>, distance + 1); ++c)
        to[min64(distance - c, last)] += from[c];
    }
  }

  // A tile's gradients as those of un-rotated keys, into the outputs where they are the unit's own,
  // else into the partial sums.
  void flush(const UnitState& u, const Walk& w, int64_t index, S& s) const {
    const int64_t first = w.source.first + index * kTileKeys<E>;
    const Range keys =
        intersect(w.kind == kWindow ? u.unit.seen : u.unit.global, {first, first + kTileKeys<E>});
    if (keys.empty()) return;
    const float* grads = tile_grads(w, index, s);
    const bool far = w.kind == kFar;
    if (rotary_.pairs > 0)
      rotation_table(far ? -p_.max_distance : first, rotary_, 1.0f, s.rotation.base_cos,
                     s.rotation.base_sin);
    const int lo = static_cast<int>(keys.lo - first), hi = static_cast<int>(keys.hi - first);
    for (const bool is_key : {true, false}) {
      for (int block = lo / kLanes * kLanes; block < hi; block += kLanes) {
        for (int d = 0; d < dim_padded_; d += kLanes)
          transpose_square(reinterpret_cast<const uint32_t*>(grads + d * kTileKeys<E> + block),
                           kTileKeys<E>, reinterpret_cast<uint32_t*>(s.float_rows + d),
                           dim_padded_);
        for (int key = std::max(lo, block); key < std::min(hi, block + kLanes); ++key) {
          float* x = s.float_rows + (key - block) * dim_padded_;
          if (is_key) finish_key(w, first, key, s.rotation, x);
          w.kind == kWindow ? store_window(u, first + key, is_key, x)
                            : add_global(u, first + key, is_key, x);
        }
      }
      grads += kTileKeys<E> * dim_padded_;
    }
  }

  void finish_key(const Walk& w, int64_t first, int key, const TileRotation& t, float* x) const {
    scale_row(x, dim_padded_, p_.score.scale);
    if (rotary_.pairs == 0 || first + key - w.source.first < w.source.n_rotated) return;
    const Angles offset = t.offset(rotary_, key);
    rotate_back(rotary_, {t.base_cos, t.base_sin}, w.kind == kFar ? nullptr : &offset, t.cos, t.sin,
                x);
    scale_rotary_dims(rotary_, x);
  }

  float* partial(float* rows, int64_t n, bool is_key) const {
    return rows + (2 * n + (is_key ? 0 : 1)) * dim_;
  }

  T* key_grad(const BackwardSequence& q, int64_t head, int64_t position, bool is_key) const {
    const int64_t n = q.key_index + position - q.key_position;
    return is_key ? row(static_cast<T*>(b_.grad_k), b_.grad_k_stride, q.batch, head, n)
                  : row(static_cast<T*>(b_.grad_v), b_.grad_v_stride, q.batch, head, n);
  }

  void store_window(const UnitState& u, int64_t position, bool is_key, const float* x) const {
    const Range own = u.unit.own;
    if (position >= own.lo && position < own.hi)
      store_row(x, dim_, key_grad(u.sequence, u.unit.head_kv, position, is_key));
    else
      std::copy_n(x, dim_, partial(u.rows, u.unit.window_row(position), is_key));
  }

  void add_global(const UnitState& u, int64_t position, bool is_key, const float* x) const {
    float* sum = partial(u.rows, u.unit.global_row(position), is_key);
    for (int d = 0; d < dim_; ++d) sum[d] += x[d];
  }

  // The gradients that several units, or none, have a part in; each in the order of the units.
  void sum_up(const BackwardPartials& partials, const Threads& threads) const {
    const int64_t sequences = static_cast<int64_t>(plan_.sequences().size());
    const int64_t longest = max64(p_.seqlen_k, p_.global_k ? p_.n_global : 0);
    const int64_t blocks = (longest + kSumKeys - 1) / kSumKeys;
    threads.parallel_for(sequences * p_.heads_kv * blocks, [&](int64_t begin, int64_t end) {
      Scratch memory(Scratch::bytes<float>(dim_));
      float* sum = memory.take<float>(dim_);
      for (int64_t n = begin; n < end; ++n) {
        const BackwardSequence& q = plan_.sequences()[n / blocks / p_.heads_kv];
        const int64_t head = n / blocks % p_.heads_kv, first = n % blocks * kSumKeys;
        for (int64_t key = first; key < min64(first + kSumKeys, q.keys); ++key)
          sum_key(q, head, q.key_position + key, partials.rows, sum);
        if (p_.global_k == nullptr) continue;
        for (int64_t key = first; key < min64(first + kSumKeys, p_.n_global); ++key)
          sum_global(q, head, key, partials.rows, sum);
      }
    });
    if (b_.grad_sinks) sum_per_head(partials.sinks, 1, b_.grad_sinks);
    if (b_.grad_biases) sum_per_head(partials.biases, p_.score.n_distances, b_.grad_biases);
  }

  static constexpr int64_t kSumKeys = 64;

  void sum_key(const BackwardSequence& q, int64_t head, int64_t position, float* rows,
               float* sum) const {
    const BackwardUnit* units = plan_.units().data() + q.first_unit + head * q.segments;
    const auto in = [&](Range r) { return position >= r.lo && position < r.hi; };
    for (int64_t n = 0; n < q.segments; ++n)
      if (in(units[n].own)) return;  // it is there already
    for (const bool is_key : {true, false}) {
      std::fill_n(sum, dim_, 0.0f);
      for (int64_t n = 0; n < q.segments; ++n) {
        const BackwardUnit& u = units[n];
        if (in(u.seen)) add_row(partial(rows, u.window_row(position), is_key), sum);
        if (p_.global_k == nullptr && in(u.global))
          add_row(partial(rows, u.global_row(position), is_key), sum);
      }
      store_row(sum, dim_, key_grad(q, head, position, is_key));
    }
  }

  void sum_global(const BackwardSequence& q, int64_t head, int64_t position, float* rows,
                  float* sum) const {
    const BackwardUnit* units = plan_.units().data() + q.first_unit + head * q.segments;
    for (const bool is_key : {true, false}) {
      std::fill_n(sum, dim_, 0.0f);
      for (int64_t n = 0; n < q.segments; ++n)
        if (position >= units[n].global.lo && position < units[n].global.hi)
          add_row(partial(rows, units[n].global_row(position), is_key), sum);
      store_row(sum, dim_,
                is_key ? row(static_cast<T*>(b_.grad_global_k), b_.grad_global_k_stride, q.batch,
                             head, position)
                       : row(static_cast<T*>(b_.grad_global_v), b_.grad_global_v_stride, q.batch,
                             head, position));
    }
  }

  void add_row(const float* x, float* sum) const {
    for (int d = 0; d < dim_; ++d) sum[d] += x[d];
  }

  // [units][heads of a key head][n] summed over the units of each head: [Hq][n].
  void sum_per_head(const float* parts, int64_t n, float* sums) const {
    std::vector<double> total(p_.heads_q * n, 0.0);
    for (size_t u = 0; u < plan_.units().size(); ++u) {
      double* to = total.data() + plan_.units()[u].head_kv * group_ * n;
      for (int64_t i = 0; i < group_ * n; ++i) to[i] += parts[u * group_ * n + i];
    }
    std::copy(total.begin(), total.end(), sums);
  }

  const LambdaAttnBackwardParams& b_;
  const LambdaAttnParams& p_;
  const Rotary& rotary_;
  ScoreMap map_;
  BackwardPlan plan_;
  int dim_;
  int dim_padded_;
  int64_t group_;    // query heads per key head
  int64_t heads_;    // of these in one block
  int64_t queries_;  // queries of a block
};

template <typename T>
void run(const LambdaAttnBackwardParams& p, const Rotary& rotary, const Threads& threads) {
  LambdaAttnBackward<T>(p, rotary).run(threads);
}
