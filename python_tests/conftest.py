"""Fixtures that every test file shares."""

from collections.abc import Sequence
from typing import Any

import emulated
import pytest
import torch
import transformers


def pytest_report_header() -> str:
    return f"torch {torch.__version__}, transformers {transformers.__version__}"


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
