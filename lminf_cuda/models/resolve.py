"""What patch_model's arguments come to for a given model, layer by layer."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from .compat import HOOKS
from .description import Description
from .rope import is_rotary, training_length
from .settings import LambdaSettings, LayerSettings


def _check_setting(name: str, value: Any, minimum: int, why: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} is {value!r}; it must be an int")
    if value < minimum:
        raise ValueError(f"{name} is {value}; it must be at least {minimum}{why}")


def refuse_meta(model: nn.Module) -> None:
    """Raises ValueError for a model that is on the meta device, wholly or in part.

    What accelerate's hooks bring when it is needed may be there, but for rotary frequencies, which
    are read at patch time.
    """
    meta = [name for name, tensor in _tensors(model) if tensor.is_meta]
    if meta:
        more = f" and {len(meta) - 1} more" if len(meta) > 1 else ""
        raise ValueError(
            f"this {type(model).__name__} is on the meta device ({meta[0]}{more}), where tensors "
            "have no values; load the weights first, as from_pretrained does, and patch it then"
        )


def _tensors(module: nn.Module, path: str = "", hooked: bool = False) -> Iterator[tuple[str, Any]]:
    """The tensors whose values a patch counts on, with their names."""
    hooked = hooked or hasattr(module, HOOKS)
    if not hooked or is_rotary(module):
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None:
                yield path + name, tensor
    for name, child in module.named_children():
        yield from _tensors(child, f"{path}{name}.", hooked)


def resolve_lengths(
    description: Description, n_global: Any, window: Any, max_distance: Any
) -> tuple[int, int, int]:
    """Checks patch_model's arguments and fills in what is None: n_global, window, max_distance."""
    chunk = description.chunk
    if window is None:
        window = training_length(description.decoder.config)
        own = [layer.window for layer in description.attention]
        if None not in own:
            window = min([window, *own])
        window = min(window, chunk or window)
    _check_setting("n_global", n_global, 0, "")
    _check_setting("window", window, 1, " (the query's own key)")
    if chunk is not None and window > chunk:
        raise ValueError(
            f"window is {window}, but layers of this {type(description.decoder).__name__} attend "
            f"within chunks of {chunk} tokens, and beyond its first chunk a longer window is not "
            f"what they do; pass window={chunk} or less"
        )
    if max_distance is None:
        max_distance = window
    _check_setting("max_distance", max_distance, window, ", the window")
    return n_global, window, max_distance


def resolve_middle(
    max_distance: int, top_k: Any, from_layer: Any, distance: Any
) -> tuple[int, int, int]:
    """Checks patch_model's middle_* arguments and fills in what is None."""
    _check_setting("middle_top_k", top_k, 0, " (0: no middle tokens)")
    _check_setting("middle_from_layer", from_layer, 0, "")
    if distance is None:
        distance = max_distance // 2
    _check_setting("middle_distance", distance, 0, "")
    if distance > max_distance:
        raise ValueError(
            f"middle_distance is {distance}; it must be at most max_distance, which is "
            f"{max_distance}"
        )
    return (top_k, from_layer, distance) if top_k else (0, 0, 0)


def add_middle(settings: LambdaSettings) -> None:
    """Tells the layers that have middle tokens."""
    if settings.middle_top_k == 0:
        return
    # A layer that slides by itself sees no token from afar.
    layers = [
        layer
        for layer in settings.layers[settings.middle_from_layer :]
        if layer is not None
        and (layer.n_global, layer.window) == (settings.n_global, settings.window)
    ]
    if any(layer is not None and layer.keys_of is not None for layer in settings.layers):
        raise ValueError(
            f"middle_top_k is {settings.middle_top_k}, but this model has layers that share their "
            "keys, among which the middle is not searched; leave middle_top_k out"
        )
    if not layers:
        raise ValueError(
            f"middle_from_layer is {settings.middle_from_layer}, but this model has "
            f"{len(settings.layers)} layers, and from there on none that does not slide by itself; "
            "choose an earlier layer"
        )
    for layer in layers:
        layer.middle_top_k = settings.middle_top_k
        layer.middle_distance = settings.middle_distance


def resolve_layers(
    description: Description, n_global: int, window: int, max_distance: int
) -> list[LayerSettings | None]:
    """Every layer's share of the settings; None for a layer without attention."""
    layers: list[LayerSettings | None] = []
    for layer in description.layers:
        if layer.attention is None:
            layers.append(None)
            continue
        # A layer that slides was trained to see no further, and never saw the first from afar.
        lengths = (n_global, window, max_distance)
        if layer.window is not None and layer.window < window:
            lengths = (0, layer.window, layer.window)
        layers.append(
            LayerSettings(
                *lengths, layer.rope, layer.slopes, layer.keys_of, query_scale=layer.query_scale
            )
        )
    return layers
