// All kernels of one instruction set and their table, which takes in every op of params.h that has
// a run() here. Included once by each isa_*.cpp, which sets LMINF_ISA, LMINF_LANES, LMINF_BF16 and
// LMINF_AMX and switches the target on around it.

namespace lminf::cpu::LMINF_ISA {

// In this order: each header uses what stands above it.
// clang-format off
#include "vec.h"
#include "tiles.h"
#include "gemm.h"
#include "angles.h"
#include "pack.h"
#include "softmax.h"
#include "read_ahead.h"
#include "lambda_attn.h"
#include "backward/pack.h"
#include "backward/scores.h"
#include "backward/scratch.h"
#include "backward/lambda_attn_backward.h"
#include "decode_dot.h"
#if LMINF_BF16
#include "decode_bf16.h"
#endif
#include "lambda_decode.h"
#include "clamped_rope.h"
#include "middle_topk.h"
// clang-format on

inline Rotary rotary_of(const RopeParams& rope, const Frequencies& frequencies) {
  return {frequencies.data(), rope.rotary_dim / 2, rope.scaling, rope.interleaved};
}

// Multiply-adds below which a call takes less time than waking other threads does.
constexpr int64_t kSerialWork = int64_t{1} << 20;

// Calls f with a value of the element type that `dtype` names.
template <typename F>
inline void with_element_type(DType dtype, const F& f) {
  switch (dtype) {
    case DType::kFloat32:
      return f(float{});
    case DType::kBFloat16:
      return f(bf16{});
    case DType::kFloat16:
      return f(f16{});
  }
  throw std::invalid_argument("lminf: unknown element type " +
                              std::to_string(static_cast<int>(dtype)));
}

template <typename Params>
inline void run_op(const Params& p, const Threads& threads) {
  const Frequencies frequencies(p.rope);
  const Rotary rotary = rotary_of(p.rope, frequencies);
  with_element_type(p.dtype, [&](auto element) { run<decltype(element)>(p, rotary, threads); });
}

// Of an op whose kernel is not cut in a way that is worth telling.
template <typename Params>
inline KernelPlan plan_of(const Params&, int) {
  return {};
}

inline KernelPlan plan_of(const LambdaAttnParams& p, int threads) {
  const Rotary none = {};
  KernelPlan plan;
  with_element_type(p.dtype, [&](auto element) {
    plan = LambdaAttnForward<decltype(element)>(p, none).plan(threads);
  });
  return plan;
}

template <typename... Params>
constexpr Kernels all_kernels(OpList<Params...>) {
  return {LMINF_NAME(LMINF_ISA), {Kernel<Params>{run_op, plan_of}...}};
}

extern const Kernels kernel_table;
constexpr Kernels kernel_table = all_kernels(Ops());

}  // namespace lminf::cpu::LMINF_ISA
