"""Λ attention as its definition reads (docs/design.md section 2): dense, slow, in plain PyTorch.

Every kernel of this project is tested against this file. It takes any floating dtype and computes
in that dtype: with float64 tensors it is the truth, with bfloat16 or float16 ones it is what an
eager implementation in that dtype would give, the yardstick for a kernel's error. Only the rotation
angles are always float64.

A query at position i sees the key at position j, at distance d = i - j, when

    d >= 0  and  (d < window  or  j < n_global)

and meets it as if it stood at distance min(d, max_distance). Keys that no query sees (padding,
unused slots) reach no row, whatever they hold: NaN and infinity included.

Letters in shape comments: B batch, Hq and Hkv heads of queries and keys, Sq queries, Sk keys, D
head dim, R rotary dim, G = n_global, C ring capacity.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["clamped_rope", "lambda_attention", "lambda_decode", "middle_topk"]


def _rotate(
    x: Tensor, positions: Tensor, inv_freq: Tensor, scaling: float, interleaved: bool
) -> Tensor:
    """R(position) x for every row of x, times `scaling`; dims past R pass through.

    Args:
        x: [B, H, S, D].
        positions: int64 [B, S].
        inv_freq: [R/2].
        scaling: multiplies the R rotated dims.
        interleaved: pairs are (2t, 2t+1) instead of (t, t + R/2).
    """
    angle = positions[:, None, :, None].double() * inv_freq.double()  # [B, 1, S, R/2]
    cos = (angle.cos() * scaling).to(x.dtype)
    sin = (angle.sin() * scaling).to(x.dtype)
    rotary_dim = 2 * inv_freq.numel()
    pairs, rest = x[..., :rotary_dim], x[..., rotary_dim:]
    a, b = (pairs[..., 0::2], pairs[..., 1::2]) if interleaved else pairs.chunk(2, dim=-1)
    rotated = (a * cos - b * sin, b * cos + a * sin)
    halves = torch.stack(rotated, -1).flatten(-2) if interleaved else torch.cat(rotated, -1)
    return torch.cat([halves, rest], dim=-1)


@dataclass(frozen=True)
class _Score:
    """The score of a pair, d' = min(d, L): s = scale * <R(d') q, k> - slope * d' + bias[d'], then
    softcap; -inf where bias[d'] is."""

    max_distance: int  # L
    inv_freq: Tensor | None = None
    rope_scaling: float = 1.0
    rope_interleaved: bool = False
    alibi_slopes: Tensor | None = None
    distance_bias: Tensor | None = None
    scale: float | None = None
    softcap: float = 0.0

    def rotate(self, x: Tensor, positions: Tensor) -> Tensor:
        if self.inv_freq is None:
            return x
        return _rotate(x, positions, self.inv_freq, self.rope_scaling, self.rope_interleaved)

    def __call__(
        self, q: Tensor, k: Tensor, q_pos: Tensor, k_pos: Tensor, k_rotated: int = 0
    ) -> Tensor:
        """The scores of all pairs, [B, Hq, Sq, Sk].

        R(d) q · k is taken as R(i) q · R(j) k, and R(L) q · k as it stands. Entry (i, j) depends on
        q_i and k_j alone, so what a masked key holds stays in its own column.

        Args:
            q: [B, Hq, Sq, D].
            k: [B, Hkv, Sk, D]; its first `k_rotated` keys are R(j) k already.
            q_pos: [B, Sq].
            k_pos: [B, Sk].
            k_rotated: see k.
        """
        k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
        distance = q_pos[:, None, :, None] - k_pos[:, None, None, :]  # [B, 1, Sq, Sk]
        k_at_j = torch.cat([k[:, :, :k_rotated], self.rotate(k, k_pos)[:, :, k_rotated:]], dim=2)
        s = self.rotate(q, q_pos) @ k_at_j.mT
        if self.inv_freq is not None:
            q_at_limit = self.rotate(q, torch.full_like(q_pos, self.max_distance))
            k_at_zero = self.rotate(k, torch.zeros_like(k_pos))
            s = torch.where(distance < self.max_distance, s, q_at_limit @ k_at_zero.mT)
        s = s * (1.0 / math.sqrt(q.shape[3]) if self.scale is None else self.scale)
        clamped = distance.clamp(max=self.max_distance)
        if self.alibi_slopes is not None:
            s = s - (self.alibi_slopes.double()[:, None, None] * clamped).to(s.dtype)
        bias = torch.zeros_like(s)
        if self.distance_bias is not None:
            bias = self.distance_bias.double()[:, clamped[:, 0].clamp(min=0)].transpose(0, 1)
            s = s + bias.to(s.dtype)
        if self.softcap > 0:
            s = self.softcap * torch.tanh(s / self.softcap)
        return s.masked_fill(bias == -math.inf, -math.inf)


def _attend(
    s: Tensor, visible: Tensor, v: Tensor, sink_logits: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Softmax over the visible keys and the weighted sum of their values: out and lse.

    A score of -inf hides its key, too.

    Args:
        s: scores, [B, Hq, Sq, Sk].
        visible: bool, [B, Sq, Sk].
        v: [B, Hkv, Sk, D].
        sink_logits: [Hq], one more term of the softmax's denominator, or None.
    """
    visible = visible[:, None] & (s != -math.inf)
    v = v.repeat_interleave(s.shape[1] // v.shape[1], dim=1)
    # A row that sees nothing has scores of 0 for as long as derivatives of -inf would be NaN.
    sees_nothing = ~visible.any(-1, keepdim=True)
    s = s.masked_fill(~visible, -math.inf).masked_fill(sees_nothing, 0.0)
    lse = torch.logsumexp(s.to(torch.promote_types(s.dtype, torch.float32)), dim=-1)
    lse = lse.masked_fill(sees_nothing[..., 0], -math.inf)
    if sink_logits is not None:
        sink = sink_logits.to(s.dtype)[None, :, None, None].expand(*s.shape[:-1], 1)
        s = torch.cat([s, sink], dim=-1)
    p = s.softmax(dim=-1)[..., : v.shape[2]].masked_fill(~visible, 0.0)

    # 0 * NaN is NaN: what no query sees is left out.
    return p @ v.masked_fill(~visible.any(2)[..., None], 0.0), lse


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
    """Attends to the first `n_global` and the last `window` tokens, at clamped distance.

    Args:
        q: [B, Hq, Sq, D], un-rotated: the last Sq of the Sk positions.
        k: [B, Hkv, Sk, D], un-rotated; Hq is a multiple of Hkv.
        v: [B, Hkv, Sk, D].
        n_global: the first so many positions are seen from everywhere.
        window: so many keys, the query's own included, are seen behind every query; at least 1.
        max_distance: no distance above it enters a score; at least `window`, which is the default.
        inv_freq: [R/2] rotary frequencies, or None for no rotary embedding.
        rope_scaling: multiplies the R rotated dims of q and of k.
        rope_interleaved: pairs are (2t, 2t+1) instead of (t, t + R/2).
        alibi_slopes: [Hq]; slope * min(d, max_distance) is taken from the score.
        sink_logits: [Hq]; one more term in the softmax's denominator, and not in lse.
        scale: of <q, k>; 1/sqrt(D) by default.
        softcap: c > 0 makes a score c * tanh(score / c).
        k_start: int64 [B], position of each row's first key; 0 by default. Keys at negative
            positions are padding.
        global_k: [B, Hkv, G, D], un-rotated keys of positions 0 .. G-1: the keys at d >= window are
            read from here, and those at d < window from k.
        global_v: [B, Hkv, G, D], as global_k.
        cu_seqlens: int32 [n + 1], boundaries of sequences packed along S; B = 1 and Sq = Sk.
        k_rotated: so many leading keys of k already carry their own rotation and rope scaling.
        distance_bias: [Hq, max_distance + 1]; entry min(d, max_distance) of a head is added to the
            score after ALiBi and before softcap, and -inf hides the keys at that distance.
        return_lse: also return lse.

    Returns:
        out [B, Hq, Sq, D] in q's dtype, and with `return_lse` the natural log-sum-exp of the
        visible scores, [B, Hq, Sq], float32 (float64 for float64 inputs). A row that sees no key
        has out 0 and lse -inf.
    """
    batch, seqlen_q, seqlen_k = q.shape[0], q.shape[2], k.shape[2]
    score = _Score(
        max_distance=window if max_distance is None else max_distance,
        inv_freq=inv_freq,
        rope_scaling=rope_scaling,
        rope_interleaved=rope_interleaved,
        alibi_slopes=alibi_slopes,
        distance_bias=distance_bias,
        scale=scale,
        softcap=softcap,
    )
    index = torch.arange(seqlen_k, device=q.device).expand(batch, -1)  # [B, Sk]
    if cu_seqlens is not None:  # positions start anew in every sequence
        sequence = torch.searchsorted(cu_seqlens.long(), index, right=True) - 1
        k_pos = index - cu_seqlens.long()[sequence]
    else:
        sequence = torch.zeros_like(index)
        k_pos = index if k_start is None else k_start[:, None] + index
    q_pos = k_pos[:, seqlen_k - seqlen_q :]  # [B, Sq]
    same_sequence = sequence[:, seqlen_k - seqlen_q :, None] == sequence[:, None, :]

    i, j = q_pos[:, :, None], k_pos[:, None, :]
    causal = same_sequence & (j >= 0) & (i - j >= 0)  # [B, Sq, Sk]
    s = score(q, k, q_pos, k_pos, k_rotated)
    if global_k is None or global_v is None:
        visible = causal & ((i - j < window) | (j < n_global))
    else:
        g_pos = torch.arange(n_global, device=q.device).expand(batch, -1)  # [B, G]
        s = torch.cat([s, score(q, global_k, q_pos, g_pos)], dim=-1)
        visible = torch.cat([causal & (i - j < window), i - g_pos[:, None, :] >= window], dim=-1)
        v = torch.cat([v, global_v], dim=2)
    out, lse = _attend(s, visible, v, sink_logits)
    return (out, lse) if return_lse else out


def clamped_rope(
    x: Tensor,
    position_ids: Tensor,
    inv_freq: Tensor,
    *,
    max_position: int | None = None,
    scaling: float = 1.0,
    interleaved: bool = False,
) -> Tensor:
    """Rotates x by min(position, max_position); negative positions rotate backwards.

    Args:
        x: [B, H, S, D].
        position_ids: int64 [S] or [B, S].
        inv_freq: [R/2]; dims from R on are copied.
        max_position: the largest position that is rotated by, or None for no limit.
        scaling: multiplies the rotated dims.
        interleaved: pairs are (2t, 2t+1) instead of (t, t + R/2).

    Returns:
        [B, H, S, D] in x's dtype.
    """
    positions = position_ids.expand(x.shape[0], x.shape[2])
    if max_position is not None:
        positions = positions.clamp(max=max_position)
    return _rotate(x, positions, inv_freq, scaling, interleaved)


def lambda_decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    ring_k: Tensor,
    ring_v: Tensor,
    global_k: Tensor,
    global_v: Tensor,
    positions: Tensor,
    window: int,
    *,
    max_distance: int | None = None,
    sink_logits: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """Appends one token of each row to a cache of fixed size, in place, and attends from it.

    The token at position p goes to ring slot p % C, and to global slot p when p < G. Slots that no
    token has reached yet are never read.

    Args:
        q: [B, Hq, 1, D], un-rotated.
        k: [B, Hkv, 1, D], un-rotated.
        v: [B, Hkv, 1, D].
        ring_k: [B, Hkv, C, D], C >= window, keys rotated to their own position; written.
        ring_v: [B, Hkv, C, D]; written.
        global_k: [B, Hkv, G, D], un-rotated keys of positions 0 .. G-1; written.
        global_v: [B, Hkv, G, D]; written.
        positions: int64 [B], the new token's position; a row with a negative one is idle: nothing
            is written, out is 0 and lse -inf.
        window: as in lambda_attention, and so max_distance and sink_logits.
        options: of a score, as in lambda_attention: inv_freq, rope_scaling, rope_interleaved,
            alibi_slopes, distance_bias, scale, softcap.

    Returns:
        out [B, Hq, 1, D] in q's dtype and lse [B, Hq, 1], as in lambda_attention.
    """
    capacity, n_global = ring_k.shape[2], global_k.shape[2]
    score = _Score(window if max_distance is None else max_distance, **options)
    p = positions[:, None]  # [B, 1]

    k_at_p = score.rotate(k, p)
    for b, position in enumerate(positions.tolist()):
        if position >= 0:
            ring_k[b, :, position % capacity] = k_at_p[b, :, 0]
            ring_v[b, :, position % capacity] = v[b, :, 0]
        if 0 <= position < n_global:
            global_k[b, :, position] = k[b, :, 0]
            global_v[b, :, position] = v[b, :, 0]

    # Slot c holds the latest position that is c modulo C.
    ring_pos = p - (p - torch.arange(capacity, device=q.device)) % capacity  # [B, C]
    global_pos = torch.arange(n_global, device=q.device).expand(q.shape[0], -1)  # [B, G]
    in_window = (p >= 0) & (ring_pos >= 0) & (p - ring_pos < window)
    visible = torch.cat([in_window, p - global_pos >= window], dim=-1)[:, None, :]
    s_ring = score(q, ring_k, p, ring_pos, k_rotated=capacity)
    s_global = score(q, global_k, p, global_pos)
    values = torch.cat([ring_v, global_v], dim=2)
    return _attend(torch.cat([s_ring, s_global], dim=-1), visible, values, sink_logits)


def middle_topk(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lambda_out: Tensor,
    lambda_lse: Tensor,
    positions: Tensor,
    n_global: int,
    window: int,
    top_k: int,
    distance: int,
    *,
    sink_logits: Tensor | None = None,
    k_start: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """Adds middle tokens to the Λ attention of one query of each row (arXiv 2308.16137, sec. 4.2).

    Of the keys at positions n_global .. i - window, which Λ attention does not show to the query at
    position i, each head takes the `top_k` with the largest score at distance `distance`, and they
    join the softmax at that distance. A row with fewer such keys stays as it is.

    Args:
        q: [B, Hq, 1, D], un-rotated.
        k: [B, Hkv, Sk, D], un-rotated; Hq is a multiple of Hkv.
        v: [B, Hkv, Sk, D].
        lambda_out: [B, Hq, 1, D], what lambda_attention gives for the query.
        lambda_lse: [B, Hq, 1], its lse.
        positions: int64 [B], the query's position; a row with a negative one stays as it is.
        n_global: as in lambda_attention.
        window: as n_global.
        top_k: keys that join; at least 1.
        distance: at which they are met; at least 0.
        sink_logits: [Hq], the term that `lambda_out` has in its denominator already.
        k_start: int64 [B], position of each row's first key; 0 by default.
        options: of a score, as in lambda_decode; of distance_bias [Hq, more than `distance`] entry
            `distance` is added.

    Returns:
        out [B, Hq, 1, D] and lse [B, Hq, 1], as in lambda_attention, and the positions that joined,
        int64 [B, Hq, top_k], the largest score first and -1 for none.
    """
    batch, heads, seqlen_k = q.shape[0], q.shape[1], k.shape[2]
    score = _Score(distance, **options)
    # The query at position `distance` meets every key at position 0.
    q_pos = positions.new_full((batch, 1), distance)
    s = score(q, k, q_pos, positions.new_zeros((batch, seqlen_k)))[:, :, 0]  # [B, Hq, Sk]

    index = torch.arange(seqlen_k, device=q.device).expand(batch, -1)
    k_pos = index if k_start is None else k_start[:, None] + index
    is_middle = (k_pos >= n_global) & (positions[:, None] - k_pos >= window)
    is_middle &= is_middle.sum(-1, keepdim=True) >= top_k
    s = s.masked_fill(~is_middle[:, None] | s.isnan(), -math.inf)
    if seqlen_k < top_k:  # no row has enough
        s = torch.cat([s, s.new_full((batch, heads, top_k - seqlen_k), -math.inf)], dim=-1)
        k_pos = torch.cat([k_pos, k_pos.new_zeros(batch, top_k - seqlen_k)], dim=-1)
        v = torch.cat([v, v.new_zeros(*v.shape[:2], top_k - seqlen_k, v.shape[3])], dim=2)
    best, slot = (x[..., :top_k] for x in s.sort(dim=-1, descending=True, stable=True))
    chosen = k_pos[:, None].expand(-1, heads, -1).gather(-1, slot).masked_fill(best.isinf(), -1)

    # The Λ result stands for one key with score lambda_lse. The sink is in its denominator, so its
    # value is what it would be without one.
    v = v.repeat_interleave(heads // v.shape[1], dim=1)
    values = v.gather(2, slot[..., None].expand(-1, -1, -1, v.shape[3]))
    values = values.masked_fill(chosen[..., None] < 0, 0.0)
    lambda_lse = lambda_lse.to(s.dtype)
    without_sink = lambda_out
    if sink_logits is not None:
        sink = sink_logits.to(s.dtype)[None, :, None]
        without_sink = lambda_out * (1.0 + (sink - lambda_lse).exp())[..., None]
        without_sink = without_sink.masked_fill(lambda_lse.isinf()[..., None], 0.0)
    scores = torch.cat([lambda_lse, best], dim=-1)[:, :, None]  # [B, Hq, 1, 1 + top_k]
    values = torch.cat([without_sink, values], dim=2)
    lse = torch.logsumexp(scores.to(torch.promote_types(s.dtype, torch.float32)), dim=-1)
    if sink_logits is not None:
        sink = sink[..., None].expand(batch, -1, -1, -1)
        scores = torch.cat([scores, sink], dim=-1)
        values = torch.cat([values, torch.zeros_like(lambda_out)], dim=2)
    p = scores.softmax(dim=-1).nan_to_num(0.0)
    is_changed = (chosen[..., :1] >= 0)[..., None]
    return torch.where(is_changed, p @ values, lambda_out), lse, chosen
