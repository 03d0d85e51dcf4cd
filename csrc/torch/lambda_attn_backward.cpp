#include "lambda_attn.h"
#include "op.h"

namespace lminf::binding {
namespace {

constexpr char kOp[] = "lambda_attn_backward";

void check_results(const Tensor& q, const Tensor& out, const Tensor& lse, const Tensor& grad_out,
                   const std::optional<Tensor>& grad_lse) {
  for (const auto& [name, tensor] : {std::pair{"out", &out}, {"grad_out", &grad_out}}) {
    check_like(kOp, name, *tensor, "q", q);
    check_shape(kOp, name, *tensor, {q.size(0), q.size(1), q.size(2), q.size(3)}, "the shape of q");
  }
  for (const auto& [name, tensor] :
       {std::pair{"lse", &lse}, {"grad_lse", grad_lse ? &*grad_lse : nullptr}}) {
    if (tensor == nullptr) continue;
    check_dtype(kOp, name, *tensor, ScalarType::Float, "float32");
    check_same_device(kOp, name, *tensor, "q", q);
    check_shape(kOp, name, *tensor, {q.size(0), q.size(1), q.size(2)}, "[B, Hq, Sq]");
  }
}

// The gradient of an input of any strides.
template <typename Outputs>
void add_gradient(Outputs& outputs, const Tensor& input, void*& data, Strides& strides) {
  outputs.push_back(empty_output_like(input));
  write_to(outputs.back(), data, strides);
}

Call<LambdaAttnBackwardParams> prepare(
    const Tensor& grad_out, const std::optional<Tensor>& grad_lse, const Tensor& out,
    const Tensor& lse, const Tensor& q, const Tensor& k, const Tensor& v, int64_t n_global,
    int64_t window, std::optional<int64_t> max_distance, const RotaryOptions& rotary,
    const ScoreOptions& score, const std::optional<Tensor>& k_start,
    const std::optional<Tensor>& global_k, const std::optional<Tensor>& global_v,
    const std::optional<Tensor>& cu_seqlens, int64_t k_rotated) {
  Call<LambdaAttnBackwardParams> call;
  LambdaAttnBackwardParams& params = call.params;
  read_inputs(kOp, params, call.copies, q, k, v, n_global, window, max_distance, rotary, score,
              k_start, global_k, global_v, cu_seqlens, k_rotated);
  check_results(q, out, lse, grad_out, grad_lse);
  const void* read = nullptr;
  read_from(call.copies.dense(out), read, params.out_stride);
  params.out = const_cast<void*>(read);
  params.lse = const_cast<float*>(data_of<float>(call.copies.contiguous(lse)));
  read_from(call.copies.dense(grad_out), params.grad_out, params.grad_out_stride);
  if (grad_lse) params.grad_lse = data_of<float>(call.copies.contiguous(*grad_lse));

  auto& outputs = call.outputs;
  const auto none = [&] { outputs.push_back(torch::stable::new_empty(lse, {0})); };
  const auto per_head = [&](const std::optional<Tensor>& input, float*& data) {
    if (!input) return none();
    outputs.push_back(torch::stable::new_empty(lse, input->sizes()));
    data = static_cast<float*>(outputs.back().mutable_data_ptr());
  };
  add_gradient(outputs, q, params.grad_q, params.grad_q_stride);
  add_gradient(outputs, k, params.grad_k, params.grad_k_stride);
  add_gradient(outputs, v, params.grad_v, params.grad_v_stride);
  if (global_k) {
    add_gradient(outputs, *global_k, params.grad_global_k, params.grad_global_k_stride);
    add_gradient(outputs, *global_v, params.grad_global_v, params.grad_global_v_stride);
  } else {
    none(), none();
  }
  per_head(score.sink_logits, params.grad_sinks);
  per_head(score.distance_bias, params.grad_biases);
  return call;
}

LMINF_REGISTER(kOp, Op<prepare>::run)

}  // namespace
}  // namespace lminf::binding
