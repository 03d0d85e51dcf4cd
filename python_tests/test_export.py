"""torch.export of patched models: any batch, any length."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from tiny_models import one_thread, tiny_model, tokens
from torch import Tensor, nn
from torch.export import Dim, export

from lminf_cuda import patch_model

SETTINGS = {"n_global": 3, "window": 12}
FAMILIES = ("llama", "gpt_neox", "gemma2", "bloom", "phi3_longrope")


@pytest.fixture(autouse=True, scope="module")
def single_threaded() -> Iterator[None]:
    with one_thread(), torch.no_grad():
        yield


class Uncached(nn.Module):
    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        logits: Tensor = self.model(ids, use_cache=False).logits
        return logits


@pytest.mark.parametrize("name", FAMILIES)
def test_a_forward_of_any_batch_and_length(name: str) -> None:
    model = patch_model(tiny_model(name), **SETTINGS)
    dims = ({0: Dim("batch", min=1), 1: Dim("length", min=2)},)
    program = export(Uncached(model), (tokens(2, 20),), dynamic_shapes=dims).module()
    for batch, length in ((1, 2), (2, 3), (1, 12), (3, 13), (2, 60)):
        ids = tokens(batch, length)
        assert torch.equal(program(ids), model(ids, use_cache=False).logits)
