"""The plots: loss by position beside the memory of the caches, and passkeys found."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lminf_cuda.evaluation.losses import CUT, LM_INFINITE, VANILLA, Evaluation
from lminf_cuda.evaluation.passkey import Cell

BUCKETS_PER_OCTAVE = 8
COLORS = {VANILLA: "#c4453c", LM_INFINITE: "#1f5fa8", CUT: "#f0b64d"}
# The baseline is a broad band, so that it shows on both sides of a line that covers it.
WIDTHS = {VANILLA: 1.5, LM_INFINITE: 1.5, CUT: 6.0}
LABELS = {
    VANILLA: "vanilla, growing cache",
    LM_INFINITE: "LM-Infinite, fixed cache",
    CUT: "cut context, recomputed",
}


def bucket_means(
    values: np.ndarray, per_octave: int = BUCKETS_PER_OCTAVE
) -> tuple[np.ndarray, np.ndarray]:
    """Means of values[t], t = 0.., over buckets of position t + 1 that widen with the position.

    Values that are nan are left out, and so are buckets without any other.

    Returns (positions, means): the geometric middle of each bucket and its mean.
    """
    if len(values) == 0:
        return np.empty(0), np.empty(0)
    octaves = int(np.ceil(np.log2(len(values)))) + 1
    edges = np.unique(np.ceil(2 ** (np.arange(octaves * per_octave + 1) / per_octave)).astype(int))
    edges = np.append(edges[edges <= len(values)], len(values) + 1)
    is_number = np.isfinite(values)
    counts = np.add.reduceat(is_number.astype(np.float64), edges[:-1] - 1)
    sums = np.add.reduceat(np.where(is_number, values, 0.0).astype(np.float64), edges[:-1] - 1)
    filled = counts > 0
    positions = np.sqrt(edges[:-1] * (edges[1:] - 1.0))
    return positions[filled], sums[filled] / counts[filled]


def _mark_training_length(axes: Axes, train_length: int, with_name: bool) -> None:
    axes.axvline(train_length, color="black", linewidth=0.8, linestyle=":")
    if not with_name:
        return
    axes.annotate(
        f"training length {train_length:,}",
        (train_length, 1.0),
        xycoords=("data", "axes fraction"),
        xytext=(-3, -4),
        textcoords="offset points",
        rotation=90,
        ha="right",
        va="top",
        fontsize=8,
    )


def _length_axis(axes: Axes, lengths: list[int]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xlabel("position in the text (tokens)")
    axes.set_xticks(lengths, [f"{n // 1024}k" if n % 1024 == 0 else str(n) for n in lengths])
    axes.minorticks_off()
    axes.grid(alpha=0.25)


def memory_ticks(low: float, high: float) -> list[float]:
    """Round numbers in low..high and next to it on either side, two of them at least."""
    decades = range(int(np.floor(np.log10(low))), int(np.ceil(np.log10(high))) + 1)
    steps = (1, 2, 5) if high / low < 300 else (1,)
    rounds = [step * 10.0**n for n in decades for step in steps]
    first = max((n for n, x in enumerate(rounds) if x <= low), default=0)
    last = min((n for n, x in enumerate(rounds) if x >= high), default=len(rounds) - 1)
    return rounds[first : last + 1]


def _plot_loss(axes: Axes, evaluation: Evaluation) -> None:
    for method in (CUT, VANILLA, LM_INFINITE):
        if method not in evaluation.traces:
            continue
        trace = evaluation.traces[method]
        positions, means = bucket_means(trace.nats)
        shown = positions >= evaluation.lengths[0] / 8
        if trace.sampled:  # few of the tokens, which are no curve
            axes.scatter(
                *_row_means(evaluation, method),
                color=COLORS[method],
                marker="D",
                s=36,
                zorder=3,
                label=f"{LABELS[method]} (samples)",
            )
            continue
        axes.plot(
            positions[shown],
            means[shown],
            color=COLORS[method],
            linewidth=WIDTHS[method],
            label=LABELS[method],
        )
        if trace.stopped and shown.any():
            axes.plot(positions[-1], means[-1], "x", color=COLORS[method])
            axes.annotate(
                f"stopped at {len(trace.nats) + 1:,}",
                (positions[-1], means[-1]),
                xytext=(0, 8),
                textcoords="offset points",
                ha="right",
                fontsize=8,
                color=COLORS[method],
            )
    axes.set_ylabel("negative log likelihood (nats per token)")
    axes.set_title("Loss by position")


def _row_means(evaluation: Evaluation, method: str) -> tuple[list[float], list[float]]:
    """The middle of each row, and LM-Infinite's mean there less how far it is above the method's.

    So samples of tokens that happen to be hard or easy stand beside the curve of all tokens.
    """
    middles, means = [], []
    for first, length in pairwise([1, *evaluation.lengths]):
        ours, row = evaluation.row(LM_INFINITE, length), evaluation.row(method, length)
        if ours.nats_per_token is None or row.nats_per_token is None:
            continue
        middles.append(float(np.sqrt(first * length)) if first > 1 else length / 2)
        means.append(ours.nats_per_token - (ours.above_cut or 0.0))
    return middles, means


def _plot_memory(axes: Axes, evaluation: Evaluation) -> None:
    low, high = np.inf, 0.0
    for method in (VANILLA, LM_INFINITE):
        trace = evaluation.traces[method]
        sizes = np.array(trace.cache_bytes) / 2**20
        axes.plot(trace.ends, sizes, color=COLORS[method])
        if len(sizes):
            low, high = min(low, sizes.min()), max(high, sizes.max())
            if trace.stopped:
                axes.plot(trace.ends[-1], sizes[-1], "x", color=COLORS[method])
    axes.set_yscale("log")
    if high:
        ticks = memory_ticks(low, high)
        axes.set_ylim(min(ticks[0], 0.9 * low), max(ticks[-1], 1.1 * high))
        axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.set_ylabel("keys and values kept (MiB)")
    axes.set_title("Cache memory")


def plot_evaluation(evaluation: Evaluation, path: Path) -> None:
    """Write a PNG: loss by position (means over buckets) and the bytes of each cache."""
    figure = Figure(figsize=(12, 4.8), layout="constrained")
    loss, memory = figure.subplots(1, 2, width_ratios=(3, 2))
    _plot_loss(loss, evaluation)
    _plot_memory(memory, evaluation)
    for axes in (loss, memory):
        _length_axis(axes, evaluation.lengths)
        _mark_training_length(axes, evaluation.train_length, axes is loss)
        axes.set_xlim(evaluation.lengths[0] / 10, 1.15 * evaluation.lengths[-1])
    settings = evaluation.settings
    title = (
        f"{settings.get('model', 'model')}: n_global {settings['n_global']}, "
        f"window {settings['window']:,}, {settings['dtype']}"
    )
    if CUT in evaluation.traces:
        title += (
            f"; cut to {settings['cut_length']:,} tokens every {settings['baseline_stride']} tokens"
        )
    figure.suptitle(title, fontsize=10)
    handles, labels = loss.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=9)  # over no curve
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def plot_passkey(results: dict[str, list[Cell]], title: str, path: Path) -> None:
    """Write a PNG: a heat map of accuracy by length and depth for each method."""
    figure = Figure(figsize=(2 + 4 * len(results), 4), layout="constrained")
    panels = figure.subplots(1, len(results), squeeze=False, sharey=True)[0]
    image: Any = None
    for axes, (method, cells) in zip(panels, results.items(), strict=True):
        lengths = sorted({cell.length for cell in cells})
        depths = sorted({cell.depth for cell in cells})
        grid = np.empty((len(depths), len(lengths)))
        for cell in cells:
            row, column = depths.index(cell.depth), lengths.index(cell.length)
            grid[row, column] = cell.accuracy
            axes.text(
                column,
                row,
                f"{cell.accuracy:.0%}",
                ha="center",
                va="center",
                fontsize=8,
                color="black" if cell.accuracy > 0.6 else "white",
            )
        image = axes.imshow(grid, cmap="viridis", vmin=0, vmax=1, aspect="auto")
        axes.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths])
        axes.set_yticks(range(len(depths)), [f"{depth:.0%}" for depth in depths])
        axes.set_xlabel("tokens of the prompt")
        axes.set_title(method, fontsize=10)
    panels[0].set_ylabel("where the key stands (0%: beginning)")
    figure.suptitle(title, fontsize=10)
    figure.colorbar(image, ax=list(panels), label="keys found", format="{x:.0%}")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
