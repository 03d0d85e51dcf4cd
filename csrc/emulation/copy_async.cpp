// cp.async: the copies of one thread, in groups.
// Built without -fsanitize=thread, like launch.cpp.
#include "launch.h"

namespace lminf::emulation {
namespace {

void land(const AsyncCopy& c) {
  announce_shared_read(c.source, c.valid);
  announce_shared_write(c.target, c.bytes);
  volatile unsigned char* target = c.target;
  for (uint32_t i = 0; i < c.bytes; ++i) target[i] = i < c.valid ? c.source[i] : 0;
}

}  // namespace

void copy_async(uint32_t address, const void* source, uint32_t bytes, uint32_t valid) {
  Launch& l = here();
  unsigned char* target = shared_bytes(address, bytes, "cp.async");
  if (reinterpret_cast<uintptr_t>(source) % bytes != 0) {
    fault("cp.async from a global address that is not aligned to " + std::to_string(bytes));
  }
  if (valid > 0) check_global(source, valid, "cp.async");
  const AsyncCopy copy{target, static_cast<const unsigned char*>(source), bytes, valid,
                       l.running->open_group};
  if (l.shuffled && (l.random() & 1)) {
    land(copy);
  } else {
    if (l.running->copies.full()) fault("too many asynchronous copies in flight");
    l.running->copies.push(copy);
  }
  maybe_yield();
}

void copy_async_commit() { ++here().running->open_group; }

void copy_async_wait(int newest_groups_left) {
  Launch& l = here();
  Queue<AsyncCopy>& copies = l.running->copies;
  const uint64_t open = l.running->open_group;
  const uint64_t left = static_cast<uint64_t>(newest_groups_left);
  // Copies not yet committed belong to no group that this waits for.
  while (!copies.empty() && copies[0].group + left < open) land(copies.pop());
}

}  // namespace lminf::emulation
