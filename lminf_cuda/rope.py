"""What a patch must know of a model's rotary embedding, and the module that takes its place.

Under a patch the model hands un-rotated queries and keys to the kernels, which rotate them by
clamped distances (design.md section 2). So the frequencies are read off once, at patch time, and
the model's own rotary module is set aside: it is not even run, since dynamic and longrope
embeddings rewrite their frequencies when they meet a long input.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["IdentityRotary", "Rope", "snapshot_rope", "training_length"]


@dataclass(eq=False)
class Rope:
    """The rotation of one kind of layer.

    Attributes:
        inv_freq: float32 [R/2], of the lengths that the model was trained on.
        scaling: multiplies the R rotated dims of queries and keys (the model's attention_scaling).
        interleaved: pairs are (2t, 2t+1) instead of (t, t + R/2).
    """

    inv_freq: Tensor
    scaling: float = 1.0
    interleaved: bool = False
    _on_device: dict[torch.device, Tensor] = field(default_factory=dict, repr=False)

    def inv_freq_on(self, device: torch.device) -> Tensor:
        """`inv_freq` on `device`, copied there once."""
        inv_freq = self._on_device.get(device)
        if inv_freq is None:
            inv_freq = self._on_device[device] = self.inv_freq.to(device)
        return inv_freq


def snapshot_rope(rotary: Any, *, interleaved: bool = False) -> Rope:
    """Copies the frequencies that a transformers rotary module was built with.

    `original_inv_freq` outlives what dynamic and longrope embeddings do to `inv_freq` on a long
    input; of longrope it holds the short factors, those of the training length.

    Args:
        rotary: the model's rotary embedding, with `inv_freq` [R/2] and `attention_scaling`.
        interleaved: whether the model pairs neighbouring dims.
    """
    inv_freq = getattr(rotary, "original_inv_freq", None)
    if inv_freq is None:
        inv_freq = rotary.inv_freq
    with torch.inference_mode(False):
        copy = inv_freq.detach().to(torch.float32, copy=True)
    return Rope(copy, float(getattr(rotary, "attention_scaling", 1.0)), interleaved)


def training_length(config: Any) -> int:
    """The number of tokens that a model was trained on, as its config tells.

    That is `original_max_position_embeddings` where a scaled rotary embedding names one, else
    `max_position_embeddings`.

    Raises:
        ValueError: the config names neither.
    """
    rope = getattr(config, "rope_parameters", None) or {}
    for length in (
        rope.get("original_max_position_embeddings"),
        getattr(config, "original_max_position_embeddings", None),
        getattr(config, "max_position_embeddings", None),
    ):
        if length is not None:
            return int(length)
    raise ValueError(
        f"window=None takes the training length, but the {config.model_type} config has no "
        "max_position_embeddings; pass window=<tokens>"
    )


class IdentityRotary(nn.Module):
    """Stands where a model's rotary module stood and rotates nothing: cos 1, sin 0.

    Attributes:
        original: the module it stands for, kept as a child so that it follows `model.to(...)`.
        rotary_dim: R, the number of dims that cos and sin are for.
    """

    def __init__(self, original: Any) -> None:
        super().__init__()
        self.original: nn.Module = original
        self.rotary_dim = 2 * original.inv_freq.numel()

    def forward(self, x: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """cos and sin for hidden states x [B, S, hidden]: [B, S, R] each, in x's dtype."""
        shape = (x.shape[0], x.shape[1], self.rotary_dim)
        return x.new_ones(1).expand(shape), x.new_zeros(1).expand(shape)
