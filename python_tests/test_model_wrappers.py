"""What people wrap around a model, around a patched one: compilation, device maps, checkpointing.

One family of each way in which the state of a forward reaches the attention modules, and one whose
rotary embedding serves several layer types.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from tiny_models import one_thread, tiny_model, tokens

from lminf_cuda import LambdaCache, patch_model, unpatch_model

FAMILIES = ("llama", "gemma3_text", "gpt_oss", "stablelm", "falcon", "mpt")
SETTINGS = {"n_global": 3, "window": 12}


@pytest.fixture(autouse=True, scope="module")
def single_threaded() -> Iterator[None]:
    with one_thread(), torch.no_grad():
        yield


def assert_same(model: Any, twin: Any) -> None:
    """Bit for bit, read at once and generated with a cache."""
    ids = tokens(1, 40)
    assert torch.equal(model(ids, use_cache=False).logits, twin(ids, use_cache=False).logits)
    written = [x.generate(ids, max_new_tokens=3, do_sample=False) for x in (model, twin)]
    assert torch.equal(*written)


@pytest.mark.parametrize("name", FAMILIES)
def test_compiled_model_has_one_graph(name: str) -> None:
    model = patch_model(tiny_model(name), **SETTINGS)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    ids = tokens(1, 40)
    expected = model(ids, use_cache=False).logits
    assert torch.equal(compiled(ids, use_cache=False).logits, expected)


@pytest.mark.parametrize("name", FAMILIES)
def test_compiled_model_decodes(name: str) -> None:
    model = patch_model(tiny_model(name), **SETTINGS)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager")
    ids = tokens(1, 30)
    cache, plain = LambdaCache(model), LambdaCache(model)
    for piece in (ids[:, :20], *ids[:, 20:].split(1, dim=1)):
        got = compiled(piece, past_key_values=cache).logits
        assert torch.equal(got, model(piece, past_key_values=plain).logits)


@pytest.mark.parametrize("name", FAMILIES)
def test_gradient_checkpointing_in_eval(name: str) -> None:
    model, plain = (patch_model(tiny_model(name), **SETTINGS) for _ in range(2))
    model.gradient_checkpointing_enable()
    assert_same(model.eval(), plain)


@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize("patch_first", [False, True])
@pytest.mark.parametrize("name", FAMILIES)
def test_device_map(name: str, patch_first: bool, offload: bool) -> None:
    accelerate = pytest.importorskip("accelerate")
    model, plain = tiny_model(name), tiny_model(name)
    vanilla = plain(tokens(1, 40)).logits
    if patch_first:
        patch_model(model, **SETTINGS)
    if offload:
        accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    else:
        accelerate.dispatch_model(model, device_map={"": "cpu"}, force_hooks=True)
    if not patch_first:
        patch_model(model, **SETTINGS)
    assert_same(model, patch_model(plain, **SETTINGS))
    assert torch.equal(unpatch_model(model)(tokens(1, 40)).logits, vanilla)
