"""Fixtures that every test file shares."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import emulated
import pairwise
import pytest
import torch
import transformers

QUICK = "every pair of parameter values, and no slow tests; `make test-all` runs all of them"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--quick", action="store_true", help=f"of parameter grids {QUICK}")


def pytest_report_header() -> str:
    return f"torch {torch.__version__}, transformers {transformers.__version__}"


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    if config.getoption("--quick"):
        terminalreporter.write_line(f"--quick: of parameter grids {QUICK}")


def parameters(item: pytest.Function) -> dict[str, Any]:
    return item.callspec.params if hasattr(item, "callspec") else {}


def quick(items: Sequence[pytest.Function]) -> set[pytest.Function]:
    """Of each test that is not slow the cases that pairwise.py keeps, and one of those skipped; for
    the interpreted PTX, which has runs of its own, by themselves."""
    grids: dict[tuple[str, bool, bool], list[pytest.Function]] = defaultdict(list)
    for item in items:
        if not item.get_closest_marker("slow"):
            skipped = any(mark.args[:1] == (True,) for mark in item.iter_markers("skipif"))
            is_ptx = item.get_closest_marker("ptx") is not None
            grids[item.nodeid.split("[")[0], skipped, is_ptx].append(item)
    chosen: set[pytest.Function] = set()
    for (_, skipped, _), grid in grids.items():
        kept = [0] if skipped else pairwise.kept([parameters(item) for item in grid])
        chosen |= {grid[index] for index in kept}
    return chosen


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Function]) -> None:
    for item in items:
        values = parameters(item)
        if (
            values.get("backend") in ("emulated_sm90", "ptx_sm90")
            and values.get("dtype") == torch.float32
        ):
            reason = "the kernel for Hopper takes 16-bit elements"
            item.add_marker(pytest.mark.skipif(True, reason=reason))
    if config.getoption("--quick"):
        chosen = quick(items)
        config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
        items[:] = [item for item in items if item in chosen]


_CUDA = (
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
)
_EMULATED = (
    pytest.mark.emulated,
    pytest.mark.skipif(emulated.missing() is not None, reason=f"emulation: {emulated.missing()}"),
)
_PTX = (
    pytest.mark.ptx,
    pytest.mark.skipif(emulated.missing("ptx") is not None, reason=f"{emulated.missing('ptx')}"),
)


def backend_params(*names: str) -> Sequence[Any]:
    """A fixture's params: backends as cases.call takes them, each with its marks."""
    marks = {"cpu": (), "emulated": _EMULATED, "emulated_sm90": _EMULATED, "cuda": _CUDA}
    marks |= {"ptx": _PTX, "ptx_sm90": _PTX}
    return [pytest.param(name, marks=marks[name]) for name in names]


@pytest.fixture(params=backend_params("cpu", "emulated", "ptx", "cuda"))
def backend(request: pytest.FixtureRequest) -> str:
    """Name of the backend that the test calls the ops on, as cases.call takes it."""
    return request.param


@pytest.fixture(params=backend_params("cpu", "cuda"))
def device(request: pytest.FixtureRequest) -> str:
    """A device that the extension itself may have kernels for."""
    return request.param


@pytest.fixture(scope="module")
def single_threaded() -> Iterator[None]:
    """For files of tiny models, whose threads would only wait for each other."""
    from tiny_models import one_thread  # op tests do without transformers' models

    with one_thread():
        yield


@pytest.fixture(scope="module")
def without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield
