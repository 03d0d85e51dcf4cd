"""What a patched model was asked for, and what follows from it for each of its layers."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .rope import Rope

__all__ = ["SETTINGS_ATTRIBUTE", "LambdaSettings", "LayerSettings"]

# The attribute of a patched module that holds its LambdaSettings.
SETTINGS_ATTRIBUTE = "_lminf_settings"


@dataclass(eq=False)
class LayerSettings:
    """What one attention layer attends to, and how it rotates.

    Attributes:
        n_global: the first so many tokens are seen from everywhere.
        window: so many keys, the query's own included, are seen behind every query.
        max_distance: no larger distance enters a score.
        rope: the layer's rotation, or None for a layer without one.
        slopes: ALiBi slopes, float32 [Hq], or None.
        query_scale: what the queries are multiplied by at their positions, int64 [B, S] ->
            float32 [B, S], or None.
        middle_top_k: so many keys of the middle join the last query of a forward; 0 for none.
        middle_distance: at which they are met.
        keys_of: the earlier layer whose keys and values this one attends with, or None for its own.
    """

    n_global: int
    window: int
    max_distance: int
    rope: Rope | None
    slopes: Tensor | None = None
    keys_of: int | None = None
    middle_top_k: int = 0
    middle_distance: int = 0
    query_scale: Callable[[Tensor], Tensor] | None = None
    _options: dict[torch.device, dict[str, Any]] = field(default_factory=dict, repr=False)

    def options(self, device: torch.device) -> dict[str, Any]:
        """The keyword arguments for lambda_attn and lambda_decode on tensors of `device`."""
        options = self._options.get(device)
        if options is None:
            options = {"max_distance": self.max_distance}
            if self.rope is not None:
                options["inv_freq"] = self.rope.inv_freq_on(device)
                options["rope_scaling"] = self.rope.scaling
                options["rope_interleaved"] = self.rope.interleaved
            if self.slopes is not None:
                options["alibi_slopes"] = self.slopes.to(device)
            self._options[device] = options
        return options

    def arrange(self, x: Tensor) -> Tensor:
        """Queries or keys x [B, H, S, D] with the dims that rotate first, as the op wants them."""
        if self.rope is None or not self.rope.rotates_last:
            return x
        rest = x.shape[-1] - 2 * self.rope.inv_freq.numel()
        return torch.cat([x[..., rest:], x[..., :rest]], dim=-1)


@dataclass(eq=False)
class LambdaSettings:
    """What `patch_model` was asked for, and what follows from it for each layer.

    Attributes:
        n_global, window, max_distance: of the layers that do not slide by themselves.
        layers: one entry per decoder layer, None for a layer without attention.
        recurrent_states: of each layer the number of convolution or recurrent states that it keeps;
            empty for a model that has none.
        middle_top_k, middle_from_layer, middle_distance: of the middle tokens (middle.py).
        cross_attends: of an encoder-decoder, whose cross-attention has a cache of its own.
        cross_layers: those that attend to an image instead of the text, whose keys stay as they
            are.
        reads_once: the model takes several new tokens only while the cache is empty.
        patch_id: tells the caches of one patched model from those of another, in any process. A
            deep copy of the model or of a cache keeps it.
    """

    n_global: int
    window: int
    max_distance: int
    layers: list[LayerSettings | None]
    middle_top_k: int = 0
    middle_from_layer: int = 0
    middle_distance: int = 0
    recurrent_states: list[int] = field(default_factory=list)
    cross_attends: bool = False
    cross_layers: list[int] = field(default_factory=list)
    reads_once: bool = False
    patch_id: str = field(default_factory=lambda: uuid.uuid4().hex)

    def __str__(self) -> str:
        text = f"n_global={self.n_global}, window={self.window}, max_distance={self.max_distance}"
        if self.middle_top_k == 0:
            return text
        return (
            f"{text}, middle_top_k={self.middle_top_k}, "
            f"middle_from_layer={self.middle_from_layer}, middle_distance={self.middle_distance}"
        )
