// AVX2 with FMA and F16C.
#define LMINF_ISA avx2
#define LMINF_LANES 8
#define LMINF_BF16 0
#define LMINF_AMX 0
#include "isa.h"

#if defined(__x86_64__)
LMINF_BEGIN_TARGET("avx2,fma,f16c")
#include "variant.h"
LMINF_END_TARGET
#endif
