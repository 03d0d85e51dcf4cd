// Accesses to global memory, held against the tensors that are there and the kernels that may run.
// Built without -fsanitize=thread, like launch.cpp.
#include <algorithm>
#include <sstream>

#include "launch.h"

namespace lminf::emulation {
namespace {

struct Global {
  uintptr_t begin, end;
  std::string name;
};

// Sorts, and makes one of those that touch.
void join(std::vector<Span>& spans) {
  std::sort(spans.begin(), spans.end(),
            [](const Span& a, const Span& b) { return a.begin < b.begin; });
  size_t kept = 0;
  for (const Span& span : spans) {
    if (kept > 0 && span.begin <= spans[kept - 1].end) {
      spans[kept - 1].end = std::max(spans[kept - 1].end, span.end);
    } else {
      spans[kept++] = span;
    }
  }
  spans.resize(kept);
}

std::vector<Global> globals;
std::vector<Span> in_flight;  // what kernels that may still run have written

// Holds an access against the kernels that may still run, and remembers it for those to come.
void check_overlap(Launch& l, Span access, const char* what, bool writes) {
  if (!l.running->past_grid_wait) {
    if (writes) {
      fault(std::string(what) + " before grid_wait: a kernel that may still run may read there");
    }
    const auto after =
        std::upper_bound(in_flight.begin(), in_flight.end(), access.begin,
                         [](uintptr_t begin, const Span& written) { return begin < written.end; });
    if (after != in_flight.end() && after->begin < access.end) {
      fault(std::string(what) + " of what a kernel before this one writes, with no grid_wait " +
            "before it");
    }
  }
  if (!writes) return;
  if (!l.written.empty() && l.written.back().end == access.begin) {
    l.written.back().end = access.end;
  } else {
    l.written.push_back(access);
  }
}

}  // namespace

void register_global(const void* begin, size_t bytes, const char* name) {
  const uintptr_t at = reinterpret_cast<uintptr_t>(begin);
  globals.push_back({at, at + bytes, name});
}

void clear_globals() { globals.clear(); }

void forget_writes() { in_flight.clear(); }

void keep_writes(const std::vector<Span>& written) {
  in_flight.insert(in_flight.end(), written.begin(), written.end());
  join(in_flight);
}

void check_global(const void* address, size_t bytes, const char* what, bool writes) {
  const Unwatched unwatched;
  Launch& l = here();
  const uintptr_t at = reinterpret_cast<uintptr_t>(address);
  check_overlap(l, {at, at + bytes}, what, writes);
  if (globals.empty()) return;
  for (const Global& g : globals) {
    if (at >= g.begin && at + bytes <= g.end) return;
  }
  std::ostringstream message;
  message << what << " of " << bytes << " bytes at " << address << ", outside every tensor:";
  for (const Global& g : globals) {
    message << "\n  " << g.name << " [" << reinterpret_cast<void*>(g.begin) << ", "
            << reinterpret_cast<void*>(g.end) << ')';
  }
  fault(message.str());
}

}  // namespace lminf::emulation
