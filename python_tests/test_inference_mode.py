"""A cache that was handled in torch.inference_mode() goes on under torch.no_grad()."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_encoder_decoder import tiny_t5
from test_multimodal import mllama
from tiny_models import tiny_model, tokens
from tiny_types import tiny
from torch import Tensor
from transformers import DynamicCache, EncoderDecoderCache

from lminf_cuda import LambdaCache, patch_model
from lminf_cuda.models.compat import recurrent_layers_are_known
from lminf_cuda.models.writable import Writable

N_GLOBAL, WINDOW = 3, 12
TOLERANCE = 2e-4  # recurrent layers sum a chunk in another order than single tokens


pytestmark = pytest.mark.usefixtures("single_threaded")


def saved_and_loaded(cache: LambdaCache) -> LambdaCache:
    buffer = io.BytesIO()
    torch.save(cache, buffer)
    buffer.seek(0)
    loaded: LambdaCache = torch.load(buffer, weights_only=False)
    return loaded


def same(change: Callable[[LambdaCache], object]) -> Callable[[LambdaCache], LambdaCache]:
    def changed(cache: LambdaCache) -> LambdaCache:
        change(cache)
        return cache

    return changed


# Of a cache of three rows: what happens to it in inference mode, and the rows it then has.
HANDLED: dict[str, tuple[Callable[[LambdaCache], LambdaCache], list[int]]] = {
    "reordered": (same(lambda cache: cache.reorder_cache(torch.tensor([2, 0, 2]))), [2, 0, 2]),
    "repeated": (same(lambda cache: cache.batch_repeat_interleave(2)), [0, 0, 1, 1, 2, 2]),
    "selected": (same(lambda cache: cache.batch_select_indices(torch.tensor([1]))), [1]),
    "copied": (copy.deepcopy, [0, 1, 2]),
    "copied lightly": (copy.copy, [0, 1, 2]),
    "pickled": (lambda cache: pickle.loads(pickle.dumps(cache)), [0, 1, 2]),
    "saved": (saved_and_loaded, [0, 1, 2]),
    "with room": (same(lambda cache: cache.activate_past_recording(5)), [0, 1, 2]),
    "copied twice": (lambda cache: copy.deepcopy(copy.deepcopy(cache)), [0, 1, 2]),
}
_recurrent = pytest.mark.skipif(
    not recurrent_layers_are_known(), reason="this transformers' caches know no such layers"
)
MODELS: dict[str, Callable[[], Any]] = {
    "llama": lambda: patch_model(tiny_model(), n_global=N_GLOBAL, window=WINDOW),
    "middle tokens": lambda: patch_model(
        tiny_model(), n_global=N_GLOBAL, window=WINDOW, middle_top_k=2, middle_from_layer=1
    ),
    "qwen3_next": lambda: patch_model(tiny("qwen3_next"), n_global=N_GLOBAL, window=WINDOW),
    "falcon_h1": lambda: patch_model(tiny("falcon_h1"), n_global=N_GLOBAL, window=WINDOW),
}
CASES = [
    pytest.param(name, marks=_recurrent if name in ("qwen3_next", "falcon_h1") else ())
    for name in MODELS
]


def read(model: Any, ids: Tensor, cache: LambdaCache) -> Tensor:
    """Logits of `ids`, in pieces of all kinds: the first, several, one."""
    pieces = [model(piece, past_key_values=cache).logits for piece in ids.split([4, 1, 7, 1], 1)]
    return torch.cat(pieces, 1)


@pytest.mark.parametrize("handled", HANDLED)
@pytest.mark.parametrize("name", CASES)
def test_goes_on_outside(name: str, handled: str) -> None:
    model = MODELS[name]()
    handle, rows = HANDLED[handled]
    ids, more = tokens(3, 20), tokens(len(rows), 13, seed=1)
    cache = LambdaCache(model)
    if handled == "with room" and not cache.is_croppable:
        pytest.skip("recurrent layers take nothing back")
    with torch.inference_mode():
        model(ids[:, :19], past_key_values=cache)
        model(ids[:, 19:], past_key_values=cache)
        cache = handle(cache)
    with torch.no_grad():
        got = read(model, more, cache)
        expected = LambdaCache(model)
        model(ids[rows, :19], past_key_values=expected)
        model(ids[rows, 19:], past_key_values=expected)
        expected = read(model, more, expected)
    torch.testing.assert_close(got, expected, rtol=0, atol=TOLERANCE)


def kept_tensors(cache: Any) -> list[Tensor]:
    """All that a cache writes: the tensors of what is Writable in it."""
    found: list[Tensor] = []
    for thing in (
        cache,
        *cache.layers,
        *(getattr(layer, "middle", None) for layer in cache.layers),
    ):
        if isinstance(thing, Writable):
            for value in vars(thing).values():
                values = value.values() if isinstance(value, dict) else [value]
                found += [item for item in values if isinstance(item, Tensor)]
    return found


@pytest.mark.parametrize("handled", HANDLED)
@pytest.mark.parametrize("name", CASES)
def test_no_tensor_is_bound_to_inference_mode(name: str, handled: str) -> None:
    model = MODELS[name]()
    cache = LambdaCache(model)
    if handled == "with room" and not cache.is_croppable:
        pytest.skip("recurrent layers take nothing back")
    with torch.inference_mode():
        model(tokens(3, 20), past_key_values=cache)
        cache = HANDLED[handled][0](cache)
    tensors = kept_tensors(cache)
    assert len(tensors) > 4 and not any(tensor.is_inference() for tensor in tensors)


@pytest.mark.parametrize("name", CASES)
def test_after_beam_search(name: str) -> None:
    """generate() selects rows; the cache is then handed on, as DynamicCache may be."""
    model = MODELS[name]()
    ids = tokens(1, 20)
    cache = LambdaCache(model)
    with torch.inference_mode():
        model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            past_key_values=cache,
            num_beams=2,
            num_return_sequences=2,
            max_new_tokens=5,
            do_sample=False,
        )
    with torch.no_grad():
        assert read(model, tokens(2, 13, seed=1), cache).isfinite().all()
        cache.reset()
        got = read(model, tokens(2, 13, seed=1), cache)
        expected = read(model, tokens(2, 13, seed=1), LambdaCache(model))
    torch.testing.assert_close(got, expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("handled", [name for name, case in HANDLED.items() if len(case[1]) == 3])
def test_layers_that_attend_to_an_image(handled: str) -> None:
    model = patch_model(mllama(), n_global=N_GLOBAL, window=WINDOW)
    ids, more = tokens(3, 20).clamp(max=59), tokens(3, 13, seed=1).clamp(max=59)
    states = torch.rand(3, 4, 32)  # of an image, in every row
    cache = LambdaCache(model)
    handle, rows = HANDLED[handled]
    decoder = model.model.language_model

    def hidden(ids: Tensor, cache: LambdaCache, **arguments: Any) -> Tensor:
        out: Tensor = decoder(ids, past_key_values=cache, **arguments).last_hidden_state
        return out

    with torch.inference_mode():
        hidden(ids, cache, cross_attention_states=states)
        cache = handle(cache)
    with torch.no_grad():
        got = torch.cat([hidden(piece, cache) for piece in more.split([4, 1, 8], 1)], 1)
        expected = LambdaCache(model)
        hidden(ids[rows], expected, cross_attention_states=states[rows])
        parts = [hidden(piece, expected) for piece in more.split([4, 1, 8], 1)]
    torch.testing.assert_close(got, torch.cat(parts, 1), rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("handled", ["reordered", "copied", "saved"])
def test_of_an_encoder_decoder(handled: str) -> None:
    model = patch_model(tiny_t5("t5"), n_global=N_GLOBAL, window=WINDOW)
    handle, rows = HANDLED[handled]
    ids, more = tokens(3, 20), tokens(3, 5, seed=1)
    encoded = model.encoder(tokens(3, 6, seed=2)).last_hidden_state.detach()

    def read(ids: Tensor, cache: Any, encoded: Tensor) -> Tensor:
        out: Tensor = model(
            decoder_input_ids=ids, encoder_outputs=(encoded,), past_key_values=cache
        ).logits
        return out

    cache: Any = EncoderDecoderCache(LambdaCache(model), DynamicCache())
    with torch.inference_mode():
        read(ids, cache, encoded)
        cache.cross_attention_cache.reorder_cache(torch.tensor(rows))
        cache.self_attention_cache = handle(cache.self_attention_cache)
    with torch.no_grad():
        got = torch.cat([read(piece, cache, encoded[rows]) for piece in more.split([4, 1], 1)], 1)
        fresh = EncoderDecoderCache(LambdaCache(model), DynamicCache())
        read(ids[rows], fresh, encoded[rows])
        pieces = [read(piece, fresh, encoded[rows]) for piece in more.split([4, 1], 1)]
    torch.testing.assert_close(got, torch.cat(pieces, 1), rtol=0, atol=TOLERANCE)
