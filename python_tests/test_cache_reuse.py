"""A cache serves every model of the same settings and the same shape, in any process; no other."""

from __future__ import annotations

import copy
import pickle
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import tiny_model, tokens
from tiny_types import tiny
from transformers import CONFIG_MAPPING

from lminf_cuda import LambdaCache, patch_model, unpatch_model
from lminf_cuda.models.compat import recurrent_layers_are_known
from lminf_cuda.models.settings import SETTINGS_ATTRIBUTE, LambdaSettings

SETTINGS = {"n_global": 3, "window": 12}
MIDDLE = {"middle_top_k": 2, "middle_from_layer": 0}
TOLERANCE = 1e-5
FAMILIES = ("llama", "llama_yarn", "llama4_text", "bloom", "gemma2", "gptj", "phi3_longrope")


pytestmark = pytest.mark.usefixtures("single_threaded", "without_gradients")


def settings_of(model: Any) -> LambdaSettings:
    settings: LambdaSettings = getattr(model, SETTINGS_ATTRIBUTE)
    return settings


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("extra", [{}, MIDDLE], ids=["", "middle"])
def test_patched_anew(name: str, extra: dict[str, Any]) -> None:
    model = patch_model(tiny_model(name), **SETTINGS, **extra)
    ids = tokens(2, 30)
    cache = model(ids[:, :20], use_cache=True).past_key_values
    saved = pickle.dumps(cache)
    expected = model(ids[:, 20:], past_key_values=cache).logits
    patch_model(unpatch_model(model), **SETTINGS, **extra)
    got = model(ids[:, 20:], past_key_values=pickle.loads(saved)).logits
    assert torch.equal(got, expected)
    twin = patch_model(tiny_model(name), **SETTINGS, **extra)
    assert torch.equal(twin(ids[:, 20:], past_key_values=pickle.loads(saved)).logits, expected)


def test_in_another_process(tmp_path: Path) -> None:
    """Of several families at once: starting a process takes its time."""
    ids, caches, expected = tokens(2, 30), {}, {}
    for name in FAMILIES:
        model = patch_model(tiny_model(name), **SETTINGS)
        caches[name] = model(ids[:, :20], use_cache=True).past_key_values
        twin = copy.deepcopy(caches[name])
        expected[name] = model(ids[:, 20:], past_key_values=twin).logits
    torch.save(caches, tmp_path / "caches.pt")
    script = f"""
import sys
import torch
sys.path.insert(0, {str(Path(__file__).parent)!r})
from tiny_models import tiny_model, tokens
from lminf_cuda import patch_model
caches = torch.load({str(tmp_path / "caches.pt")!r}, weights_only=False)
ids, logits = tokens(2, 30), {{}}
with torch.no_grad():
    for name, cache in caches.items():
        model = patch_model(tiny_model(name), n_global=3, window=12)
        logits[name] = model(ids[:, 20:], past_key_values=cache).logits
torch.save(logits, {str(tmp_path / "logits.pt")!r})
"""
    subprocess.run([sys.executable, "-c", script], check=True)
    got = torch.load(tmp_path / "logits.pt")
    for name in FAMILIES:
        torch.testing.assert_close(got[name], expected[name], rtol=0, atol=TOLERANCE)


def _theta(theta: float) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": "default", "rope_theta": theta}}


# Of the model that made the cache and of the one that is given it: name, config, settings; and what
# the message says.
DIFFERENT: dict[str, tuple[tuple[str, dict[str, Any], dict[str, Any]], ...]] = {
    "n_global is 3 in it and 4 in the model": (
        ("llama", {}, {}),
        ("llama", {}, {"n_global": 4}),
    ),
    "window is 12 in it and 13 in the model": (
        ("llama", {}, {}),
        ("llama", {}, {"window": 13}),
    ),
    "max_distance is 12 in it and 20 in the model": (
        ("llama", {}, {}),
        ("llama", {}, {"max_distance": 20}),
    ),
    "middle_top_k of layer 0 is 0 in it and 2 in the model": (
        ("llama", {}, {}),
        ("llama", {}, MIDDLE),
    ),
    "middle_distance of layer 0 is 6 in it and 5 in the model": (
        ("llama", {}, MIDDLE),
        ("llama", {}, MIDDLE | {"middle_distance": 5}),
    ),
    "middle_top_k of layer 0 is 2 in it and 0 in the model": (
        ("llama", {}, MIDDLE),
        ("llama", {}, MIDDLE | {"middle_from_layer": 1}),
    ),
    "inv_freq of layer 0[1] is 0.1": (
        ("llama", _theta(1e4), {}),
        ("llama", _theta(1.01e4), {}),
    ),
    "rope_scaling of layer 0 is 1.0 in it and 1.13": (
        ("llama", {}, {}),
        ("llama_yarn", {}, {}),
    ),
    "num_key_value_heads is 2 in it and 4 in the model": (
        ("llama", {}, {}),
        ("llama_mha", {}, {}),
    ),
    "head_dim is 8 in it and 16 in the model": (
        ("llama", {}, {}),
        ("llama", {"head_dim": 16}, {}),
    ),
    "number of layers is 2 in it and 3 in the model": (
        ("llama", {}, {}),
        ("llama", {"num_hidden_layers": 3}, {}),
    ),
    "window of layer 1 is 8 in it and 12 in the model": (
        ("qwen2_sliding", {}, {}),
        ("qwen2", {}, {}),
    ),
    "model_type is 'llama' in it and 'cohere' in the model": (
        ("llama", {}, {}),
        ("cohere", {}, {}),
    ),
    "query_scale of layer 1 is \"_temperature((), {'floor_scale': 8": (
        ("llama4_text", {}, {}),
        ("llama4_text", {"floor_scale": 16}, {}),
    ),
    "slopes of layer 0 is [0.25,": (
        ("bloom", {}, {}),
        ("bloom_6_heads", {}, {}),
    ),
}


@pytest.mark.parametrize("said", DIFFERENT)
def test_other_settings_and_shapes_are_refused(said: str) -> None:
    first, second = (
        patch_model(tiny_model(name, **config), **(SETTINGS | extra))
        for name, config, extra in DIFFERENT[said]
    )
    ids = tokens(1, 20)
    cache = first(ids, use_cache=True).past_key_values
    with pytest.raises(ValueError, match="LambdaCache made for another model") as raised:
        second(ids[:, :1], past_key_values=cache)
    message = str(raised.value)
    differences = settings_of(first).differences(settings_of(second))
    found = [f"{name} is {a!r} in it and {b!r} in the model" for name, a, b in differences]
    assert any(text.startswith(said) for text in found)
    assert all(text in message for text in found[:3])
    assert all(a != b for a, b in re.findall(r" is (.+?) in it and (.+?) in the model", message))
    first(ids[:, :1], past_key_values=cache)  # and nothing has happened to it


def test_frequencies_of_another_machine() -> None:
    """Its last bits may differ; a change in the rotation may not pass for that."""
    model, ids = patch_model(tiny_model(), **SETTINGS), tokens(1, 20)
    cache = model(ids, use_cache=True).past_key_values
    for factor, is_same in ((1 + 2e-7, True), (1 + 1e-5, False)):
        twin = pickle.loads(pickle.dumps(cache))
        for layer in twin.settings.layers:
            layer.rope.inv_freq *= factor
        twin.settings.seal()
        assert twin.settings.fingerprint != cache.settings.fingerprint
        if is_same:
            model(ids[:, :1], past_key_values=twin)
        else:
            with pytest.raises(ValueError, match=r"inv_freq of layer 0\[0\] is 1\.0000"):
                model(ids[:, :1], past_key_values=twin)


def test_a_step_compares_no_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = patch_model(tiny_model(), **SETTINGS), tokens(1, 20)
    cache = pickle.loads(pickle.dumps(model(ids, use_cache=True).past_key_values))
    monkeypatch.setattr(LambdaSettings, "_facts", lambda settings: 1 / 0)
    for token in ids.split(1, dim=1):
        model(token, past_key_values=cache)


@pytest.mark.parametrize("n_new", [1, 5])
@pytest.mark.parametrize("name", ["llama", "bloom", "qwen3_next", "falcon_h1", "middle"])
def test_a_model_in_another_dtype_is_refused(name: str, n_new: int) -> None:
    if name in ("qwen3_next", "falcon_h1"):
        if not recurrent_layers_are_known():
            pytest.skip("this transformers' caches know no such layers")
        model = patch_model(tiny(name), **SETTINGS)
    else:
        extra = MIDDLE if name == "middle" else {}
        model = patch_model(tiny_model("llama" if name == "middle" else name), **SETTINGS, **extra)
    ids = tokens(1, 20)
    cache = model(ids, use_cache=True).past_key_values
    model.to(torch.bfloat16)
    with pytest.raises(ValueError, match=r"holds torch.float32.* gives it torch.bfloat16"):
        model(ids[:, :n_new], past_key_values=cache)
    cache = LambdaCache(model)
    model(ids, past_key_values=cache)
    assert model(ids[:, :n_new], past_key_values=cache).logits.isfinite().all()


def test_compiled_step_with_a_loaded_cache() -> None:
    model, ids = patch_model(tiny_model(), **SETTINGS), tokens(1, 24)
    saved = pickle.dumps(model(ids[:, :20], use_cache=True).past_key_values)
    expected = model(ids, use_cache=False).logits[:, 20:]
    patch_model(unpatch_model(model), **SETTINGS)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    cache = pickle.loads(saved)
    got = [compiled(token, past_key_values=cache).logits for token in ids[:, 20:].split(1, dim=1)]
    torch.testing.assert_close(torch.cat(got, 1), expected, rtol=0, atol=TOLERANCE)
    torch._dynamo.reset()


def test_layers_that_differ_in_shape() -> None:
    """Of a config that tells such sizes for each layer alone."""
    if "gemma4_text" not in CONFIG_MAPPING:
        pytest.skip("this transformers has no gemma4_text")
    model = patch_model(tiny("gemma4_text"), **SETTINGS)
    shape = settings_of(model).shape
    assert shape["head_dim"]
    cache = model(tokens(1, 20), use_cache=True).past_key_values
    twin = patch_model(tiny("gemma4_text"), **SETTINGS)
    twin(tokens(1, 1), past_key_values=copy.deepcopy(cache))
    settings_of(twin).shape["head_dim"] = 17
    settings_of(twin).seal()
    with pytest.raises(ValueError, match=r"head_dim is .* in it and 17 in the model"):
        twin(tokens(1, 1), past_key_values=cache)
