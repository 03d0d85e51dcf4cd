// How a backward is cut into units, and where what they share is summed up.
//
// A unit is a segment of a sequence's queries with all query heads of one key head. It owns the
// gradients of its queries. A key that only one unit sees has its gradient from there; what the
// units have to say of the others is kept in float32, a row for each unit that sees the key, and
// summed up in the order of the segments. The cut depends on shapes alone, so that the gradients
// are the same bit for bit with any number of threads.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "../../core/lambda_mask.h"
#include "../../params.h"

namespace lminf::cpu {

// A row of keys of one sequence: the whole of what a backward says of them.
struct BackwardSequence {
  int64_t batch;         // row of the batch (0 with cu_seqlens)
  int64_t query;         // first query, as an index of q's sequence dimension
  int64_t queries;       //
  int64_t position;      // of the first query
  int64_t key_index;     // first key, as an index of k's sequence dimension
  int64_t key_position;  // and its position
  int64_t keys;
  Range global_held;  // positions whose keys the near and far branches may read
  int64_t segment;    // queries of a unit
  int64_t segments;
  int64_t first_unit;  // those of a head follow each other, head by head
};

struct BackwardUnit {
  int64_t sequence, head_kv;
  int64_t first, queries;  // of the sequence's queries
  Range seen;              // positions of the keys that its windows show
  Range own;               // of these the ones that nothing else shows, here or in another unit
  Range global;            // positions of the keys that its near and far branches show
  int64_t window_rows;  // where its rows start in the partial sums: of keys in `seen` but not `own`
  int64_t global_rows;  // and of the keys in `global`

  // The row of a key that is in `seen` and not in `own`.
  int64_t window_row(int64_t position) const {
    return window_rows + position - (position < own.lo ? seen.lo : seen.lo + own.hi - own.lo);
  }
  int64_t global_row(int64_t position) const { return global_rows + position - global.lo; }
};

class BackwardPlan {
 public:
  explicit BackwardPlan(const LambdaAttnParams& p) : p_(p) {
    int64_t longest = 1;
    const int64_t n = p.cu_seqlens ? p.n_sequences : p.batch;
    for (int64_t s = 0; s < n; ++s) {
      sequences_.push_back(sequence(s));
      longest = std::max(longest, sequences_.back().queries);
    }
    // Segments enough for many threads, as long as there are not more partial sums than keys.
    int64_t segment = longest;
    for (;;) {
      cut(segment);
      const int64_t shorter = (segment + 1) / 2;
      if (shorter < kShortest || static_cast<int64_t>(units_.size()) >= kManyUnits) break;
      const int64_t units = static_cast<int64_t>(units_.size());
      cut(shorter);
      if (units >= kFewUnits && rows_ > p.batch * p.heads_kv * p.seqlen_k) {
        cut(segment);
        break;
      }
      segment = shorter;
    }
  }

  const std::vector<BackwardSequence>& sequences() const { return sequences_; }
  const std::vector<BackwardUnit>& units() const { return units_; }
  int64_t partial_rows() const { return rows_; }

  // Keys that the longest of the units sees in its windows, and in its other branches.
  int64_t most_seen() const {
    return most([](const BackwardUnit& u) { return u.seen; });
  }
  int64_t most_global() const {
    return most([](const BackwardUnit& u) { return u.global; });
  }

 private:
  static constexpr int64_t kShortest = 128;
  static constexpr int64_t kFewUnits = 8;
  static constexpr int64_t kManyUnits = 64;

  BackwardSequence sequence(int64_t index) const {
    BackwardSequence s = {};
    if (p_.cu_seqlens) {
      s.query = s.key_index = p_.cu_seqlens[index];
      s.keys = s.queries = p_.cu_seqlens[index + 1] - s.key_index;
    } else {
      s.batch = index;
      s.keys = p_.seqlen_k;
      s.queries = p_.seqlen_q;
      s.key_position = p_.k_start ? p_.k_start[index] : 0;
      s.position = s.key_position + s.keys - s.queries;
    }
    s.global_held =
        p_.global_k ? Range{0, p_.n_global} : Range{s.key_position, s.key_position + s.keys};
    return s;
  }

  void cut(int64_t segment) {
    units_.clear();
    rows_ = 0;
    for (size_t index = 0; index < sequences_.size(); ++index) {
      BackwardSequence& s = sequences_[index];
      s.segment = segment;
      s.segments = (s.queries + segment - 1) / segment;
      s.first_unit = static_cast<int64_t>(units_.size());
      if (s.queries == 0) continue;
      const Branch window = window_branch({s.key_position, s.key_position + s.keys}, p_.window);
      // Near and far together.
      const Branch global = far_branch(s.global_held, p_.n_global, p_.window);
      const Range all = {s.position, s.position + s.queries};
      const int64_t shared = p_.global_k ? 0 : seen(global, all).hi;
      for (int64_t head = 0; head < p_.heads_kv; ++head) {
        for (int64_t n = 0; n < s.segments; ++n) {
          const Range queries = segment_of(all, n, segment);
          BackwardUnit u = {static_cast<int64_t>(index), head, n * segment,
                            queries.hi - queries.lo};
          u.seen = seen(window, queries), u.global = seen(global, queries);
          const int64_t next =
              n + 1 < s.segments ? seen(window, segment_of(all, n + 1, segment)).lo : u.seen.hi;
          u.own = intersect(u.seen, {max64(shared, n > 0 ? queries.lo : u.seen.lo), next});
          if (u.own.empty()) u.own = {u.seen.hi, u.seen.hi};
          u.window_rows = rows_;
          rows_ += u.seen.hi - u.seen.lo - (u.own.hi - u.own.lo);
          u.global_rows = rows_;
          rows_ += u.global.hi - u.global.lo;
          units_.push_back(u);
        }
      }
    }
  }

  static Range segment_of(Range all, int64_t n, int64_t segment) {
    return {all.lo + n * segment, min64(all.hi, all.lo + (n + 1) * segment)};
  }

  static Range seen(const Branch& branch, Range queries) {
    if (branch.empty()) return {0, 0};
    const Range keys = branch.visible_keys(queries);
    return keys.empty() ? Range{0, 0} : keys;
  }

  template <typename F>
  int64_t most(const F& range) const {
    int64_t most = 0;
    for (const BackwardUnit& u : units_) most = max64(most, range(u).hi - range(u).lo);
    return most;
  }

  const LambdaAttnParams& p_;
  std::vector<BackwardSequence> sequences_;
  std::vector<BackwardUnit> units_;
  int64_t rows_ = 0;
};

}  // namespace lminf::cpu
