// Angles and rotations against long double, at every magnitude of position up to 2^31 - 1.
#include <cmath>
#include <random>
#include <string>
#include <vector>

#include "../core/lambda_mask.h"
#include "../core/rotation.h"
#include "check.h"

namespace lminf {
namespace {

constexpr long double kTwoPi = 6.283185307179586476925286766559005768L;

const std::vector<int64_t>& positions() {
  static const std::vector<int64_t> all = [] {
    std::vector<int64_t> p = {0, 1, 2, 3, 1000, (1 << 24) + 1, 200000000, INT32_MAX - 1, INT32_MAX};
    std::mt19937_64 random(0);
    for (int bits = 2; bits <= 31; ++bits) {
      for (int n = 0; n < 20; ++n) {
        p.push_back(static_cast<int64_t>(random() & ((uint64_t{1} << bits) - 1)));
      }
    }
    const size_t n = p.size();
    for (size_t i = 0; i < n; ++i) p.push_back(-p[i]);
    return p;
  }();
  return all;
}

// The frequencies of the models in use, as float32 and as float64.
const std::vector<double>& frequencies() {
  static const std::vector<double> all = [] {
    std::vector<double> f;
    for (const double base : {1e4, 5e5, 1e6}) {
      for (int t = 0; t < 64; t += 3) {
        const double exact = std::pow(base, -t / 64.0);
        f.push_back(exact);
        f.push_back(static_cast<float>(exact));
      }
    }
    return f;
  }();
  return all;
}

std::string where(int64_t position, double inv_freq, double got, long double expected) {
  return "position " + std::to_string(position) + " inv_freq " + std::to_string(inv_freq) + ": " +
         std::to_string(got) + ", expected " + std::to_string(static_cast<double>(expected));
}

void angles() {
  for (const int64_t position : positions()) {
    for (const double inv_freq : frequencies()) {
      const long double angle = static_cast<long double>(position) * inv_freq;
      // The product is one float64 rounding of up to 2^31 radians away from this.
      const long double rounding = fabsl(angle) * 0x1p-53L;
      const long double reduced = angle - kTwoPi * roundl(angle / kTwoPi);
      const double got = reduced_angle(position, inv_freq);
      // Next to a half turn the two may stand on opposite sides of it.
      const long double off = fabsl(remainderl(got - reduced, kTwoPi));
      CHECK(off <= rounding + 1e-9L * (1 + rounding), where(position, inv_freq, got, reduced));
      CHECK(std::fabs(got) <= static_cast<double>(kTwoPi / 2) + 1e-6,
            where(position, inv_freq, got, reduced));
      // The angle is rounded to float32 (at most 2^-23 at π), then its cosine and sine are.
      const CosSin r = rotation_at(position, inv_freq);
      const long double tolerance = rounding + 2.5e-7L;
      CHECK(fabsl(r.cos - cosl(reduced)) < tolerance,
            where(position, inv_freq, r.cos, cosl(reduced)));
      CHECK(fabsl(r.sin - sinl(reduced)) < tolerance,
            where(position, inv_freq, r.sin, sinl(reduced)));
    }
  }
}

void composition() {
  for (const int64_t base : positions()) {
    for (const int64_t offset : {int64_t{0}, int64_t{1}, int64_t{63}, int64_t{-17}}) {
      for (const double inv_freq : frequencies()) {
        const CosSin r = compose(rotation_at(base, inv_freq), rotation_at(offset, inv_freq));
        const long double angle = static_cast<long double>(base + offset) * inv_freq;
        const long double tolerance = fabsl(angle) * 0x1p-53L + 6e-7L;
        CHECK(fabsl(r.cos - cosl(angle)) < tolerance, where(base, inv_freq, r.cos, cosl(angle)));
        CHECK(fabsl(r.sin - sinl(angle)) < tolerance, where(base, inv_freq, r.sin, sinl(angle)));
      }
    }
  }
}

// Every dim below R belongs to exactly one pair, in both layouts.
void pairs() {
  for (int rotary_dim = 2; rotary_dim <= 256; rotary_dim += 2) {
    for (const bool interleaved : {false, true}) {
      std::vector<int> seen(rotary_dim, 0);
      for (int t = 0; t < rotary_dim / 2; ++t) {
        const PairDims dims = pair_dims(t, rotary_dim, interleaved);
        const std::string what = "R " + std::to_string(rotary_dim) + " t " + std::to_string(t);
        CHECK(dims.second - dims.first == (interleaved ? 1 : rotary_dim / 2), what);
        CHECK(dims.first == (interleaved ? 2 * t : t), what);
        ++seen[dims.first];
        ++seen[dims.second];
      }
      for (int dim = 0; dim < rotary_dim; ++dim) {
        CHECK(seen[dim] == 1, "R " + std::to_string(rotary_dim) + " dim " + std::to_string(dim));
      }
    }
  }
}

// <R(i) q, R(j) k> is <R(i - j) q, k>, and <R(L) q, k> is <q, R(-L) k>: what the kernels build on.
void scores_depend_on_distance_alone() {
  std::mt19937_64 random(1);
  std::normal_distribution<float> normal;
  for (const int64_t i : positions()) {
    for (const double inv_freq : frequencies()) {
      const int64_t d = static_cast<int64_t>(random() % 5000), j = i - d;
      const float q[2] = {normal(random), normal(random)};
      const float k[2] = {normal(random), normal(random)};
      const long double turn = static_cast<long double>(d) * inv_freq;
      const long double expected = (q[0] * cosl(turn) - q[1] * sinl(turn)) * k[0] +
                                   (q[1] * cosl(turn) + q[0] * sinl(turn)) * k[1];
      float q_i[2] = {q[0], q[1]}, k_j[2] = {k[0], k[1]}, k_back[2] = {k[0], k[1]};
      rotate_pair(rotation_at(i, inv_freq), q_i[0], q_i[1]);
      rotate_pair(rotation_at(j, inv_freq), k_j[0], k_j[1]);
      rotate_pair(rotation_at(-d, inv_freq), k_back[0], k_back[1]);
      const long double size = hypotl(q[0], q[1]) * hypotl(k[0], k[1]);
      const long double rounding = 2 * fabsl(static_cast<long double>(i) * inv_freq) * 0x1p-53L;
      const float moving = q_i[0] * k_j[0] + q_i[1] * k_j[1];
      const float still = q[0] * k_back[0] + q[1] * k_back[1];
      CHECK(fabsl(moving - expected) <= size * (1.5e-6L + rounding),
            where(i, inv_freq, moving, expected));
      CHECK(fabsl(still - expected) <= size * 1e-6L, where(d, inv_freq, still, expected));
    }
  }
}

void clamped_distances() {
  for (const int64_t limit : {int64_t{1}, int64_t{4096}, int64_t{INT64_MAX}}) {
    for (const int64_t d : {int64_t{-3}, int64_t{0}, int64_t{1}, int64_t{4095}, int64_t{4096},
                            int64_t{4097}, int64_t{INT32_MAX}}) {
      CHECK(clamped_distance(d, limit) == (d > limit ? limit : d), std::to_string(d));
    }
  }
}

}  // namespace
}  // namespace lminf

int main() {
  lminf::angles();
  lminf::composition();
  lminf::pairs();
  lminf::scores_depend_on_distance_alone();
  lminf::clamped_distances();
  return lminf::test::finish_tests("rotation");
}
