"""torch.export of patched models: any batch, any length."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import tiny_model, tokens
from torch import Tensor, nn
from torch.export import Dim, export
from torch.utils._pytree import tree_leaves, tree_map

from lminf_cuda import LambdaCache, patch_model
from lminf_cuda.models.compat import cache_argument, cache_keyword

SETTINGS = {"n_global": 3, "window": 12}
FAMILIES = ("llama", "gpt_neox", "gemma2", "bloom", "phi3_longrope")


pytestmark = pytest.mark.usefixtures("single_threaded", "without_gradients")


class Uncached(nn.Module):
    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        logits: Tensor = self.model(ids, use_cache=False).logits
        return logits


@pytest.mark.parametrize("name", FAMILIES)
def test_a_forward_of_any_batch_and_length(name: str) -> None:
    model = patch_model(tiny_model(name), **SETTINGS)
    dims = ({0: Dim("batch", min=1), 1: Dim("length", min=2)},)
    program = export(Uncached(model), (tokens(2, 20),), dynamic_shapes=dims).module()
    for batch, length in ((1, 2), (2, 3), (1, 12), (3, 13), (2, 60)):
        ids = tokens(batch, length)
        assert torch.equal(program(ids), model(ids, use_cache=False).logits)


class Step(nn.Module):
    """One forward with a cache, which goes in and comes out."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, ids: Tensor, cache: LambdaCache, mask: Tensor | None = None
    ) -> tuple[Tensor, LambdaCache]:
        arguments = cache_keyword(self.model, cache)
        return self.model(ids, attention_mask=mask, **arguments).logits, cache


def filled(model: Any, batch: int, length: int, mask: Tensor | None = None) -> LambdaCache:
    cache = LambdaCache(model)
    ids = tokens(batch, length)
    model(ids, attention_mask=mask, **cache_keyword(model, cache))
    return cache


def assert_same_steps(model: Any, program: Any, cache: LambdaCache, n_steps: int) -> None:
    """The program's steps equal the model's, and its last cache serves the model as well."""
    step, batch = Step(model), cache.batch_size
    twin = copy.deepcopy(cache)
    for token in tokens(batch, n_steps, seed=1).split(1, dim=1):
        expected, twin = step(token, twin)
        got, cache = program(token, cache)
        assert torch.equal(got, expected)
    assert isinstance(cache, LambdaCache)
    assert cache.get_seq_length() == twin.get_seq_length() and cache.batch_size == batch
    assert torch.equal(cache.next_positions, twin.next_positions)
    loaded = pickle.loads(pickle.dumps(cache))
    for other in (copy.deepcopy(cache), loaded, cache):
        expected = step(tokens(batch, 9, seed=2), copy.deepcopy(twin))[0]
        assert torch.equal(step(tokens(batch, 9, seed=2), other)[0], expected)


@pytest.mark.parametrize("name", FAMILIES)
def test_one_step_serves_a_cache_at_any_position(name: str) -> None:
    """Exported at position 20; from the first token on, about the window's end, far beyond it."""
    model = patch_model(tiny_model(name), **SETTINGS)
    program = export(Step(model), (tokens(2, 1), filled(model, 2, 20))).module()
    for length in (1, 2, 11, 12, 13, 57):
        assert_same_steps(model, program, filled(model, 2, length), 15)


def test_a_step_of_any_batch() -> None:
    model = patch_model(tiny_model(), **SETTINGS)
    cache = filled(model, 2, 20)
    batch = Dim("batch", min=1)
    leaves = [
        {} if leaf.device.type == "cpu" and leaf.shape == (2,) and index == 0 else {0: batch}
        for index, leaf in enumerate(tree_leaves(cache))
    ]
    dims = ({0: batch}, leaves)
    program = export(Step(model), (tokens(2, 1), cache), dynamic_shapes=dims).module()
    for rows in (1, 2, 5):
        assert_same_steps(model, program, filled(model, rows, 7), 10)


def test_a_step_of_rows_that_begin_with_padding() -> None:
    model = patch_model(tiny_model(), **SETTINGS)
    mask = torch.ones(2, 20, dtype=torch.int64)
    mask[0, :6] = 0
    cache = filled(model, 2, 20, mask)
    example = torch.cat([mask, mask[:, -1:]], 1)
    dims = ({}, [{}] * len(tree_leaves(cache)), {1: Dim("columns", min=2)})
    program = export(Step(model), (tokens(2, 1), cache, example), dynamic_shapes=dims).module()
    for length in (9, 30):
        mask = torch.ones(2, length, dtype=torch.int64)
        mask[1, :5] = 0
        cache = filled(model, 2, length, mask)
        twin = copy.deepcopy(cache)
        for token in tokens(2, 8, seed=1).split(1, dim=1):
            mask = torch.cat([mask, mask[:, -1:]], 1)
            expected, twin = Step(model)(token, twin, mask)
            got, cache = program(token, cache, mask)
            assert torch.equal(got, expected)


def test_a_prompt_and_its_steps() -> None:
    """The cache begins in one program, which takes any length, and goes on in another."""
    model = patch_model(tiny_model(), **SETTINGS)
    dims = ({1: Dim("length", min=2)}, [{}])
    read = export(Step(model), (tokens(1, 20), LambdaCache(model)), dynamic_shapes=dims).module()
    program = export(Step(model), (tokens(1, 1), filled(model, 1, 20))).module()
    for length in (2, 12, 40):
        got, cache = read(tokens(1, length), LambdaCache(model))
        assert torch.equal(got, model(tokens(1, length), use_cache=False).logits)
        assert cache.get_seq_length() == length
        assert_same_steps(model, program, cache, 10)


def test_a_saved_program(tmp_path: Path) -> None:
    model = patch_model(tiny_model(), **SETTINGS)
    program = export(Step(model), (tokens(2, 1), filled(model, 2, 20)))
    program.example_inputs = None  # would be pickled beside the program
    torch.export.save(program, tmp_path / "step.pt2")
    loaded = torch.export.load(tmp_path / "step.pt2").module()
    assert_same_steps(model, loaded, filled(model, 2, 5), 10)


def test_a_cache_of_another_model_is_refused() -> None:
    model = patch_model(tiny_model(), **SETTINGS)
    program = export(Step(model), (tokens(2, 1), filled(model, 2, 20))).module()
    other = patch_model(tiny_model(), n_global=3, window=13)
    with pytest.raises(ValueError, match="input tree spec"):
        program(tokens(2, 1), filled(other, 2, 20))


def test_an_untouched_tree_is_the_same_cache() -> None:
    """As where a library maps something over the inputs of a module."""
    model = patch_model(tiny_model(), **SETTINGS)
    for cache in (LambdaCache(model), filled(model, 2, 20)):
        assert tree_map(lambda leaf: leaf, {"cache": cache})["cache"] is cache
    cloned = tree_map(torch.clone, cache)
    assert cloned is not cache and cloned.get_seq_length() == 20
    assert all(map(torch.equal, tree_leaves(cloned), tree_leaves(cache)))
    growing = patch_model(tiny_model(), **SETTINGS, middle_top_k=2, middle_from_layer=0)
    cache = filled(growing, 2, 20)
    assert tree_map(lambda leaf: leaf, [cache])[0] is cache
    with pytest.raises(Exception, match="CacheThatCannotBeExported"):
        export(Step(growing), (tokens(2, 1), cache))


def test_nothing_is_kept_of_a_flattened_cache() -> None:
    model = patch_model(tiny_model(), **SETTINGS)
    cache = filled(model, 2, 20)
    leaves = tree_leaves(cache)
    gone = weakref.ref(cache), weakref.ref(leaves[-1])
    del cache, leaves
    gc.collect()
    assert [ref() for ref in gone] == [None, None]


def test_a_model_as_it_is() -> None:
    """With its default of use_cache, so that a cache is made within, and its own output."""
    model = patch_model(tiny_model(), **SETTINGS)
    read = export(model, (tokens(1, 20),), dynamic_shapes=({1: Dim("length", min=2)},)).module()
    for length in (2, 13, 40):
        output, expected = read(tokens(1, length)), model(tokens(1, length))
        assert torch.equal(output.logits, expected.logits)
        name = cache_argument(model.forward)
        assert name is not None
        more = tokens(1, 9, seed=1)
        got, _ = Step(model)(more, output[name])
        assert torch.equal(got, Step(model)(more, expected[name])[0])
