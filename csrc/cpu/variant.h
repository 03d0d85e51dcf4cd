// All kernels of one instruction set and their table. Included once by each isa_*.cpp, which sets
// LMINF_ISA, LMINF_LANES, LMINF_BF16 and LMINF_AMX and switches the target on around it.

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

inline void run_lambda_attn(const LambdaAttnParams& p, const Threads& threads) {
  const Frequencies frequencies(p.rope);
  const Rotary rotary = rotary_of(p.rope, frequencies);
  with_element_type(
      p.dtype, [&](auto element) { LambdaAttnForward<decltype(element)>(p, rotary).run(threads); });
}

inline KernelPlan plan_lambda_attn(const LambdaAttnParams& p, int threads) {
  const Rotary none = {};
  KernelPlan plan;
  with_element_type(p.dtype, [&](auto element) {
    plan = LambdaAttnForward<decltype(element)>(p, none).plan(threads);
  });
  return plan;
}

inline void run_lambda_decode(const LambdaDecodeParams& p, const Threads& threads) {
  const Frequencies frequencies(p.rope);
  const Rotary rotary = rotary_of(p.rope, frequencies);
  with_element_type(
      p.dtype, [&](auto element) { LambdaDecodeStep<decltype(element)>(p, rotary).run(threads); });
}

inline void run_clamped_rope(const ClampedRopeParams& p, const Threads& threads) {
  const Frequencies frequencies(p.rope);
  const Rotary rotary = rotary_of(p.rope, frequencies);
  with_element_type(p.dtype,
                    [&](auto element) { clamped_rope<decltype(element)>(p, rotary, threads); });
}

inline void run_middle_topk(const MiddleTopkParams& p, const Threads& threads) {
  const Frequencies frequencies(p.rope);
  const Rotary rotary = rotary_of(p.rope, frequencies);
  with_element_type(p.dtype,
                    [&](auto element) { MiddleTopk<decltype(element)>(p, rotary).run(threads); });
}

}  // namespace lminf::cpu::LMINF_ISA
