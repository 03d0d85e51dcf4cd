// Cache-line aligned memory that a thread keeps between the tiles of one call.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <new>

namespace lminf::cpu {

class Scratch {
 public:
  explicit Scratch(size_t bytes)
      : base_(static_cast<char*>(std::aligned_alloc(kAlign, padded(bytes)))), size_(padded(bytes)) {
    if (base_ == nullptr) throw std::bad_alloc();
    size_t before = largest();
    while (before < size_ && !largest().compare_exchange_weak(before, size_)) {
    }
  }
  ~Scratch() { std::free(base_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  // The next `count` elements; the sum of all takes must not pass what the constructor was given.
  template <typename T>
  T* take(size_t count) {
    T* p = reinterpret_cast<T*>(base_ + used_);
    used_ += padded(count * sizeof(T));
    if (used_ > size_) throw std::bad_alloc();
    return p;
  }

  // What `take<T>(count)` uses up.
  template <typename T>
  static size_t bytes(size_t count) {
    return padded(count * sizeof(T));
  }

  // The most bytes that one thread has held since this was last set to 0.
  static std::atomic<size_t>& largest() {
    static std::atomic<size_t> bytes{0};
    return bytes;
  }

 private:
  static constexpr size_t kAlign = 64;
  static size_t padded(size_t n) { return (n + kAlign - 1) / kAlign * kAlign; }

  char* base_;
  size_t size_;
  size_t used_ = 0;
};

}  // namespace lminf::cpu
