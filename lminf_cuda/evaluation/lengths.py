"""How a text is cut: into lengths to report, chunks to stream and windows to recompute."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise


def default_lengths(train_length: int, n_tokens: int) -> list[int]:
    """The training length and its doublings, as far as the text goes, to 65,536 or 4 times it."""
    most = min(n_tokens, max(65_536, 4 * train_length))
    lengths = [train_length]
    while lengths[-1] * 2 <= most:
        lengths.append(lengths[-1] * 2)
    return lengths


def check_lengths(lengths: Sequence[int], n_tokens: int) -> None:
    """Raises ValueError unless the lengths increase, start at 2 or more and fit the text."""
    if not lengths or lengths[0] < 2 or any(a >= b for a, b in pairwise(lengths)):
        raise ValueError(
            f"lengths must increase and start at 2 or more, got {list(lengths)}; "
            "for example 256,512,1024"
        )
    if n_tokens < lengths[0]:
        raise ValueError(
            f"the text has {n_tokens} tokens, fewer than the shortest length {lengths[0]}; "
            "give a longer text or shorter lengths"
        )
    if n_tokens < lengths[-1]:
        raise ValueError(
            f"the text has {n_tokens} tokens, fewer than the longest length {lengths[-1]}; "
            "give a longer text or leave that length out"
        )


def chunk_bounds(lengths: Sequence[int], chunk: int) -> list[tuple[int, int]]:
    """Chunks [start, end) of input tokens, at most `chunk` long, that end where a length ends.

    The input at position t scores token t + 1, so the inputs of length L end at L - 1.
    """
    bounds = []
    start = 0
    for length in lengths:
        while start < length - 1:
            end = min(start + chunk, length - 1)
            bounds.append((start, end))
            start = end
    return bounds


def baseline_windows(n_tokens: int, context: int, stride: int) -> list[tuple[int, int, int]]:
    """Windows (start, first, end) of the cut baseline: read [start, end - 1), score [first, end).

    Every token but the first is scored exactly once, past the context's length with at least the
    last context - stride + 1 tokens before it and at most context.

    Raises ValueError unless 1 <= stride <= context.
    """
    if not 1 <= stride <= context:
        raise ValueError(
            f"baseline stride must be 1 to its context of {context} tokens, got {stride}"
        )
    windows = []
    first = 1
    while first < n_tokens:
        end = min(context + 1 if first == 1 else first + stride, n_tokens)
        windows.append((max(0, end - 1 - context), first, end))
        first = end
    return windows
