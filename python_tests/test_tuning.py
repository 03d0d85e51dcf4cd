"""The search for the Λ shape: it finds what a grid finds, in a quarter of its work."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_cli import folder, lminf  # noqa: F401  (a fixture)

from lminf_cuda import LambdaCache, patch_model, unpatch_model
from lminf_cuda.cli.loading import HELD_OUT, load
from lminf_cuda.cli.options import Device, Dtype
from lminf_cuda.evaluation import tuning
from lminf_cuda.evaluation.lengths import chunk_bounds
from lminf_cuda.evaluation.plot_tuning import plot_tuning
from lminf_cuda.evaluation.traces import stream
from lminf_cuda.evaluation.tuning import Candidate, Shape, Tuning, tune
from lminf_cuda.models.compat import cache_keyword
from lminf_cuda.text.reading import read_text, tokenize

pytestmark = pytest.mark.usefixtures("single_threaded")


@pytest.fixture(scope="module")
def shipped() -> Any:
    return load(None, Dtype.float32, Device.cpu)


def text(loaded: Any, n: int) -> torch.Tensor:
    return tokenize(loaded.tokenizer, read_text(HELD_OUT)[:8192]).head(n).tokens


def candidate(loss: float, size: int, n: int = 10) -> Candidate:
    return Candidate(Shape(0, 1, 1), size, np.full(n, loss, np.float32))


def test_shapes_are_all_combinations_that_patch_model_takes() -> None:
    found = tuning.shapes((0, 4), (8, 32), None, 32)
    assert found == [
        Shape(n, window, distance)
        for n in (0, 4)
        for window, distance in ((8, 8), (8, 32), (32, 32))
    ]
    assert tuning.shapes((4,), (8, 32), (16,), 32) == [Shape(4, 8, 16)]
    assert len(tuning.shapes((0, 1, 4, 16, 64), tuning.default_windows(256), None, 256)) == 35


@pytest.mark.parametrize(("window", "n_tokens"), [(256, 5120), (256, 65_536), (2048, 40_960)])
def test_a_search_of_forty_reads_less_than_a_quarter_of_a_grid(window: int, n_tokens: int) -> None:
    ends = tuning.stretches(window, n_tokens)
    assert ends == sorted(ends) and ends[-1] == n_tokens and ends[0] >= 2 * window
    assert tuning.planned_tokens(40, window, n_tokens) < 40 * n_tokens / 4


def test_a_text_too_short_to_tell_windows_apart_is_refused() -> None:
    with pytest.raises(ValueError, match="1000 tokens are too few for a window of 256"):
        tuning.stretches(256, 1000)


def test_fronts_and_survivors() -> None:
    good, small, worse, worst = (candidate(*x) for x in ((1.0, 8), (1.5, 2), (1.1, 9), (2.0, 9)))
    everyone = [worst, worse, small, good]
    assert tuning.fronts(everyone, 1) == [[small, good], [worse], [worst]]
    assert tuning.survivors(everyone, 1, by_loss=False) == [good, small]
    assert tuning.survivors(everyone, 1, by_loss=True) == [good, worse]


def test_the_smallest_of_those_that_are_as_good_is_taken() -> None:
    best, close, far = candidate(1.0, 9), candidate(1.004, 3), candidate(1.02, 1)
    assert tuning.choose([best, close, far], 1) is close


def test_reading_on_is_reading_in_one_go(shipped: Any) -> None:
    """A shape that reads in stretches, with steps timed in between, has the losses of one pass."""
    tokens = text(shipped, 900)
    shape = Shape(4, 64, 100)
    in_parts = Candidate(shape)
    for end in (200, 500, 900):
        tuning._read_on(shipped.model, tokens, in_parts, end, 128, "")
        assert in_parts.read == end and in_parts.decode_seconds > 0
    patch_model(shipped.model, n_global=4, window=64, max_distance=100)
    whole = stream(shipped.model, tokens, LambdaCache(shipped.model), chunk_bounds([900], 128))
    unpatch_model(shipped.model)
    np.testing.assert_allclose(in_parts.nats, whole.nats, atol=1e-4)


def test_it_finds_what_the_grid_finds_on_the_shipped_model(shipped: Any) -> None:
    tokens = text(shipped, 2048)
    shapes = tuning.shapes((0, 4, 16), (16, 32, 64), None, 128)
    search = tune(shipped.model, tokens, shapes, chunk=256)
    grid = tune(shipped.model, tokens, shapes, chunk=256, grid=True)
    assert search.grid_tokens == grid.tokens_read == len(shapes) * 2048
    assert search.tokens_read < 0.3 * grid.tokens_read  # 18 shapes, of which at least two go on
    at_all = {c.shape: c.loss(grid.score_from) for c in grid.candidates}
    assert at_all[search.best.shape] <= at_all[grid.best.shape] + 2 * tuning.TOLERANCE
    with pytest.raises(ValueError, match="not patched"):
        unpatch_model(shipped.model)


def test_a_budget_of_memory_is_kept(shipped: Any) -> None:
    tokens = text(shipped, 512)
    shapes = tuning.shapes((0, 4), (16, 64), (64,), 64)
    sizes = {}
    for shape in shapes:
        patch_model(shipped.model, n_global=shape.n_global, window=shape.window, max_distance=64)
        cache = LambdaCache(shipped.model)
        with torch.no_grad():
            shipped.model(tokens[None, :2], use_cache=True, **cache_keyword(shipped.model, cache))
        sizes[shape] = cache.memory_bytes()
        unpatch_model(shipped.model)
    budget = sizes[Shape(4, 16, 64)]
    result = tune(shipped.model, tokens, shapes, max_bytes=budget)
    assert result.best.shape.window == 16
    assert [c.dropped for c in result.candidates] == ["", "memory", "", "memory"]
    assert all(c.cache_bytes == sizes[c.shape] for c in result.candidates)
    with pytest.raises(ValueError, match="no shape keeps 10 bytes: the smallest cache takes"):
        tune(shipped.model, tokens, shapes, max_bytes=10)


def test_a_budget_of_time_is_kept(shipped: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = text(shipped, 512)
    shapes = tuning.shapes((0, 4), (16, 64), (64,), 64)
    monkeypatch.setattr(
        tuning, "_decode_seconds", lambda model, token, cache: cache.settings.window / 1e3
    )
    result = tune(shipped.model, tokens, shapes, max_seconds_per_token=0.02)
    assert result.best.shape.window == 16
    with pytest.raises(ValueError, match="no shape writes a token in 1 ms: the fastest takes 16"):
        tune(shipped.model, tokens, shapes, max_seconds_per_token=0.001)


def test_the_plot_shows_losses_on_the_same_tokens(tmp_path: Path) -> None:
    best, early = candidate(1.0, 9, 40), candidate(3.0, 5, 10)
    best.nats[:9] = 2.5
    result = Tuning([best, early], [best], best, 1, 50, 80, 1.0)
    assert result.above_best(early) == pytest.approx(3.0 - (9 * 2.5 + 1.0) / 10)
    plot_tuning(result, "title", tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_the_command_prints_the_line_to_paste(
    folder: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    command = ("tune", folder / "llama", "--text", folder / "text.txt", "--dtype", "float32")
    code, output = lminf(
        *command, "--n-global", "0,2", "--window", "8,16", "--chunk", 32, "--out", tmp_path
    )
    assert code == 0, output
    with (tmp_path / "tuning.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 8
    facts = json.loads((tmp_path / "tuning.json").read_text())
    names = ("n_global", "window", "max_distance")
    best = ", ".join(f"{name}={facts['best'][name]}" for name in names)
    assert f"take: patch_model(model, {best})" in output
    assert facts["tokens_read"] == sum(int(row["tokens_read"]) for row in rows)
    assert (tmp_path / "tuning.png").stat().st_size > 0
    code, output = lminf(*command, "--window", "400")
    assert code == 2 and "too few for a window of 400" in output
    code, output = lminf(*command, "--window", "8", "--max-distance", "4")
    assert code == 2 and "no max_distance is as large" in output


def test_full_layers_are_tried_and_their_memory_counts(
    folder: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    command = ("tune", folder / "llama", "--text", folder / "text.txt", "--dtype", "float32")
    code, output = lminf(
        *(*command, "--n-global", "2", "--window", "8", "--max-distance", "8", "--chunk", 32),
        *("--full-layers", "1", "--full-layers", "0,1", "--length", 128, "--out", tmp_path),
    )
    assert code == 2 and "None for every layer" in output
    code, output = lminf(
        *(*command, "--n-global", "2", "--window", "8", "--max-distance", "8", "--chunk", 32),
        *("--full-layers", "1", "--length", 128, "--out", tmp_path, "--grid"),
    )
    assert code == 0, output
    with (tmp_path / "tuning.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    sizes = {row["full_layers"]: int(row["cache_bytes"]) for row in rows}
    a_token = 2 * 2 * 8 * 4  # keys and values, 2 heads of 8 float32 numbers
    assert sizes == {"": 2 * a_token * 10, "1": a_token * (10 + 128)}
    code, output = lminf(*command, "--full-layers", "7")
    assert code == 2 and "the model's are 0 to 1" in output


def test_a_window_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="window is 0; it must be at least 1"):
        tuning.shapes([1], [0], None, 256)
