"""What a whole model costs at a length: reading a text up to there, and writing on from it.

LM-Infinite and vanilla attention read the same tokens in the same chunks, each through its cache;
only the last token of a chunk gets logits. At every length some tokens are written and taken back.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from lminf_cuda.evaluation.lengths import chunk_bounds
from lminf_cuda.evaluation.losses import LM_INFINITE, VANILLA
from lminf_cuda.evaluation.records import write_records
from lminf_cuda.evaluation.traces import cache_memory
from lminf_cuda.models.cache import LambdaCache
from lminf_cuda.models.compat import cache_keyword
from lminf_cuda.models.patch import patch_model, unpatch_model
from lminf_cuda.text.progress import progress

STEPS = 16  # tokens written at each length; their median counts


@dataclass(frozen=True)
class SpeedRow:
    """One method at one length.

    Attributes:
        length: tokens read.
        encode_seconds: to read all of them.
        decode_ms: to write one more.
        cache_bytes: kept by then.
    """

    method: str
    length: int
    encode_seconds: float
    decode_ms: float
    cache_bytes: int


def _finish(tensor: Tensor) -> None:
    if tensor.is_cuda:
        torch.cuda.synchronize(tensor.device)


@torch.inference_mode()
def measure(
    model: Any, tokens: Tensor, cache: Any, lengths: Sequence[int], method: str, chunk: int
) -> list[SpeedRow]:
    """A row for each of the increasing lengths; tokens int64 [lengths[-1]], cache empty."""

    def forward(piece: Tensor, kept: Any) -> float:
        began = time.perf_counter()
        model(
            input_ids=piece[None],
            use_cache=True,
            logits_to_keep=1,
            **cache_keyword(model, kept),
        )
        _finish(piece)
        return time.perf_counter() - began

    rows, seconds = [], 0.0
    model(input_ids=tokens[None, :256], use_cache=False, logits_to_keep=1)  # pays for set-up
    with progress(lengths[-1], method, "tok") as bar:
        for start, end in chunk_bounds([n + 1 for n in lengths], chunk):
            seconds += forward(tokens[start:end], cache)
            bar.update(end - start)
            if end not in lengths:
                continue
            own = cache if isinstance(cache, DynamicCache) else copy.deepcopy(cache)
            steps = [forward(tokens[end - 1 : end], own) for _ in range(STEPS)]
            if own is cache:
                cache.crop(-STEPS)
            rows.append(SpeedRow(method, end, seconds, median(steps) * 1e3, cache_memory(cache)))
    return rows


def speeds(
    model: Any, tokens: Tensor, lengths: Sequence[int], patch: dict[str, Any], chunk: int = 1024
) -> list[SpeedRow]:
    """The rows of both methods; `patch` are the arguments of `patch_model`."""
    tokens = tokens[: lengths[-1]].to(model.device)
    patch_model(model, **patch)
    try:
        rows = measure(model, tokens, LambdaCache(model), lengths, LM_INFINITE, chunk)
    finally:
        unpatch_model(model)
    growing = DynamicCache(config=model.config)
    return rows + measure(model, tokens, growing, lengths, VANILLA, chunk)


def write_results(rows: Sequence[SpeedRow], settings: dict[str, Any], folder: Path) -> None:
    """Write speed.csv (a line a method and length) and speed.json (with the settings)."""
    lines = [asdict(row) for row in rows]
    facts = {"settings": settings, "rows": lines}
    write_records(folder, "speed", lines, facts)
