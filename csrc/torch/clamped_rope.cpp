#include "op.h"
#include "options.h"

namespace lminf::binding {
namespace {

constexpr char kOp[] = "clamped_rope";

// `rows` is 1 when all batch rows share their positions.
void check_position_values(const Tensor& position_ids, int64_t rows, int64_t row_stride,
                           int64_t seqlen) {
  if (!position_ids.is_cpu()) return;
  const auto* data = static_cast<const int64_t*>(position_ids.const_data_ptr());
  for (int64_t b = 0; b < rows; ++b) {
    for (int64_t s = 0; s < seqlen; ++s) {
      const int64_t position = data[b * row_stride + s];
      LMINF_CHECK(kOp, position > -kPositionLimit && position < kPositionLimit,
                  "position_ids holds ", position, ", but positions must stay within +-2^31");
    }
  }
}

Call<ClampedRopeParams> prepare(const Tensor& x, const Tensor& position_ids, const Tensor& inv_freq,
                                std::optional<int64_t> max_position, double scaling,
                                bool interleaved) {
  check_rank(kOp, "x", x, 4, "[B, H, S, D]");
  check_attention_dtype(kOp, "x", x);
  const int64_t batch = x.size(0), heads = x.size(1), seqlen = x.size(2), head_dim = x.size(3);
  check_head_dim(kOp, "x", head_dim);
  check_dtype(kOp, "position_ids", position_ids, ScalarType::Long, "int64");
  check_same_device(kOp, "position_ids", position_ids, "x", x);
  const bool per_row = position_ids.dim() == 2;
  LMINF_CHECK(kOp,
              (per_row && (position_ids.size(0) == batch || position_ids.size(0) == 1) &&
               position_ids.size(1) == seqlen) ||
                  (position_ids.dim() == 1 && position_ids.size(0) == seqlen),
              "position_ids has shape ", shape_of(position_ids), ", but must be [S] = [", seqlen,
              "], [1, S] or [B, S] = [", batch, ", ", seqlen, "]");
  LMINF_CHECK(kOp, !max_position || *max_position > -kPositionLimit, "max_position is ",
              max_position.value_or(0), ", but must be above -2^31");

  Call<ClampedRopeParams> call;
  ClampedRopeParams& params = call.params;
  params.rope = rope_params(kOp, {inv_freq, scaling, interleaved}, "x", x, call.copies, "scaling");
  call.outputs.push_back(empty_output_like(x));
  write_to(call.outputs[0], params.out, params.out_stride);
  read_from(call.copies.dense(x), params.x, params.x_stride);
  const Tensor& ids = call.copies.dense(position_ids);
  const bool row_positions = per_row && ids.size(0) > 1;
  params.position_ids = data_of<int64_t>(ids);
  params.position_batch_stride = row_positions ? ids.stride(0) : 0;
  if (call.has_work()) {
    check_position_values(ids, row_positions ? batch : 1, params.position_batch_stride, seqlen);
  }

  params.dtype = dtype_of(x);
  params.batch = batch;
  params.heads = heads;
  params.seqlen = seqlen;
  params.head_dim = head_dim;
  params.has_max_position = max_position.has_value();
  params.max_position = max_position.value_or(0);
  return call;
}

LMINF_REGISTER(kOp, Op<prepare>::run)

}  // namespace
}  // namespace lminf::binding
