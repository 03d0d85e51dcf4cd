"""Loss by length over many documents (PG19's form: a folder of texts), with confidence intervals.

A row is the mean over documents of a document's mean loss over the tokens number (previous length,
length]; its interval comes from drawing as many documents anew, again and again (bootstrap).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from transformers import DynamicCache

from lminf_cuda.evaluation.lengths import chunk_bounds
from lminf_cuda.evaluation.losses import LM_INFINITE, VANILLA
from lminf_cuda.evaluation.records import write_records
from lminf_cuda.evaluation.traces import stream
from lminf_cuda.models.cache import LambdaCache
from lminf_cuda.models.patch import patch_model, unpatch_model
from lminf_cuda.text.reading import read_text, tokenize

DRAWS = 2000  # of as many documents as there are
LEVEL = 0.95


@dataclass(frozen=True)
class LengthRow:
    """One method at one length; the interval holds the mean with probability LEVEL."""

    method: str
    length: int
    documents: int
    nats_per_token: float
    low: float
    high: float


def interval(values: np.ndarray, seed: int = 0) -> tuple[float, float]:
    """The bootstrap interval of the mean of values [n]; of one value, that value twice."""
    draws = np.random.default_rng(seed).integers(len(values), size=(DRAWS, len(values)))
    means = values[draws].mean(1)
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def rows_of(
    method: str, documents: Sequence[np.ndarray], lengths: Sequence[int]
) -> list[LengthRow]:
    """Rows of the losses of documents, each float32 [tokens - 1]; those too short are left out."""
    rows = []
    for first, length in pairwise([1, *lengths]):
        means = [
            nats[first - 1 : length - 1].mean() for nats in documents if len(nats) >= length - 1
        ]
        if means:
            values = np.array(means, np.float64)
            rows.append(LengthRow(method, length, len(values), values.mean(), *interval(values)))
    return rows


def find_documents(folder: Path) -> list[Path]:
    """The .txt files under a folder, in order.

    Raises ValueError when there is none.
    """
    found = sorted(folder.rglob("*.txt")) if folder.is_dir() else []
    if not found:
        raise ValueError(f"{folder} has no .txt files; give a folder with a text a file")
    return found


def evaluate_documents(
    model: Any,
    tokenizer: Any,
    paths: Sequence[Path],
    lengths: Sequence[int],
    *,
    patch: dict[str, Any],
    vanilla: bool = True,
    chunk: int = 1024,
) -> list[LengthRow]:
    """Rows of LM-Infinite, and of vanilla if wanted.

    Args:
        model: an unpatched causal LM in eval mode; it is unpatched again on return.
        paths: of texts; a text shorter than the first length counts for no row.
        lengths: increasing, from 2 on.
        patch: the arguments of `patch_model`.
        chunk: tokens per forward.
    """
    texts = [tokenize(tokenizer, read_text(path)).tokens[: lengths[-1]] for path in paths]
    texts = [tokens.to(model.device) for tokens in texts if len(tokens) >= lengths[0]]
    if not texts:
        raise ValueError(f"no text has {lengths[0]} tokens; give shorter lengths or longer texts")
    losses: dict[str, list[np.ndarray]] = {}
    for method in (LM_INFINITE, VANILLA)[: 1 + vanilla]:
        if method == LM_INFINITE:
            patch_model(model, **patch)
        try:
            for n, tokens in enumerate(texts, 1):
                patched = method == LM_INFINITE
                cache = LambdaCache(model) if patched else DynamicCache(config=model.config)
                label = f"{method}, {n} of {len(texts)}"
                bounds = chunk_bounds([len(tokens)], chunk)
                losses.setdefault(method, []).append(
                    stream(model, tokens, cache, bounds, label=label).nats
                )
        finally:
            if method == LM_INFINITE:
                unpatch_model(model)
    return [row for method, found in losses.items() for row in rows_of(method, found, lengths)]


def write_results(rows: Sequence[LengthRow], settings: dict[str, Any], folder: Path) -> None:
    """Write documents.csv (a line a method and length) and documents.json."""
    lines = [asdict(row) for row in rows]
    write_records(folder, "documents", lines, {"settings": settings, "rows": lines})
