"""Where a model type may differ from Llama: what a line in families.py can say."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from .rope import Rope


@dataclass(frozen=True)
class Family:
    """Where a model type differs from Llama.

    Attributes:
        layers: the path from the decoder to its layers.
        attention: the paths from a layer to its attention modules, mostly one.
        modules: of a decoder: its attention modules in the order of their layers in a cache, where
            these two do not tell.
        interleaved: rotary pairs are (2t, 2t+1) instead of (t, t + R/2).
        backwards: rotates by minus the position.
        rotates_last: the last R dims of a head rotate instead of the first ones.
        uses_rope: of an attention module: whether the layer rotates at all.
        rotary: of a decoder and a layer's index: the rotary module that serves the layer.
        rope: of an attention module: its rotation, where no rotary module tells it.
        slopes: of an attention module: its ALiBi slopes, float32 [Hq], or None.
        forward: stands for the attention module's forward where that does not ask the
            AttentionInterface.
        query_scale: of an attention module: what its queries are multiplied by at their positions,
            int64 [B, S] -> float32 [B, S]; None where the model's own code does it from
            position_ids, or nothing does.
        switched_off: attributes of the attention modules that are False while they are patched.
        cross_attends: an encoder-decoder, of which the decoder's self-attention alone is replaced.
        cross_attention: a layer's attribute that holds its attention to an image, in layers that
            have that instead of self-attention and stay as they are.
        reads_positions: position_ids are used for something besides rotation.
        needs_mask: the decoder's forward wants a padding mask that is a tensor.
        is_recurrent: has layers besides attention that keep a state over the tokens.
        reads_once: transformers' own code of these starts from nothing whenever it reads several
            tokens, whatever the cache holds.
        plain_methods: methods of the causal LM that are replaced by GenerationMixin's own while it
            is patched.
    """

    layers: str = "layers"
    attention: tuple[str, ...] = ("self_attn",)
    modules: Callable[[Any], list[Any]] | None = None
    interleaved: bool = False
    backwards: bool = False
    rotates_last: bool = False
    uses_rope: Callable[[Any], bool] = lambda attention: True
    rotary: Callable[[Any, int], Any] = lambda decoder, index: decoder.rotary_emb
    rope: Callable[[Any], Rope] | None = None
    slopes: Callable[[Any], Tensor | None] = lambda attention: None
    query_scale: Callable[[Any], Callable[[Tensor], Tensor] | None] = lambda attention: None
    switched_off: tuple[str, ...] = ()
    forward: Callable[..., Any] | None = None
    cross_attends: bool = False
    cross_attention: str | None = None
    reads_positions: bool = False
    needs_mask: bool = False
    is_recurrent: bool = False
    reads_once: bool = False
    plain_methods: tuple[str, ...] = ()

    def __deepcopy__(self, memo: dict[int, Any]) -> Family:
        return self


# What a config calls layers that keep a state, and those among its layers that have no attention.
RECURRENT = ("linear_attention", "conv", "hybrid", "hybrid_sliding")
WITHOUT_ATTENTION = ("linear_attention", "conv", "mlp", "moe")
