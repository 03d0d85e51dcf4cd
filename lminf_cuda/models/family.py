"""Where a model type may differ from Llama: what a line in families.py can say."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import transformers
from torch import Tensor, nn

from .compat import asks_interface
from .rope import Rope, is_rotary, snapshot_rope

__all__ = ["RECURRENT", "WITHOUT_ATTENTION", "Family", "layer_type"]


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

    def __reduce__(self) -> tuple[Any, ...]:
        """By its name, since the functions here have none of their own that pickle could store."""
        from .families import all_families, family_of

        names = [name for name, family in all_families().items() if family is self]
        if not names:
            raise TypeError("a Family that no model type has cannot be pickled")
        return family_of, (names[0],)

    def attention_modules(self, decoder: Any) -> list[Any]:
        """The attention modules of a decoder, in the order of their layers in a cache.

        None stands for a layer without self-attention.
        """
        if self.modules is not None:
            return self.modules(decoder)
        return [
            None
            if layer_type(decoder.config, index) in WITHOUT_ATTENTION
            or (self.cross_attention is not None and hasattr(layer, self.cross_attention))
            else _descendant(layer, path)
            for index, layer in enumerate(_descendant(decoder, self.layers))
            for path in self.attention
        ]

    def cross_attention_modules(self, decoder: Any) -> dict[int, Any]:
        """By the layer's index the modules that attend to an image and stay as they are."""
        if self.cross_attention is None:
            return {}
        modules = [getattr(layer, self.cross_attention, None) for layer in decoder.layers]
        return {index: module for index, module in enumerate(modules) if module is not None}

    def recurrent_states(self, decoder: Any) -> list[int]:
        """Of every layer the number of states that it keeps beside attention; or an empty list."""
        if not self.is_recurrent:
            return []
        config = decoder.config
        n_states = getattr(config, "number_of_conv_states", 1)
        states = [
            n_states if layer_type(config, index) in RECURRENT else 0
            for index in range(len(_descendant(decoder, self.layers)))
        ]
        return states if any(states) else []

    def keys_of(self, decoder: Any) -> list[int | None]:
        """Of every layer the earlier one whose keys it attends with, None for its own."""
        config, n_layers = decoder.config, len(self.attention_modules(decoder))
        modes = getattr(config, "kv_sharing_modes", None)
        if modes is None and getattr(config, "num_kv_shared_layers", None):
            raise ValueError(
                f"this {type(decoder).__name__} has layers that share keys in a way of "
                f"transformers {transformers.__version__} that a patch cannot follow; use a "
                "newer transformers"
            )
        modes = modes or [None] * n_layers
        storing = {
            layer_type(config, index): index for index, mode in enumerate(modes) if mode == "store"
        }
        return [
            storing[layer_type(config, index)] if mode == "reuse" else None
            for index, mode in enumerate(modes)
        ]

    def layer_rope(self, decoder: Any, index: int) -> Rope | None:
        """How layer `index` rotates its queries and keys; None if it does not."""
        attention = self.attention_modules(decoder)[index]
        if not self.uses_rope(attention):
            return None
        if self.rope is not None:
            return self.rope(attention)
        rope = snapshot_rope(
            self.rotary(decoder, index),
            layer_type=layer_type(decoder.config, index),
            interleaved=self.interleaved,
            rotates_last=self.rotates_last,
        )
        return replace(rope, inv_freq=-rope.inv_freq) if self.backwards else rope

    def fits(self, decoder: Any) -> bool:
        """Whether a module has the attributes that this family's decoder has."""
        layers = _descendant(decoder, self.layers)
        if not isinstance(layers, nn.ModuleList) or len(layers) == 0:
            return False
        if not hasattr(decoder, "config"):
            return False
        if self.cross_attends and not getattr(decoder, "is_decoder", False):
            return False
        with_attention = self.attention_modules(decoder)
        modules = [module for module in with_attention if module is not None]
        if len(modules) < len(with_attention) and not (self.is_recurrent or self.cross_attention):
            return False
        if not modules or not all(map(_is_transformers_attention, modules)):
            return False
        if self.forward is not None:
            return True
        has_rotary = any(is_rotary(module) for module in decoder.modules())
        rotates = any(map(self.uses_rope, modules))
        return (has_rotary or not rotates) and all(map(asks_interface, modules))


# What a config calls layers that keep a state, and those among its layers that have no attention.
RECURRENT = ("linear_attention", "conv", "hybrid", "hybrid_sliding")
WITHOUT_ATTENTION = ("linear_attention", "conv", "mlp", "moe")


def _descendant(module: Any, path: str) -> Any:
    """The attribute at a dotted path, or None."""
    for name in path.split("."):
        module = getattr(module, name, None)
    return module


def layer_type(config: Any, index: int) -> str | None:
    """The config's word for layer `index`, as in "sliding_attention", or None."""
    types = getattr(config, "layer_types", None)
    return types[index] if types else None


def _is_transformers_attention(module: Any) -> bool:
    return hasattr(module, "layer_idx") and any(
        cls.__module__.startswith("transformers.models.") for cls in type(module).__mro__
    )
