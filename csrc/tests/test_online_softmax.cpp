// Online softmax, merged tile by tile, against the softmax taken at once in long double.
#include <algorithm>
#include <cmath>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "../core/online_softmax.h"
#include "check.h"

namespace lminf {
namespace {

// What a kernel carries for one row: the state and an unnormalised output of one dim.
struct Partial {
  SoftmaxState state = empty_softmax();
  float out = 0.0f;
};

Partial one_tile(const std::vector<float>& scores, const std::vector<float>& values) {
  Partial p;
  for (float s : scores) p.state.max = std::max(p.state.max, s * kLog2e);
  if (p.state.max == minus_infinity()) return p;
  for (size_t n = 0; n < scores.size(); ++n) {
    const float weight = exp2f(scores[n] * kLog2e - p.state.max);
    p.state.sum += weight;
    p.out += weight * values[n];
  }
  return p;
}

Partial merged(const Partial& a, const Partial& b) {
  const SoftmaxMerge m = merge(a.state, b.state);
  return {m.state, a.out * m.weight_a + b.out * m.weight_b};
}

struct Expected {
  long double out = 0, lse = -INFINITY;
};

Expected direct(const std::vector<float>& scores, const std::vector<float>& values, bool has_sink,
                float sink) {
  long double top = -INFINITY;
  for (float s : scores) top = std::max<long double>(top, s);
  if (top == -INFINITY) return {};
  long double sum = 0, weighted = 0;
  for (size_t n = 0; n < scores.size(); ++n) {
    const long double weight = expl(scores[n] - top);
    sum += weight;
    weighted += weight * values[n];
  }
  const long double denominator = sum + (has_sink ? expl(sink - top) : 0.0L);
  return {weighted / denominator, top + logl(sum)};
}

void compare(const Partial& p, const std::vector<float>& scores, const std::vector<float>& values,
             bool has_sink, float sink, const std::string& what) {
  const SoftmaxEnd end = finish(p.state, has_sink, sink);
  const Expected expected = direct(scores, values, has_sink, sink);
  const float out = p.out * end.out_scale;
  const auto where = [&] {
    return what + (has_sink ? " sink " + std::to_string(sink) : "") + ": out " +
           std::to_string(out) + " lse " + std::to_string(end.lse) + ", expected " +
           std::to_string(static_cast<double>(expected.out)) + " and " +
           std::to_string(static_cast<double>(expected.lse));
  };
  if (expected.lse == -INFINITY) {
    CHECK(out == 0.0f && end.lse == -INFINITY, where());
    return;
  }
  // A score of size s is rounded to s * 2^-24 when it is brought to base 2, and so is its weight.
  long double size = 1;
  for (float s : scores) {
    if (s != -INFINITY) size = std::max<long double>(size, std::fabs(s));
  }
  const long double tolerance = 1e-6L * size;
  CHECK(fabsl(out - expected.out) < tolerance, where());
  CHECK(fabsl(end.lse - expected.lse) < tolerance, where());
}

// Scores of several sizes in tiles of several widths, some keys and some whole tiles masked.
void tile_by_tile() {
  std::mt19937 random(0);
  std::normal_distribution<float> normal;
  std::uniform_real_distribution<float> uniform;
  for (int n = 0; n < 20000; ++n) {
    const float spread = n % 3 == 0 ? 1.0f : n % 3 == 1 ? 30.0f : 1000.0f;
    const float masked = n % 5 == 0 ? 0.9f : n % 5 == 1 ? 1.0f : 0.2f;
    const int n_tiles = 1 + static_cast<int>(random() % 6);
    std::vector<float> all_scores, all_values;
    std::vector<Partial> tiles;
    for (int t = 0; t < n_tiles; ++t) {
      std::vector<float> scores, values;
      const bool tile_masked = uniform(random) < 0.3f;
      const int width = 1 + static_cast<int>(random() % 7);
      for (int j = 0; j < width; ++j) {
        const bool hidden = tile_masked || uniform(random) < masked;
        scores.push_back(hidden ? -INFINITY : spread * normal(random));
        values.push_back(normal(random));
      }
      tiles.push_back(one_tile(scores, values));
      all_scores.insert(all_scores.end(), scores.begin(), scores.end());
      all_values.insert(all_values.end(), values.begin(), values.end());
    }
    Partial forward, backward, halves;
    for (int t = 0; t < n_tiles; ++t) forward = merged(forward, tiles[t]);
    for (int t = n_tiles - 1; t >= 0; --t) backward = merged(tiles[t], backward);
    Partial left, right;
    for (int t = 0; t < n_tiles; ++t) {
      Partial& half = t < n_tiles / 2 ? left : right;
      half = merged(half, tiles[t]);
    }
    halves = merged(left, right);
    for (const Partial& p : {forward, backward, halves}) {
      compare(p, all_scores, all_values, false, 0.0f, "case " + std::to_string(n));
      for (const float sink : {0.0f, -2.5f, 40.0f, 3000.0f, -3000.0f, -INFINITY}) {
        compare(p, all_scores, all_values, true, sink, "case " + std::to_string(n));
      }
    }
  }
}

void empty_states() {
  const SoftmaxMerge both_empty = merge(empty_softmax(), empty_softmax());
  CHECK(both_empty.state.max == minus_infinity() && both_empty.state.sum == 0.0f, "two empty");
  CHECK(both_empty.weight_a == 0.0f && both_empty.weight_b == 0.0f, "two empty");
  const SoftmaxState some = {-1234.5f, 3.0f};
  const SoftmaxMerge left = merge(some, empty_softmax()), right = merge(empty_softmax(), some);
  CHECK(left.state.max == some.max && left.state.sum == some.sum, "empty on the right");
  CHECK(left.weight_a == 1.0f && left.weight_b == 0.0f, "empty on the right");
  CHECK(right.state.max == some.max && right.state.sum == some.sum, "empty on the left");
  CHECK(right.weight_a == 0.0f && right.weight_b == 1.0f, "empty on the left");
  for (const float sink : {-INFINITY, 0.0f, 100.0f}) {
    const SoftmaxEnd end = finish(empty_softmax(), true, sink);
    CHECK(end.out_scale == 0.0f && end.lse == -INFINITY, "an empty row with a sink");
    // Against this maximum keys with score -inf are summed, so that a NaN among them shows.
    const SoftmaxEnd hidden = finish({std::numeric_limits<float>::lowest(), 0.0f}, true, sink);
    CHECK(hidden.out_scale == 0.0f && hidden.lse == -INFINITY, "a row of hidden keys");
  }
  CHECK(rescale_factor(minus_infinity(), minus_infinity()) == 1.0f, "nothing seen yet");
  CHECK(rescale_factor(minus_infinity(), 5.0f) == 0.0f, "the first key");
}

}  // namespace
}  // namespace lminf

int main() {
  lminf::tile_by_tile();
  lminf::empty_states();
  return lminf::test::finish_tests("online_softmax");
}
