"""n_global and window by layer, and layers whose attention stays full."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from tiny_models import tiny_model, tokens
from torch import Tensor

from lminf_cuda import LambdaCache, patch_model, unpatch_model
from lminf_cuda.models.cache import layers as cache_layers
from lminf_cuda.models.compat import cache_keyword
from lminf_cuda.models.settings import SETTINGS_ATTRIBUTE

pytestmark = pytest.mark.usefixtures("single_threaded", "without_gradients")

N = 70
HYBRID: dict[str, Any] = {"n_global": [3, 0], "window": [8, None], "max_distance": 20}


@pytest.fixture(autouse=True)
def small_room(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a full layer has to grow more than once."""
    monkeypatch.setattr(cache_layers, "FIRST_ROOM", 4)


def model_of(family: str = "llama", **arguments: Any) -> Any:
    model = tiny_model(family)
    n_layers = len(getattr(patch_model(model), SETTINGS_ATTRIBUTE).layers)
    unpatch_model(model)
    repeated = {
        name: (value * n_layers)[:n_layers] if isinstance(value, list) else value
        for name, value in arguments.items()
    }
    return patch_model(model, **repeated)


def logits(model: Any, ids: Tensor, **arguments: Any) -> Tensor:
    return model(input_ids=ids, use_cache=False, **arguments).logits


def test_equal_values_for_all_layers_are_one_number() -> None:
    ids = tokens(2, N)
    by_layer = logits(model_of(n_global=[3], window=[8]), ids)
    assert torch.equal(by_layer, logits(model_of(n_global=3, window=8), ids))


@pytest.mark.parametrize("family", ["llama", "bloom", "gemma2", "phi"])
def test_a_full_layer_is_one_with_a_window_as_long_as_the_text(family: str) -> None:
    ids = tokens(1, N)
    full = logits(model_of(family, n_global=3, window=[8, None]), ids)
    long = logits(model_of(family, n_global=3, window=[8, N]), ids)
    torch.testing.assert_close(full, long, atol=1e-5, rtol=0)
    short = logits(model_of(family, n_global=3, window=8), ids)
    assert (full - short).abs().max() > 1e-3


def test_each_layer_sees_what_its_own_values_say() -> None:
    """A token reaches as far as the layers' windows together, and globals only where they are."""
    model = model_of(n_global=[0, 0], window=[4, 9])
    ids = tokens(1, N)
    reach = sum(
        layer.window - 1 for layer in getattr(model, SETTINGS_ATTRIBUTE).layers if layer is not None
    )
    before = logits(model, ids)
    changed = ids.clone()
    changed[0, 0] = (changed[0, 0] + 1) % 50
    differs = (logits(model, changed) - before).abs().amax(-1)[0] > 0
    assert differs[: reach + 1].any() and not differs[reach + 1 :].any()
    with_globals = model_of(n_global=[0, 1], window=[4, 9])
    differs = (logits(with_globals, changed) - logits(with_globals, ids)).abs().amax(-1)[0] > 0
    assert differs[-1]


@pytest.mark.parametrize("chunk", [1, 7, 30])
@pytest.mark.parametrize("padding", [0, 5])
def test_the_cache_gives_what_the_forward_without_gives(chunk: int, padding: int) -> None:
    model = model_of(**HYBRID)
    ids = tokens(2, N)
    mask = torch.ones_like(ids)
    mask[1, :padding] = 0
    expected = logits(model, ids, attention_mask=mask)
    cache = LambdaCache(model)
    parts = []
    for start in range(0, N, chunk):
        end = min(start + chunk, N)
        out = model(
            input_ids=ids[:, start:end],
            attention_mask=mask[:, :end],
            use_cache=True,
            **cache_keyword(model, cache),
        )
        parts.append(out.logits)
    got = torch.cat(parts, dim=1)
    real = mask.bool()
    torch.testing.assert_close(got[real], expected[real], atol=2e-5, rtol=0)


def test_only_full_layers_grow() -> None:
    model = model_of(**HYBRID)
    ids = tokens(1, N)
    cache = LambdaCache(model)
    sizes = []
    for start in (0, 20, 40):
        model(input_ids=ids[:, start : start + 20], use_cache=True, **cache_keyword(model, cache))
        sizes.append([layer.ring_k.shape[2] for layer in cache.attention_layers()])
    first, last = sizes[0], sizes[-1]
    assert first[0] == last[0] == 8
    assert first[1] == 20 and 60 <= last[1] <= 120


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"num_beams": 3},
        {"prompt_lookup_num_tokens": 3},
        {"prefill_chunk_size": 9},
    ],
)
def test_generate_gives_what_it_gives_without_a_cache(arguments: dict[str, Any]) -> None:
    model = model_of(**HYBRID)
    ids = tokens(1, 12).repeat(1, 3)  # something to look up
    # Looking up needs an end of text on 5.4; none comes before so many tokens.
    options = {"max_new_tokens": 30, "min_new_tokens": 30, "do_sample": False, "eos_token_id": 0}
    got = model.generate(ids, **options, **arguments)
    beams = {"num_beams": arguments.get("num_beams", 1)}
    assert torch.equal(got, model.generate(ids, use_cache=False, **options, **beams))


def test_tokens_can_be_taken_back_and_a_cache_copied_and_pickled() -> None:
    model = model_of(**HYBRID)
    ids = tokens(1, N)
    cache = LambdaCache(model)
    cache.activate_past_recording(6)

    def step(part: Tensor, kept: LambdaCache) -> Tensor:
        return model(input_ids=part, use_cache=True, **cache_keyword(model, kept)).logits

    step(ids[:, :40], cache)
    step(tokens(1, 6), cache)
    cache.crop(-6)
    expected = logits(model, ids)[:, 40:]
    for other in (copy.deepcopy(cache), pickle.loads(pickle.dumps(cache)), cache):
        torch.testing.assert_close(step(ids[:, 40:], other), expected, atol=2e-5, rtol=0)
    cache.reset()
    torch.testing.assert_close(step(ids, cache), logits(model, ids), atol=2e-5, rtol=0)


def test_patching_twice_and_another_shape_on_top() -> None:
    model = model_of(**HYBRID)
    settings = getattr(model, SETTINGS_ATTRIBUTE)
    n_layers = len(settings.layers)
    same = {"n_global": ([3, 0] * n_layers)[:n_layers], "max_distance": 20}
    windows = ([8, None] * n_layers)[:n_layers]
    assert patch_model(model, window=windows, **same) is model
    with pytest.raises(ValueError, match=r"is patched with n_global=\[3, 0.*window=\[8, None"):
        patch_model(model, window=9, n_global=3)
    other = model_of(n_global=[3, 0], window=[8, 9], max_distance=20)
    with pytest.raises(ValueError, match="made for another model or for other settings"):
        other(input_ids=tokens(1, 2), **cache_keyword(other, LambdaCache(model)))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"window": [8]}, ValueError, "window has 1 values, and the model . layers"),
        ({"window": [8, 0]}, ValueError, r"window\[1\] is 0; it must be at least 1"),
        ({"window": [8, 2.5]}, TypeError, r"window\[1\] is 2.5; it must be an int"),
        ({"n_global": [1, -1]}, ValueError, r"n_global\[1\] is -1"),
        ({"window": [None, None]}, ValueError, "None for every layer"),
        ({"window": [8, 30], "max_distance": 20}, ValueError, "max_distance is 20; .* 30"),
        ({"window": [8, None], "middle_top_k": 2}, ValueError, "leave middle_top_k out"),
    ],
)
def test_values_that_do_not_do_are_named(
    arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    model = tiny_model("llama")
    n_layers = model.config.num_hidden_layers
    if "window" in arguments and len(arguments["window"]) == 2:
        arguments = arguments | {"window": (arguments["window"] * n_layers)[:n_layers]}
    if "n_global" in arguments:
        arguments = arguments | {"n_global": (arguments["n_global"] * n_layers)[:n_layers]}
    with pytest.raises(error, match=message):
        patch_model(model, **arguments)
    with pytest.raises(ValueError, match="not patched"):
        unpatch_model(model)
