// A fiber: a stack of its own and a switch to it. Every emulated CUDA thread is one.
//
// The switch is a few instructions on x86-64 and ucontext elsewhere. AddressSanitizer and
// ThreadSanitizer are told of every switch. To ThreadSanitizer a switch is no synchronisation: what
// one fiber did before it is not thereby seen by the next, just as on a GPU.
#pragma once

#include <cstddef>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace lminf::emulation {

class Fiber {
 public:
  using Entry = void (*)();

  Fiber() = default;
  ~Fiber();
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;

  // Describes the calling thread's own stack, so that fibers can switch back to it.
  void adopt_caller();

  // Prepares the fiber to run `entry` from its beginning when it is next switched to. `entry` must
  // never return: it ends by switching away for the last time.
  void prepare(Entry entry);

  // Leaves `from` (the running fiber) for `to`. `last`: `from` will never be resumed.
  static void switch_to(Fiber& from, Fiber& to, bool last);

  // To be called first thing by an entry.
  static void entered();

 private:
  void free_stack();
  void retire_sanitizer_fiber();

  static constexpr size_t kStackBytes = 256 * 1024;

  char* stack_ = nullptr;  // lowest address
  size_t stack_bytes_ = 0;
  bool owns_stack_ = false;
  void* sanitizer_fiber_ = nullptr;  // ThreadSanitizer's
  void* fake_stack_ = nullptr;       // AddressSanitizer's
#if defined(__x86_64__)
  void* stack_pointer_ = nullptr;
#else
  ucontext_t context_{};
#endif
};

}  // namespace lminf::emulation
