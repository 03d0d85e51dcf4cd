// The Λ predicate, its branches and their tile ranges against brute force over all small shapes.
#include <algorithm>
#include <cstdint>
#include <random>
#include <string>
#include <vector>

#include "../core/lambda_mask.h"
#include "check.h"

namespace lminf {
namespace {

struct Case {
  int64_t seqlen_q, seqlen_k, k_start, n_global, window, max_distance;
  bool separate_global;  // the global keys are positions [0, n_global) of their own tensor

  Range keys() const { return {k_start, k_start + seqlen_k}; }
  Range queries() const { return {k_start + seqlen_k - seqlen_q, k_start + seqlen_k}; }
  Range global_keys() const { return separate_global ? Range{0, n_global} : keys(); }

  std::string text() const {
    return "Sq " + std::to_string(seqlen_q) + " Sk " + std::to_string(seqlen_k) + " k_start " +
           std::to_string(k_start) + " n_global " + std::to_string(n_global) + " window " +
           std::to_string(window) + " max_distance " + std::to_string(max_distance) +
           (separate_global ? " separate global keys" : "");
  }
};

std::string text(const TileRanges& t) {
  return " begin " + std::to_string(t.begin) + " full [" + std::to_string(t.full_begin) + ", " +
         std::to_string(t.full_end) + ") end " + std::to_string(t.end);
}

// Walks the three branches as a kernel does and counts how often, and at which distance, each pair
// is met.
void check_pairs(const Case& c, const Branch (&branches)[3]) {
  const Range keys = c.keys(), global_keys = c.global_keys();
  const int64_t first = std::min<int64_t>(keys.lo, 0);
  const int64_t last = std::max(keys.hi, global_keys.hi);
  for (int64_t i = c.queries().lo; i < c.queries().hi; ++i) {
    for (int64_t j = first; j < last; ++j) {
      const int64_t d = i - j;
      // A key may stand in k, among the separate global keys, or in both.
      const bool in_k = j >= keys.lo && j < keys.hi;
      const bool in_global = j >= global_keys.lo && j < global_keys.hi;
      const bool by_window = in_k && j >= 0 && d >= 0 && d < c.window;
      const bool by_global = in_global && j >= 0 && j < c.n_global && d >= c.window;
      int met = 0;
      for (const Branch& branch : branches) met += branch.sees(i, j);
      const auto where = [&] {
        return c.text() + " i " + std::to_string(i) + " j " + std::to_string(j);
      };
      CHECK(met == (by_window || by_global), where());
      if (!c.separate_global && in_k) {
        CHECK((met == 1) == visible(i, j, c.n_global, c.window), where());
      }
      CHECK(branches[0].sees(i, j) == by_window, where());
      if (branches[0].sees(i, j) || branches[1].sees(i, j)) {
        CHECK(clamped_distance(d, c.max_distance) == d, where());
      }
      if (branches[2].sees(i, j)) {
        CHECK(clamped_distance(d, c.max_distance) == c.max_distance, where());
      }
    }
  }
}

// `seen(tile)` and `all(tile)`: whether any and whether every pair of a tile is visible. A tile
// that sticks out of the tensor has pairs that do not exist, so it is never full.
template <typename Any, typename All>
void check_ranges(const Case& c, const TileRanges& ranges, int64_t n_tiles, const Any& any,
                  const All& all) {
  const auto where = [&] { return c.text() + text(ranges); };
  CHECK(ranges.begin <= ranges.full_begin && ranges.full_begin <= ranges.full_end &&
            ranges.full_end <= ranges.end,
        where());
  CHECK(ranges.begin >= 0 && ranges.end <= n_tiles, where());
  for (int64_t tile = 0; tile < n_tiles; ++tile) {
    const bool visited = tile >= ranges.begin && tile < ranges.end;
    CHECK(visited == any(tile), where() + " tile " + std::to_string(tile));
    CHECK(ranges.full(tile) == all(tile), where() + " tile " + std::to_string(tile));
  }
}

// One branch's pairs as a table, and the two kinds of tile ranges read off it.
void check_tiles(const Case& c, const Branch& branch, Range keys) {
  const Range queries = c.queries();
  const int64_t n_queries = queries.hi - queries.lo, n_keys = keys.hi - keys.lo;
  if (n_keys <= 0) return;
  // sum[i][j]: visible pairs among the first i queries and the first j keys.
  static std::vector<int64_t> sum;
  const int64_t pitch = n_keys + 1;
  sum.assign((n_queries + 1) * pitch, 0);
  for (int64_t i = 0; i < n_queries; ++i) {
    for (int64_t j = 0; j < n_keys; ++j) {
      sum[(i + 1) * pitch + j + 1] = branch.sees(queries.lo + i, keys.lo + j) +
                                     sum[i * pitch + j + 1] + sum[(i + 1) * pitch + j] -
                                     sum[i * pitch + j];
    }
  }
  const auto count = [&](int64_t i0, int64_t i1, int64_t j0, int64_t j1) {
    return sum[i1 * pitch + j1] - sum[i0 * pitch + j1] - sum[i1 * pitch + j0] +
           sum[i0 * pitch + j0];
  };
  for (const int64_t size_q : {1, 2, 3, 4, 16}) {
    for (const int64_t size_k : {1, 2, 3, 5, 16}) {
      for (int64_t i0 = 0; i0 < n_queries; i0 += size_q) {
        const int64_t i1 = std::min(i0 + size_q, n_queries);
        check_ranges(
            c, key_tiles(branch, {queries.lo + i0, queries.lo + i1}, keys.lo, size_k),
            ceil_div(n_keys, size_k),
            [&](int64_t t) {
              return count(i0, i1, t * size_k, std::min((t + 1) * size_k, n_keys)) > 0;
            },
            [&](int64_t t) {
              return (t + 1) * size_k <= n_keys &&
                     count(i0, i1, t * size_k, (t + 1) * size_k) == (i1 - i0) * size_k;
            });
      }
      for (int64_t j0 = 0; j0 < n_keys; j0 += size_k) {
        const int64_t j1 = std::min(j0 + size_k, n_keys);
        check_ranges(
            c, query_tiles(branch, {keys.lo + j0, keys.lo + j1}, queries, size_q),
            ceil_div(n_queries, size_q),
            [&](int64_t t) {
              return count(t * size_q, std::min((t + 1) * size_q, n_queries), j0, j1) > 0;
            },
            [&](int64_t t) {
              return (t + 1) * size_q <= n_queries &&
                     count(t * size_q, (t + 1) * size_q, j0, j1) == (j1 - j0) * size_q;
            });
      }
    }
  }
}

void check_case(const Case& c) {
  const Branch branches[3] = {
      window_branch(c.keys(), c.window),
      near_branch(c.global_keys(), c.n_global, c.window, c.max_distance),
      far_branch(c.global_keys(), c.n_global, c.max_distance),
  };
  check_pairs(c, branches);
  check_tiles(c, branches[0], c.keys());
  check_tiles(c, branches[1], c.global_keys());
  check_tiles(c, branches[2], c.global_keys());
}

void all_small_shapes() {
  constexpr int64_t kHuge = INT64_MAX;
  for (const int64_t seqlen_k : {1, 2, 3, 5, 8, 9}) {
    for (int64_t seqlen_q = 1; seqlen_q <= seqlen_k; ++seqlen_q) {
      for (const int64_t k_start : {-10, -8, -3, -1, 0, 1, 4, 20}) {
        for (const int64_t n_global : {int64_t{0}, int64_t{1}, int64_t{2}, int64_t{5}, kHuge}) {
          for (const int64_t window :
               {int64_t{1}, int64_t{2}, int64_t{3}, int64_t{4}, int64_t{7}, int64_t{12}, kHuge}) {
            for (const int64_t extra : {int64_t{0}, int64_t{1}, int64_t{3}, kHuge}) {
              const int64_t max_distance = window > kHuge - extra ? kHuge : window + extra;
              check_case({seqlen_q, seqlen_k, k_start, n_global, window, max_distance, false});
              if (n_global < kHuge) {
                check_case({seqlen_q, seqlen_k, k_start, n_global, window, max_distance, true});
              }
            }
          }
        }
      }
    }
  }
}

// Random shapes with several tiles of each kind, near zero and far out.
void random_shapes() {
  std::mt19937_64 random(0);
  const auto draw = [&](int64_t lo, int64_t hi) {
    return std::uniform_int_distribution<int64_t>(lo, hi)(random);
  };
  for (int n = 0; n < 3000; ++n) {
    Case c;
    c.seqlen_k = draw(1, 60);
    c.seqlen_q = draw(1, c.seqlen_k);
    c.n_global = draw(0, 25);
    c.window = draw(1, 50);
    c.max_distance = c.window + draw(0, 1) * draw(0, 40);
    c.separate_global = draw(0, 1) == 1;
    c.k_start = draw(-70, 70);
    check_case(c);
  }
}

// The window branch knows positions only through their difference.
void far_out_positions() {
  const Range keys = {0, 500}, queries = {320, 384};
  const TileRanges near_zero = key_tiles(window_branch(keys, 200), queries, keys.lo, 64);
  for (const int64_t base :
       {int64_t{1}, (int64_t{1} << 24) + 1, int64_t{200000000}, (int64_t{1} << 31) - 501}) {
    const Range moved_keys = {keys.lo + base, keys.hi + base};
    const Range moved_queries = {queries.lo + base, queries.hi + base};
    const TileRanges moved =
        key_tiles(window_branch(moved_keys, 200), moved_queries, moved_keys.lo, 64);
    CHECK(moved.begin == near_zero.begin && moved.end == near_zero.end, text(moved));
    CHECK(moved.full_begin == near_zero.full_begin && moved.full_end == near_zero.full_end,
          text(moved));
    CHECK(key_tiles(far_branch({0, 16}, 16, 200), moved_queries, 0, 16).full(0), text(moved));
  }
}

// The keys at positions from 0 on, not after the query, that it does not see.
void middle_keys_are_the_invisible_ones() {
  for (int64_t first = -6; first <= 6; ++first) {
    for (int64_t n_global : {0, 1, 4, 30}) {
      for (const int64_t window : {int64_t{1}, int64_t{3}, int64_t{9}, kUnbounded}) {
        for (int64_t i = 0; i < 24; ++i) {
          const Range keys = {first, first + 20};
          const Range middle = middle_keys(keys, i, n_global, window);
          for (int64_t j = keys.lo; j < keys.hi; ++j) {
            const bool is_middle = j >= 0 && j <= i && !visible(i, j, n_global, window);
            CHECK(is_middle == (j >= middle.lo && j < middle.hi),
                  "query " + std::to_string(i) + ", key " + std::to_string(j));
          }
        }
      }
    }
  }
}

void division() {
  for (int64_t a = -20; a <= 20; ++a) {
    for (int64_t b = 1; b <= 7; ++b) {
      const auto where = [&] { return std::to_string(a) + " / " + std::to_string(b); };
      CHECK(floor_div(a, b) * b <= a && a < (floor_div(a, b) + 1) * b, where());
      CHECK((ceil_div(a, b) - 1) * b < a && a <= ceil_div(a, b) * b, where());
    }
  }
}

}  // namespace
}  // namespace lminf

int main() {
  lminf::division();
  lminf::all_small_shapes();
  lminf::random_shapes();
  lminf::far_out_positions();
  lminf::middle_keys_are_the_invisible_ones();
  return lminf::test::finish_tests("lambda_mask");
}
