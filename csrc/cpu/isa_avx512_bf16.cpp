// AVX-512 with the bf16 dot product.
#define LMINF_ISA avx512_bf16
#define LMINF_LANES 16
#define LMINF_BF16 1
#define LMINF_AMX 0
#include "isa.h"

#if defined(__x86_64__)
LMINF_BEGIN_TARGET("avx512bf16,avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
#include "variant.h"
LMINF_END_TARGET
#endif
