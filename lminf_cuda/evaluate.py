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

import csv
import json
import math
import resource
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.functional import cross_entropy
from tqdm import tqdm
from transformers import DynamicCache

from lminf_cuda.models.cache import LambdaCache
from lminf_cuda.models.compat import cache_keyword
from lminf_cuda.models.patch import patch_model, unpatch_model

VANILLA, LM_INFINITE, CUT = "vanilla", "LM-Infinite", "cut"
BASELINE_BATCH_TOKENS = 4096  # tokens of the cut baseline's windows in one forward
PATCH_SETTINGS = ("n_global", "window", "max_distance")
SPARE_MEMORY = 0.9  # share of the available memory that vanilla may plan to use


@dataclass(frozen=True)
class Text:
    """Tokens of one long text; `byte_ends[t]` counts its bytes up to the end of token t."""

    tokens: torch.Tensor  # int64 [n]
    byte_ends: np.ndarray | None  # int64 [n]; None where the tokenizer gives no offsets

    def __len__(self) -> int:
        """Number of tokens."""
        return len(self.tokens)

    def head(self, n: int) -> Text:
        """The first n tokens."""
        return Text(self.tokens[:n], None if self.byte_ends is None else self.byte_ends[:n])

    def bytes_between(self, start: int, end: int) -> int | None:
        """Bytes of tokens start..end-1, start >= 1."""
        if self.byte_ends is None:
            return None
        return int(self.byte_ends[end - 1] - self.byte_ends[start - 1])


@dataclass
class Trace:
    """What one method did: losses, and its clock and cache as it went along the text.

    `nats[t]` is the loss of token t + 1 (token 0 has nothing before it). Entry n of the lists says
    that after `seconds[n]` all tokens before `ends[n]` were scored, with `cache_bytes[n]` kept.
    """

    nats: np.ndarray  # float32 [tokens scored]
    ends: list[int]
    seconds: list[float]
    cache_bytes: list[int]
    stopped: str | None = None
    peak_rss_bytes: int = 0

    @property
    def stopped_text(self) -> str:
        """Where and why it stopped early; empty when it did not."""
        return f"stopped at {len(self.nats) + 1:,} tokens: {self.stopped}" if self.stopped else ""

    @property
    def tokens_per_second(self) -> float:
        """Over everything this method scored."""
        return len(self.nats) / self.seconds[-1] if self.seconds else 0.0


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


def read_text(path: Path) -> str:
    """The text of a UTF-8 file.

    Raises FileNotFoundError or ValueError, naming the file, when it is missing, not text or empty.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no such text file: {path}; give the path of a UTF-8 text file")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not UTF-8 text ({error.reason} at byte {error.start}); convert it first"
        ) from error
    if not text.strip():
        raise ValueError(f"{path} is empty; give a text file with something to read")
    return text


def tokenize(tokenizer: Any, text: str) -> Text:
    """Tokens of the text, special ones included, with byte offsets where the tokenizer has them."""
    encoded = tokenizer(
        text, return_offsets_mapping=getattr(tokenizer, "is_fast", False), verbose=False
    )
    tokens = torch.tensor(encoded["input_ids"], dtype=torch.int64)
    offsets = encoded.get("offset_mapping")
    if offsets is None:
        return Text(tokens, None)
    if text.isascii():
        byte_of_char = np.arange(len(text) + 1)
    else:
        widths = [len(char.encode()) for char in text]
        byte_of_char = np.concatenate([[0], np.cumsum(widths)])
    char_ends = np.maximum.accumulate(np.array([end for _, end in offsets], dtype=np.int64))
    return Text(tokens, byte_of_char[char_ends])


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


def baseline_windows(n_tokens: int, train_length: int, stride: int) -> list[tuple[int, int, int]]:
    """Windows (start, first, end) of the cut baseline: read [start, end - 1), score [first, end).

    Every token but the first is scored exactly once, past the training length with at least the
    last train_length - stride + 1 tokens before it and at most train_length.

    Raises ValueError unless 1 <= stride <= train_length.
    """
    if not 1 <= stride <= train_length:
        raise ValueError(
            f"baseline stride must be 1 to the training length {train_length}, got {stride}"
        )
    windows = []
    first = 1
    while first < n_tokens:
        end = min(train_length + 1 if first == 1 else first + stride, n_tokens)
        windows.append((max(0, end - 1 - train_length), first, end))
        first = end
    return windows


def token_nats(logits: torch.Tensor, targets: torch.Tensor) -> np.ndarray:
    """Loss of each target in nats: logits [n, vocab], targets [n] -> float32 [n]."""
    return cross_entropy(logits.float(), targets, reduction="none").cpu().numpy()


def cache_memory(cache: Any) -> int:
    """Bytes of keys and values that a cache holds."""
    if isinstance(cache, LambdaCache):
        return cache.memory_bytes()
    tensors = [t for layer in cache.layers for t in (layer.keys, layer.values) if t is not None]
    return sum(t.numel() * t.element_size() for t in tensors)


def _process_status(name: str) -> int | None:
    """A field of /proc/self/status in bytes, where there is one."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    values = [line.split()[1] for line in lines if line.startswith(name + ":")]
    return int(values[0]) * 1024 if values else None


def reset_peak_rss() -> None:
    """Start a new high-water mark of resident memory, where the system allows it (Linux)."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


def peak_rss_bytes() -> int:
    """Highest resident memory since `reset_peak_rss`, or since the start where it cannot."""
    peak = _process_status("VmHWM")
    if peak is not None:
        return peak
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def available_memory(device: torch.device) -> int | None:
    """Bytes that can still be allocated on the device; None where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    values = [line.split()[1] for line in lines if line.startswith("MemAvailable:")]
    return int(values[0]) * 1024 if values else None


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


def _progress(total: int, label: str) -> tqdm:
    """Tokens done and the time left: a bar on a terminal, a line every 10 s in a log."""
    if sys.stderr.isatty():
        options: dict[str, Any] = dict(leave=False)
    else:
        text = "{desc}: {n_fmt} of {total_fmt} tokens, {remaining} left\n"
        options = dict(leave=False, delay=10, mininterval=10, bar_format=text)
    return tqdm(total=total, desc=label, unit="tok", unit_scale=True, **options)


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
    _warm_up(model, tokens)
    reset_peak_rss()
    trace = Trace(np.empty(0, np.float32), [], [], [])
    nats: list[np.ndarray] = []
    seconds, cache_bytes = 0.0, 0
    with_cache = cache_keyword(model, cache)
    with _progress(bounds[-1][1], label) as bar:
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


def _batches(
    windows: Sequence[tuple[int, int, int]], batch_size: int
) -> Iterator[list[tuple[int, int, int]]]:
    """Consecutive windows that read equally many tokens, at most batch_size together."""
    batch: list[tuple[int, int, int]] = []
    for window in windows:
        same = batch and window[2] - window[0] == batch[0][2] - batch[0][0]
        if batch and (not same or len(batch) == batch_size):
            yield batch
            batch = []
        batch.append(window)
    yield batch


@torch.inference_mode()
def recompute(
    model: Any,
    tokens: torch.Tensor,
    train_length: int,
    stride: int,
    *,
    bos_token_id: int | None = None,
    label: str = "",
) -> Trace:
    """Score the tokens [n] from windows of the training length, each computed from scratch.

    Args:
        stride: tokens scored per window; 1 gives every token the full training length.
        bos_token_id: when the text begins with this token, every window does.
        label: name on the progress bar.
    """
    _warm_up(model, tokens)
    reset_peak_rss()
    trace = Trace(np.empty(0, np.float32), [], [], [])
    nats: list[np.ndarray] = []
    seconds = 0.0
    windows = baseline_windows(len(tokens), train_length, stride)
    batch_size = max(1, BASELINE_BATCH_TOKENS // train_length)
    keep_bos = bos_token_id is not None and int(tokens[0]) == bos_token_id
    with _progress(len(tokens) - 1, label) as bar:
        for batch in _batches(windows, batch_size):
            began = time.perf_counter()
            inputs = torch.stack([tokens[start : end - 1] for start, _, end in batch])
            if keep_bos:
                inputs[:, 0] = tokens[0]
            scored = max(end - first for _, first, end in batch)
            logits = model(input_ids=inputs, use_cache=False, logits_to_keep=scored).logits
            for row, (_, first, end) in zip(logits, batch, strict=True):
                nats.append(token_nats(row[first - end :], tokens[first:end]))
            _synchronize(tokens.device)
            seconds += time.perf_counter() - began
            trace.ends.append(batch[-1][2])
            trace.seconds.append(seconds)
            trace.cache_bytes.append(0)
            bar.update(batch[-1][2] - batch[0][1])
    trace.nats = np.concatenate(nats)
    trace.peak_rss_bytes = peak_rss_bytes()
    return trace


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


def _past_training(evaluation: Evaluation, method: str) -> list[Row]:
    """Rows of a method beyond the training length that have a loss."""
    return [
        row
        for row in evaluation.rows
        if row.method == method
        and row.length > evaluation.train_length
        and row.nats_per_token is not None
    ]


def _sentence(reasons: Sequence[str], facts: str) -> str:
    return f"Shown: {facts}." if not reasons else f"NOT shown ({'; '.join(reasons)}): {facts}."


def findings(evaluation: Evaluation, *, tolerance: float = 0.03) -> list[str]:
    """Two sentences with this run's numbers: fluency past the training length, then what it costs.

    Each begins with "Shown" only when its claims hold in these numbers, else with "NOT shown" and
    what fails: vanilla's loss grows by more than 0.1 nats; LM-Infinite is at most `tolerance` nats
    above the cut baseline at every length; it reads faster than the baseline; its cache has one
    size throughout.
    """
    ours = _past_training(evaluation, LM_INFINITE)
    vanilla = _past_training(evaluation, VANILLA)
    if not ours or not vanilla:
        who = LM_INFINITE if not ours else VANILLA
        fact = f"{who} has no row past the training length of {evaluation.train_length:,} tokens"
        return [_sentence(["nothing to compare"], fact)]

    before = evaluation.row(VANILLA, evaluation.lengths[0])
    start = before.nats_per_token or 0.0
    end = vanilla[-1].nats_per_token or 0.0
    losses = [row.nats_per_token or 0.0 for row in ours]
    above = {
        row.length: loss - (evaluation.row(CUT, row.length).nats_per_token or 0.0)
        for row, loss in zip(ours, losses, strict=True)
    }
    worst = max(above, key=lambda length: above[length])
    fluent = (
        f"past the training length of {evaluation.train_length:,} tokens vanilla goes from "
        f"{start:.2f} nats per token at {before.length:,} to {end:.2f} at {vanilla[-1].length:,}, "
        f"LM-Infinite is between {min(losses):.2f} and {max(losses):.2f} up to "
        f"{ours[-1].length:,} tokens and, on the same tokens, at worst {abs(above[worst]):.3f} "
        f"nats {'above' if above[worst] > 0 else 'below'} the model recomputed on a cut context "
        f"(at {worst:,})"
    )
    reasons = []
    if end - start <= 0.1:
        reasons.append("vanilla's loss does not grow")
    if above[worst] > tolerance:
        reasons.append(f"LM-Infinite is more than {tolerance:g} nats above the cut baseline")

    speed, cut_speed = (evaluation.traces[m].tokens_per_second for m in (LM_INFINITE, CUT))
    sizes = [row.cache_bytes or 0 for row in evaluation.rows if row.method == LM_INFINITE]
    cost = (
        f"LM-Infinite reads {speed:,.0f} tokens/s where recomputing every "
        f"{evaluation.settings['baseline_stride']} tokens reads {cut_speed:,.0f} "
        f"(a ratio of {speed / cut_speed:.1f}), and its cache takes {mebibytes(sizes[0])} at "
        f"{evaluation.lengths[0]:,} tokens and {mebibytes(sizes[-1])} at "
        f"{evaluation.lengths[-1]:,}, vanilla's {mebibytes(vanilla[-1].cache_bytes or 0)} at "
        f"{vanilla[-1].length:,}"
    )
    cost_reasons = []
    if speed <= cut_speed:
        cost_reasons.append("LM-Infinite is not faster than the cut baseline")
    if len(set(sizes)) > 1:
        cost_reasons.append("the size of the LM-Infinite cache changes")
    return [_sentence(reasons, fluent), _sentence(cost_reasons, cost)]


def mebibytes(n_bytes: int) -> str:
    """Bytes as people read them."""
    return f"{n_bytes / 2**20:,.1f} MiB"


def write_results(evaluation: Evaluation, folder: Path) -> None:
    """Write evaluation.csv (one line a row) and evaluation.json (rows, settings, peak memory)."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [asdict(row) for row in evaluation.rows]
    with (folder / "evaluation.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    facts = {
        "train_length": evaluation.train_length,
        "settings": evaluation.settings,
        "peak_rss_bytes": {m: t.peak_rss_bytes for m, t in evaluation.traces.items()},
        "stopped": {m: t.stopped for m, t in evaluation.traces.items()},
        "rows": rows,
    }
    (folder / "evaluation.json").write_text(json.dumps(facts, indent=2) + "\n")
