// A test is a plain executable: CHECK counts and prints failures, `finish_tests` is main's result.
#pragma once

#include <cstdint>
#include <cstdio>
#include <string>

namespace lminf::test {

struct Tally {
  int64_t checks = 0;
  int64_t failures = 0;
};

inline Tally& tally() {
  static Tally t;
  return t;
}

// `describe` is called for a failure only; the first ten are printed.
template <typename Describe>
void check(bool ok, const char* file, int line, const char* expression, Describe describe) {
  Tally& t = tally();
  ++t.checks;
  if (ok) return;
  if (++t.failures > 10) return;
  std::fprintf(stderr, "%s:%d: %s is false: %s\n", file, line, expression, describe().c_str());
}

inline int finish_tests(const char* name) {
  const Tally& t = tally();
  std::printf("%s: %lld checks, %lld failures\n", name, static_cast<long long>(t.checks),
              static_cast<long long>(t.failures));
  return t.failures == 0 && t.checks > 0 ? 0 : 1;
}

}  // namespace lminf::test

// CHECK(condition, expression that gives a std::string saying which case this is)
#define CHECK(condition, description)                               \
  ::lminf::test::check((condition), __FILE__, __LINE__, #condition, \
                       [&] { return std::string(description); })
