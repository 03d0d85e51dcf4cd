"""What a model's decoder is, asked once, at patch time.

`describe` answers all that a patch wants to know of it, layer by layer; what works on a patched
model is handed the answers.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import transformers
from torch import Tensor, nn

from .compat import asks_interface
from .family import RECURRENT, WITHOUT_ATTENTION, Family
from .rope import Rope, is_rotary, snapshot_rope

_SLIDING = (None, "sliding_attention", "hybrid_sliding")


@dataclass(frozen=True, eq=False)
class LayerDescription:
    """A layer as a cache counts them, unpatched.

    Attributes:
        attention: its self-attention module; None for a layer without one.
        cross_attention: the module that attends to an image instead, or None.
        window: over which it slides by itself, or None.
        n_states: convolution or recurrent states that it keeps beside attention.
        keys_of: the earlier layer whose keys it attends with, None for its own.
        rope: its rotation, or None.
        slopes: its ALiBi slopes, float32 [Hq], or None.
        query_scale: see Family.query_scale.
    """

    attention: Any
    cross_attention: Any
    window: int | None
    n_states: int
    keys_of: int | None
    rope: Rope | None = None
    slopes: Tensor | None = None
    query_scale: Any = None


@dataclass(frozen=True, eq=False)
class Description:
    """A decoder, unpatched.

    Attributes:
        family: where its type differs from Llama.
        chunk: tokens of the chunks within which some layers attend, or None.
    """

    decoder: Any
    family: Family
    layers: tuple[LayerDescription, ...]
    chunk: int | None

    @property
    def attention(self) -> list[LayerDescription]:
        """The layers with self-attention."""
        return [layer for layer in self.layers if layer.attention is not None]

    @property
    def cross_attention(self) -> dict[int, Any]:
        """By the layer's index the modules that attend to an image and stay as they are."""
        modules = {index: layer.cross_attention for index, layer in enumerate(self.layers)}
        return {index: module for index, module in modules.items() if module is not None}

    @property
    def recurrent_states(self) -> list[int]:
        """The layers' numbers of states; empty for a decoder that has none."""
        states = [layer.n_states for layer in self.layers]
        return states if any(states) else []


def describe(decoder: Any, family: Family) -> Description:
    """All that a patch wants to know of a decoder.

    Raises:
        ValueError: it rotates, or shares keys, in a way that a patch cannot follow.
    """
    config = decoder.config
    modules = attention_modules(decoder, family)
    types = getattr(config, "layer_types", None) or [None] * len(modules)
    sources = _keys_of(decoder, types)
    sliding = getattr(config, "sliding_window", None)
    n_states = getattr(config, "number_of_conv_states", 1) if family.is_recurrent else 0
    ropes: dict[tuple[int, str | None], Rope] = {}
    layers = []
    for index, attention in enumerate(modules):
        kind = types[index]
        cross = family.cross_attention and getattr(
            decoder.layers[index], family.cross_attention, None
        )
        layer = LayerDescription(
            attention,
            cross,
            window=sliding if kind in _SLIDING else None,
            n_states=n_states if kind in RECURRENT else 0,
            keys_of=sources[index],
        )
        if attention is not None:
            layer = replace(
                layer,
                rope=_rope(decoder, family, index, attention, kind, ropes),
                slopes=family.slopes(attention),
                query_scale=family.query_scale(attention),
            )
        layers.append(layer)
    chunked = "chunked_attention" in types
    return Description(
        decoder, family, tuple(layers), config.attention_chunk_size if chunked else None
    )


def attention_modules(decoder: Any, family: Family) -> list[Any]:
    """The attention modules of a decoder, in the order of their layers in a cache.

    None stands for a layer without self-attention.
    """
    if family.modules is not None:
        return family.modules(decoder)
    types = getattr(decoder.config, "layer_types", None)
    return [
        None
        if (types and types[index] in WITHOUT_ATTENTION)
        or (family.cross_attention is not None and hasattr(layer, family.cross_attention))
        else _descendant(layer, path)
        for index, layer in enumerate(_descendant(decoder, family.layers))
        for path in family.attention
    ]


def fits(decoder: Any, family: Family) -> bool:
    """Whether a module has the attributes that the family's decoder has."""
    layers = _descendant(decoder, family.layers)
    if not isinstance(layers, nn.ModuleList) or len(layers) == 0:
        return False
    if not hasattr(decoder, "config"):
        return False
    if family.cross_attends and not getattr(decoder, "is_decoder", False):
        return False
    with_attention = attention_modules(decoder, family)
    modules = [module for module in with_attention if module is not None]
    if len(modules) < len(with_attention) and not (family.is_recurrent or family.cross_attention):
        return False
    if not modules or not all(map(_is_transformers_attention, modules)):
        return False
    if family.forward is not None:
        return True
    has_rotary = any(is_rotary(module) for module in decoder.modules())
    rotates = any(map(family.uses_rope, modules))
    return (has_rotary or not rotates) and all(map(asks_interface, modules))


def _keys_of(decoder: Any, types: list[str | None]) -> list[int | None]:
    """Of every layer the earlier one whose keys it attends with, None for its own."""
    modes = getattr(decoder.config, "kv_sharing_modes", None)
    if modes is None and getattr(decoder.config, "num_kv_shared_layers", None):
        raise ValueError(
            f"this {type(decoder).__name__} has layers that share keys in a way of "
            f"transformers {transformers.__version__} that a patch cannot follow; use a "
            "newer transformers"
        )
    if not modes:
        return [None] * len(types)
    storing = {types[index]: index for index, mode in enumerate(modes) if mode == "store"}
    return [storing[types[index]] if mode == "reuse" else None for index, mode in enumerate(modes)]


def _rope(
    decoder: Any,
    family: Family,
    index: int,
    attention: Any,
    kind: str | None,
    known: dict[tuple[int, str | None], Rope],
) -> Rope | None:
    """How a layer rotates its queries and keys, None if it does not; kept in `known`."""
    if not family.uses_rope(attention):
        return None
    if family.rope is not None:
        return family.rope(attention)
    rotary = family.rotary(decoder, index)
    if (id(rotary), kind) not in known:
        rope = snapshot_rope(
            rotary,
            layer_type=kind,
            interleaved=family.interleaved,
            rotates_last=family.rotates_last,
        )
        known[id(rotary), kind] = (
            replace(rope, inv_freq=-rope.inv_freq) if family.backwards else rope
        )
    return known[id(rotary), kind]


def _descendant(module: Any, path: str) -> Any:
    """The attribute at a dotted path, or None."""
    for name in path.split("."):
        module = getattr(module, name, None)
    return module


def _is_transformers_attention(module: Any) -> bool:
    return hasattr(module, "layer_idx") and any(
        cls.__module__.startswith("transformers.models.") for cls in type(module).__mro__
    )
