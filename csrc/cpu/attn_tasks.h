// How a forward is cut into tasks: one sequence, one chunk of the query heads that share a key
// head, one run of queries. A row of a task is one query of one head; the heads of a query stand
// next to each other.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "../params.h"

namespace lminf::cpu {

struct AttnTask {
  int64_t sequence;  // counts rows of the batch, or packed sequences
  int64_t batch;     // row of the batch (0 with cu_seqlens)
  int64_t head_kv;
  int64_t head_q;  // first query head
  int64_t heads;   // query heads of this task, all of head_kv
  int64_t query;   // first query, as an index of q's sequence dimension
  int64_t queries;
  int64_t position;      // of the first query
  int64_t key_index;     // first key of the sequence, as an index of k's sequence dimension
  int64_t key_position;  // and its position
  int64_t keys;          // of the sequence
};

class AttnTasks {
 public:
  AttnTasks(const LambdaAttnParams& p, int threads, int64_t max_rows, int64_t max_heads)
      : p_(p), group_(p.heads_q / p.heads_kv) {
    heads_ = std::min(group_, max_heads);
    chunks_ = (group_ + heads_ - 1) / heads_;
    // Rows enough to use a packed key tile many times, few enough to leave every thread several
    // tasks.
    const int64_t sequences = p.cu_seqlens ? 1 : p.batch;
    const int64_t all_rows = sequences * p.heads_kv * chunks_ * p.seqlen_q * heads_;
    int64_t rows = all_rows / (4 * std::max(threads, 1));
    rows = std::max<int64_t>(std::min(rows, max_rows), std::min<int64_t>(64, max_rows));
    queries_ = std::max<int64_t>(rows / heads_, 1);
    blocks_before_.push_back(0);
    const int64_t n = p.cu_seqlens ? p.n_sequences : p.batch;
    for (int64_t s = 0; s < n; ++s) {
      const int64_t length = p.cu_seqlens ? p.cu_seqlens[s + 1] - p.cu_seqlens[s] : p.seqlen_q;
      blocks_before_.push_back(blocks_before_.back() + (length + queries_ - 1) / queries_);
    }
  }

  int64_t count() const { return blocks_before_.back() * p_.heads_kv * chunks_; }
  int64_t rows_per_task() const { return queries_ * heads_; }
  int64_t queries_per_task() const { return queries_; }

  AttnTask task(int64_t index) const {
    const int64_t per_block = p_.heads_kv * chunks_;
    // The query blocks of one key head follow each other, so that its keys stay in the cache.
    AttnTask t;
    const auto it =
        std::upper_bound(blocks_before_.begin(), blocks_before_.end(), index / per_block);
    const int64_t sequence = it - blocks_before_.begin() - 1;
    const int64_t blocks = blocks_before_[sequence + 1] - blocks_before_[sequence];
    const int64_t within = index - blocks_before_[sequence] * per_block;
    const int64_t head = within / blocks, block = within % blocks;
    t.sequence = sequence;
    t.head_kv = head / chunks_;
    t.head_q = t.head_kv * group_ + head % chunks_ * heads_;
    t.heads = std::min(heads_, (t.head_kv + 1) * group_ - t.head_q);
    int64_t queries;
    if (p_.cu_seqlens) {
      t.batch = 0;
      t.key_index = p_.cu_seqlens[sequence];
      t.keys = queries = p_.cu_seqlens[sequence + 1] - t.key_index;
      t.key_position = 0;
    } else {
      t.batch = sequence;
      t.key_index = 0;
      t.keys = p_.seqlen_k;
      queries = p_.seqlen_q;
      t.key_position = p_.k_start ? p_.k_start[sequence] : 0;
    }
    t.query = block * queries_;
    t.queries = std::min(queries_, queries - t.query);
    t.position = t.key_position + t.keys - queries + t.query;
    t.query += p_.cu_seqlens ? t.key_index : 0;
    return t;
  }

 private:
  const LambdaAttnParams& p_;
  int64_t group_;                       // query heads per key head
  int64_t heads_;                       // query heads per task
  int64_t chunks_;                      // tasks that share a key head and a run of queries
  int64_t queries_;                     // queries per task
  std::vector<int64_t> blocks_before_;  // query blocks before each sequence
};

}  // namespace lminf::cpu
