"""generate() on a patched model: the same tokens as without a cache."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from tiny_models import MODELS, TRAINED, one_thread, tiny_model, tokens
from torch import Tensor
from transformers import DynamicCache

from lminf_cuda import LambdaCache, patch_model

N_GLOBAL, WINDOW, NEW = 3, 12, 20


@pytest.fixture(autouse=True, scope="module")
def single_threaded() -> Iterator[None]:
    with one_thread():
        yield


def patched(name: str = "llama") -> Any:
    return patch_model(tiny_model(name), n_global=N_GLOBAL, window=WINDOW)


def generate(model: Any, ids: Tensor, **arguments: Any) -> Tensor:
    arguments = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None} | arguments
    arguments.setdefault("attention_mask", torch.ones_like(ids))
    output: Tensor = model.generate(ids, **arguments)
    return output


@pytest.mark.parametrize("name", MODELS)
def test_greedy_equals_uncached(name: str) -> None:
    model = patched(name)
    ids = tokens(2, WINDOW + 2)
    got = generate(model, ids, max_new_tokens=8)
    assert got.shape == (2, WINDOW + 10)
    assert torch.equal(got, generate(model, ids, max_new_tokens=8, use_cache=False))


def test_greedy_is_the_argmax_of_each_step() -> None:
    model = patched()
    ids = tokens(1, 20)
    expected = ids
    for _ in range(NEW):
        logits = model(expected, use_cache=False).logits
        expected = torch.cat([expected, logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(generate(model, ids), expected)


def test_far_beyond_the_trained_length() -> None:
    model = patched("phi3_longrope")  # whose own generate() drops the cache at 33 tokens
    ids = tokens(1, 28)
    got = generate(model, ids, max_new_tokens=TRAINED)
    assert torch.equal(got, generate(model, ids, max_new_tokens=TRAINED, use_cache=False))


def test_left_padded_batch_equals_single_rows() -> None:
    model = patched()
    lengths = [1, 4, 12, 30]
    ids = tokens(len(lengths), 30)
    mask = torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        mask[row, 30 - length :] = 1
    for arguments in ({}, {"prefill_chunk_size": 7}):
        got = generate(model, ids, attention_mask=mask, **arguments)
        for row, length in enumerate(lengths):
            alone = generate(model, ids[row : row + 1, 30 - length :], use_cache=False)
            assert torch.equal(got[row, 30 - length :], alone[0])


def test_chunked_prefill() -> None:
    model = patched()
    ids = tokens(2, 29)
    expected = generate(model, ids, use_cache=False)
    for size in (1, 5, 28, 100):
        assert torch.equal(generate(model, ids, prefill_chunk_size=size), expected)


def test_turns_in_one_cache() -> None:
    model = patched()
    cache = LambdaCache(model)
    text = tokens(1, 9)
    for turn in range(3):
        expected = generate(model, text, use_cache=False)
        text = generate(model, text, past_key_values=cache)
        assert torch.equal(text, expected)
        assert cache.get_seq_length() == text.shape[1] - 1  # the last token was not fed yet
        text = torch.cat([text, tokens(1, 6, seed=turn)], 1)


def test_beam_search() -> None:
    model = patched()
    ids = tokens(2, 20)
    arguments = {"num_beams": 3, "num_return_sequences": 2}
    got = generate(model, ids, **arguments)
    assert torch.equal(got, generate(model, ids, use_cache=False, **arguments))


def test_sampling() -> None:
    model = patched()
    ids = tokens(1, 20)
    samples = []
    for use_cache in (True, False):
        torch.manual_seed(7)
        samples.append(
            generate(model, ids, do_sample=True, num_return_sequences=3, use_cache=use_cache)
        )
    assert torch.equal(*samples)


def test_returns_its_cache() -> None:
    model = patched()
    output: Any = generate(model, tokens(1, 20), return_dict_in_generate=True)
    cache = output.past_key_values
    assert isinstance(cache, LambdaCache)
    assert cache.get_seq_length() == 20 + NEW - 1


def test_inputs_embeds() -> None:
    model = patched()
    ids = tokens(1, 20)
    got = model.generate(
        inputs_embeds=model.get_input_embeddings()(ids), max_new_tokens=NEW, do_sample=False
    )
    assert torch.equal(got, generate(model, ids, use_cache=False)[:, 20:])


def test_two_threads_share_a_model() -> None:
    model = patched()
    prompts = [tokens(1, 18), tokens(2, 25, seed=1)]
    expected = [generate(model, ids) for ids in prompts]
    got: list[Tensor | None] = [None, None]

    def work(index: int) -> None:
        got[index] = generate(model, prompts[index])

    threads = [threading.Thread(target=work, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for result, ids in zip(got, expected, strict=True):
        assert result is not None and torch.equal(result, ids)


@pytest.mark.parametrize("implementation", ["static", "quantized", "dynamic"])
def test_cache_implementation_is_refused(implementation: str) -> None:
    with pytest.raises(ValueError, match=f"cache_implementation is '{implementation}'.*leave"):
        generate(patched(), tokens(1, 5), cache_implementation=implementation)


def test_other_caches_are_refused() -> None:
    with pytest.raises(TypeError, match=r"is a DynamicCache.*LambdaCache\(model\)"):
        generate(patched(), tokens(1, 5), past_key_values=DynamicCache())


def test_output_attentions_is_refused() -> None:
    with pytest.raises(ValueError, match="output_attentions=True"):
        generate(patched(), tokens(1, 5), output_attentions=True, return_dict_in_generate=True)
