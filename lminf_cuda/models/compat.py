"""What this project uses of transformers beyond its documented interface, and the versions tried.

transformers renames such things several times a year. So every one of them is spelled here and
nowhere else (the attributes of single attention modules stand with their families, in
own_forwards.py), what can be found without its name is found without it, and
python_tests/test_compat.py compares the list with the installed version.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import transformers
from transformers import cache_utils
from transformers.generation import GenerationMixin

# The oldest and the newest release with which all tests of the models passed.
TESTED = ("5.4.0", "5.24.0")

# What callers may name a cache, with any version: 5.24 renamed the second into the first.
_CACHE_SPELLINGS = ("cache", "past_key_values")


def _release(version: str) -> tuple[int, ...]:
    """(5, 24, 0) of "5.24.0" and of "5.24.0.dev0"."""
    numbers = []
    for part in version.split("."):
        if not part.isdecimal():
            break
        numbers.append(int(part))
    return tuple(numbers)


def versions() -> str:
    """The installed and the tested versions, for errors that an untested version may explain."""
    return f"transformers is {transformers.__version__}, tested are {TESTED[0]} to {TESTED[1]}"


def version_note() -> str | None:
    """A sentence for users of a version of transformers outside of the tested range, else None."""
    oldest, newest = map(_release, TESTED)
    if oldest <= _release(transformers.__version__) <= newest:
        return None
    return (
        f"{versions()}: a patched model checks what it relies on and raises where it does not "
        f"hold; pip install 'transformers=={TESTED[1]}' is known to work"
    )


def parameter_names(forward: Callable[..., Any]) -> list[str]:
    """The names of a forward's parameters, those of decorators' wrappers not among them."""
    return list(inspect.signature(forward).parameters)


def has_keywords(forward: Callable[..., Any]) -> bool:
    """Whether a forward takes keywords that it does not name."""
    kinds = [parameter.kind for parameter in inspect.signature(forward).parameters.values()]
    return inspect.Parameter.VAR_KEYWORD in kinds


def cache_argument(forward: Callable[..., Any]) -> str | None:
    """What a forward calls the cache: the parameter whose annotation mentions Cache.

    Where several do, or none is annotated so, it is the one with a known name; None if there is
    none.
    """
    parameters = inspect.signature(forward).parameters
    annotated = [name for name, p in parameters.items() if "Cache" in str(p.annotation)]
    if len(annotated) == 1:
        return annotated[0]
    known = [name for name in _CACHE_SPELLINGS if name in (annotated or parameters)]
    return known[0] if known else None


def cache_keyword(model: Any, cache: Any) -> dict[str, Any]:
    """`cache` as a keyword of a model's forward, patched or not."""
    name = cache_argument(model.forward)
    if name is None:
        raise TypeError(
            f"the forward of {type(model).__name__} takes no cache that could be recognised "
            f"({versions()})"
        )
    return {name: cache}


def move_cache(arguments: dict[str, Any], name: str) -> Any:
    """Brings the cache that a caller passed, under whatever name, to the name `name`.

    Args:
        arguments: keyword arguments, changed in place: of all spellings `name` alone remains, where
            one of them was there.
        name: as the forward calls it.

    Returns:
        The cache, or None.

    Raises:
        ValueError: two caches are given.
    """
    spellings = [key for key in dict.fromkeys((name, *_CACHE_SPELLINGS)) if key in arguments]
    if spellings in ([], [name]):
        return arguments.get(name)
    cache = None
    for key in spellings:
        value = arguments.pop(key)
        if value is not None and cache is not None and value is not cache:
            raise ValueError(
                f"two caches are given, under the names {' and '.join(spellings)}; pass one"
            )
        cache = cache if value is None else value
    arguments[name] = cache
    return cache


# What generate() calls the cache among a model's arguments.
GENERATION_CACHE = cache_argument(GenerationMixin.prepare_inputs_for_generation) or "cache"

# The methods of GenerationMixin by which generate() makes a cache and a padding mask, and drafts.
MAKES_CACHE = "_prepare_cache_for_generation"
MAKES_MASK = "_prepare_attention_mask_for_generation"
DRAFTS_BY = "_get_candidate_generator"
# Those that keep keys and values in pages; not all versions have all of them.
PAGED = ("init_continuous_batching", "continuous_batching_context_manager", "generate_batch")


def asks_interface(module: Any) -> bool:
    """Whether an attention module's forward looks its attention function up in transformers'
    AttentionInterface; not all do in old versions."""
    forward = inspect.unwrap(type(module).forward)
    return "ALL_ATTENTION_FUNCTIONS" in forward.__code__.co_names


def attention_name(config: Any) -> str | None:
    """The attention function that a config names."""
    name: str | None = config._attn_implementation
    return name


def set_attention_name(config: Any, name: str | None) -> None:
    """Lets a config name an attention function, without a check of what the model supports."""
    config._attn_implementation = name


# The buffer of sines and cosines in a rotary module that looks them up, as GPT-J's and CodeGen's
# from 5.24 on. It ends at the training length.
ROTARY_TABLE = "embed_positions"

# The attribute of a module with accelerate's hooks that holds the forward in them.
WRAPPED_FORWARD = "_old_forward"
# The attribute that holds these hooks, which may bring the module's weights.
HOOKS = "_hf_hook"


# The attribute of a module that runs some of itself again in the backward: the function that does.
CHECKPOINTS_BY = "_gradient_checkpointing_func"


class _Unknown:
    """Stands for a class that an old version does not have."""


def config_value(config: Any, name: str) -> Any:
    """An attribute of a config, None if it has none; a list where it differs from layer to layer,
    as in Gemma 4, whose config refuses to tell it then."""
    if name in (getattr(config, "per_layer_attributes", None) or ()):
        return [getattr(layer, name, None) for layer in config.per_layer_config]
    return getattr(config, name, None)


# What caches keep of a layer.
CacheLayerMixin: Any = cache_utils.CacheLayerMixin
DynamicLayer: Any = cache_utils.DynamicLayer
# What a model with other layers than attention keeps of them.
LinearAttentionLayer: Any = getattr(cache_utils, "LinearAttentionLayer", _Unknown)
DummyLayer: Any = getattr(cache_utils, "DummyLayer", _Unknown)


def recurrent_layers_are_known() -> bool:
    """Whether the installed transformers has cache layers for what is not attention."""
    return _Unknown not in (LinearAttentionLayer, DummyLayer)
