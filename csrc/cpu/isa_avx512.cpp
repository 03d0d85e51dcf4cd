// AVX-512 (F, BW, DQ, VL).
#define LMINF_ISA avx512
#define LMINF_LANES 16
#define LMINF_BF16 0
#define LMINF_AMX 0
#include "isa.h"

#if defined(__x86_64__)
LMINF_BEGIN_TARGET("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
#include "variant.h"
LMINF_END_TARGET
#endif
