"""Middle tokens, the optional part of LM-Infinite (arXiv 2308.16137, section 4.2).

With `patch_model(model, middle_top_k=k)` the last query of every forward also meets, in the layers
from `middle_from_layer` on, for each head those k of the keys between the global tokens and the
window whose score is largest, all at distance `middle_distance`. The other queries of a forward see
what they see without it.

For this a cache has to keep the keys and values of all tokens: 2 * key heads * head dim elements a
token and layer, so that memory grows with the text. They stand un-rotated at slot 1 + position;
slot 0 takes what is padding.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .settings import LayerSettings
from .writable import Writable, writable

_FIRST_SLOTS = 256


def check_device(device: torch.device) -> None:
    """Raises RuntimeError for a device on which this build cannot search the middle."""
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    if device.type != "cuda" or has_kernel("lminf::middle_topk", "CUDA"):
        return
    raise RuntimeError(
        "middle tokens have no CUDA kernel in this build; keep and search them in the CPU's "
        'memory: past_key_values=LambdaCache(model, keep_middle="cpu")'
    )


def add_middle_tokens(
    settings: LayerSettings,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    positions: Tensor,
    options: dict[str, Any],
    k_start: Tensor | None = None,
) -> Tensor:
    """The Λ attention of one query of each row, with its middle tokens added.

    Args:
        settings: of the layer, with middle_top_k > 0.
        q: [B, Hq, 1, D], un-rotated.
        k, v: [B, Hkv, Sk, D], un-rotated, on any device: there the keys are chosen.
        out, lse: [B, Hq, 1, D] and [B, Hq, 1], of Λ attention.
        positions: int64 [B], of the queries; a row with a negative one stays as it is.
        options: of the op lambda_attn on the device of q, those of `settings` among them.
        k_start: int64 [B], position of each row's first key; 0 by default.

    Returns:
        [B, Hq, 1, D] on the device of q.
    """
    check_device(k.device)
    moved = {
        name: value.to(k.device) if isinstance(value, Tensor) else value
        for name, value in options.items()
        if name != "max_distance"
    }
    merged, _, _ = torch.ops.lminf.middle_topk.default(
        q.to(k.device),
        k,
        v,
        out.to(k.device),
        lse.to(k.device),
        positions.to(k.device),
        settings.n_global,
        settings.window,
        settings.middle_top_k,
        settings.middle_distance,
        k_start=None if k_start is None else k_start.to(k.device),
        **moved,
    )
    return merged.to(q.device)


class MiddleStore(Writable):
    """All keys and values of one layer, un-rotated, in memory that doubles when it is full.

    Args:
        k, v: [B, Hkv, any, D], like the keys and values to come.
        device: where they are kept.
    """

    def __init__(self, k: Tensor, v: Tensor, device: torch.device) -> None:
        self.device = device
        self.k = self._empty(k, _FIRST_SLOTS)  # [B, Hkv, slots, D]
        self.v = self._empty(v, _FIRST_SLOTS)

    def _empty(self, like: Tensor, slots: int) -> Tensor:
        batch, heads, _, dim = like.shape
        with writable():
            return like.new_empty((batch, heads, slots, dim), device=self.device)

    def append(self, k: Tensor, v: Tensor, first: Tensor, seen: int) -> None:
        """Keeps k, v [B, Hkv, S, D], whose rows stand from positions `first` [B] on.

        `seen` columns came before; no row's position is beyond its column.
        """
        n_new = k.shape[2]
        slots = self.k.shape[2]
        needed = 1 + seen + n_new
        positions = first.to(self.device)[:, None] + torch.arange(n_new, device=self.device)
        index = (positions.clamp(min=-1) + 1)[:, None, :, None]
        for name, new in (("k", k), ("v", v)):
            kept: Tensor = getattr(self, name)
            if needed > slots:
                larger = self._empty(kept, max(needed, 2 * slots))
                larger[:, :, :slots] = kept
                setattr(self, name, larger)
                kept = larger
            new = new.to(self.device)
            kept.scatter_(2, index.expand(-1, new.shape[1], -1, new.shape[3]), new)

    def held(self, seen: int) -> tuple[Tensor, Tensor]:
        """Keys and values of positions 0 .. seen - 1, [B, Hkv, seen, D]."""
        return self.k[:, :, 1 : 1 + seen], self.v[:, :, 1 : 1 + seen]

    def select_rows(self, indices: Tensor) -> None:
        """Keeps the rows `indices` int64 [rows]."""
        indices = indices.to(self.device)
        with writable():
            self.k, self.v = self.k.index_select(0, indices), self.v.index_select(0, indices)
