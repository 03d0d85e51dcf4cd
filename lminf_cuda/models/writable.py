"""Tensors that outlive the inference mode they are made in.

What is made in torch.inference_mode() cannot be written outside of it. A cache goes on from one
mode to the other, so all that it keeps is made here.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def writable() -> torch.inference_mode:
    """A context, in which tensors are made that may be written in any mode."""
    return torch.inference_mode(False)


def _made_writable(value: Any) -> Any:
    """A tensor, or those of a dict, copied where they may not be written in any mode."""
    if isinstance(value, dict):
        return {name: _made_writable(item) for name, item in value.items()}
    if not isinstance(value, Tensor) or not value.is_inference():
        return value
    with writable():
        return value.clone()


class Writable:
    """A class whose copies and pickles may be read in inference mode and then written in any."""

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(_made_writable(state))
