"""Negative log likelihood by position over one long text, for three ways to read it.

- *vanilla*: the model as it is, with a key-value cache that grows with the text;
- *LM-Infinite*: the patched model with its cache of fixed size;
- *cut*: the model as it is, recomputed from scratch on a context cut to the window. It is the
  honest baseline: always within what the model was trained on, at the price of reading the same
  tokens again and again. Where its time is short it scores samples, spread evenly.

All score the same text. A row for length L is the mean over the tokens number (previous length, L],
so growth past the training length is not averaged away.
"""

from __future__ import annotations

import json
import math
import time
from bisect import bisect_left
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import DynamicCache

from lminf_cuda.evaluation.lengths import baseline_windows, check_lengths, chunk_bounds
from lminf_cuda.evaluation.machine import available_memory
from lminf_cuda.evaluation.records import write_records
from lminf_cuda.evaluation.traces import Trace, recompute, stream, vanilla_memory
from lminf_cuda.models.cache import LambdaCache
from lminf_cuda.models.patch import patch_model, unpatch_model
from lminf_cuda.models.settings import SETTINGS_ATTRIBUTE
from lminf_cuda.text.progress import waiting
from lminf_cuda.text.reading import Text

VANILLA, LM_INFINITE, CUT = "vanilla", "LM-Infinite", "cut"
METHODS = (VANILLA, LM_INFINITE, CUT)
PATCH_SETTINGS = ("n_global", "window", "max_distance")
MIDDLE_SETTINGS = ("middle_top_k", "middle_from_layer", "middle_distance")
BASELINE_STRIDE = 32
SPARE_MEMORY = 0.9  # share of the available memory that vanilla may plan to use


@dataclass(frozen=True)
class Row:
    """One method over the tokens number (previous length, length].

    Attributes:
        scored: so many of the tokens have a loss, where these are samples; None: all.
        above_cut: of LM-Infinite, its loss minus the cut baseline's on the tokens that both scored.
    """

    method: str
    length: int
    tokens: int
    nats_per_token: float | None
    bits_per_byte: float | None
    tokens_per_second: float | None
    cache_bytes: int | None
    note: str = ""
    scored: int | None = None
    above_cut: float | None = None


@dataclass
class Evaluation:
    """All rows of a run, the traces behind them and the settings they were made with."""

    lengths: list[int]
    train_length: int
    settings: dict[str, Any]
    traces: dict[str, Trace]
    rows: list[Row] = field(default_factory=list)

    def row(self, method: str, length: int) -> Row:
        """The row of one method at one length; one without numbers for a method left out."""
        rows = (r for r in self.rows if r.method == method and r.length == length)
        return next(rows, Row(method, length, 0, None, None, None, None))


def rows_of(method: str, trace: Trace, text: Text, lengths: Sequence[int]) -> list[Row]:
    """Rows of one method: means, and time taken, over each (previous length, length]."""
    rows = []
    clock = np.interp(lengths, [1, *trace.ends], [0.0, *trace.seconds])
    for n, (length, clock_end) in enumerate(zip(lengths, clock, strict=True)):
        first = lengths[n - 1] if n else 1
        tokens = length - first
        nats = trace.nats[first - 1 : length - 1]
        has_loss = np.isfinite(nats)
        scored = int(has_loss.sum())
        if length > len(trace.nats) + 1 or scored == 0:
            note = trace.stopped_text or trace.sampled
            rows.append(Row(method, length, tokens, None, None, None, None, note))
            continue
        total = float(nats[has_loss].sum(dtype=np.float64))
        n_bytes = text.bytes_of(first, length, has_loss)
        seconds = clock_end - (clock[n - 1] if n else 0.0)
        reached = min(bisect_left(trace.ends, length), len(trace.ends) - 1)
        rows.append(
            Row(
                method,
                length,
                tokens,
                total / scored,
                total / math.log(2) / n_bytes if n_bytes else None,
                scored / seconds if seconds > 0 else None,
                trace.cache_bytes[reached],
                scored=None if scored == tokens else scored,
            )
        )
    return rows


def above_cut(ours: Trace, cut: Trace, lengths: Sequence[int]) -> list[float | None]:
    """For each row how far the loss is above the cut baseline's, on tokens that both scored."""
    difference = ours.nats.astype(np.float64) - cut.nats
    found: list[float | None] = []
    for first, length in pairwise([1, *lengths]):
        both = difference[first - 1 : length - 1]
        both = both[np.isfinite(both)]
        found.append(float(both.mean()) if len(both) else None)
    return found


def duration(seconds: float) -> str:
    """Seconds as people read them."""
    for unit, size in (("days", 86_400), ("hours", 3_600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:,.0f} {unit}"
    return f"{seconds:,.0f} s"


@torch.inference_mode()
def _seconds_per_token(model: Any, tokens: torch.Tensor, chunk: int) -> float:
    """Of reading without a cache, from one forward."""
    piece = tokens[None, :chunk]
    model(input_ids=piece[:, :256], use_cache=False)  # pays for set-up
    began = time.perf_counter()
    model(input_ids=piece, use_cache=False)
    return (time.perf_counter() - began) / piece.shape[1]


def _estimates(
    per_token: float, n_tokens: int, n_read: int, cut_seconds: float | None, vanilla_seconds: float
) -> str:
    """How long the methods will take; the cut baseline reads n_read tokens, 0: it is left out."""
    parts = [f"LM-Infinite about {duration(per_token * n_tokens)} or more"]
    if n_read:
        whole = per_token * n_read
        parts.append(f"cut about {duration(whole)} to read {n_read:,} tokens")
        if cut_seconds is not None and whole > cut_seconds:
            parts[-1] += f", of which it takes samples for {duration(cut_seconds)}"
    parts.append(f"vanilla at most about {duration(vanilla_seconds)}")
    return f"{n_tokens:,} tokens: {'; '.join(parts)}"


@dataclass
class Kept:
    """Traces in a folder, so that a run that was broken off goes on with what it has.

    Attributes:
        folder: for the traces.
        facts: of the run; a trace is taken only by one with the same facts.
    """

    folder: Path
    facts: dict[str, Any]

    def path(self, method: str) -> Path:
        """Where a method's trace is."""
        return self.folder / f"{method}.npz"

    def load(self, method: str) -> Trace | None:
        """The trace of a method, or None."""
        try:
            with np.load(self.path(method)) as arrays:
                facts = json.loads(str(arrays["facts"]))
                if facts["of_run"] != json.loads(json.dumps(self.facts, default=str)):
                    return None
                return Trace(nats=arrays["nats"], **facts["trace"])
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def save(self, method: str, trace: Trace) -> None:
        """Keeps the trace of a method."""
        self.folder.mkdir(parents=True, exist_ok=True)
        others = {name: value for name, value in vars(trace).items() if name != "nats"}
        facts = json.dumps({"of_run": self.facts, "trace": others}, default=str)
        with self.path(method).open("wb") as file:
            np.savez_compressed(file, nats=trace.nats, facts=np.array(facts))

    def clear(self) -> None:
        """Removes them."""
        for method in METHODS:
            self.path(method).unlink(missing_ok=True)
        with suppress(OSError):
            self.folder.rmdir()


def evaluate(
    model: Any,
    text: Text,
    lengths: Sequence[int],
    *,
    train_length: int,
    n_global: int = 16,
    window: int | None = None,
    max_distance: int | None = None,
    middle: dict[str, int] | None = None,
    chunk: int = 1024,
    baseline_stride: int | None = None,
    cut: bool = True,
    cut_length: int | None = None,
    cut_seconds: float | None = None,
    vanilla_seconds: float = 120.0,
    bos_token_id: int | None = None,
    kept: Kept | None = None,
    after_each: Callable[[Evaluation], object] = lambda evaluation: None,
    say: Callable[[str], object] = lambda line: None,
) -> Evaluation:
    """Score `text` up to the last of `lengths` with LM-Infinite, the cut baseline and vanilla.

    Args:
        model: an unpatched causal LM in eval mode; it is unpatched again on return.
        text: at least lengths[-1] tokens.
        lengths: increasing, 2 or more.
        train_length: tokens the model was trained on at once.
        n_global, window, max_distance: as for `patch_model`; the window is by default the training
            length that the config names.
        middle: the middle_* arguments of `patch_model`; a chunk has middle tokens for its last
            query alone.
        chunk: tokens per forward of the two that stream.
        baseline_stride: tokens scored per window of the cut baseline, 1 to cut_length; 1 is the
            exact token-by-token version; None: BASELINE_STRIDE, at most cut_length.
        cut: whether the cut baseline runs.
        cut_length: tokens of its context; None: the window, at most train_length.
        cut_seconds: it begins no window after so many seconds, and those are spread evenly; None:
            all windows.
        vanilla_seconds: vanilla stops at the first chunk after so many seconds.
        bos_token_id: repeated at the start of every cut window when the text begins with it.
        kept: where traces are kept until all methods are done, and taken from.
        after_each: called with what there is after each method.
        say: told beforehand how long it will take.

    Raises ValueError when lengths, chunk, stride or seconds are out of range, and what
    `patch_model` raises.
    """
    check_lengths(lengths, len(text))
    if chunk < 1:
        raise ValueError(f"chunk must be 1 or more tokens, got {chunk}")
    for name, seconds in (("vanilla_seconds", vanilla_seconds), ("cut_seconds", cut_seconds)):
        if seconds is not None and seconds < 0:
            raise ValueError(f"{name} must be 0 or more, got {seconds}")
    text = text.head(lengths[-1])
    tokens = text.tokens.to(model.device)
    bounds = chunk_bounds(lengths, chunk)
    patch = {"n_global": n_global, "window": window, "max_distance": max_distance} | (middle or {})

    patch_model(model, **patch)  # type: ignore[arg-type]
    try:
        resolved = getattr(model, SETTINGS_ATTRIBUTE)
        settings = {name: getattr(resolved, name) for name in PATCH_SETTINGS}
        if middle:
            settings |= {name: getattr(resolved, name) for name in MIDDLE_SETTINGS}
    finally:
        unpatch_model(model)
    context = cut_length or min(settings["window"], train_length)
    if baseline_stride is None:
        baseline_stride = min(BASELINE_STRIDE, context)
    windows = baseline_windows(len(tokens), context, baseline_stride)
    settings |= {
        "chunk": chunk,
        "baseline_stride": baseline_stride,
        "cut_length": context,
        "cut_seconds": cut_seconds,
        "vanilla_seconds": vanilla_seconds,
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": str(model.device),
    }
    result = Evaluation(list(lengths), train_length, settings, {})
    n_read = sum(end - 1 - start for start, _, end in windows) if cut else 0
    with waiting("estimating the time"):
        per_token = _seconds_per_token(model, tokens, chunk)
    say(_estimates(per_token, len(tokens), n_read, cut_seconds, vanilla_seconds))

    def read_patched() -> Trace:
        patch_model(model, **patch)  # type: ignore[arg-type]
        try:
            return stream(model, tokens, LambdaCache(model), bounds, label=LM_INFINITE)
        finally:
            unpatch_model(model)

    def read_cut() -> Trace:
        return recompute(
            model,
            tokens,
            context,
            baseline_stride,
            lengths=lengths,
            seconds=cut_seconds,
            bos_token_id=bos_token_id,
            label=CUT,
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

    def read_vanilla() -> Trace:
        growing = DynamicCache(config=model.config)
        return stream(model, tokens, growing, bounds, stop=stop_vanilla, label=VANILLA)

    readers = {LM_INFINITE: read_patched, CUT: read_cut, VANILLA: read_vanilla}
    for method, read in readers.items():
        if method == CUT and not cut:
            continue
        trace = kept.load(method) if kept is not None else None
        if trace is not None:
            say(f"{method}: taken from the run that was broken off")
        else:
            trace = read()
            if kept is not None:
                with suppress(OSError):  # it is there all the same
                    kept.save(method, trace)
        result.traces[method] = trace
        result.rows = _all_rows(result, text)
        after_each(result)
    if kept is not None:
        kept.clear()
    return result


def _all_rows(result: Evaluation, text: Text) -> list[Row]:
    """The rows of the methods that are done."""
    rows = []
    for method in METHODS:
        if method not in result.traces:
            continue
        of_method = rows_of(method, result.traces[method], text, result.lengths)
        if method == LM_INFINITE and CUT in result.traces:
            above = above_cut(result.traces[method], result.traces[CUT], result.lengths)
            of_method = [replace(row, above_cut=x) for row, x in zip(of_method, above, strict=True)]
        rows += of_method
    return rows


def write_results(evaluation: Evaluation, folder: Path) -> None:
    """Write evaluation.csv (one line a row) and evaluation.json (rows, settings, peak memory)."""
    rows = [asdict(row) for row in evaluation.rows]
    facts = {
        "train_length": evaluation.train_length,
        "settings": evaluation.settings,
        "peak_rss_bytes": {m: t.peak_rss_bytes for m, t in evaluation.traces.items()},
        "stopped": {m: t.stopped for m, t in evaluation.traces.items()},
        "sampled": {m: t.sampled for m, t in evaluation.traces.items() if t.sampled},
        "rows": rows,
    }
    write_records(folder, "evaluation", rows, facts)
