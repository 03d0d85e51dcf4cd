"""Negative log likelihood by position over one long text, for three ways to read it.

- *vanilla*: the model as it is, with a key-value cache that grows with the text;
- *LM-Infinite*: the patched model with its cache of fixed size;
- *cut*: the model as it is, recomputed from scratch on a context cut to the training length. It is
  the honest baseline: always within what the model was trained on, at the price of reading the same
  tokens again and again.

All three score the same tokens of the same text. A row for length L is the mean over the tokens
number (previous length, L], so growth past the training length is not averaged away.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from transformers import DynamicCache

from lminf_cuda.evaluation.lengths import baseline_windows, check_lengths, chunk_bounds
from lminf_cuda.evaluation.machine import available_memory
from lminf_cuda.evaluation.records import write_records
from lminf_cuda.evaluation.traces import Trace, recompute, stream, vanilla_memory
from lminf_cuda.models.cache import LambdaCache
from lminf_cuda.models.patch import patch_model, unpatch_model
from lminf_cuda.text.reading import Text

VANILLA, LM_INFINITE, CUT = "vanilla", "LM-Infinite", "cut"
PATCH_SETTINGS = ("n_global", "window", "max_distance")
SPARE_MEMORY = 0.9  # share of the available memory that vanilla may plan to use


@dataclass(frozen=True)
class Row:
    """One method over the tokens number (previous length, length]."""

    method: str
    length: int
    tokens: int
    nats_per_token: float | None
    bits_per_byte: float | None
    tokens_per_second: float | None
    cache_bytes: int | None
    note: str = ""


@dataclass
class Evaluation:
    """All rows of a run, the traces behind them and the settings they were made with."""

    lengths: list[int]
    train_length: int
    settings: dict[str, Any]
    traces: dict[str, Trace]
    rows: list[Row] = field(default_factory=list)

    def row(self, method: str, length: int) -> Row:
        """The row of one method at one length."""
        return next(r for r in self.rows if r.method == method and r.length == length)


def rows_of(method: str, trace: Trace, text: Text, lengths: Sequence[int]) -> list[Row]:
    """Rows of one method: means, and time taken, over each (previous length, length]."""
    rows = []
    clock = np.interp(lengths, [1, *trace.ends], [0.0, *trace.seconds])
    for n, (length, clock_end) in enumerate(zip(lengths, clock, strict=True)):
        first = lengths[n - 1] if n else 1
        tokens = length - first
        if length > len(trace.nats) + 1:
            note = trace.stopped_text
            rows.append(Row(method, length, tokens, None, None, None, None, note))
            continue
        nats = trace.nats[first - 1 : length - 1]
        n_bytes = text.bytes_between(first, length)
        seconds = clock_end - (clock[n - 1] if n else 0.0)
        reached = next(i for i, end in enumerate(trace.ends) if end >= length)
        rows.append(
            Row(
                method,
                length,
                tokens,
                float(nats.mean(dtype=np.float64)),
                float(nats.sum(dtype=np.float64) / math.log(2) / n_bytes) if n_bytes else None,
                tokens / seconds if seconds > 0 else None,
                trace.cache_bytes[reached],
            )
        )
    return rows


def evaluate(
    model: Any,
    text: Text,
    lengths: Sequence[int],
    *,
    train_length: int,
    n_global: int = 16,
    window: int | None = None,
    max_distance: int | None = None,
    chunk: int = 1024,
    baseline_stride: int = 32,
    vanilla_seconds: float = 120.0,
    bos_token_id: int | None = None,
) -> Evaluation:
    """Score `text` up to the last of `lengths` with LM-Infinite, the cut baseline and vanilla.

    Args:
        model: an unpatched causal LM in eval mode; it is unpatched again on return.
        text: at least lengths[-1] tokens.
        lengths: increasing, 2 or more.
        train_length: tokens the model was trained on at once.
        n_global, window, max_distance: as for `patch_model`.
        chunk: tokens per forward of the two that stream.
        baseline_stride: tokens scored per window of the cut baseline, 1 to train_length; 1 is the
            exact token-by-token version.
        vanilla_seconds: vanilla stops at the first chunk after so many seconds.
        bos_token_id: repeated at the start of every cut window when the text begins with it.

    Raises ValueError when lengths, chunk, stride or seconds are out of range, and what
    `patch_model` raises.
    """
    check_lengths(lengths, len(text))
    if chunk < 1:
        raise ValueError(f"chunk must be 1 or more tokens, got {chunk}")
    if vanilla_seconds < 0:
        raise ValueError(f"vanilla_seconds must be 0 or more, got {vanilla_seconds}")
    baseline_windows(2, train_length, baseline_stride)  # checks the stride before anything runs
    text = text.head(lengths[-1])
    tokens = text.tokens.to(model.device)
    bounds = chunk_bounds(lengths, chunk)

    patch_model(model, n_global=n_global, window=window, max_distance=max_distance)
    try:
        cache = LambdaCache(model)
        settings = {name: getattr(cache.settings, name) for name in PATCH_SETTINGS}
        traces = {LM_INFINITE: stream(model, tokens, cache, bounds, label=LM_INFINITE)}
    finally:
        unpatch_model(model)
    traces[CUT] = recompute(
        model, tokens, train_length, baseline_stride, bos_token_id=bos_token_id, label=CUT
    )

    next_length = {end: min(n for n in lengths if n > end) for _, end in bounds}

    def stop_vanilla(end: int, seconds: float, cache_bytes: int) -> str | None:
        if seconds > vanilla_seconds:
            return f"its time of {vanilla_seconds:g} s was up"
        need = vanilla_memory(model.config, next_length[end], chunk, model.dtype.itemsize)
        available = available_memory(model.device)
        if available is not None and need - cache_bytes > SPARE_MEMORY * available:
            return (
                f"{next_length[end]:,} tokens need {need / 2**30:.1f} GiB, "
                f"{available / 2**30:.1f} GiB are free"
            )
        return None

    growing = DynamicCache(config=model.config)
    traces[VANILLA] = stream(model, tokens, growing, bounds, stop=stop_vanilla, label=VANILLA)

    rows = [
        row
        for method in (VANILLA, LM_INFINITE, CUT)
        for row in rows_of(method, traces[method], text, lengths)
    ]
    settings |= {
        "chunk": chunk,
        "baseline_stride": baseline_stride,
        "vanilla_seconds": vanilla_seconds,
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": str(model.device),
    }
    return Evaluation(list(lengths), train_length, settings, traces, rows)


def write_results(evaluation: Evaluation, folder: Path) -> None:
    """Write evaluation.csv (one line a row) and evaluation.json (rows, settings, peak memory)."""
    rows = [asdict(row) for row in evaluation.rows]
    facts = {
        "train_length": evaluation.train_length,
        "settings": evaluation.settings,
        "peak_rss_bytes": {m: t.peak_rss_bytes for m, t in evaluation.traces.items()},
        "stopped": {m: t.stopped for m, t in evaluation.traces.items()},
        "rows": rows,
    }
    write_records(folder, "evaluation", rows, facts)
