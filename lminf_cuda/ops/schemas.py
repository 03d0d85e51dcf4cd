"""The schemas of the operators torch.ops.lminf.*."""

import torch

# torch.compile keeps the strides that the caller gave, and trusts the fake kernels below.
TAGS = (torch.Tag.needs_exact_strides, torch.Tag.pt2_compliant_tag)
# B batch, Hq and Hkv heads, Sq queries, Sk keys, D head dim, C ring slots, G global slots.
SCHEMAS = (
    # q [B, Hq, Sq, D], k and v [B, Hkv, Sk, D] -> out like q, lse float32 [B, Hq, Sq]
    "lambda_attn(Tensor q, Tensor k, Tensor v, int n_global, int window, *, "
    "int? max_distance=None, Tensor? inv_freq=None, float rope_scaling=1.0, "
    "bool rope_interleaved=False, Tensor? alibi_slopes=None, Tensor? sink_logits=None, "
    "float? scale=None, float softcap=0.0, Tensor? k_start=None, Tensor? global_k=None, "
    "Tensor? global_v=None, Tensor? cu_seqlens=None, int k_rotated=0, "
    "Tensor? distance_bias=None) -> (Tensor, Tensor)",
    # q [B, Hq, 1, D], k and v [B, Hkv, 1, D], ring_k and ring_v [B, Hkv, C, D] with rotated keys,
    # global_k and global_v [B, Hkv, G, D] with un-rotated keys, positions int64 [B]
    "lambda_decode(Tensor q, Tensor k, Tensor v, Tensor(a!) ring_k, Tensor(b!) ring_v, "
    "Tensor(c!) global_k, Tensor(d!) global_v, Tensor positions, int window, *, "
    "int? max_distance=None, Tensor? inv_freq=None, float rope_scaling=1.0, "
    "bool rope_interleaved=False, Tensor? alibi_slopes=None, Tensor? sink_logits=None, "
    "float? scale=None, float softcap=0.0, Tensor? distance_bias=None) -> (Tensor, Tensor)",
    # x [B, H, S, D], position_ids int64 [S] or [B, S], inv_freq [R/2] -> like x
    "clamped_rope(Tensor x, Tensor position_ids, Tensor inv_freq, *, int? max_position=None, "
    "float scaling=1.0, bool interleaved=False) -> Tensor",
    # q and lambda_out [B, Hq, 1, D], k and v [B, Hkv, Sk, D] un-rotated, lambda_lse float32
    # [B, Hq, 1], positions and k_start int64 [B] -> out like q, lse float32 [B, Hq, 1], chosen
    # int64 [B, Hq, top_k]
    "middle_topk(Tensor q, Tensor k, Tensor v, Tensor lambda_out, Tensor lambda_lse, "
    "Tensor positions, int n_global, int window, int top_k, int distance, *, "
    "Tensor? inv_freq=None, float rope_scaling=1.0, bool rope_interleaved=False, "
    "Tensor? alibi_slopes=None, Tensor? sink_logits=None, float? scale=None, float softcap=0.0, "
    "Tensor? k_start=None, Tensor? distance_bias=None) -> (Tensor, Tensor, Tensor)",
)
