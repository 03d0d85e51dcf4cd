"""Reads a text through a model, and keeps the loss of every token with its clock and its cache.

`stream` reads once, through a cache; `recompute` again and again, on a context cut to the training
length.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import zip_longest
from typing import Any

import numpy as np
import torch
from torch.nn.functional import cross_entropy
from transformers import DynamicCache

from lminf_cuda.evaluation.lengths import baseline_windows
from lminf_cuda.evaluation.machine import peak_rss_bytes, reset_peak_rss
from lminf_cuda.models.cache import LambdaCache
from lminf_cuda.models.compat import cache_keyword
from lminf_cuda.models.settings import SETTINGS_ATTRIBUTE
from lminf_cuda.text.progress import progress

Window = tuple[int, int, int]  # see baseline_windows
BASELINE_BATCH_TOKENS = 4096  # tokens of the cut baseline's windows in one forward


@dataclass
class Trace:
    """What one method did: losses, and its clock and cache as it went along the text.

    `nats[t]` is the loss of token t + 1 (token 0 has nothing before it), nan where it was left out.
    Entry n of the lists says that after `seconds[n]` all tokens before `ends[n]` were done, with
    `cache_bytes[n]` kept. `sampled` says how much was scored where that is not all.
    """

    nats: np.ndarray  # float32 [tokens scored]
    ends: list[int]
    seconds: list[float]
    cache_bytes: list[int]
    stopped: str | None = None
    peak_rss_bytes: int = 0
    sampled: str = ""

    @property
    def scored(self) -> int:
        """Tokens that have a loss."""
        return int(np.isfinite(self.nats).sum())

    @property
    def stopped_text(self) -> str:
        """Where and why it stopped early; empty when it did not."""
        return f"stopped at {len(self.nats) + 1:,} tokens: {self.stopped}" if self.stopped else ""

    @property
    def tokens_per_second(self) -> float:
        """Over everything this method scored."""
        return self.scored / self.seconds[-1] if self.seconds else 0.0


def token_nats(logits: torch.Tensor, targets: torch.Tensor) -> np.ndarray:
    """Loss of each target in nats: logits [n, vocab], targets [n] -> float32 [n]."""
    return cross_entropy(logits.float(), targets, reduction="none").cpu().numpy()


def cache_memory(cache: Any) -> int:
    """Bytes of keys and values that a cache holds."""
    if isinstance(cache, LambdaCache):
        return cache.memory_bytes()
    tensors = [t for layer in cache.layers for t in (layer.keys, layer.values) if t is not None]
    return sum(t.numel() * t.element_size() for t in tensors)


@torch.inference_mode()
def kept_bytes(model: Any, n_tokens: int) -> int:
    """What a cache of the model, patched or not, holds of one text of n_tokens."""
    token = torch.zeros((1, 1), dtype=torch.int64, device=model.device)
    if not hasattr(model, SETTINGS_ATTRIBUTE):
        growing = DynamicCache(config=model.config)
        model(input_ids=token, use_cache=True, **cache_keyword(model, growing))
        return n_tokens * cache_memory(growing)
    cache = LambdaCache(model)
    model(input_ids=token, use_cache=True, **cache_keyword(model, cache))
    total = 0
    for layer in cache.attention_layers():
        rings = (layer.ring_k, layer.ring_v)
        a_token = sum(ring[:, :, 0].numel() * ring.element_size() for ring in rings)
        total += a_token * (n_tokens if layer.settings.is_full else layer.settings.window)
        total += a_token * layer.settings.n_global
        total += a_token * n_tokens if layer.middle is not None else 0
    return total


def vanilla_memory(config: Any, n_tokens: int, chunk: int, element_size: int) -> int:
    """Bytes the vanilla cache still needs on its way to n_tokens, with one layer's working copies.

    Counts keys and values of every layer, the concatenation and the repetition over the query heads
    of one layer, and the [chunk, n_tokens] mask in bool and in float32.
    """
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    one_head = 2 * n_tokens * head_dim * element_size
    cache = config.num_hidden_layers * kv_heads * one_head
    return int(cache + (kv_heads + heads) * one_head + 5 * chunk * n_tokens)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _warm_up(model: Any, tokens: torch.Tensor) -> None:
    """One forward outside the clock: the first one pays for set-up that is not the method's."""
    model(input_ids=tokens[None, : min(len(tokens), 256)], use_cache=False)
    _synchronize(tokens.device)


@torch.inference_mode()
def stream(
    model: Any,
    tokens: torch.Tensor,
    cache: Any,
    bounds: Sequence[tuple[int, int]],
    *,
    stop: Callable[[int, float, int], str | None] = lambda end, seconds, cache_bytes: None,
    label: str = "",
) -> Trace:
    """Read the tokens in chunks through one cache and score each from all that came before.

    Args:
        tokens: int64 [n] on the model's device.
        cache: any transformers cache, empty.
        bounds: chunks [start, end) of input positions, end < n.
        stop: called before each chunk with its end, the seconds so far and the bytes in the cache;
            returns a reason to stop or None.
        label: name on the progress bar.
    """
    trace = Trace(np.empty(0, np.float32), [], [], [])
    nats: list[np.ndarray] = []
    seconds, cache_bytes = 0.0, 0
    with_cache = cache_keyword(model, cache)
    with progress(bounds[-1][1], label, "tok") as bar:
        _warm_up(model, tokens)
        reset_peak_rss()
        for start, end in bounds:
            trace.stopped = stop(end, seconds, cache_bytes)
            if trace.stopped:
                break
            began = time.perf_counter()
            piece = tokens[None, start:end]
            logits = model(input_ids=piece, use_cache=True, **with_cache).logits[0]
            nats.append(token_nats(logits, tokens[start + 1 : end + 1]))
            _synchronize(tokens.device)
            seconds += time.perf_counter() - began
            cache_bytes = cache_memory(cache)
            trace.ends.append(end + 1)
            trace.seconds.append(seconds)
            trace.cache_bytes.append(cache_bytes)
            bar.update(end - start)
    trace.nats = np.concatenate(nats) if nats else trace.nats
    trace.peak_rss_bytes = peak_rss_bytes()
    return trace


def _batches(windows: Sequence[Window], batch_size: int) -> Iterator[list[Window]]:
    """Consecutive windows that read equally many tokens, at most batch_size together."""
    batch: list[Window] = []
    for window in windows:
        same = batch and window[2] - window[0] == batch[0][2] - batch[0][0]
        if batch and (not same or len(batch) == batch_size):
            yield batch
            batch = []
        batch.append(window)
    yield batch


def spread_order(windows: Sequence[Window], lengths: Sequence[int]) -> list[Window]:
    """The windows in an order of which every beginning is spread evenly over each length's row.

    The rows take turns; within a row the fractions 0, 1/2, 1/4, 3/4, 1/8, ... come one by one.
    """
    rows: list[list[Window]] = [[] for _ in lengths]
    for window in windows:
        rows[bisect_left(lengths, window[2])].append(window)
    orders = [sorted(range(len(row)), key=partial(_reversed_bits, size=len(row))) for row in rows]
    turns = zip_longest(*([row[n] for n in order] for row, order in zip(rows, orders, strict=True)))
    return [window for turn in turns for window in turn if window is not None]


def _reversed_bits(n: int, size: int) -> int:
    bits = max(size - 1, 1).bit_length()
    return int(format(n, f"0{bits}b")[::-1], 2)


@torch.inference_mode()
def recompute(
    model: Any,
    tokens: torch.Tensor,
    context: int,
    stride: int,
    *,
    lengths: Sequence[int] | None = None,
    seconds: float | None = None,
    bos_token_id: int | None = None,
    label: str = "",
) -> Trace:
    """Score the tokens [n] from windows of `context` tokens, each computed from scratch.

    Args:
        context: tokens that a window reads, mostly the training length.
        stride: tokens scored per window; 1 gives every token the full context.
        lengths: of the rows that samples are to be spread over; the last one is n.
        seconds: no window begins after so long; those before it are spread evenly over each row.
            None: all of them.
        bos_token_id: when the text begins with this token, every window does.
        label: name on the progress bar.
    """
    windows = baseline_windows(len(tokens), context, stride)
    n_windows = len(windows)
    if seconds is not None:
        windows = spread_order(windows, lengths or [len(tokens)])
    nats = np.full(len(tokens) - 1, np.nan, np.float32)
    done: list[tuple[int, float]] = []  # where each batch ended, and its seconds
    batch_size = max(1, BASELINE_BATCH_TOKENS // context)
    keep_bos = bos_token_id is not None and int(tokens[0]) == bos_token_id
    n_done = 0
    with progress(len(tokens) - 1, label, "tok") as bar:
        _warm_up(model, tokens)
        reset_peak_rss()
        for batch in _batches(windows, batch_size):
            if seconds is not None and sum(x for _, x in done) > seconds:
                break
            began = time.perf_counter()
            inputs = torch.stack([tokens[start : end - 1] for start, _, end in batch])
            if keep_bos:
                inputs[:, 0] = tokens[0]
            scored = max(end - first for _, first, end in batch)
            logits = model(input_ids=inputs, use_cache=False, logits_to_keep=scored).logits
            for row, (_, first, end) in zip(logits, batch, strict=True):
                nats[first - 1 : end - 1] = token_nats(row[first - end :], tokens[first:end])
            _synchronize(tokens.device)
            done.append((max(end for _, _, end in batch), time.perf_counter() - began))
            n_done += len(batch)
            bar.update(sum(end - first for _, first, end in batch))
    done.sort()
    clock = np.cumsum([x for _, x in done]).tolist()
    trace = Trace(nats, [end for end, _ in done], clock, [0] * len(done))
    trace.peak_rss_bytes = peak_rss_bytes()
    if n_done < n_windows:
        trace.sampled = (
            f"{trace.scored:,} of {len(nats):,} tokens scored, in {n_done:,} windows spread evenly "
            f"over each row ({seconds:g} s)"
        )
    return trace
