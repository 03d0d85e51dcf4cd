"""Fixtures that every test file shares."""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import emulated
import pairwise
import pytest
import torch
import transformers

QUICK = "every pair of parameter values, not every combination: `make test-all` runs these"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--quick", action="store_true", help=f"of the parameter grids {QUICK}")


def pytest_report_header() -> str:
    return f"torch {torch.__version__}, transformers {transformers.__version__}"


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    if config.getoption("--quick"):
        terminalreporter.write_line(f"--quick: of the parameter grids {QUICK}")


def parameters(item: pytest.Function) -> dict[str, Any]:
    return item.callspec.params if hasattr(item, "callspec") else {}


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Function]) -> None:
    """With --quick, of each test the cases that pairwise.py keeps, and one of those skipped."""
    for item in items:
        values = parameters(item)
        if values.get("backend") == "emulated_sm90" and values.get("dtype") == torch.float32:
            item.add_marker(
                pytest.mark.skipif(True, reason="the kernel for Hopper takes 16-bit elements")
            )
    if not config.getoption("--quick"):
        return
    grids: dict[tuple[str, bool], list[pytest.Function]] = defaultdict(list)
    for item in items:
        skipped = any(mark.args[:1] == (True,) for mark in item.iter_markers("skipif"))
        grids[item.nodeid.split("[")[0], skipped].append(item)
    quick: set[pytest.Function] = set()
    for (_, skipped), grid in grids.items():
        cases = [parameters(item) for item in grid]
        quick |= {grid[index] for index in ([0] if skipped else pairwise.kept(cases))}
    config.hook.pytest_deselected(items=[item for item in items if item not in quick])
    items[:] = [item for item in items if item in quick]


_CUDA = (
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
)
_EMULATED = (
    pytest.mark.emulated,
    pytest.mark.skipif(emulated.missing() is not None, reason=f"emulation: {emulated.missing()}"),
)


def backend_params(*names: str) -> Sequence[Any]:
    """A fixture's params: backends as cases.call takes them, each with its marks."""
    marks = {"cpu": (), "emulated": _EMULATED, "emulated_sm90": _EMULATED, "cuda": _CUDA}
    return [pytest.param(name, marks=marks[name]) for name in names]


@pytest.fixture(params=backend_params("cpu", "emulated", "cuda"))
def backend(request: pytest.FixtureRequest) -> str:
    """Name of the backend that the test calls the ops on, as cases.call takes it."""
    return request.param


@pytest.fixture(params=backend_params("cpu", "cuda"))
def device(request: pytest.FixtureRequest) -> str:
    """A device that the extension itself may have kernels for."""
    return request.param
