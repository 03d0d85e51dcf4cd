"""The documented front of torch.ops.lminf.lambda_attn."""

from types import NoneType

import torch
from torch import Tensor

_TYPE_NAMES = {
    Tensor: "a torch.Tensor",
    int: "an int",
    float: "a float",
    bool: "a bool",
    NoneType: "None",
}


def _check_type(types: type | tuple[type, ...], **arguments: object) -> None:
    for name, value in arguments.items():
        if not isinstance(value, types):
            allowed = types if isinstance(types, tuple) else (types,)
            names = [_TYPE_NAMES[t] for t in allowed if t in _TYPE_NAMES]
            raise TypeError(
                f"lambda_attention: {name} is a {type(value).__name__}, but must be "
                f"{' or '.join(names)}"
            )


def lambda_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    n_global: int,
    window: int,
    max_distance: int | None = None,
    inv_freq: Tensor | None = None,
    rope_scaling: float = 1.0,
    rope_interleaved: bool = False,
    alibi_slopes: Tensor | None = None,
    sink_logits: Tensor | None = None,
    scale: float | None = None,
    softcap: float = 0.0,
    k_start: Tensor | None = None,
    global_k: Tensor | None = None,
    global_v: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    k_rotated: int = 0,
    distance_bias: Tensor | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Λ-shaped attention: each query sees the first n_global and the last window tokens.

    The query at position i sees the key at position j, at distance d = i - j >= 0, when d < window
    or j < n_global, and meets it at distance min(d, max_distance) (docs/design.md section 2;
    LM-Infinite, arXiv 2308.16137, section 4). The queries are the last Sq of the Sk positions. Runs
    on the CPU, and on CUDA devices in a build with CUDA kernels. On the CPU q, k, v, global_k,
    global_v, sink_logits and distance_bias have gradients, from out and from lse.

    Args:
        q: queries [B, Hq, Sq, D], un-rotated, float32, bfloat16 or float16. Any strides; a last
            dimension that is not contiguous costs a copy (of k, v, global_k and global_v too).
        k: keys [B, Hkv, Sk, D] in q's dtype, un-rotated. Hq is a multiple of Hkv.
        v: values, shaped like k.
        n_global: so many first tokens are seen from everywhere; >= 0.
        window: so many last tokens are seen, the query's own included; >= 1.
        max_distance: no larger distance is ever seen; >= window, which is the default.
        inv_freq: rotary frequencies [R/2], float32 or float64 (others are converted to float32);
            the first R <= D dims of a head rotate. None: no rotation.
        rope_scaling: multiplies the rotated dims of queries and of keys (yarn, longrope).
        rope_interleaved: rotate the pairs (2t, 2t + 1) instead of (t, t + R/2).
        alibi_slopes: [Hq]; slope times the clamped distance is taken from the score.
        sink_logits: [Hq]; one logit a head that joins the softmax's denominator only.
        scale: factor of the scores, default 1/sqrt(D).
        softcap: c > 0 turns a score s into c * tanh(s / c); 0 is none. From 1e-30 to 1e30.
        k_start: int64 [B], the position of each row's first key, default 0. Keys at negative
            positions are padding. Positions must stay within +-2^31.
        global_k: [B, Hkv, n_global, D], un-rotated keys of the positions 0 to n_global - 1 when k
            no longer starts there.
        global_v: their values.
        cu_seqlens: int32 [n + 1], the offsets of n sequences packed into one row: B = 1, Sq = Sk.
        k_rotated: so many leading keys of k are rotated at their own position (and scaled) already.
        distance_bias: [Hq, max_distance + 1]; a head's entry at the clamped distance is added to
            the score, after ALiBi and before softcap; -inf hides the keys at that distance. Any
            floating dtype, converted to float32 (below -2e38 an entry may count as -inf).
        return_lse: return the log-sum-exp too.

    Returns:
        out [B, Hq, Sq, D], in the dtype and, where q is dense, the strides of q; with return_lse
        also lse, float32 [B, Hq, Sq]: the natural log of the sum of exp(score) over the visible
        keys. A row that sees no key has out 0 and lse -inf.

    Raises:
        TypeError: an argument is not of the type in the signature.
        ValueError: shapes, dtypes, devices or values that break a rule above.
        RuntimeError: gradients are on, and alibi_slopes or inv_freq requires one, or anything on a
            CUDA device.

    On a CUDA device the values of k_start and cu_seqlens are not checked.
    """
    _check_type(Tensor, q=q, k=k, v=v)
    _check_type((int, torch.SymInt), n_global=n_global, window=window, k_rotated=k_rotated)
    _check_type((int, torch.SymInt, NoneType), max_distance=max_distance)
    _check_type((int, float), rope_scaling=rope_scaling, softcap=softcap)
    _check_type(bool, rope_interleaved=rope_interleaved)
    _check_type((int, float, NoneType), scale=scale)
    _check_type((Tensor, NoneType), inv_freq=inv_freq, k_start=k_start, cu_seqlens=cu_seqlens)
    _check_type((Tensor, NoneType), alibi_slopes=alibi_slopes, sink_logits=sink_logits)
    _check_type((Tensor, NoneType), distance_bias=distance_bias)
    _check_type((Tensor, NoneType), global_k=global_k, global_v=global_v)
    out, lse = torch.ops.lminf.lambda_attn(
        q,
        k,
        v,
        n_global,
        window,
        max_distance=max_distance,
        inv_freq=inv_freq,
        rope_scaling=rope_scaling,
        rope_interleaved=rope_interleaved,
        alibi_slopes=alibi_slopes,
        sink_logits=sink_logits,
        scale=scale,
        softcap=softcap,
        k_start=k_start,
        global_k=global_k,
        global_v=global_v,
        cu_seqlens=cu_seqlens,
        k_rotated=k_rotated,
        distance_bias=distance_bias,
    )
    return (out, lse) if return_lse else out
