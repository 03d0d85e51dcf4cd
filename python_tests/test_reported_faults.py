"""Faults that users met with: cache settings of checkpoints, rows of padding alone, packed rows."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from tiny_models import tiny_model, tokens
from torch import Tensor
from transformers import GenerationConfig

from lminf_cuda import LambdaCache, patch_model
from lminf_cuda.models.compat import GENERATION_CACHE, cache_keyword

pytestmark = pytest.mark.usefixtures("single_threaded")


def patched(name: str = "llama", window: int = 12) -> Any:
    return patch_model(tiny_model(name), n_global=2, window=window)


def generate(model: Any, ids: Tensor, **arguments: Any) -> Tensor:
    asked = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0} | arguments
    output: Tensor = model.generate(ids, **asked)
    return output


@pytest.mark.parametrize("implementation", ["static", "dynamic", "quantized", "offloaded"])
def test_a_checkpoints_cache_implementation_is_not_the_users(implementation: str) -> None:
    model, ids = patched(), tokens(1, 15)
    expected = generate(model, ids)
    model.generation_config.cache_implementation = implementation
    assert torch.equal(generate(model, ids), expected)
    given = copy.deepcopy(model.generation_config)
    assert torch.equal(generate(model, ids, generation_config=given), expected)
    kept = {GENERATION_CACHE: LambdaCache(model)}
    assert torch.equal(generate(model, ids, **kept), expected)
    assert model.generation_config.cache_implementation == implementation
    # What is asked for in the call is.
    with pytest.raises(ValueError, match=f"cache_implementation is '{implementation}'"):
        generate(model, ids, cache_implementation=implementation)
    model.generation_config.cache_implementation = None
    other = GenerationConfig(cache_implementation=implementation)
    with pytest.raises(ValueError, match=f"cache_implementation is '{implementation}'"):
        generate(model, ids, generation_config=other)


def test_a_cache_that_holds_all_tokens_has_nothing_left_to_read() -> None:
    model, ids = patched(), tokens(2, 12)
    cache = LambdaCache(model)
    model(ids, **cache_keyword(model, cache))
    for held in (ids, ids[:, :7]):
        wrong = rf"input_ids has {held.shape[1]} tokens and the LambdaCache holds 12 already"
        with pytest.raises(ValueError, match=wrong):
            generate(model, held, **{GENERATION_CACHE: cache})
        with pytest.raises(ValueError, match=wrong):
            generate(model, None, input_ids=held, **{GENERATION_CACHE: cache})
    longer = tokens(2, 13)
    longer[:, :12] = ids
    got = generate(model, longer, **{GENERATION_CACHE: cache})
    assert torch.equal(got, generate(model, longer, use_cache=False))


def test_rows_of_a_cache_before_its_first_forward() -> None:
    model = patched()
    cache = LambdaCache(model, batch_size=2)
    cache.batch_repeat_interleave(3)
    assert cache.batch_size == 6
    cache.batch_select_indices(torch.tensor([0, 1, 4, 5]))
    assert cache.batch_size == 4
    ids = tokens(4, 9)
    logits = model(ids, **cache_keyword(model, cache)).logits
    torch.testing.assert_close(logits, model(ids, use_cache=False).logits)
    unknown = LambdaCache(model)
    unknown.batch_repeat_interleave(3)  # whose rows the first forward tells
    assert unknown.batch_size == -1


PADDED = [
    {},
    {"num_beams": 2},
    {"num_beams": 3, "num_return_sequences": 2},
    {"use_cache": False},
    {"num_beams": 2, "use_cache": False},
    {"prefill_chunk_size": 3},
]


@pytest.mark.parametrize("asked", PADDED, ids=str)
@pytest.mark.parametrize("name", ["llama", "gpt_neox", "bloom", "gemma2"])
def test_a_row_of_padding_alone(name: str, asked: dict[str, Any]) -> None:
    """The other rows get the tokens that they get from the plain model, and without that row."""
    ids = tokens(3, 7)
    mask = torch.ones_like(ids)
    mask[1], mask[2, :3] = 0, 0
    model = patched(name, window=64)
    got = generate(model, ids, attention_mask=mask, **asked)
    plain = generate(tiny_model(name), ids, attention_mask=mask, **asked)
    copies = got.shape[0] // 3
    rows = [row for row in range(3 * copies) if row // copies != 1]
    assert torch.equal(got[rows], plain[rows])
    alone = generate(model, ids[[0, 2]], attention_mask=mask[[0, 2]], **asked)
    assert torch.equal(got[rows][:, -6:], alone[:, -6:])


def test_a_row_of_padding_alone_beyond_the_window() -> None:
    model, ids = patched(), tokens(3, 20)
    mask = torch.ones_like(ids)
    mask[1] = 0
    got = generate(model, ids, attention_mask=mask, max_new_tokens=30)
    assert torch.equal(got[[0, 2]], generate(model, ids[[0, 2]], max_new_tokens=30))
    # The row counts its own tokens, whatever their position_ids begin with.
    cache = LambdaCache(model)
    model(ids, attention_mask=mask, **cache_keyword(model, cache))
    new = tokens(3, 4, seed=5)
    for step in range(4):
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
        positions = torch.tensor([[20], [1], [20]]) + step
        token = new[:, step : step + 1]
        kept = cache_keyword(model, cache)
        logits = model(token, attention_mask=mask, position_ids=positions, **kept).logits
    expected = model(new[1:2], use_cache=False).logits[:, -1]
    torch.testing.assert_close(logits[1:2, -1], expected)
    wrong = torch.tensor([[24], [9], [24]])
    mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
    with pytest.raises(ValueError, match="position_ids of row 1 are"):
        model(new[:, :1], attention_mask=mask, position_ids=wrong, **cache_keyword(model, cache))


@pytest.mark.parametrize("name", ["llama", "gpt_neox", "gemma2", "phi3", "gptj"])
def test_packed_rows_are_never_one_sequence(name: str) -> None:
    """transformers makes masks of position_ids that start again: each sequence knows nothing of the
    others. A cache holds one sequence a row."""
    model, ids = patched(name), tokens(1, 12)
    positions = torch.cat([torch.arange(5), torch.arange(7)])[None]
    packed = model(ids, position_ids=positions, use_cache=False).logits
    alone = [model(part, use_cache=False).logits for part in ids.split([5, 7], dim=1)]
    torch.testing.assert_close(packed, torch.cat(alone, dim=1))
    with pytest.raises(ValueError, match=r"packed into a row .* a cache is in use"):
        model(ids, position_ids=positions, use_cache=True)
