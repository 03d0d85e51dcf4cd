"""Fixtures that every test file shares."""

import emulated
import pytest
import torch
import transformers


def pytest_report_header() -> str:
    return f"torch {torch.__version__}, transformers {transformers.__version__}"


_NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
_NO_EMULATION = pytest.mark.skipif(
    emulated.missing() is not None, reason=f"emulation: {emulated.missing()}"
)


@pytest.fixture(
    params=[
        "cpu",
        pytest.param("emulated", marks=[pytest.mark.emulated, _NO_EMULATION]),
        pytest.param("cuda", marks=[pytest.mark.cuda, _NO_GPU]),
    ]
)
def backend(request: pytest.FixtureRequest) -> str:
    """Name of the backend that the test calls the ops on, as cases.call takes it."""
    return request.param


@pytest.fixture(
    params=["cpu", pytest.param("cuda", marks=[pytest.mark.cuda, _NO_GPU])],
)
def device(request: pytest.FixtureRequest) -> str:
    """A device that the extension itself may have kernels for."""
    return request.param
