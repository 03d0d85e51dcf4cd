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

from .cache import LambdaCache

__all__ = ["OVERRIDES", "check_cache"]


def check_cache(cache: Any) -> None:
    """Raises TypeError for a cache of another kind than a patched model takes."""
    if not isinstance(cache, LambdaCache):
        raise TypeError(
            f"past_key_values is a {type(cache).__name__}; a patched model takes a LambdaCache: "
            "leave the argument out, or pass lminf_cuda.LambdaCache(model)"
        )


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
        check_cache(cache)
        type(model)._prepare_cache_for_generation(
            model, generation_config, model_kwargs, *args, **kwargs
        )
    elif generation_config.use_cache is not False:
        cache = model_kwargs["past_key_values"] = LambdaCache(model)
    if cache is not None and drafts:
        cache.activate_past_recording(1 + (generation_config.max_new_tokens or 0))


def _get_candidate_generator(model: Any, *args: Any, **kwargs: Any) -> Any:
    """The drafting half of assisted decoding: the cache gets room to take every draft back."""
    cache: LambdaCache = kwargs["model_kwargs"]["past_key_values"]
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
