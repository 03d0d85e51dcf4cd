"""What torch's default dtype and default device are set to is nothing to a patch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from test_encoder_decoder import tiny_t5
from tiny_models import tiny_model, tokens
from torch import Tensor, nn

from lminf_cuda import LambdaCache, patch_model, reference
from lminf_cuda.models.rope import IdentityRotary

N_GLOBAL, WINDOW = 3, 12
DTYPES = (torch.bfloat16, torch.float16, torch.float64)


pytestmark = pytest.mark.usefixtures("single_threaded", "without_gradients")


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


MODELS: dict[str, Callable[[], Any]] = {
    "bloom": lambda: tiny_model("bloom"),
    "gemma2": lambda: tiny_model("gemma2"),
    "gpt_oss": lambda: tiny_model(
        "gpt_oss",
        rope_parameters={
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 32.0,
            "original_max_position_embeddings": 16,
        },
    ),
    "gptj": lambda: tiny_model("gptj"),
    "llama": lambda: tiny_model("llama"),
    "llama4_text": lambda: tiny_model("llama4_text"),
    "longrope": lambda: tiny_model("phi3_longrope"),
    "mpt": lambda: tiny_model("mpt_6_heads"),
    "t5": lambda: tiny_t5("t5"),
    "umt5": lambda: tiny_t5("umt5"),
    "yarn": lambda: tiny_model("llama_yarn"),
}


def logits_of(model: Any) -> list[Tensor]:
    """Of one forward, and of a prompt and two steps with a cache."""
    ids = tokens(2, 40)
    if model.config.is_encoder_decoder:
        inputs = {"encoder_outputs": model.encoder(tokens(2, 5, seed=1))}
        name = "decoder_input_ids"
    else:
        inputs, name = {}, "input_ids"
    whole = model(**{name: ids}, **inputs, use_cache=False).logits
    cache, parts = None, []
    for chunk in ids.split([30, 1, 9], dim=1):
        out = model(**{name: chunk}, **inputs, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        parts.append(out.logits)
    return [whole, torch.cat(parts, 1)]


def facts_of(model: nn.Module) -> list[Any]:
    """All that a patch has read off a model."""
    decoder = model.decoder if hasattr(model, "encoder") else model
    layers = [layer.settings for layer in LambdaCache(decoder).attention_layers()]
    facts: list[Any] = []
    for layer in layers:
        rope = layer.rope
        facts.append(layer.slopes)
        if rope is not None:
            facts += [rope.inv_freq, rope.scaling, rope.interleaved, rope.rotates_last]
    for module in model.modules():
        if isinstance(module, IdentityRotary):
            facts.append(module.is_empty)
            for out in module._outputs.values():
                facts += list(out) if isinstance(out, tuple) else [out]
    return facts


def assert_same(got: list[Any], expected: list[Any]) -> None:
    assert len(got) == len(expected)
    for a, b in zip(got, expected, strict=True):
        if isinstance(b, Tensor):
            assert a.dtype == b.dtype and a.device == b.device and torch.equal(a, b)
        else:
            assert a == b


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_default_dtype_at_patch_time(name: str, dtype: torch.dtype) -> None:
    expected = patch_model(MODELS[name](), n_global=N_GLOBAL, window=WINDOW)
    model = MODELS[name]()
    with default_dtype(dtype):
        patch_model(model, n_global=N_GLOBAL, window=WINDOW)
    assert_same(facts_of(model), facts_of(expected))
    assert_same(logits_of(model), logits_of(expected))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_default_dtype_in_forwards(name: str, dtype: torch.dtype) -> None:
    model = patch_model(MODELS[name](), n_global=N_GLOBAL, window=WINDOW)
    expected = logits_of(model)
    with default_dtype(dtype):
        got = logits_of(model)
    assert_same(got, expected)


@pytest.mark.parametrize("name", MODELS)
def test_default_device(name: str) -> None:
    """What is made beside a model's own tensors is on their device, not on the default one."""
    expected = patch_model(MODELS[name](), n_global=N_GLOBAL, window=WINDOW)
    model = MODELS[name]()
    with torch.device("meta"):
        patch_model(model, n_global=N_GLOBAL, window=WINDOW)
    assert_same(facts_of(model), facts_of(expected))
    logits = logits_of(expected)
    assert_same(logits_of(model), logits)
    with torch.device("meta"):
        assert_same(logits_of(model), logits)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_default_dtype_of_the_definition(dtype: torch.dtype) -> None:
    q, k, v, bias = (torch.rand(1, 2, 20, 8) for _ in range(4))
    call = {
        "n_global": 2,
        "window": 5,
        "inv_freq": torch.rand(4),
        "alibi_slopes": torch.rand(2),
        "sink_logits": torch.rand(2),
        "softcap": 2.0,
        "distance_bias": bias[0, :, :6, 0],
        "return_lse": True,
    }
    expected = reference.lambda_attention(q, k, v, **call)
    with default_dtype(dtype):
        got = reference.lambda_attention(q, k, v, **call)
    assert_same(list(got), list(expected))
