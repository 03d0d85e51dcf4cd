"""Passkey retrieval: what is asked, how it is counted, and the command."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_cli import folder, lminf  # noqa: F401  (a fixture)
from torch import Tensor

from lminf_cuda import patch_model, unpatch_model
from lminf_cuda.cli.loading import load
from lminf_cuda.cli.options import Device, Dtype
from lminf_cuda.evaluation import passkey, plots
from lminf_cuda.evaluation.passkey import Cell, Prompts

pytestmark = pytest.mark.usefixtures("single_threaded")


@pytest.fixture(scope="module")
def shipped() -> Any:
    return load(None, Dtype.float32, Device.cpu)


@pytest.mark.parametrize("length", [371, 400, 1000])
@pytest.mark.parametrize("depth", [0.0, 0.3, 1.0])
def test_prompts(shipped: Any, length: int, depth: float) -> None:
    prompts = Prompts(shipped.tokenizer)
    ids = prompts.prompt(length, depth, "31415")
    assert len(ids) == length
    text = shipped.tokenizer.decode(ids, skip_special_tokens=True)
    assert text.startswith(passkey.INTRODUCTION) and text.endswith("The pass key is")
    assert text.count("31415") == 2
    # Of the filler, `depth` stands before the key.
    begin, needle = len(passkey.INTRODUCTION), text.index("\nThe pass key is 31415")
    n_filler = length - prompts.shortest()
    assert abs((needle - begin) - depth * n_filler) <= 1


class Wrapping:
    """A tokenizer that puts its own tokens around a text."""

    def __init__(self, before: list[int], after: list[int]) -> None:
        self.before, self.after = before, after
        self.bos_token_id = 1  # named, whether it is added or not

    def __call__(self, text: str, add_special_tokens: bool = True, verbose: bool = True) -> Any:
        ids = [ord(c) for c in text]
        return SimpleNamespace(
            input_ids=self.before + ids + self.after if add_special_tokens else ids
        )


@pytest.mark.parametrize(("before", "after"), [([], []), ([1], []), ([1], [2]), ([], [2])])
def test_a_prompt_begins_with_what_the_tokenizer_adds_itself(
    before: list[int], after: list[int]
) -> None:
    ids = Prompts(Wrapping(before, after)).prompt(500, 0.5, "31415")
    assert ids[: len(before) + 1] == [*before, ord(passkey.INTRODUCTION[0])]
    assert 2 not in ids


def test_a_prompt_without_room_is_refused(shipped: Any) -> None:
    prompts = Prompts(shipped.tokenizer)
    shortest = prompts.shortest()
    prompts.prompt(shortest, 0.5, "31415")
    with pytest.raises(ValueError, match=f"shortest has {shortest} with this tokenizer"):
        prompts.prompt(shortest - 1, 0.5, "31415")


def test_default_lengths(shipped: Any) -> None:
    prompts = Prompts(shipped.tokenizer)
    assert 128 < prompts.shortest() <= 256
    assert prompts.default_lengths(64) == prompts.default_lengths(256) == [256, 512, 1024]
    assert prompts.default_lengths(4096) == [4096, 8192, 16384]


def looking_back(tokenizer: Any, window: int) -> Any:
    """Stands for `write_on`: answers rightly when the key is among the last `window` tokens."""

    def write_on(model: Any, prompts: Tensor, n_tokens: int, chunk: int) -> Tensor:
        rows = []
        for row in prompts:
            seen = tokenizer.decode(row[-window:])
            _, _, after = seen.partition("Remember it. ")
            answer = f" {after[:5]}." if after else " 00000."
            rows.append(torch.tensor(tokenizer(answer, add_special_tokens=False).input_ids))
        return torch.stack(rows)

    return write_on


def test_accuracy_counts_the_keys_found(shipped: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(passkey, "write_on", looking_back(shipped.tokenizer, 400))
    results = passkey.compare(
        shipped.model,
        shipped.tokenizer,
        [400, 800, 1600],
        [0.0, 0.5, 1.0],
        trials=3,
        patch={"n_global": 4, "middle_top_k": 2, "middle_from_layer": 1},
        vanilla=True,
    )
    assert list(results) == ["LM-Infinite, middle tokens", "LM-Infinite", "vanilla"]
    for cells in results.values():
        assert [(cell.length, cell.depth, cell.accuracy) for cell in cells] == [
            *((400, 0.0, 1.0), (400, 0.5, 1.0), (400, 1.0, 1.0)),
            *((800, 0.0, 0.0), (800, 0.5, 1.0), (800, 1.0, 1.0)),
            *((1600, 0.0, 0.0), (1600, 0.5, 0.0), (1600, 1.0, 1.0)),
        ]


def test_a_patched_model_reads_in_chunks(shipped: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same answer for any size of the chunks, and a whole batch at once."""
    prompts = Prompts(shipped.tokenizer)
    ids = torch.tensor([prompts.prompt(420, 0.5, key) for key in ("12345", "67890")])
    vanilla = passkey.write_on(shipped.model, ids, 4, 1)
    assert vanilla.shape == (2, 4)
    patch_model(shipped.model)
    try:
        expected = passkey.write_on(shipped.model, ids, 4, 1000)
        assert torch.equal(passkey.write_on(shipped.model, ids, 4, 50), expected)
    finally:
        unpatch_model(shipped.model)


def test_the_command_on_the_shipped_model(tmp_path: Path) -> None:
    code, output = lminf(
        *("passkey", "--lengths", "400,800", "--depths", "0.1,0.9", "--trials", 2, "--vanilla"),
        *("--middle-top-k", 3, "--middle-from-layer", 2, "--out", tmp_path, "--dtype", "float32"),
    )
    assert code == 0
    for text in ("LM-Infinite, middle tokens: keys found", "vanilla: keys found", "800 tokens"):
        assert text in output
    with (tmp_path / "passkey.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 3 * 2 * 2 and {row["trials"] for row in rows} == {"2"}
    settings = json.loads((tmp_path / "passkey.json").read_text())["settings"]
    assert settings["middle_top_k"] == 3 and settings["model"] == "the shipped model"
    assert (tmp_path / "passkey.png").stat().st_size > 0


def test_the_plot(tmp_path: Path) -> None:
    cells = [Cell(length, depth, 4, 3) for length in (512, 1024) for depth in (0.0, 1.0)]
    plots.plot_passkey({"LM-Infinite": cells}, "title", tmp_path / "one.png")
    assert (tmp_path / "one.png").stat().st_size > 0


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("--lengths", "100"), "length 100 is too short; the prompt without filler takes"),
        (("--lengths", "many"), "'many' is not a length"),
        (("--depths", "0,2"), "depth 2 is outside of 0 (the beginning) to 1 (the end)"),
        (("--depths", "deep"), "'deep' is no list of depths"),
        (("--middle-top-k", 5, "--middle-from-layer", 40), "middle_from_layer is 40"),
    ],
)
def test_bad_input_is_named(arguments: tuple[Any, ...], text: str, tmp_path: Path) -> None:
    code, output = lminf("passkey", *arguments, "--out", tmp_path)
    assert code == 2
    assert text in output


def test_an_unsupported_model_is_named(folder: Path) -> None:  # noqa: F811
    code, output = lminf("passkey", folder / "gpt2")
    assert code == 2
    assert "model type 'gpt2' is not supported" in output


def test_a_run_that_was_broken_off_goes_on_where_it_was(
    folder: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    command = (
        *("passkey", folder / "llama", "--lengths", "512,600", "--depths", "0,1", "--trials", 2),
        *("--dtype", "float32", "--window", 16, "--middle-top-k", 0, "--seed", 5),
    )
    write_on, asked = passkey.write_on, []

    def until_the_third(model: Any, prompts: Tensor, n_tokens: int, chunk: int) -> Tensor:
        if len(asked) == 2:
            raise KeyboardInterrupt
        asked.append(prompts.shape[1])
        return write_on(model, prompts, n_tokens, chunk)

    with monkeypatch.context() as patch:
        patch.setattr(passkey, "write_on", until_the_third)
        assert lminf(*command, "--out", tmp_path / "a")[0] != 0
    facts = json.loads((tmp_path / "a" / "passkey.json").read_text())
    assert len(facts["cells"]) == 2 and not facts["finished"]

    asked.clear()
    monkeypatch.setattr(
        passkey,
        "write_on",
        lambda model, prompts, n, chunk: (
            asked.append(prompts) or write_on(model, prompts, n, chunk)
        ),
    )
    code, output = lminf(*command, "--out", tmp_path / "a")
    assert code == 0 and "goes on with the run" in output
    assert len(asked) == 2
    rest = [prompts.clone() for prompts in asked]
    asked.clear()
    assert lminf(*command, "--out", tmp_path / "b")[0] == 0
    assert len(asked) == 4
    assert all(torch.equal(a, b) for a, b in zip(rest, asked[2:], strict=True))  # the same keys
    csvs = [(tmp_path / name / "passkey.csv").read_text() for name in "ab"]
    assert csvs[0] == csvs[1]
    settings = json.loads((tmp_path / "b" / "passkey.json").read_text())["settings"]
    assert (settings["max_distance"], settings["chunk"]) == (16, 1024)
    assert settings["machine"]["threads"] and settings["transformers"]


def test_layers_with_full_attention_are_a_method_with_its_memory(
    folder: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    command = ("passkey", folder / "llama", "--lengths", "512", "--depths", "0", "--trials", 1)
    code, output = lminf(
        *command, "--window", 16, "--n-global", 4, "--full-layers", "1", "--vanilla",
        "--dtype", "float32", "--out", tmp_path,
    )  # fmt: skip
    assert code == 0, output
    with (tmp_path / "passkey.csv").open(newline="") as file:
        sizes = {row["method"]: int(row["cache_bytes"]) for row in csv.DictReader(file)}
    a_token = 2 * 2 * 8 * 4  # keys and values, 2 heads of 8 float32 numbers
    assert sizes == {
        "LM-Infinite": 2 * a_token * 20,
        "LM-Infinite, full layers 1": a_token * (20 + 512),
        "vanilla": 2 * a_token * 512,
    }
    code, output = lminf(*command, "--full-layers", "x")
    assert code == 2 and "is no list of layers" in output
    code, output = lminf(*command, "--full-layers", "2")
    assert code == 2 and "the model's are 0 to 1" in output
