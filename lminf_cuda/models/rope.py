"""What a patch must know of a model's rotary embedding, and the module that takes its place.

Under a patch the model hands un-rotated queries and keys to the kernels, which rotate them by
clamped distances (docs/design.md section 2). So the frequencies are read off once, at patch time,
and the model's own rotary module is set aside: it is not even run, since dynamic and longrope
embeddings rewrite their frequencies when they meet a long input.
"""

from __future__ import annotations

import copy
import functools
import inspect
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .compat import ROTARY_TABLE
from .writable import writable

_PASSES = "_lminf_lets_unrotated_pass"  # of a library's function: it is wrapped


@dataclass(eq=False)
class Rope:
    """The rotation of one kind of layer.

    Attributes:
        inv_freq: float32 [R/2], of the lengths that the model was trained on.
        scaling: multiplies the R rotated dims of queries and keys (the model's attention_scaling).
        interleaved: pairs are (2t, 2t+1) instead of (t, t + R/2).
        rotates_last: the last R dims of a head rotate instead of the first ones.
    """

    inv_freq: Tensor
    scaling: float = 1.0
    interleaved: bool = False
    rotates_last: bool = False
    _on_device: dict[torch.device, Tensor] = field(default_factory=dict, repr=False)

    def inv_freq_on(self, device: torch.device) -> Tensor:
        """`inv_freq` on `device`, copied there once."""
        inv_freq = self._on_device.get(device)
        if inv_freq is None:
            inv_freq = self._on_device[device] = self.inv_freq.to(device)
        return inv_freq


def is_rotary(module: nn.Module) -> bool:
    """Whether a module is a rotary embedding, of one or of several layer types."""
    names = [name for name, _ in module.named_buffers(recurse=False)]
    if ROTARY_TABLE in names:  # older attention modules have one each, and look it up themselves
        return not any(True for _ in module.children())
    return any(name == "inv_freq" or name.endswith("_inv_freq") for name in names)


def _identity(rotary: Any, layer_type: str | None) -> tuple[Any, float]:
    """What a rotary module returns for position 0, with 1 for its largest entry, and that entry.

    The output is a tuple of cos and sin, or one complex tensor; [1, 1, any] or [3, 1, 1, any] each.
    """
    layer_types = () if layer_type is None else (layer_type,)
    probe = copy.deepcopy(rotary)  # some rewrite their frequencies
    with writable(), torch.no_grad():
        device = next(probe.buffers()).device
        x = torch.zeros(1, 1, 1, dtype=torch.float32, device=device)
        positions = torch.zeros(1, 1, dtype=torch.int64, device=device)
        parameters = getattr(getattr(rotary, "config", None), "rope_parameters", None) or {}
        if "mrope_section" in parameters:  # one for each of three dims
            positions = positions.expand(3, 1, 1)
        out = type(probe).forward(probe, x, positions, *layer_types)
    parts = out if isinstance(out, tuple) else (out,)
    shapes = ((1, 1), (3, 1, 1))
    if not all(isinstance(part, Tensor) and part.shape[:-1] in shapes for part in parts):
        raise ValueError(
            f"{type(rotary).__name__} returns something else than cos and sin of [batch, tokens, "
            "dims]; a patch cannot stand for it"
        )
    scaling = max(float(part.abs().max()) for part in parts)  # cos is the first or the last
    ones = tuple((part / scaling).cpu() for part in parts)
    return (ones if isinstance(out, tuple) else ones[0]), scaling


def snapshot_rope(
    rotary: Any,
    *,
    layer_type: str | None = None,
    interleaved: bool = False,
    rotates_last: bool = False,
) -> Rope:
    """Copies the frequencies that a transformers rotary module was built with.

    `original_inv_freq` outlives what dynamic and longrope embeddings do to `inv_freq` on a long
    input; of longrope it holds the short factors, those of the training length.

    Args:
        rotary: the model's rotary embedding, with `inv_freq` [R/2], or with one of that name for
            each layer type.
        layer_type: the layer's type, for an embedding that serves several.
        interleaved: whether the model pairs neighbouring dims.
        rotates_last: whether the last dims of a head rotate.
    """
    if isinstance(rotary, IdentityRotary):
        rotary = rotary.original
    layer_type = layer_type if _is_per_layer_type(rotary) else None
    prefix = "" if layer_type is None else f"{layer_type}_"
    inv_freq = getattr(rotary, f"{prefix}original_inv_freq", None)
    if inv_freq is None:
        inv_freq = getattr(rotary, f"{prefix}inv_freq")
    with writable():
        kept = inv_freq.detach().to(torch.float32, copy=True)
    return Rope(kept, _identity(rotary, layer_type)[1], interleaved, rotates_last)


def _is_per_layer_type(rotary: Any) -> bool:
    names = [name for name, _ in rotary.named_buffers(recurse=False)]
    return not {"inv_freq", ROTARY_TABLE} & set(names)


def training_length(config: Any) -> int:
    """The number of tokens that a model was trained on, as its config tells.

    That is `original_max_position_embeddings` where a scaled rotary embedding names one, else
    `max_position_embeddings`, or the name that a family has for it (T5's `n_positions`, which only
    some of its checkpoints have).

    Raises:
        ValueError: the config names neither.
    """
    rope = getattr(config, "rope_parameters", None) or {}
    if getattr(config, "layer_types", None):  # a dict of dicts where layer types differ
        rope = rope.get("full_attention", rope) or {}
    for length in (
        rope.get("original_max_position_embeddings"),
        getattr(config, "original_max_position_embeddings", None),
        getattr(config, "max_position_embeddings", None),
        getattr(config, "max_seq_len", None),
        getattr(config, "seq_length", None),
        getattr(config, "n_positions", None),
    ):
        if length is not None:
            return int(length)
    raise ValueError(
        f"window=None takes the training length, but the {config.model_type} config has no "
        "max_position_embeddings; pass window=<tokens>"
    )


def let_unrotated_pass(attention_types: Iterable[type], cos_sin: Any) -> bool:
    """Spares a model the multiplications by cos 1 and sin 0, ten operations a layer.

    The library's function that the attention modules rotate by hands its tensors on as they are
    when cos is empty, from now on; with any other cos it does what it did.

    Args:
        attention_types: classes of attention modules.
        cos_sin: what their rotary module returns for position 0, unscaled.

    Returns:
        Whether all of them rotate by a function that allows it: the only one with "rotary" in its
        name that the forward calls, of tensors, cos and sin, and nothing but a rotation.
    """
    if not isinstance(cos_sin, tuple) or any(part.shape[:-1] != (1, 1) for part in cos_sin):
        return False
    found: list[tuple[dict[str, Any], str, Callable[..., Any], int]] = []
    for cls in attention_types:
        forward = inspect.unwrap(cls.forward)  # type: ignore[attr-defined]
        known = vars(sys.modules[forward.__module__])
        names = [n for n in forward.__code__.co_names if "rotary" in n and callable(known.get(n))]
        if len(names) != 1:
            return False
        rotate = known[names[0]]
        parameters = list(inspect.signature(rotate).parameters.values())
        required = [p.name for p in parameters if p.default is p.empty]
        if required[-2:] != ["cos", "sin"]:
            return False
        n_tensors = len(required) - 2
        if not _only_rotates(rotate, n_tensors, cos_sin):
            return False
        found.append((known, names[0], rotate, n_tensors))
    for known, name, rotate, n_tensors in found:
        if not hasattr(rotate, _PASSES):
            known[name] = _passing(rotate, n_tensors)
    return True


def keeps_rotation(attention: nn.Module) -> bool:
    """Whether an attention module keeps the function it rotates by, as in transformers 5.4.

    Pickle, which knows functions by their names, would not find it under its own once
    `let_unrotated_pass` has wrapped it, in models that are not patched either.
    """
    return any(inspect.isfunction(v) and "rotary" in v.__name__ for v in vars(attention).values())


def _only_rotates(rotate: Callable[..., Any], n_tensors: int, cos_sin: Any) -> bool:
    """Whether `rotate` gives its tensors back, where cos is 1 and sin 0 for each dim or pair."""
    for dims_an_entry in (1, 2):
        cos = cos_sin[0]  # float32, on the CPU
        x = torch.linspace(-1, 1, dims_an_entry * cos.shape[-1], dtype=cos.dtype, device=cos.device)
        x = x.view(1, 1, 1, -1)
        try:
            out = rotate(*[x] * n_tensors, *cos_sin)
        except RuntimeError:  # other dims
            continue
        if all(torch.equal(part, x) for part in (out if n_tensors > 1 else (out,))):
            return True
    return False


def _passing(rotate: Callable[..., Any], n_tensors: int) -> Callable[..., Any]:
    """`rotate`, of n_tensors tensors and then cos and sin, but for an empty cos."""

    @functools.wraps(rotate)
    def rotate_or_pass(*args: Any, **kwargs: Any) -> Any:
        if len(args) > n_tensors and args[n_tensors].shape[-1] == 0:
            return args[:n_tensors] if n_tensors > 1 else args[0]
        return rotate(*args, **kwargs)

    setattr(rotate_or_pass, _PASSES, True)
    return rotate_or_pass


class IdentityRotary(nn.Module):
    """Stands where a model's rotary module stood and rotates nothing: cos 1, sin 0.

    Attributes:
        original: the module it stands for, kept as a child so that it follows `model.to(...)`.
        is_empty: cos and sin are empty, of models that `let_unrotated_pass` has seen.
    """

    def __init__(self, original: Any, attention: Iterable[nn.Module]) -> None:
        super().__init__()
        self.original: nn.Module = original
        for name in ("config", "layer_types"):  # which some models ask it for
            setattr(self, name, getattr(original, name, None))
        suffix = "_inv_freq"
        layer_types: list[str | None] = [None]
        if _is_per_layer_type(original):
            names = [name for name, _ in original.named_buffers(recurse=False)]
            kinds = [name.removesuffix(suffix) for name in names if name.endswith(suffix)]
            layer_types = [kind for kind in kinds if not kind.endswith("_original")]
        self._outputs = {kind: _identity(original, kind)[0] for kind in layer_types}
        attention = list(attention)
        self._attention_types = (
            None if any(map(keeps_rotation, attention)) else {type(module) for module in attention}
        )
        self.is_empty = self._may_be_empty()

    def _may_be_empty(self) -> bool:
        types = self._attention_types
        return types is not None and all(
            let_unrotated_pass(types, out) for out in self._outputs.values()
        )

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Of a pickle: the library's function is another one in this process."""
        super().__setstate__(state)
        self.is_empty = self._may_be_empty()

    def forward(
        self, x: Tensor, position_ids: Tensor, layer_type: str | None = None, **_: Any
    ) -> Any:
        """What the original returns for position 0, unscaled.

        For position_ids [..., B, S]: [B, S, any] or [3, B, S, any] each, in x's dtype where real;
        [B, S, 0] where is_empty.
        """
        if self.is_empty:
            empty = x.new_empty((*position_ids.shape[-2:], 0))
            return empty, empty

        def spread(part: Tensor) -> Tensor:
            part = part.to(x.device) if part.is_complex() else part.to(x)
            return part.expand(*part.shape[:-3], *position_ids.shape[-2:], -1)

        out = self._outputs[layer_type if layer_type in self._outputs else None]
        return tuple(map(spread, out)) if isinstance(out, tuple) else spread(out)
