"""The three factors: logits, entropy and hidden states against the model's own numbers."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_cli import folder, lminf  # noqa: F401  (a fixture)
from transformers import AutoModelForCausalLM, BloomConfig, BloomForCausalLM

from lminf_cuda import patch_model, unpatch_model
from lminf_cuda.cli.loading import DEMO_MODEL, HELD_OUT, load
from lminf_cuda.cli.options import Device, Dtype
from lminf_cuda.evaluation import diagnosis, plot_diagnosis
from lminf_cuda.evaluation.diagnosis import LM_INFINITE, VANILLA, diagnose, layer_numbers
from lminf_cuda.models.settings import SETTINGS_ATTRIBUTE
from lminf_cuda.text.reading import read_text, tokenize

pytestmark = pytest.mark.usefixtures("single_threaded")

LENGTH, TRAINED = 96, 48


@pytest.fixture(scope="module")
def tokens() -> torch.Tensor:
    return torch.randint(200, (LENGTH,), generator=torch.Generator().manual_seed(1))


def bloom() -> Any:
    torch.manual_seed(0)
    config = BloomConfig(vocab_size=256, hidden_size=32, n_layer=2, n_head=4)
    return BloomForCausalLM(config).eval()


def llama() -> Any:
    options = {"dtype": torch.float32, "attn_implementation": "eager"}
    return AutoModelForCausalLM.from_pretrained(DEMO_MODEL, **options).eval()


@pytest.mark.parametrize("make", [llama, bloom])
@torch.inference_mode()
def test_entropy_and_hidden_states_of_vanilla_are_the_model_s_own(
    make: Any, tokens: torch.Tensor
) -> None:
    model = make()
    model.set_attn_implementation("eager")
    result = diagnose(model, tokens, train_length=TRAINED, window=32)
    own = model(input_ids=tokens[None], output_attentions=True, output_hidden_states=True)
    for index, layer in enumerate(result.arms[VANILLA]):
        weights = own.attentions[index][0].double()
        entropy = -(weights * weights.clamp(min=1e-30).log()).sum(-1).mean(0)
        ends = layer.lengths
        for n, value in zip(ends, layer.entropy, strict=True):
            rows = entropy[n - diagnosis.NEIGHBOURS : n]
            assert value == pytest.approx(float(rows.mean()), abs=1e-3)
        late = weights[:, LENGTH // 2 :]
        assert layer.first_token_share == pytest.approx(float(late[..., 0].mean()), abs=0.02)
        if index + 1 < len(result.arms[VANILLA]):  # the last one is normed in own.hidden_states
            hidden = own.hidden_states[index + 1][0, torch.from_numpy(result.positions)]
            np.testing.assert_allclose(layer.hidden, hidden, atol=2e-3)
    with pytest.raises(ValueError, match="not patched"):
        unpatch_model(model)


@torch.inference_mode()
def test_logits_are_those_of_the_definition(tokens: torch.Tensor) -> None:
    """Softmax over them gives what the op gives, with a clamp beyond the window."""
    model = llama()
    patch_model(model, n_global=4, window=16, max_distance=24)
    layer = getattr(model, SETTINGS_ATTRIBUTE).layers[2]
    seen: list[Any] = []
    layer.observer = lambda q, k, options: seen.append((q, k, dict(options)))
    model(input_ids=tokens[None], use_cache=False)
    q, k, options = seen[0]
    positions = torch.arange(LENGTH)
    scores, distances = diagnosis.logits(q, k, positions, layer, options)
    assert distances.max() == 24
    values = torch.eye(LENGTH)[None, None].expand(1, k.shape[1], -1, -1)
    dim = q.shape[-1]
    for start in range(0, LENGTH, dim):  # the op's values are as wide as its keys
        part = values[..., start : start + dim]
        part = torch.nn.functional.pad(part, (0, dim - part.shape[-1])).contiguous()
        out, _ = torch.ops.lminf.lambda_attn(q, k, part, 4, 16, **options)
        width = min(dim, LENGTH - start)
        weights = scores.softmax(-1)[..., start : start + width]
        torch.testing.assert_close(out[0, ..., :width], weights, atol=2e-5, rtol=0)


def test_lm_infinite_sees_no_distance_beyond_its_clamp(tokens: torch.Tensor) -> None:
    result = diagnose(llama(), tokens, train_length=TRAINED, n_global=4, window=16)
    assert result.settings == {"n_global": 4, "window": 16, "max_distance": 16}
    for vanilla, ours in zip(result.arms[VANILLA], result.arms[LM_INFINITE], strict=True):
        far = ours.distances > 16
        assert not np.isfinite(ours.logit_max[far]).any()
        assert np.isfinite(vanilla.logit_max[far]).any()
        # four global keys and sixteen of the window: no more than log 20
        assert ours.entropy.max() <= np.log(20) + 1e-6


def test_the_shipped_model_shows_the_first_two_factors() -> None:
    loaded = load(None, Dtype.float32, Device.cpu)
    text = tokenize(loaded.tokenizer, read_text(HELD_OUT)[:600]).head(512)
    result = diagnose(loaded.model, text.tokens, train_length=256)
    rows = layer_numbers(result)
    grown = [row for row in rows if row.arm == VANILLA and row.logit_beyond > row.logit_within]
    assert len(grown) >= 3
    means = {
        arm: np.mean([row.entropy_at_end for row in rows if row.arm == arm])
        for arm in (VANILLA, LM_INFINITE)
    }
    assert means[VANILLA] > means[LM_INFINITE] + 0.3
    assert len(diagnosis.findings(result, rows)) == 3


def test_a_text_within_the_training_length_shows_nothing(tokens: torch.Tensor) -> None:
    result = diagnose(llama(), tokens, train_length=LENGTH, window=32)
    (sentence,) = diagnosis.findings(result, layer_numbers(result))
    assert "give a longer one" in sentence


def test_a_text_that_is_too_short_is_refused(tokens: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="at least 64"):
        diagnose(llama(), tokens[:40], train_length=16)


def test_the_plane_is_that_of_the_largest_variance() -> None:
    generator = np.random.default_rng(0)
    points = generator.normal(size=(200, 6)) * [9, 1, 0.1, 5, 0.1, 0.1] + 3
    plane = plot_diagnosis.principal_plane(points)
    assert abs(np.corrcoef(plane[:, 0], points[:, 0])[0, 1]) > 0.99
    assert abs(np.corrcoef(plane[:, 1], points[:, 3])[0, 1]) > 0.99


def test_the_command_writes_a_line_a_layer_and_a_plot(
    folder: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    code, output = lminf(
        *("diagnose", folder / "llama", "--text", folder / "text.txt", "--out", tmp_path),
        *("--n-global", 4, "--dtype", "float32"),
    )
    assert code == 0, output
    with (tmp_path / "diagnosis.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["arm"], row["layer"]) for row in rows] == [
        (arm, str(n)) for arm in (VANILLA, LM_INFINITE) for n in range(2)
    ]
    facts = json.loads((tmp_path / "diagnosis.json").read_text())
    assert facts["settings"]["length"] == 64 and facts["settings"]["text_sha256"]
    assert (tmp_path / "diagnosis.png").read_bytes().startswith(b"\x89PNG")
    assert "1. distances" in output
    code, output = lminf("diagnose", folder / "llama", "--text", folder / "text.txt",
                         "--length", 100_000, "--out", tmp_path)  # fmt: skip
    assert code == 2 and "fewer than the 100000 wanted" in output
