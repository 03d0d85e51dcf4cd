#include "fiber.h"

#include <pthread.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstdlib>
#include <new>

#if defined(LMINF_ADDRESS_SANITIZER)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#if defined(LMINF_THREAD_SANITIZER)
#include <sanitizer/tsan_interface.h>
#endif

#if defined(__x86_64__)
// Saves the registers a callee must keep, trades stacks, restores the other side's registers.
extern "C" void lminf_switch_stacks(void** save_stack_pointer, void* load_stack_pointer);
asm(R"(
.text
.globl lminf_switch_stacks
.type lminf_switch_stacks,@function
lminf_switch_stacks:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size lminf_switch_stacks,.-lminf_switch_stacks
)");
#endif

namespace lminf::emulation {

Fiber::~Fiber() {
  if (owns_stack_) {
    retire_sanitizer_fiber();
    free_stack();
  }
}

void Fiber::free_stack() {
  munmap(stack_ - getpagesize(), kStackBytes + getpagesize());
  stack_ = nullptr;
}

void Fiber::retire_sanitizer_fiber() {
#if defined(LMINF_THREAD_SANITIZER)
  if (sanitizer_fiber_ != nullptr) __tsan_destroy_fiber(sanitizer_fiber_);
#endif
  sanitizer_fiber_ = nullptr;
}

void Fiber::adopt_caller() {
  pthread_attr_t attributes;
  void* lowest = nullptr;
  if (pthread_getattr_np(pthread_self(), &attributes) != 0) std::abort();
  pthread_attr_getstack(&attributes, &lowest, &stack_bytes_);
  pthread_attr_destroy(&attributes);
  stack_ = static_cast<char*>(lowest);
#if defined(LMINF_THREAD_SANITIZER)
  sanitizer_fiber_ = __tsan_get_current_fiber();
#endif
}

void Fiber::prepare(Entry entry) {
#if defined(LMINF_THREAD_SANITIZER)
  // What the fiber's last life left on its stack is no business of the next one.
  if (stack_ != nullptr) free_stack();
#endif
  if (stack_ == nullptr) {
    // A page that may not be touched stands below the stack.
    const size_t guard = getpagesize();
    void* memory = mmap(nullptr, guard + kStackBytes, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    mprotect(memory, guard, PROT_NONE);
    stack_ = static_cast<char*>(memory) + guard;
    stack_bytes_ = kStackBytes;
    owns_stack_ = true;
  }
#if defined(LMINF_ADDRESS_SANITIZER)
  ASAN_UNPOISON_MEMORY_REGION(stack_, stack_bytes_);
#endif
#if defined(LMINF_THREAD_SANITIZER)
  retire_sanitizer_fiber();
  sanitizer_fiber_ = __tsan_create_fiber(0);
#endif
  fake_stack_ = nullptr;
#if defined(__x86_64__)
  void** top = reinterpret_cast<void**>(stack_ + stack_bytes_);
  *--top = nullptr;                         // keeps the entry's frame aligned as after a call
  *--top = reinterpret_cast<void*>(entry);  // where the switch returns to
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  stack_pointer_ = top;
#else
  getcontext(&context_);
  context_.uc_stack.ss_sp = stack_;
  context_.uc_stack.ss_size = stack_bytes_;
  context_.uc_link = nullptr;
  makecontext(&context_, entry, 0);
#endif
}

void Fiber::switch_to(Fiber& from, Fiber& to, bool last) {
#if defined(LMINF_ADDRESS_SANITIZER)
  __sanitizer_start_switch_fiber(last ? nullptr : &from.fake_stack_, to.stack_, to.stack_bytes_);
#endif
#if defined(LMINF_THREAD_SANITIZER)
  __tsan_switch_to_fiber(to.sanitizer_fiber_, __tsan_switch_to_fiber_no_sync);
#endif
#if defined(__x86_64__)
  lminf_switch_stacks(&from.stack_pointer_, to.stack_pointer_);
#else
  swapcontext(&from.context_, &to.context_);
#endif
#if defined(LMINF_ADDRESS_SANITIZER)
  __sanitizer_finish_switch_fiber(from.fake_stack_, nullptr, nullptr);
#endif
  (void)last;
}

void Fiber::entered() {
#if defined(LMINF_ADDRESS_SANITIZER)
  __sanitizer_finish_switch_fiber(nullptr, nullptr, nullptr);
#endif
}

}  // namespace lminf::emulation
