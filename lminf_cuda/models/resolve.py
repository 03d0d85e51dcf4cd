"""What patch_model's arguments come to for a given model, layer by layer."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from .compat import HOOKS
from .description import Description
from .rope import is_rotary, training_length
from .settings import FULL, LambdaSettings, LayerSettings


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


@dataclass(frozen=True)
class Lengths:
    """What n_global, window and max_distance come to.

    Attributes:
        n_global, window, max_distance: of the layers that do not slide by themselves; where they
            differ, the largest that are not full.
        by_layer: n_global and window of each layer, None in the window: full; None: all alike.
        clamp: max_distance as it was asked for; None: each layer's window.
    """

    n_global: int
    window: int
    max_distance: int
    by_layer: list[tuple[int, int | None]] | None = None
    clamp: int | None = None

    def of_layer(self, index: int) -> tuple[int, int, int]:
        """n_global, window and max_distance of a layer that does not slide by itself."""
        if self.by_layer is None:
            return self.n_global, self.window, self.max_distance
        n_global, window = self.by_layer[index]
        if window is None:
            return 0, FULL, FULL  # every key is in the window
        return n_global, window, self.clamp or window


def _by_layer(name: str, value: Any, n_layers: int) -> list[Any]:
    """One value for each layer."""
    if not isinstance(value, (list, tuple)):
        return [value] * n_layers
    if len(value) != n_layers:
        raise ValueError(
            f"{name} has {len(value)} values, and the model {n_layers} layers; give one for each, "
            "or one number for all"
        )
    return list(value)


def resolve_lengths(
    description: Description, n_global: Any, window: Any, max_distance: Any
) -> Lengths:
    """Checks patch_model's arguments and fills in what is None."""
    n_layers = len(description.layers)
    if not isinstance(n_global, (list, tuple)) and not isinstance(window, (list, tuple)):
        if window is None:
            window = _default_window(description)
        _check_setting("n_global", n_global, 0, "")
        _check_window(description, window)
        clamp = window if max_distance is None else max_distance
        _check_setting("max_distance", clamp, window, ", the window")
        return Lengths(n_global, window, clamp)
    n_globals = _by_layer("n_global", n_global, n_layers)
    if window is None:
        window = _default_window(description)
    windows = _by_layer("window", window, n_layers)
    for index in range(n_layers):
        _check_setting(f"n_global[{index}]", n_globals[index], 0, "")
        if windows[index] is not None:
            _check_window(description, windows[index], f"window[{index}]")
        elif description.chunk is not None or description.family.cross_attends:
            raise ValueError(
                f"window[{index}] is None, but a {type(description.decoder).__name__} attends "
                "within chunks or with a learned bias for every distance, where no layer can stay "
                "full; give a window for every layer"
            )
    finite = [size for size in windows if size is not None]
    if not finite:
        raise ValueError("window is None for every layer, which is no patch; give some a number")
    largest = max(finite)
    if max_distance is not None:
        _check_setting("max_distance", max_distance, largest, ", the largest window")
    return Lengths(
        max(n_globals),
        largest,
        max_distance or largest,
        list(zip(n_globals, windows, strict=True)),
        max_distance,
    )


def _default_window(description: Description) -> int:
    """The training length, or the shorter window over which all layers slide."""
    window = training_length(description.decoder.config)
    layers = description.attention
    own = [layer.window for layer in layers if layer.window is not None]
    if len(own) == len(layers):
        window = min([window, *own])
    return min(window, description.chunk or window)


def _check_window(description: Description, window: Any, name: str = "window") -> None:
    _check_setting(name, window, 1, " (the query's own key)")
    chunk = description.chunk
    if chunk is not None and window > chunk:
        raise ValueError(
            f"{name} is {window}, but layers of this {type(description.decoder).__name__} attend "
            f"within chunks of {chunk} tokens, and beyond its first chunk a longer window is not "
            f"what they do; pass window={chunk} or less"
        )


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
    if settings.by_layer is not None:
        raise ValueError(
            f"middle_top_k is {settings.middle_top_k}, but n_global and window are given by layer, "
            "where the middle is not searched; give one number for all layers, or leave "
            "middle_top_k out"
        )
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


def resolve_layers(description: Description, lengths: Lengths) -> list[LayerSettings | None]:
    """Every layer's share of the settings; None for a layer without attention."""
    layers: list[LayerSettings | None] = []
    for index, layer in enumerate(description.layers):
        if layer.attention is None:
            layers.append(None)
            continue
        # A layer that slides was trained to see no further, and never saw the first from afar.
        of_layer = lengths.of_layer(index)
        if layer.window is not None and layer.window < of_layer[1]:
            of_layer = (0, layer.window, layer.window)
        source = None if layer.keys_of is None else layers[layer.keys_of]
        if source is not None and (source.n_global, source.window, source.max_distance) != of_layer:
            raise ValueError(
                f"layer {index} attends with the keys of layer {layer.keys_of} and must have its "
                "n_global and window; give both the same"
            )
        layers.append(
            LayerSettings(
                *of_layer, layer.rope, layer.slopes, layer.keys_of, query_scale=layer.query_scale
            )
        )
    return layers
