"""What a patched model was asked for, and what follows from it for each of its layers."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .compat import config_value
from .rope import Rope

# The attribute of a patched module that holds its LambdaSettings.
SETTINGS_ATTRIBUTE = "_lminf_settings"

# What configs call the sizes on which a cache's tensors depend.
_SHAPE_NAMES = (
    *("model_type", "hidden_size", "d_model", "num_attention_heads", "num_heads", "n_heads"),
    *("num_key_value_heads", "num_kv_heads", "num_global_key_value_heads", "multi_query"),
    *("head_dim", "global_head_dim", "d_kv", "qk_head_dim", "qk_nope_head_dim"),
    *("qk_rope_head_dim", "v_head_dim"),
)
# Frequencies that two machines compute from the same config differ by less.
_ROUNDING = 2e-6
_SHOWN = 3  # differences in one message


def model_shape(config: Any) -> dict[str, Any]:
    """A decoder's sizes, as far as its config tells."""
    sizes = {name: config_value(config, name) for name in _SHAPE_NAMES}
    return {name: size for name, size in sizes.items() if size is not None}


def _plain(value: Any) -> Any:
    """A fact as numbers and text, the same in every process."""
    if isinstance(value, Tensor):
        return value.double().flatten().tolist()
    if isinstance(value, partial):
        return f"{_plain(value.func)}({value.args}, {value.keywords})"
    return getattr(value, "__qualname__", value) if callable(value) else value


def _difference(a: Any, b: Any) -> tuple[str, Any, Any] | None:
    """Where two facts differ: an index as text, and both; None if they are the same."""
    if isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        for index, (x, y) in enumerate(zip(a, b, strict=True)):
            if _difference(x, y):
                return f"[{index}]", x, y
        return None
    if isinstance(a, float) and isinstance(b, float):
        return None if math.isclose(a, b, rel_tol=_ROUNDING) else ("", a, b)
    return None if a == b else ("", a, b)


FULL = 2**30  # the window and the max_distance of a layer that keeps full attention


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
        observer: called with the un-rotated queries and keys of every forward and the op's options,
            just before the op; for looking into a model (evaluation/diagnosis.py).
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
    observer: Callable[[Tensor, Tensor, dict[str, Any]], None] | None = None
    _options: dict[torch.device, dict[str, Any]] = field(default_factory=dict, repr=False)

    @property
    def is_full(self) -> bool:
        """Whether it attends to all keys, at their true distances, and keeps them all."""
        return self.window >= FULL

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

    def facts(self) -> dict[str, Any]:
        """All of it that what is kept of the layer's keys depends on."""
        names = ("n_global", "window", "max_distance", "keys_of", "middle_top_k", "middle_distance")
        facts = {name: getattr(self, name) for name in names}
        facts |= {"slopes": _plain(self.slopes), "query_scale": _plain(self.query_scale)}
        if self.rope is not None:
            facts["inv_freq"] = _plain(self.rope.inv_freq)
            facts["rope_scaling"] = self.rope.scaling
            facts["rope_interleaved"] = self.rope.interleaved
            facts["rope_rotates_last"] = self.rope.rotates_last
        return facts

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
        n_global, window, max_distance: of the layers that do not slide by themselves; where they
            differ, the largest that are not full.
        layers: one entry per decoder layer, None for a layer without attention.
        recurrent_states: of each layer the number of convolution or recurrent states that it keeps;
            empty for a model that has none.
        middle_top_k, middle_from_layer, middle_distance: of the middle tokens (middle.py).
        cross_attends: of an encoder-decoder, whose cross-attention has a cache of its own.
        cross_layers: those that attend to an image instead of the text, whose keys stay as they
            are.
        reads_once: the model takes several new tokens only while the cache is empty.
        by_layer: each layer's n_global and window (None: full), where lists were asked for.
        shape: sizes of the model, by their names.
        fingerprint: the same for settings that are the same, in any process.
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
    by_layer: list[tuple[int, int | None]] | None = None
    shape: dict[str, Any] = field(default_factory=dict)
    fingerprint: str = ""

    def seal(self) -> None:
        """Takes the fingerprint, once all is set."""
        self.fingerprint = hashlib.sha256(repr(self._facts()).encode()).hexdigest()

    def _facts(self) -> dict[str, Any]:
        """All that a cache depends on, by name."""
        names = ("n_global", "window", "max_distance", "recurrent_states", "cross_attends")
        facts = {name: getattr(self, name) for name in (*names, "cross_layers", "reads_once")}
        facts |= self.shape | {"number of layers": len(self.layers)}
        for index, layer in enumerate(self.layers):
            own = {"attention": layer is not None} | ({} if layer is None else layer.facts())
            facts |= {f"{name} of layer {index}": value for name, value in own.items()}
        return facts

    def differences(self, other: LambdaSettings) -> Iterator[tuple[str, Any, Any]]:
        """What differs between two settings: its name, and what it is in each."""
        mine, theirs = self._facts(), other._facts()
        for name in mine | theirs:
            difference = _difference(mine.get(name), theirs.get(name))
            if difference is not None:
                index, a, b = difference
                yield f"{name}{index}", a, b

    def check_same(self, model: LambdaSettings) -> None:
        """Whether a cache with these settings may be used by a model with those of `model`.

        Raises:
            ValueError: they differ.
        """
        if model is self or model.fingerprint == self.fingerprint:
            return
        found = [
            f"{name} is {a!r} in it and {b!r} in the model"
            for name, a, b in self.differences(model)
        ]
        if not found:  # but roundings
            self.fingerprint = model.fingerprint
            return
        more = f", and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
        raise ValueError(
            "past_key_values is a LambdaCache made for another model or for other settings: "
            f"{', '.join(found[:_SHOWN])}{more}; make a new one by LambdaCache(model)"
        )

    def __str__(self) -> str:
        text = f"n_global={self.n_global}, window={self.window}, max_distance={self.max_distance}"
        if self.by_layer is not None:
            n_globals, windows = map(list, zip(*self.by_layer, strict=True))
            return f"n_global={n_globals}, window={windows}, max_distance={self.max_distance}"
        if self.middle_top_k == 0:
            return text
        return (
            f"{text}, middle_top_k={self.middle_top_k}, "
            f"middle_from_layer={self.middle_from_layer}, middle_distance={self.middle_distance}"
        )
