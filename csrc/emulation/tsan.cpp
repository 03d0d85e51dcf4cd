// What ThreadSanitizer is told.
// Built without -fsanitize=thread, like launch.cpp.
#include "launch.h"

#if defined(LMINF_THREAD_SANITIZER)
#include <sanitizer/tsan_interface.h>
extern "C" void __tsan_read_range(void* address, unsigned long bytes);
extern "C" void __tsan_write_range(void* address, unsigned long bytes);
// Reads and writes, for all its name.
extern "C" void AnnotateIgnoreReadsBegin(const char* file, int line);
extern "C" void AnnotateIgnoreReadsEnd(const char* file, int line);
#endif

namespace lminf::emulation {

void happens_before([[maybe_unused]] void* token) {
#if defined(LMINF_THREAD_SANITIZER)
  __tsan_release(token);
#endif
}

void happens_after([[maybe_unused]] void* token) {
#if defined(LMINF_THREAD_SANITIZER)
  __tsan_acquire(token);
#endif
}

void announce_shared_read([[maybe_unused]] const void* p, [[maybe_unused]] size_t bytes) {
#if defined(LMINF_THREAD_SANITIZER)
  __tsan_read_range(const_cast<void*>(p), bytes);
#endif
}

void announce_shared_write([[maybe_unused]] void* p, [[maybe_unused]] size_t bytes) {
#if defined(LMINF_THREAD_SANITIZER)
  __tsan_write_range(p, bytes);
#endif
}

#if defined(LMINF_THREAD_SANITIZER)
Unwatched::Unwatched() { AnnotateIgnoreReadsBegin(__FILE__, __LINE__); }
Unwatched::~Unwatched() { AnnotateIgnoreReadsEnd(__FILE__, __LINE__); }

namespace {

template <typename Act>
void as_fiber(void* fiber, Act act) {
  void* self = __tsan_get_current_fiber();
  __tsan_switch_to_fiber(fiber, __tsan_switch_to_fiber_no_sync);
  act();
  __tsan_switch_to_fiber(self, __tsan_switch_to_fiber_no_sync);
}

}  // namespace

void Agent::make() { fiber_ = __tsan_create_fiber(0); }
void Agent::release(void* token) {
  as_fiber(fiber_, [&] { __tsan_release(token); });
}
void Agent::read(const void* address, size_t bytes) {
  as_fiber(fiber_, [&] { announce_shared_read(address, bytes); });
}
void Agent::write(void* address, size_t bytes) {
  as_fiber(fiber_, [&] { announce_shared_write(address, bytes); });
}
void Agent::finish() {
  if (fiber_ != nullptr) __tsan_destroy_fiber(fiber_);
  fiber_ = nullptr;
}
#else
Unwatched::Unwatched() = default;
Unwatched::~Unwatched() = default;
void Agent::make() { (void)fiber_; }
void Agent::release(void*) {}
void Agent::read(const void*, size_t) {}
void Agent::write(void*, size_t) {}
void Agent::finish() {}
#endif

}  // namespace lminf::emulation
