"""A fact in the middle of a long text is found with middle tokens, and not without them."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from tiny_models import one_thread

SCRIPT = Path(__file__).parent.parent / "tools" / "train_recall_model.py"


@pytest.fixture(scope="module")
def recall() -> Iterator[ModuleType]:
    spec = importlib.util.spec_from_file_location("train_recall_model", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with one_thread():
        yield module


@pytest.fixture(scope="module")
def model(recall: ModuleType) -> Any:
    model = recall.recall_model()
    assert recall.train(model) > 0.97
    return model


MIDDLE = {"middle_top_k": 5, "middle_from_layer": 0}


@pytest.mark.parametrize("place", [0.1, 0.5, 0.9])
def test_a_fact_in_the_middle(recall: ModuleType, model: Any, place: float) -> None:
    assert recall.share_found(model, place) < 0.25  # a guess is right in one of 16
    assert recall.share_found(model, place, **MIDDLE) > 0.95


@pytest.mark.parametrize("place", [0.0, 0.98])
def test_a_fact_in_sight(recall: ModuleType, model: Any, place: float) -> None:
    assert recall.share_found(model, place) > 0.95
    assert recall.share_found(model, place, **MIDDLE) > 0.95
