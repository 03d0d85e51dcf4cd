// AVX-512 BF16 with AMX matrix tiles for bf16 products.
#define LMINF_ISA amx
#define LMINF_LANES 16
#define LMINF_BF16 1
#define LMINF_AMX 1
#include "isa.h"

#if defined(__x86_64__)
LMINF_BEGIN_TARGET("amx-tile,amx-bf16,avx512bf16,avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
#include "variant.h"
LMINF_END_TARGET
#endif
