"""In how many files an option of the ops stands, and an op: in those that CONTRIBUTING.md names."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MOST = 15
# Beside tests, results and what tells of past work.
SOURCES = ("README.md", "docs/*.md", "csrc/**/*.*", "lminf_cuda/**/*.py")
SUFFIXES = {".md", ".h", ".cpp", ".cu", ".cuh", ".py", ".pyi"}


def places(pattern: str) -> set[str]:
    """The files that hold it."""
    files = {path for source in SOURCES for path in ROOT.glob(source) if path.suffix in SUFFIXES}
    names = {str(path.relative_to(ROOT)): path for path in files}
    return {
        name
        for name, path in names.items()
        if not name.startswith("csrc/tests/") and re.search(pattern, path.read_text())
    }


def named(heading: str) -> set[str]:
    """The files that a section of CONTRIBUTING.md names, but for tests."""
    text = (ROOT / "CONTRIBUTING.md").read_text()
    section = text.split(f"## {heading}\n")[1].split("\n## ")[0]
    paths = set(re.findall(r"`([\w/]+\.\w+)`", section))
    return {path for path in paths if not path.startswith("python_tests/")}


@pytest.mark.parametrize("option", ["softcap", "distance_bias", "alibi_slopes", "sink_logits"])
def test_where_an_option_of_the_scores_stands(option: str) -> None:
    found = places(rf"\b{option}\b")
    assert found <= named("Adding an option to an op")
    assert len(found) <= MOST


def test_where_an_op_stands() -> None:
    found = places("middle_topk|MiddleTopk")
    assert found <= named("Adding an op")
    assert len(found) <= MOST
