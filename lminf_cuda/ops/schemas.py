"""The schemas of the operators torch.ops.lminf.*."""

import re

import torch

# torch.compile keeps the strides that the caller gave, and trusts the fake kernels (fakes.py).
TAGS = (torch.Tag.needs_exact_strides, torch.Tag.pt2_compliant_tag)

# Groups of options (csrc/torch/options.h, in this order).
_ROTARY = "Tensor? inv_freq=None, float rope_scaling=1.0, bool rope_interleaved=False"
_SCORE = (
    "Tensor? alibi_slopes=None, Tensor? sink_logits=None, float? scale=None, float softcap=0.0, "
    "Tensor? distance_bias=None"
)

_LAMBDA_ATTN = (
    "Tensor q, Tensor k, Tensor v, int n_global, int window, *, int? max_distance=None, "
    f"{_ROTARY}, {_SCORE}, Tensor? k_start=None, Tensor? global_k=None, Tensor? global_v=None, "
    "Tensor? cu_seqlens=None, int k_rotated=0"
)

# The arguments of each op and what it returns. B batch, Hq and Hkv heads, Sq queries, Sk keys, D
# head dim, C ring slots, G global slots.
SCHEMAS = {
    # q [B, Hq, Sq, D], k and v [B, Hkv, Sk, D] -> out like q, lse float32 [B, Hq, Sq]
    "lambda_attn": (_LAMBDA_ATTN, "(Tensor, Tensor)"),
    # of its inputs and results, and the gradients of those -> the gradients of q, k, v, global_k,
    # global_v, and float32 those of sink_logits [Hq] and distance_bias [Hq, distances]; [0] for an
    # input that is not there
    "lambda_attn_backward": (
        f"Tensor grad_out, Tensor? grad_lse, Tensor out, Tensor lse, {_LAMBDA_ATTN}",
        "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    ),
    # q [B, Hq, 1, D], k and v [B, Hkv, 1, D], ring_k and ring_v [B, Hkv, C, D] with rotated keys,
    # global_k and global_v [B, Hkv, G, D] with un-rotated keys, positions int64 [B]
    "lambda_decode": (
        "Tensor q, Tensor k, Tensor v, Tensor(a!) ring_k, Tensor(b!) ring_v, "
        "Tensor(c!) global_k, Tensor(d!) global_v, Tensor positions, int window, *, "
        f"int? max_distance=None, {_ROTARY}, {_SCORE}",
        "(Tensor, Tensor)",
    ),
    # x [B, H, S, D], position_ids int64 [S] or [B, S], inv_freq [R/2] -> like x
    "clamped_rope": (
        "Tensor x, Tensor position_ids, Tensor inv_freq, *, int? max_position=None, "
        "float scaling=1.0, bool interleaved=False",
        "Tensor",
    ),
    # q and lambda_out [B, Hq, 1, D], k and v [B, Hkv, Sk, D] un-rotated, lambda_lse float32
    # [B, Hq, 1], positions and k_start int64 [B] -> out like q, lse float32 [B, Hq, 1], chosen
    # int64 [B, Hq, top_k]
    "middle_topk": (
        "Tensor q, Tensor k, Tensor v, Tensor lambda_out, Tensor lambda_lse, Tensor positions, "
        f"int n_global, int window, int top_k, int distance, *, {_ROTARY}, {_SCORE}, "
        "Tensor? k_start=None",
        "(Tensor, Tensor, Tensor)",
    ),
}
# Those whose plan can be asked for: by an op <name>_plan, which computes nothing (plan.py).
PLANNED = ("lambda_attn", "lambda_decode")


def define(library: torch.library.Library) -> None:
    """Defines the ops' schemas in a library: of this package, or of tests that have other kernels
    for them."""
    for name, (arguments, returns) in SCHEMAS.items():
        library.define(f"{name}({arguments}) -> {returns}", tags=TAGS)
    for name in PLANNED:
        read_only = re.sub(r"\(\w!\)", "", SCHEMAS[name][0])
        library.define(
            f"{name}_plan({read_only}, int device_capability, int multiprocessors) -> (str, int[])"
        )
