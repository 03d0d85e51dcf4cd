"""Fixtures that every test file shares."""

import pytest


@pytest.fixture(params=["cpu"])
def backend(request: pytest.FixtureRequest) -> str:
    """Name of the backend that the test calls the ops on, as cases.call takes it."""
    return request.param
