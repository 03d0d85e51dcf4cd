"""lminf eval: the tasks made here, questions, documents, and lm-evaluation-harness where it is."""

from __future__ import annotations

import csv
import json
import random
import re
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_cli import folder, lminf  # noqa: F401  (a fixture)
from transformers import AutoTokenizer

from lminf_cuda import patch_model
from lminf_cuda.cli.loading import load
from lminf_cuda.cli.options import Device, Dtype
from lminf_cuda.evaluation import documents, harness, questions, synthetic, tasks
from lminf_cuda.evaluation.tasks import LM_INFINITE, METHODS, TRUNCATED, VANILLA, Prompt

pytestmark = pytest.mark.usefixtures("single_threaded")

QUESTIONS = Path(__file__).parent / "questions.jsonl"


@pytest.fixture(scope="module")
def shipped() -> Any:
    return load(None, Dtype.float32, Device.cpu)


def n_tokens(loaded: Any, text: str) -> int:
    return len(loaded.tokenizer(text).input_ids)


# What is asked


@pytest.mark.parametrize("task", list(synthetic.TASKS))
def test_prompts_have_the_length_and_hold_their_answers(shipped: Any, task: str) -> None:
    length = 12_000 if task == "cwe" else 2_000  # this tokenizer takes a token a character
    found = synthetic.samples(shipped.tokenizer, task, length, 3)
    for sample in found:
        assert 0.9 * length < n_tokens(shipped, sample.prompt) <= length
        assert all(answer in sample.prompt for answer in sample.answers)
        assert synthetic.score(f" {', '.join(sample.answers)}.", sample) == 1
        assert synthetic.score("nothing of it", sample) == 0
    assert len({sample.prompt for sample in found}) == 3
    again = synthetic.samples(shipped.tokenizer, task, length, 3)
    assert found == again


def test_the_words_asked_for_are_the_frequent_ones(shipped: Any) -> None:
    (sample,) = synthetic.samples(shipped.tokenizer, "cwe", 12_000, 1)
    counts = {w: len(re.findall(rf"\b{w}\b", sample.prompt)) for w in sample.answers}
    assert set(counts.values()) == {synthetic.COMMON_TIMES}
    (sample,) = synthetic.samples(shipped.tokenizer, "fwe", 6_000, 1)
    listed = sample.prompt.split("\n")[1].split()
    most = sorted(set(listed), key=listed.count, reverse=True)[:3]
    assert most == list(sample.answers)


def test_variables_that_hold_the_number_are_those_of_one_chain(shipped: Any) -> None:
    (sample,) = synthetic.samples(shipped.tokenizer, "vt", 3_000, 1)
    value = re.search(r"assigned the value (\d+)", sample.prompt)[1]  # type: ignore[index]
    holds = {}
    for name, what in re.findall(r"VAR (\w+) = (?:VAR )?(\w+)\.", sample.prompt):
        holds[name] = what
    found = set()
    for name in holds:
        at = name
        while at in holds:
            at = holds[at]
        if at == value:
            found.add(name)
    assert found == set(sample.answers) and len(holds) == 2 * len(found)


def test_needles_go_from_the_beginning_to_the_end(shipped: Any) -> None:
    prompts = tasks.synthetic_prompts(shipped.tokenizer, "niah_multikey", 3_000, 5)
    places = [prompt.evidence for prompt in prompts]
    assert places == sorted(places)
    assert places[0] < 400 and places[-1] > 2_500  # between what is said before and asked after
    assert len(set(re.findall(r"magic numbers for (\w+) is: \d+", prompts[0].text))) == 4


def test_what_does_not_fit_is_refused(shipped: Any) -> None:
    with pytest.raises(ValueError, match="niah_single takes more than 100 tokens"):
        synthetic.samples(shipped.tokenizer, "niah_single", 100, 1)
    with pytest.raises(ValueError, match="there is no task 'x'"):
        synthetic.samples(shipped.tokenizer, "x", 100, 1)


def test_the_longest_that_fits() -> None:
    rng = random.Random(0)
    for _ in range(20):
        limit = rng.randrange(0, 2000)
        size = synthetic._longest("x".__mul__, lambda text, limit=limit: len(text) <= limit)
        assert size == limit


# Where the evidence stands


@pytest.mark.parametrize(
    ("evidence", "expected"),
    [(None, "spread"), (0, "first tokens"), (3, "first tokens"), (4, "middle"), (89, "middle"),
     (90, "window"), (99, "window")],
)  # fmt: skip
def test_regions_are_those_of_the_definition(evidence: int | None, expected: str) -> None:
    assert tasks.region(evidence, 100, n_global=4, window=10) == expected


def test_each_method_reads_its_part(shipped: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[tuple[bool, int]] = []

    def write_on(model: Any, ids: torch.Tensor, n: int, chunk: int) -> torch.Tensor:
        patched = hasattr(model, "_lminf_settings") or tasks.SETTINGS_ATTRIBUTE in vars(model)
        read.append((patched, ids.shape[1]))
        text = shipped.tokenizer.decode(ids[0])
        answer = "yes" if "needle" in text else "no"
        return torch.tensor([shipped.tokenizer(answer, add_special_tokens=False).input_ids])

    monkeypatch.setattr(tasks, "write_on", write_on)
    text = "needle" + "x" * 394
    prompt = Prompt("task", 400, text, lambda written: float("yes" in written), 0, 3)
    results = tasks.run(
        shipped.model, shipped.tokenizer, [prompt], patch={"n_global": 4, "window": 50}
    )
    n = n_tokens(shipped, text)
    assert read == [(False, n), (True, n), (False, 50)]
    assert {r.method: r.score for r in results} == {VANILLA: 1, LM_INFINITE: 1, TRUNCATED: 0}
    assert {r.region for r in results} == {"first tokens"}


# Questions


def test_questions_are_read_with_all_their_answers() -> None:
    found = questions.read_questions(QUESTIONS)
    assert len(found) == 6
    assert found[0].answers == ("Adela Strand",) and len(found[1].answers) == 2
    assert found[0].prompt.endswith("Question: Who built the Heron Mill?\nAnswer:")


@pytest.mark.parametrize(
    ("content", "message"),
    [("", "has no line"), ("{}", "line 1: KeyError"), ("\nx", "line 2: JSONDecodeError"),
     ('{"document": 1}', "question and answer")],
)  # fmt: skip
def test_lines_that_do_not_do_are_named(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "questions.jsonl"
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        questions.read_questions(path)


@pytest.mark.parametrize(
    ("written", "score"),
    [("Adela Strand.", 1), (" The Adela strand\nand more", 1), ("Adela", 2 / 3), ("nobody", 0),
     ("", 0), ("It was Adela Strand", 2 / 3)],
)  # fmt: skip
def test_f1(written: str, score: float) -> None:
    assert questions.f1(written, ["Adela Strand"]) == pytest.approx(score)
    assert questions.f1(written, ["somebody else", "Adela Strand"]) == pytest.approx(score)


# Documents


def test_intervals_hold_the_mean_as_often_as_they_say() -> None:
    rng = np.random.default_rng(1)
    inside = 0
    for n in range(200):
        low, high = documents.interval(rng.normal(3.0, 1.0, size=30), seed=n)
        inside += low <= 3.0 <= high
    assert 0.88 < inside / 200 < 0.99
    assert documents.interval(np.array([2.0])) == (2.0, 2.0)


def test_short_documents_count_where_they_reach() -> None:
    long, short = np.array([1.0, 1, 3, 3, 3], np.float32), np.array([2.0, 2], np.float32)
    rows = documents.rows_of("m", [long, short], [3, 6])
    assert [(r.length, r.documents, r.nats_per_token) for r in rows] == [(3, 2, 1.5), (6, 1, 3.0)]


def test_a_folder_of_documents(
    folder: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    texts = tmp_path / "texts"
    (texts / "more").mkdir(parents=True)
    for n, name in enumerate(("a.txt", "b.txt", "more/c.txt")):
        (texts / name).write_text("In the beginning " * (4 + 3 * n))
    command = ("eval", folder / "llama", "--documents", texts, "--window", 16, "--n-global", 4)
    code, output = lminf(
        *command, "--lengths", "32,100", "--out", tmp_path / "out", "--dtype", "float32"
    )
    assert code == 0, output
    with (tmp_path / "out" / "documents.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    counts = {(row["method"], row["length"]): row["documents"] for row in rows}
    assert counts == {
        (method, length): n
        for method in (LM_INFINITE, VANILLA)
        for length, n in (("32", "3"), ("100", "2"))
    }
    for row in rows:
        assert float(row["low"]) <= float(row["nats_per_token"]) <= float(row["high"])
    code, output = lminf(*command, "--lengths", "5000", "--out", tmp_path / "out")
    assert code == 2 and "no text has 5000 tokens" in output


# The command


def test_the_command_has_all_methods_in_one_table(
    folder: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    code, output = lminf(
        *("eval", folder / "llama", "--tasks", "niah_single,vt", "--questions", QUESTIONS),
        *("--lengths", "900", "--samples", 2, "--window", 64, "--out", tmp_path),
    )
    assert code == 0, output
    with (tmp_path / "tasks.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {(row["task"], row["method"]) for row in rows} == {
        (task, method) for task in ("niah_single", "vt", "questions") for method in METHODS
    }
    settings = json.loads((tmp_path / "tasks.json").read_text())["settings"]
    assert settings["window"] == 64 and settings["machine"]
    assert all(method in output for method in METHODS)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "there is nothing to do"),
        (("--documents", "nowhere"), "has no .txt files"),
        (("--tasks", "vt", "--lengths", "64"), "vt takes more than 64 tokens"),
    ],
)
def test_bad_input_is_named(
    folder: Path,  # noqa: F811
    arguments: tuple[str, ...],
    message: str,
) -> None:
    code, output = lminf("eval", folder / "llama", *arguments)
    assert code == 2 and message in output


# lm-evaluation-harness


@pytest.mark.skipif(find_spec("lm_eval") is not None, reason="it is installed")
def test_without_the_harness_the_extra_is_named(folder: Path) -> None:  # noqa: F811
    code, output = lminf("eval", folder / "llama", "--tasks", "hellaswag")
    assert code == 2 and "pip install 'lminf_cuda[eval]'" in output


def test_chunked_logits_are_those_of_one_forward(shipped: Any) -> None:
    ids = torch.randint(3, 90, (1, 150), generator=torch.Generator().manual_seed(0))
    patch_model(shipped.model, n_global=4, window=32)
    try:
        with torch.inference_mode():
            whole = shipped.model(ids, use_cache=False).logits
            chunked = harness.chunked_logits(shipped.model, ids, 40)
        torch.testing.assert_close(chunked, whole, atol=1e-4, rtol=0)
    finally:
        from lminf_cuda import unpatch_model

        unpatch_model(shipped.model)


@pytest.mark.skipif(find_spec("lm_eval") is None, reason="needs the extra lminf_cuda[eval]")
def test_a_task_of_the_harness_runs_with_every_method(
    folder: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    model = tmp_path / "model"
    shutil.copytree(folder / "llama", model)
    AutoTokenizer.from_pretrained(model, eos_token="!").save_pretrained(model)
    rows = [{"text": "In the beginning God ", "answer": answer} for answer in ("created", "made")]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "own.yaml").write_text(
        "task: own_task\ndataset_path: json\n"
        f"dataset_kwargs:\n  data_files:\n    test: {tmp_path}/rows.jsonl\n"
        "test_split: test\noutput_type: loglikelihood\n"
        'doc_to_text: "{{text}}"\ndoc_to_target: "{{answer}}"\n'
        "metric_list:\n  - metric: perplexity\n  - metric: acc\n"
    )
    code, output = lminf(
        *("eval", model, "--tasks", "own_task", "--include", tmp_path),
        *("--lengths", "64", "--window", 8, "--chunk", 5, "--out", tmp_path / "out"),
    )
    assert code == 0, output
    with (tmp_path / "out" / "harness.csv").open(newline="") as file:
        found = list(csv.DictReader(file))
    assert {(row["metric"], row["method"]) for row in found} >= {
        ("perplexity", method) for method in METHODS
    }
