"""What `generate()` asks of a model, answered by a patched one.

Each function here stands for the method of transformers' GenerationMixin of the same name while a
model is patched: a cache of the right kind, room in it for the drafts of assisted decoding, and a
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
from .settings import SETTINGS_ATTRIBUTE

__all__ = ["OVERRIDES", "lambda_cache", "new_cache"]


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
            f"the argument out, or pass {way_out}"
        )
    return own


def _prepare_cache_for_generation(
    model: Any, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
) -> None:
    """Gives `generate()` a LambdaCache; a drafting model's can take back all that it drafts."""
    drafts = getattr(generation_config, "is_assistant", False)
    # Older transformers ask for a "dynamic_full" cache themselves where drafts are to be cropped.
    if generation_config.cache_implementation is not None and not drafts:
        raise ValueError(
            f"cache_implementation is {generation_config.cache_implementation!r}; a patched model "
            "has its own cache: leave the argument out"
        )
    cache = model_kwargs.get("past_key_values")
    if cache is not None:
        held = lambda_cache(model, cache).get_seq_length()
        if held and getattr(model, SETTINGS_ATTRIBUTE).cross_attends:
            raise ValueError(
                f"past_key_values holds {held} tokens already, and transformers' generate() of an "
                "encoder-decoder would read them again, also where it is an assistant; leave "
                "past_key_values out, call the model's forward for each token, or pass an "
                "assistant that is not patched"
            )
        type(model)._prepare_cache_for_generation(
            model, generation_config, model_kwargs, *args, **kwargs
        )
    elif generation_config.use_cache is not False:
        cache = model_kwargs["past_key_values"] = new_cache(model)
    if cache is not None and drafts:
        lambda_cache(model, cache).activate_past_recording(
            1 + (generation_config.max_new_tokens or 0)
        )


def _get_candidate_generator(model: Any, *args: Any, **kwargs: Any) -> Any:
    """The drafting half of assisted decoding: the cache gets room to take every draft back."""
    cache = lambda_cache(model, kwargs["model_kwargs"]["past_key_values"])
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
    generator = type(model)._get_candidate_generator(model, *args, **kwargs)
    draft: Callable[..., Any] = generator.get_candidates

    @wraps(draft)
    def get_candidates(input_ids: Any, *args: Any, **kwargs: Any) -> Any:
        candidates, logits = draft(input_ids, *args, **kwargs)
        cache.activate_past_recording(max(1, candidates.shape[1] - input_ids.shape[1]))
        return candidates, logits

    generator.get_candidates = get_candidates
    return generator


def _prepare_attention_mask_for_generation(
    model: Any, inputs_tensor: Tensor, generation_config: Any, *args: Any, **kwargs: Any
) -> Tensor:
    """All ones for a drafting model, which is handed its text without padding.

    Left to itself transformers takes every pad token that was generated for padding.
    """
    if getattr(generation_config, "is_assistant", False):
        return inputs_tensor.new_ones(inputs_tensor.shape[:2], dtype=torch.long)
    mask: Tensor = type(model)._prepare_attention_mask_for_generation(
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
    "_prepare_cache_for_generation": _prepare_cache_for_generation,
    "_prepare_attention_mask_for_generation": _prepare_attention_mask_for_generation,
    "_get_candidate_generator": _get_candidate_generator,
    "init_continuous_batching": _refuse_continuous_batching,
    "continuous_batching_context_manager": _refuse_continuous_batching,
    "generate_batch": _refuse_continuous_batching,
}
