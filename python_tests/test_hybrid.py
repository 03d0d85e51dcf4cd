"""Models with other layers beside attention, and models whose layers share keys."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from tiny_models import tokens
from tiny_types import in_pieces, tiny
from torch import Tensor

from lminf_cuda import LambdaCache, patch_model
from lminf_cuda.models.cache.layers import LambdaCacheLayer
from lminf_cuda.models.compat import recurrent_layers_are_known
from lminf_cuda.models.families import FAMILIES

N_GLOBAL, WINDOW, NEW = 3, 12, 5
# One with states of convolutions alone, one of each kind of recurrence, two with both in a layer,
# one whose layers share an attention module.
RECURRENT = ("lfm2", "qwen3_next", "bamba", "falcon_h1", "zaya", "zamba2")
SHARING = ("gemma3n_text", "gemma4_text")
# A chunk is summed in another order than single tokens, and the float32 logits of such a model are
# off by up to 5e-4 from its float64 ones.
TOLERANCE = 1e-3

pytestmark = [
    pytest.mark.skipif(
        not recurrent_layers_are_known(), reason="this transformers' caches know no such layers"
    ),
    pytest.mark.usefixtures("single_threaded", "without_gradients"),
]


def patched(model_type: str, **extra: Any) -> Any:
    return patch_model(tiny(model_type), n_global=N_GLOBAL, window=WINDOW, **extra)


def generate(model: Any, ids: Tensor, **arguments: Any) -> Tensor:
    arguments = {"max_new_tokens": NEW, "do_sample": False} | arguments
    arguments.setdefault("attention_mask", torch.ones_like(ids))
    output: Tensor = model.generate(ids, **arguments)
    return output


@pytest.mark.parametrize("model_type", RECURRENT + SHARING)
def test_generation_equals_uncached(model_type: str) -> None:
    model = patched(model_type)
    ids = tokens(2, 20)
    mask = torch.ones_like(ids)
    mask[1, :13] = 0
    for arguments in (
        {"prefill_chunk_size": 7},
        {"num_beams": 3},
        {"attention_mask": mask},
        {"do_sample": True, "num_return_sequences": 2},
    ):
        written = []
        for use_cache in (True, False):
            torch.manual_seed(1)
            chunks = {} if use_cache else {"prefill_chunk_size": None}
            written.append(generate(model, ids, use_cache=use_cache, **(arguments | chunks)))
        assert torch.equal(*written)


@pytest.mark.parametrize("model_type", RECURRENT + SHARING)
def test_cache_is_fixed_and_goes_on(model_type: str) -> None:
    model = patched(model_type)
    text, more = tokens(2, 60), tokens(2, 50, seed=1)
    cache = LambdaCache(model)
    in_pieces(model, text, cache)
    size, twin = cache.memory_bytes(), copy.deepcopy(cache)
    with torch.inference_mode():
        got = in_pieces(model, more, cache)
    assert cache.memory_bytes() == size > 0
    expected = model(torch.cat([text, more], 1), use_cache=False).logits[:, 60:]
    torch.testing.assert_close(got, expected, rtol=0, atol=TOLERANCE)
    torch.testing.assert_close(in_pieces(model, more, twin), expected, rtol=0, atol=TOLERANCE)
    cache.reset()
    expected = model(more, use_cache=False).logits
    torch.testing.assert_close(in_pieces(model, more, cache), expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("model_type", RECURRENT + SHARING)
def test_rows_are_selected(model_type: str) -> None:
    model = patched(model_type)
    text, more, rows = tokens(3, 25), tokens(2, 40, seed=1), torch.tensor([2, 0])
    cache = LambdaCache(model)
    model(text, past_key_values=cache)
    cache.batch_select_indices(rows)
    expected = model(torch.cat([text[rows], more], 1), use_cache=False).logits[:, 25:]
    torch.testing.assert_close(in_pieces(model, more, cache), expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("model_type", RECURRENT)
def test_what_a_recurrent_state_cannot_do_is_refused(model_type: str) -> None:
    model = patched(model_type)
    ids = tokens(2, 20)
    cache = model(ids).past_key_values
    assert not cache.is_croppable
    with pytest.raises(RuntimeError, match=r"crop\(-2\) removes 2 of 20 tokens.*recurrent layers"):
        cache.crop(-2)
    cache.crop(0)
    with pytest.raises(ValueError, match=r"recurrent layers.*without an assistant"):
        cache.activate_past_recording(2)
    with pytest.raises(ValueError, match=r"recurrent layers|stateful"):
        generate(model, ids[:1], prompt_lookup_num_tokens=3)
    mask = torch.ones(2, 21, dtype=torch.int64)
    mask[0, 20] = 0
    with pytest.raises(ValueError, match=r"masks the new token.*recurrent layers"):
        model(ids[:, :1], attention_mask=mask, past_key_values=cache)


@pytest.mark.parametrize("model_type", ["jamba", "zamba"])
def test_text_in_several_pieces_is_refused_where_it_is_forgotten(model_type: str) -> None:
    model = patched(model_type)
    ids = tokens(2, 20)
    cache = model(ids[:, :15]).past_key_values
    for call in (
        lambda: model(ids[:, 15:], past_key_values=cache),
        lambda: generate(model, ids, prefill_chunk_size=15),
    ):
        with pytest.raises(ValueError, match=r"5 new tokens follow 15.*forget.*one at a time"):
            call()
    got = [model(token, past_key_values=cache).logits for token in ids[:, 15:].split(1, dim=1)]
    expected = model(ids, use_cache=False).logits[:, 15:]
    torch.testing.assert_close(torch.cat(got, 1), expected, rtol=0, atol=TOLERANCE)
    cache.reset()
    again = model(ids, past_key_values=cache).logits[:, 15:]
    torch.testing.assert_close(again, expected, rtol=0, atol=TOLERANCE)
    for arguments in ({}, {"num_beams": 3}):
        written = [generate(model, ids, use_cache=x, **arguments) for x in (True, False)]
        assert torch.equal(*written)


def test_shared_keys_are_kept_once() -> None:
    model = patched("gemma3n_text")
    cache = model(tokens(1, 30)).past_key_values
    kept = [isinstance(layer, LambdaCacheLayer) for layer in cache.layers]
    assert kept == [True] * 3 + [False] * 3
    assert [layer.keys_of for layer in cache.settings.layers] == [None] * 3 + [1, 2, 1]
    assert all(layer.shown is None for layer in cache.attention_layers())
    with pytest.raises(ValueError, match=r"middle_top_k is 2.*share their keys"):
        patched("gemma3n_text", middle_top_k=2, middle_from_layer=0)


def test_logits_to_keep_skips_queries_of_sharing_layers() -> None:
    """gemma4 gives its sharing layers the last queries alone."""
    model = patched("gemma4_text")
    ids = tokens(2, 40)
    expected = model(ids, use_cache=False).logits[:, -3:]
    for use_cache in (False, True):
        got = model(ids, use_cache=use_cache, logits_to_keep=3).logits
        torch.testing.assert_close(got, expected, rtol=0, atol=TOLERANCE)


def test_middle_tokens_beside_recurrent_layers() -> None:
    model = patched("qwen3_next", middle_top_k=2, middle_from_layer=0)
    ids = tokens(1, 40)
    cached = in_pieces(model, ids, LambdaCache(model))[:, -1]
    assert not torch.equal(cached, in_pieces(patched("qwen3_next"), ids, None)[:, -1])
    last = model(ids, use_cache=False).logits[:, -1]
    assert not torch.allclose(last, patched("qwen3_next")(ids).logits[:, -1], atol=1e-3)
    cache = LambdaCache(model)
    torch.testing.assert_close(model(ids, past_key_values=cache).logits[:, -1], last)


def test_compiled_decode() -> None:
    model = patched("lfm2")
    ids = tokens(2, 24)
    cache = LambdaCache(model)
    got = [model(ids[:, :16], past_key_values=cache).logits]
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager")
    for token in ids[:, 16:].split(1, dim=1):
        got.append(compiled(token, past_key_values=cache).logits)
    expected = model(ids, use_cache=False).logits
    torch.testing.assert_close(torch.cat(got, 1), expected, rtol=0, atol=TOLERANCE)
    torch._dynamo.reset()


def test_old_transformers_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lminf_cuda.models.families.recurrent_layers_are_known", lambda: False)
    assert FAMILIES["lfm2"].is_recurrent
    with pytest.raises(ValueError, match=r"'lfm2' has recurrent layers.*newer transformers"):
        patched("lfm2")
