"""What the pages say of the repository is so: links, paths, options, and code that runs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import typer
from tiny_models import one_thread
from transformers import AutoModelForCausalLM

import lminf_cuda
from lminf_cuda import cli
from lminf_cuda.cli.loading import DEMO_MODEL

ROOT = Path(__file__).parents[1]
PAGES = sorted(
    page
    for pattern in ("*.md", "docs/*.md", "benchmarks/*.md", "lminf_cuda/**/*.md")
    for page in ROOT.glob(pattern)
)
FOLDERS = ("csrc", "lminf_cuda", "python_tests", "benchmarks", "docs", "tools", r"\.ci")
README = (ROOT / "README.md").read_text()


def anchor(heading: str) -> str:
    """What a heading is called in a link."""
    return re.sub(r"[^\w -]", "", heading.strip().lower()).replace(" ", "-")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_and_paths_exist(page: Path) -> None:
    text = page.read_text()
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"https?://", target):
            continue
        path, _, heading = target.partition("#")
        linked = page.parent / path if path else page
        assert linked.exists(), f"the link {target} leads nowhere"
        if heading:
            headings = re.findall(r"^#+ (.*)$", linked.read_text(), re.M)
            assert heading in map(anchor, headings), f"{target} is no heading"
    without_links = re.sub(r"https?://\S+", "", text)
    for path in re.findall(rf"(?<![\w./-])(?:{'|'.join(FOLDERS)})/[\w./*<>-]*", without_links):
        pattern = re.sub(r"<\w+>", "*", path.rstrip(".").rstrip("/"))
        found = list(ROOT.glob(pattern)) + list(page.parent.glob(pattern))
        assert found, f"there is no {path}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_make_targets_exist(page: Path) -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M))
    named = re.findall(r"(?:`|^ {4})make ([a-z][\w-]*)", page.read_text(), re.M)
    assert set(named) <= targets


def test_the_files_of_the_readme_exist() -> None:
    """Its list of the package's files, whose names stand without their folder."""
    listed = README[README.index("## Files") : README.index("## Limits")]
    names = re.findall(r"\b(\w+\.(?:py|h|md))\b", listed)
    assert len(names) > 20
    folders = [ROOT / name for name in ("lminf_cuda", "csrc", "docs", "tools")]
    known = {path.name for folder in folders for path in folder.rglob("*")}
    assert set(names) <= known


def test_the_command_lines_of_the_readme_parse() -> None:
    commands = typer.main.get_command(cli.app).commands  # type: ignore[attr-defined]
    lines = re.findall(r"^ {4}lminf (\w+)(.*?)(?:#.*)?$", README, re.M)
    assert {name for name, _ in lines} == set(commands)
    for name, rest in lines:
        options = {option for param in commands[name].params for option in param.opts}
        assert set(re.findall(r"--[\w-]+", rest)) <= options


SNIPPETS = re.findall(r"^```python\n(.*?)^```", README, re.M | re.S)


@pytest.mark.parametrize("n", range(len(SNIPPETS)))
def test_the_snippets_of_the_readme_run(n: int, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    Path("long.txt").write_text("In the beginning God created the heaven and the earth. " * 10)
    names: dict[str, Any] = {
        "patch_model": lminf_cuda.patch_model,
        "LambdaCache": lminf_cuda.LambdaCache,
        "model": AutoModelForCausalLM.from_pretrained(DEMO_MODEL),
    }
    with one_thread():
        exec(SNIPPETS[n].replace("a/model", str(DEMO_MODEL)), names)
    if "out" in names:
        assert names["out"].shape == names["q"].shape


def test_the_first_screen() -> None:
    """A sentence, the plot, what was measured, how to install, and six lines of code."""
    order = ["LM-Infinite", ".png)", "| tokens up to |", "make demo", "```python", "## "]
    places = [README.index(mark) for mark in order]
    assert places == sorted(places)
    assert len([line for line in SNIPPETS[0].splitlines() if line]) == 6
