"""The Λ shape for a model, by successive halving on held-out loss.

All shapes read the same text, each through a cache of its own. After a first stretch the worse ones
are dropped, the others read on from where they stopped, and so on until the last few have read all
of it. Where a budget is given, the worse ones are those with the higher loss among the shapes that
keep it; otherwise those that others beat in loss and in memory both (fronts, as in multi-objective
search), so that a whole curve of loss against memory is left.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lminf_cuda.evaluation.lengths import chunk_bounds
from lminf_cuda.evaluation.records import write_records
from lminf_cuda.evaluation.traces import kept_bytes, stream
from lminf_cuda.models.cache import LambdaCache
from lminf_cuda.models.compat import cache_keyword
from lminf_cuda.models.patch import patch_model, unpatch_model

KEEP = 4  # one shape in so many goes on after a stretch
STRETCHES = 3
ROOM = 2.0  # the first stretch is at least so many of the largest windows
FIRST_SHARE = 0.1  # and at least this share of the text
TOLERANCE = 0.005  # nats; of shapes that differ by less the smaller one is taken
DECODE_STEPS = 8  # whose median is the time per token


@dataclass(frozen=True, order=True)
class Shape:
    """What the model is patched with; `full_layers` keep full attention."""

    n_global: int
    window: int
    max_distance: int
    full_layers: tuple[int, ...] = ()

    def arguments(self, n_layers: int) -> dict[str, Any]:
        """Of `patch_model`."""
        window: Any = self.window
        if self.full_layers:
            window = [None if n in self.full_layers else window for n in range(n_layers)]
        return {"n_global": self.n_global, "window": window, "max_distance": self.max_distance}

    def __str__(self) -> str:
        text = f"n_global={self.n_global}, window={self.window}, max_distance={self.max_distance}"
        full = ", ".join(map(str, self.full_layers))
        return f"{text}, full layers {full}" if full else text


@dataclass(eq=False)
class Candidate:
    """One shape and how far it has come.

    Attributes:
        shape: what the model is patched with.
        cache_bytes: of its cache, at the end of the text where layers are full.
        nats: float32 [tokens read - 1], the loss of each token but the first.
        seconds: spent reading.
        decode_seconds: median of a step that writes one token, after the stretch read last.
        dropped: why it never began, or "".
    """

    shape: Shape
    cache_bytes: int = 0
    nats: np.ndarray = field(default_factory=lambda: np.empty(0, np.float32))
    seconds: float = 0.0
    decode_seconds: float | None = None
    dropped: str = ""
    cache: LambdaCache | None = field(default=None, repr=False)

    @property
    def read(self) -> int:
        """Tokens read so far."""
        return len(self.nats) + 1 if len(self.nats) else 0

    def loss(self, score_from: int, end: int | None = None) -> float:
        """Mean loss in nats of the tokens number score_from to end."""
        return float(self.nats[score_from - 1 : None if end is None else end - 1].mean())


@dataclass
class Tuning:
    """What came of a search.

    Attributes:
        candidates: all of them.
        finalists: those that read the whole text.
        best: the one to take.
        score_from: losses count from this token on: the largest window is full there.
        tokens_read: by all together.
        grid_tokens: what a grid would have read.
        seconds: of the whole search.
    """

    candidates: list[Candidate]
    finalists: list[Candidate]
    best: Candidate
    score_from: int
    tokens_read: int
    grid_tokens: int
    seconds: float

    def above_best(self, candidate: Candidate) -> float:
        """How much higher its loss is than the best one's on the tokens that it has read, nats."""
        end = candidate.read
        return candidate.loss(self.score_from, end) - self.best.loss(self.score_from, end)

    @property
    def front(self) -> list[Candidate]:
        """Of the finalists those that no other beats in loss and memory both, smallest first."""
        front = fronts(self.finalists, self.score_from)[0]
        return sorted(front, key=lambda candidate: candidate.cache_bytes)


def default_windows(train_length: int) -> list[int]:
    """Four of them, up to the training length."""
    return [max(1, train_length // n) for n in (8, 4, 2, 1)]


def shapes(
    n_globals: Sequence[int],
    windows: Sequence[int],
    max_distances: Sequence[int] | None,
    train_length: int,
    full_layers: Sequence[tuple[int, ...]] = ((),),
) -> list[Shape]:
    """Every combination whose max_distance is at least its window; None: the window and the
    training length. Raises ValueError for a window below 1."""
    if min(windows, default=1) < 1:
        raise ValueError(f"window is {min(windows)}; it must be at least 1 (the query's own key)")
    found = {
        Shape(n_global, window, distance, full)
        for n_global in n_globals
        for full in full_layers
        for window in windows
        for distance in (max_distances or (window, max(window, train_length)))
        if distance >= window
    }
    return sorted(found)


def stretches(largest_window: int, n_tokens: int) -> list[int]:
    """Where each stretch ends, as numbers of tokens; the last one is n_tokens.

    Raises ValueError where the text is too short to tell windows apart.
    """
    least = int(ROOM * largest_window)
    if n_tokens < 2 * least:
        raise ValueError(
            f"{n_tokens} tokens are too few for a window of {largest_window}: the first stretch "
            f"takes {least}, and the last one should be longer; give at least {2 * least} tokens "
            "or smaller windows"
        )
    first = max(least, int(FIRST_SHARE * n_tokens))
    ratio = (n_tokens / first) ** (1 / (STRETCHES - 1))
    return [round(first * ratio**n) for n in range(STRETCHES - 1)] + [n_tokens]


def fronts(candidates: Sequence[Candidate], score_from: int) -> list[list[Candidate]]:
    """The shapes that none beats in loss and memory both, then those that are left, and so on."""
    left = [(c, c.loss(score_from)) for c in candidates]
    found: list[list[Candidate]] = []
    while left:
        front = [
            c
            for c, loss in left
            if not any(
                other.cache_bytes <= c.cache_bytes
                and other_loss <= loss
                and (other.cache_bytes < c.cache_bytes or other_loss < loss)
                for other, other_loss in left
            )
        ]
        found.append(front)
        left = [(c, loss) for c, loss in left if c not in front]
    return found


def survivors(candidates: Sequence[Candidate], score_from: int, by_loss: bool) -> list[Candidate]:
    """The best part of them, one in KEEP, and at least two."""
    count = max(2, -(-len(candidates) // KEEP))
    by_front = [sorted(candidates, key=lambda c: c.loss(score_from))]
    if not by_loss:
        by_front = [
            sorted(front, key=lambda c: c.loss(score_from))
            for front in fronts(candidates, score_from)
        ]
    return [candidate for front in by_front for candidate in front][:count]


def choose(candidates: Sequence[Candidate], score_from: int) -> Candidate:
    """The smallest of those within TOLERANCE of the lowest loss."""
    lowest = min(c.loss(score_from) for c in candidates)
    close = [c for c in candidates if c.loss(score_from) <= lowest + TOLERANCE]
    return min(close, key=lambda c: (c.cache_bytes, c.loss(score_from)))


@torch.inference_mode()
def _decode_seconds(model: Any, token: Tensor, cache: LambdaCache) -> float:
    """The median of a few steps that write one token; they are taken back. token int64 [1]."""
    times = []
    cache.activate_past_recording(DECODE_STEPS + 1)
    for _ in range(DECODE_STEPS):
        began = time.perf_counter()
        model(input_ids=token[None], use_cache=True, **cache_keyword(model, cache))
        if token.is_cuda:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    cache.crop(-DECODE_STEPS)
    return float(np.median(times))


def _read_on(
    model: Any, tokens: Tensor, candidate: Candidate, end: int, chunk: int, label: str
) -> None:
    """Reads up to `end` tokens and times some steps there."""
    patch_model(model, **candidate.shape.arguments(model.config.num_hidden_layers))
    try:
        if candidate.cache is None:
            candidate.cache = LambdaCache(model)
        done = len(candidate.nats)
        bounds = [
            (start, stop) for start, stop in chunk_bounds([done + 1, end], chunk) if start >= done
        ]
        trace = stream(model, tokens, candidate.cache, bounds, label=label)
        candidate.nats = np.concatenate([candidate.nats, trace.nats])
        candidate.seconds += trace.seconds[-1]
        if candidate.cache.is_croppable:
            last = tokens[end - 1 : end]
            candidate.decode_seconds = _decode_seconds(model, last, candidate.cache)
    finally:
        unpatch_model(model)


def tune(
    model: Any,
    tokens: Tensor,
    candidates: Sequence[Shape],
    *,
    max_bytes: int | None = None,
    max_seconds_per_token: float | None = None,
    grid: bool = False,
    chunk: int = 1024,
) -> Tuning:
    """Search the shape with the lowest loss over `tokens`.

    Args:
        model: an unpatched causal LM in eval mode; it is unpatched again on return.
        tokens: int64 [n]; at least four times the largest window.
        candidates: at least one.
        max_bytes: of the cache; larger shapes are left out.
        max_seconds_per_token: of writing a token; slower shapes are left out after the first
            stretch.
        grid: read the whole text with every shape.
        chunk: tokens per forward.

    Raises ValueError when the text is too short or no shape keeps the budget, and what
    `patch_model` raises.
    """
    began = time.perf_counter()
    if not candidates:
        raise ValueError("there is no shape to try; give at least one n_global and one window")
    tokens = tokens.to(model.device)
    everyone = [Candidate(shape) for shape in candidates]
    for candidate in everyone:
        patch_model(model, **candidate.shape.arguments(model.config.num_hidden_layers))
        try:
            candidate.cache_bytes = kept_bytes(model, len(tokens))
        finally:
            unpatch_model(model)
        if max_bytes is not None and candidate.cache_bytes > max_bytes:
            candidate.dropped = "memory"
    running = [c for c in everyone if not c.dropped]
    if not running:
        least = min(c.cache_bytes for c in everyone)
        raise ValueError(
            f"no shape keeps {max_bytes} bytes: the smallest cache takes {least}; give more "
            "memory, or smaller windows"
        )
    largest = max(c.shape.window for c in running)
    ends = stretches(largest, len(tokens))
    if grid:
        ends = ends[-1:]
    has_budget = max_bytes is not None or max_seconds_per_token is not None
    for n, end in enumerate(ends):
        for count, candidate in enumerate(running):
            label = f"to {end:,}, {count + 1} of {len(running)}"
            _read_on(model, tokens, candidate, end, chunk, label)
        if max_seconds_per_token is not None:
            for candidate in running:
                if (candidate.decode_seconds or 0.0) > max_seconds_per_token:
                    candidate.dropped = "time"
            fastest = min(candidate.decode_seconds or 0.0 for candidate in running)
            running = [c for c in running if not c.dropped]
            if not running:
                raise ValueError(
                    f"no shape writes a token in {max_seconds_per_token * 1e3:g} ms: the fastest "
                    f"takes {fastest * 1e3:.1f} ms; give more time, or smaller windows"
                )
        if n + 1 < len(ends):
            going_on = survivors(running, largest, has_budget)
            for candidate in running:
                if candidate not in going_on:
                    candidate.cache = None
            running = going_on
    for candidate in running:
        candidate.cache = None
    return Tuning(
        everyone,
        running,
        choose(running, largest),
        largest,
        sum(c.read for c in everyone),
        len(everyone) * len(tokens),
        time.perf_counter() - began,
    )


def planned_tokens(n_shapes: int, largest_window: int, n_tokens: int) -> int:
    """Tokens that a search without a budget reads, all shapes together."""
    total, count = 0, n_shapes
    for start, end in pairwise([0, *stretches(largest_window, n_tokens)]):
        total += count * (end - start)
        count = min(count, max(2, -(-count // KEEP)))
    return total


def write_results(result: Tuning, settings: dict[str, Any], folder: Path) -> None:
    """Write tuning.csv (a line a shape) and tuning.json (settings, shapes, the best)."""
    front = result.front
    rows = []
    for c in result.candidates:
        has_loss = c.read > result.score_from
        step = c.decode_seconds
        rows.append(
            asdict(c.shape)
            | {
                "full_layers": " ".join(map(str, c.shape.full_layers)),
                "cache_bytes": c.cache_bytes,
                "tokens_read": c.read,
                "nats_per_token": round(c.loss(result.score_from), 5) if has_loss else None,
                "above_best": round(result.above_best(c), 5) if has_loss else None,
                "ms_per_token_written": None if step is None else round(step * 1e3, 3),
                "seconds_reading": round(c.seconds, 2),
                "on_front": c in front,
                "left_out_for": c.dropped,
            }
        )
    facts = {
        "settings": settings,
        "best": asdict(result.best.shape),
        "scored_from": result.score_from,
        "tokens_read": result.tokens_read,
        "tokens_of_a_grid": result.grid_tokens,
        "seconds": round(result.seconds, 1),
        "shapes": rows,
    }
    write_records(folder, "tuning", rows, facts)
