// The ops in C++, with the signatures of the schemas in lminf_cuda/ops/schemas.py, where they are
// explained. They run on any device that run() in backend.h knows.
#pragma once

#include <cstdint>
#include <optional>
#include <tuple>

#include "checks.h"

namespace lminf::binding {

std::tuple<Tensor, Tensor> lambda_attn(
    const Tensor& q, const Tensor& k, const Tensor& v, int64_t n_global, int64_t window,
    std::optional<int64_t> max_distance, const std::optional<Tensor>& inv_freq, double rope_scaling,
    bool rope_interleaved, const std::optional<Tensor>& alibi_slopes,
    const std::optional<Tensor>& sink_logits, std::optional<double> scale, double softcap,
    const std::optional<Tensor>& k_start, const std::optional<Tensor>& global_k,
    const std::optional<Tensor>& global_v, const std::optional<Tensor>& cu_seqlens,
    int64_t k_rotated, const std::optional<Tensor>& distance_bias);

std::tuple<Tensor, Tensor> lambda_decode(
    const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& ring_k, const Tensor& ring_v,
    const Tensor& global_k, const Tensor& global_v, const Tensor& positions, int64_t window,
    std::optional<int64_t> max_distance, const std::optional<Tensor>& inv_freq, double rope_scaling,
    bool rope_interleaved, const std::optional<Tensor>& alibi_slopes,
    const std::optional<Tensor>& sink_logits, std::optional<double> scale, double softcap,
    const std::optional<Tensor>& distance_bias);

Tensor clamped_rope(const Tensor& x, const Tensor& position_ids, const Tensor& inv_freq,
                    std::optional<int64_t> max_position, double scaling, bool interleaved);

std::tuple<Tensor, Tensor, Tensor> middle_topk(
    const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& lambda_out,
    const Tensor& lambda_lse, const Tensor& positions, int64_t n_global, int64_t window,
    int64_t top_k, int64_t distance, const std::optional<Tensor>& inv_freq, double rope_scaling,
    bool rope_interleaved, const std::optional<Tensor>& alibi_slopes,
    const std::optional<Tensor>& sink_logits, std::optional<double> scale, double softcap,
    const std::optional<Tensor>& k_start, const std::optional<Tensor>& distance_bias);

}  // namespace lminf::binding
