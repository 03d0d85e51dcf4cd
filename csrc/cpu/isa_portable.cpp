// Any machine: vectors of four floats that the compiler lowers.
#define LMINF_ISA portable
#define LMINF_LANES 4
#define LMINF_BF16 0
#define LMINF_AMX 0
#include "isa.h"
#include "variant.h"
namespace lminf::cpu {
extern const Kernels k_portable;
const Kernels k_portable = {"portable",
                            portable::run_lambda_attn,
                            portable::plan_lambda_attn,
                            portable::run_lambda_decode,
                            portable::run_clamped_rope,
                            portable::run_middle_topk};
}  // namespace lminf::cpu
