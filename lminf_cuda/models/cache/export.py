"""A LambdaCache as a pytree, so that it can go into an exported program and come out of it.

Its leaves are its tensors, and the two numbers that grow with the text as a tensor: an exported
step then serves a cache at any position. What remains is the tree's context, in plain values.
Importing this registers the class with torch.utils._pytree.

A cache with other layers than attention, with full ones, or with middle tokens, is one leaf, which
torch.export refuses by its name.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch.utils import _pytree as pytree

from ..settings import SETTINGS_ATTRIBUTE, LambdaSettings
from .lambda_cache import LambdaCache

_BUFFERS = ("ring_k", "ring_v", "global_k", "global_v")

# By their fingerprints, the settings of the caches that were flattened.
_settings: weakref.WeakValueDictionary[str, LambdaSettings] = weakref.WeakValueDictionary()
# Of a first leaf: the cache that it was taken from, and the other leaves.
_TAKEN_FROM = "_lminf_taken_from"


class CacheThatCannotBeExported:
    """One leaf: a cache with recurrent or full layers, layers of an image, or middle tokens."""

    def __init__(self, cache: LambdaCache) -> None:
        self.cache = cache


def _is_fixed(settings: LambdaSettings) -> bool:
    is_full = any(layer is not None and layer.is_full for layer in settings.layers)
    return not (
        settings.middle_top_k or settings.recurrent_states or settings.cross_layers or is_full
    )


def _flatten_with_keys(
    cache: LambdaCache,
) -> tuple[list[tuple[pytree.KeyEntry, Any]], pytree.Context]:
    if not _is_fixed(cache.settings):
        return [(pytree.MappingKey("cache"), CacheThatCannotBeExported(cache))], None
    _settings[cache.settings.fingerprint] = cache.settings
    layers = cache.attention_layers()
    leaves: dict[str, Any] = {"counts": cache._progress.counts()}
    for name in ("next_positions", "late_rows"):
        if getattr(cache, name) is not None:
            leaves[name] = getattr(cache, name)
    for index, layer in enumerate(layers):
        if layer.is_initialized:
            leaves |= {f"{name}_{index}": getattr(layer, name) for name in _BUFFERS}
    context = [
        cache.settings.fingerprint,
        list(leaves),
        cache._progress.slack,
        cache._unusable,
        cache._batch_size if cache.next_positions is None else None,
    ]
    return [(pytree.MappingKey(name), leaf) for name, leaf in leaves.items()], context


def _flatten(cache: LambdaCache) -> tuple[list[Any], pytree.Context]:
    pairs, context = _flatten_with_keys(cache)
    leaves = [leaf for _, leaf in pairs]
    if context is not None:
        setattr(leaves[0], _TAKEN_FROM, (weakref.ref(cache), leaves[1:]))
    return leaves, context


def _unflatten(values: Any, context: pytree.Context) -> LambdaCache:
    leaves = list(values)
    if context is None:
        cache: LambdaCache = leaves[0].cache
        return cache
    same = _unchanged(leaves)
    return _restored(leaves, context) if same is None else same


def _unchanged(leaves: Sequence[Any]) -> LambdaCache | None:
    """The cache that was taken apart, if nothing was done to its leaves: it is still that one."""
    cache, others = getattr(leaves[0], _TAKEN_FROM, (None, []))
    if cache is None or len(others) != len(leaves) - 1:
        return None
    same = all(a is b for a, b in zip(others, leaves[1:], strict=True))
    return cache() if same else None


def _restored(leaves: list[Any], context: pytree.Context) -> LambdaCache:
    """A cache of these leaves, which may be anything but tensors in a tree that is not a value."""
    fingerprint, names, slack, unusable, batch_size = context
    settings = _settings.get(fingerprint)
    if settings is None:
        raise RuntimeError(
            "a LambdaCache comes out of an exported program, and no cache with its settings has "
            "gone into one in this process; patch the model with the settings that it was exported "
            "with, and pass a LambdaCache(model) first"
        )
    cache = LambdaCache(SimpleNamespace(**{SETTINGS_ATTRIBUTE: settings}))
    kept = dict(zip(names, leaves, strict=True))
    cache._progress.slack = slack
    if "next_positions" in kept:  # else it is empty
        cache._progress.set_counts(kept["counts"])
    cache._unusable = unusable
    cache.next_positions = kept.get("next_positions")
    cache.late_rows = kept.get("late_rows")
    cache._batch_size = batch_size
    if isinstance(cache.next_positions, torch.Tensor):
        cache._batch_size = cache.next_positions.shape[0]
    for index, layer in enumerate(cache.attention_layers()):
        if f"ring_k_{index}" in kept:
            for name in _BUFFERS:
                setattr(layer, name, kept[f"{name}_{index}"])
            layer.keys = layer.values = torch.empty(0)
            layer.is_initialized = True
    return cache


pytree.register_pytree_node(
    LambdaCache,
    _flatten,
    _unflatten,
    serialized_type_name="lminf_cuda.LambdaCache",
    flatten_with_keys_fn=_flatten_with_keys,
)
