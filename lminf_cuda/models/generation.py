"""What `generate()` asks of a model, answered by a patched one.

Each function in OVERRIDES stands for a method of transformers' GenerationMixin while a model is
patched: a cache of the right kind, room in it for the drafts of assisted decoding, and a
refusal of what manages keys and values in pages of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, EncoderDecoderCache

from .cache import LambdaCache
from .compat import (
    DRAFTS_BY,
    GENERATION_CACHE,
    MAKES_CACHE,
    MAKES_MASK,
    PAGED,
    move_cache,
    versions,
)
from .settings import SETTINGS_ATTRIBUTE


class _EncoderDecoderCache(EncoderDecoderCache):
    """One that hands all its methods on to a LambdaCache as it does to a DynamicCache."""

    def check_dynamic_cache(self, method: str) -> None:
        pass


def new_cache(model: Any) -> LambdaCache | EncoderDecoderCache:
    """What a patched model or its decoder takes as past_key_values.

    In an encoder-decoder the cross-attention keeps the library's own cache beside the LambdaCache.
    """
    cache = LambdaCache(model)
    if not cache.settings.cross_attends:
        return cache
    return _EncoderDecoderCache(cache, DynamicCache())


def lambda_cache(model: Any, cache: Any) -> LambdaCache:
    """The LambdaCache in the past_key_values of a patched model or its decoder.

    Raises:
        TypeError: `cache` is of another kind than the model takes.
    """
    wanted, way_out = "a LambdaCache", "lminf_cuda.LambdaCache(model)"
    own = cache
    if getattr(model, SETTINGS_ATTRIBUTE).cross_attends:
        wanted, way_out = (
            "an EncoderDecoderCache around a LambdaCache",
            "EncoderDecoderCache(lminf_cuda.LambdaCache(model), DynamicCache())",
        )
        own = cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else None
    if not isinstance(own, LambdaCache):
        raise TypeError(
            f"past_key_values is a {type(cache).__name__}; a patched model takes {wanted}: leave "
            f"the argument out, or pass {way_out} ({versions()})"
        )
    return own


def _generate(model: Any, *args: Any, **kwargs: Any) -> Any:
    """The model's own generate(), for a cache of either name and in either state it can be in.

    Raises:
        ValueError: another cache implementation is asked for, or there is nothing left to read.
    """
    cache = move_cache(kwargs, GENERATION_CACHE)
    given = kwargs.get("generation_config", args[1] if len(args) > 1 else None)
    own = model.generation_config
    asked = kwargs.get("cache_implementation")
    if asked is None and given is not None and not getattr(given, "is_assistant", False):
        asked = given.cache_implementation
        if own is not None and asked == own.cache_implementation:
            asked = None  # the checkpoint's, which is not about this model as it is patched
    if asked == "paged":
        _refuse_continuous_batching(model)
    if asked is not None:
        raise ValueError(
            f"cache_implementation is {asked!r}; a patched model has its own cache: leave the "
            "argument out"
        )
    inputs = next(
        (
            value
            for value in (*args[:1], kwargs.get("inputs"), kwargs.get("input_ids"))
            if value is not None
        ),
        None,
    )
    if cache is not None and isinstance(inputs, Tensor) and inputs.ndim == 2:
        settings = getattr(model, SETTINGS_ATTRIBUTE)
        held = lambda_cache(model, cache).get_seq_length()
        if not settings.cross_attends and 0 < inputs.shape[1] <= held:
            raise ValueError(
                f"input_ids has {inputs.shape[1]} tokens and the LambdaCache holds {held} already, "
                "so that none is left to read; pass all tokens so far, at least one more than the "
                "cache holds, or leave the cache out"
            )
    return type(model).generate(model, *args, **kwargs)


def _make_cache(
    model: Any, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
) -> None:
    """Gives `generate()` a LambdaCache; a drafting model's can take back all that it drafts."""
    drafts = getattr(generation_config, "is_assistant", False)
    # generate() works on a copy of what the checkpoint says, and asks it further on.
    generation_config.cache_implementation = None
    cache = model_kwargs.get(GENERATION_CACHE)
    if cache is not None:
        held = lambda_cache(model, cache).get_seq_length()
        if held and getattr(model, SETTINGS_ATTRIBUTE).cross_attends:
            raise ValueError(
                f"past_key_values holds {held} tokens already, and transformers' generate() of an "
                "encoder-decoder would read them again, also where it is an assistant; leave "
                "past_key_values out, call the model's forward for each token, or pass an "
                "assistant that is not patched"
            )
        getattr(type(model), MAKES_CACHE)(model, generation_config, model_kwargs, *args, **kwargs)
    elif generation_config.use_cache is not False:
        cache = model_kwargs[GENERATION_CACHE] = new_cache(model)
    if cache is not None and drafts:
        lambda_cache(model, cache).activate_past_recording(
            1 + (generation_config.max_new_tokens or 0)
        )


def _draft(model: Any, *args: Any, **kwargs: Any) -> Any:
    """The drafting half of assisted decoding: the cache gets room to take every draft back."""
    cache = lambda_cache(model, kwargs["model_kwargs"][GENERATION_CACHE])
    if cache.get_seq_length() > 0:
        raise ValueError(
            f"past_key_values holds {cache.get_seq_length()} tokens already, and transformers' "
            "assisted decoding would read them again; leave past_key_values out, or generate "
            "without an assistant and without prompt_lookup_num_tokens"
        )
    if cache.settings.middle_top_k:
        raise ValueError(
            "the model is patched with middle_top_k, and a forward gives middle tokens to its last "
            "query only, so drafts cannot be checked several at a time; generate without an "
            "assistant and without prompt_lookup_num_tokens, or patch without middle tokens"
        )
    generator = getattr(type(model), DRAFTS_BY)(model, *args, **kwargs)
    draft: Callable[..., Any] = generator.get_candidates

    @wraps(draft)
    def get_candidates(input_ids: Any, *args: Any, **kwargs: Any) -> Any:
        candidates, logits = draft(input_ids, *args, **kwargs)
        cache.activate_past_recording(max(1, candidates.shape[1] - input_ids.shape[1]))
        return candidates, logits

    generator.get_candidates = get_candidates
    return generator


def _make_mask(
    model: Any, inputs_tensor: Tensor, generation_config: Any, *args: Any, **kwargs: Any
) -> Tensor:
    """All ones for a drafting model, which is handed its text without padding.

    Left to itself transformers takes every pad token that was generated for padding.
    """
    if getattr(generation_config, "is_assistant", False):
        return inputs_tensor.new_ones(inputs_tensor.shape[:2], dtype=torch.long)
    mask: Tensor = getattr(type(model), MAKES_MASK)(
        model, inputs_tensor, generation_config, *args, **kwargs
    )
    return mask


def _refuse_continuous_batching(model: Any, *_: Any, **__: Any) -> Any:
    raise NotImplementedError(
        "continuous batching keeps keys and values in pages of its own, and a patched model keeps "
        "them in a LambdaCache of fixed size; call model.generate() with a left-padded batch, or "
        "unpatch_model(model) first"
    )


# Method of GenerationMixin -> what answers to its name while the model is patched.
OVERRIDES: dict[str, Callable[..., Any]] = {
    "generate": _generate,
    MAKES_CACHE: _make_cache,
    MAKES_MASK: _make_mask,
    DRAFTS_BY: _draft,
    **dict.fromkeys(PAGED, _refuse_continuous_batching),
}
