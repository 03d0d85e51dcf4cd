// One instruction set: what the including file sets LMINF_ISA to names the namespace that all
// kernel headers put their code in, so that the variants never share a symbol.
//
//   LMINF_ISA     amx | avx512_bf16 | avx512 | avx2 | portable
//   LMINF_LANES   floats in a vector: 16, 8 or 4
//   LMINF_BF16    1 where bf16 products are done by the bf16 dot product
//   LMINF_AMX     1 where they are done by matrix tiles
//
// The target is switched on by a pragma after every library header has been read: code of the
// standard library stays at the baseline and can be shared, only ours is compiled for the
// instruction set.
#pragma once

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <limits>
#include <memory>
#include <new>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>
#if defined(__x86_64__) || defined(_M_X64)
#include <immintrin.h>
#endif

#include "../core/common.h"
#include "../core/online_softmax.h"
#include "../core/rotation.h"
#include "../core/walk.h"
#include "../params.h"
#include "attn_tasks.h"
#include "backward/plan.h"
#include "frequencies.h"
#include "kernels.h"
#include "scratch.h"

#if defined(__clang__)
#define LMINF_BEGIN_TARGET(features) \
  LMINF_PRAGMA(clang attribute push(__attribute__((target(features))), apply_to = function))
#define LMINF_END_TARGET LMINF_PRAGMA(clang attribute pop)
#else
#define LMINF_BEGIN_TARGET(features) \
  LMINF_PRAGMA(GCC push_options)     \
  LMINF_PRAGMA(GCC target(features))
#define LMINF_END_TARGET LMINF_PRAGMA(GCC pop_options)
#endif
#define LMINF_PRAGMA(x) _Pragma(#x)
#define LMINF_NAME(isa) LMINF_NAME_OF(isa)
#define LMINF_NAME_OF(isa) #isa
#if defined(__clang__)
#define LMINF_UNROLL LMINF_PRAGMA(unroll)
#define LMINF_NO_UNROLL LMINF_PRAGMA(nounroll)
#else
#define LMINF_UNROLL LMINF_PRAGMA(GCC unroll 32)
#define LMINF_NO_UNROLL LMINF_PRAGMA(GCC unroll 1)
#endif
