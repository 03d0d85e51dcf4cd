"""The plot of a diagnosis: three factors, a row for vanilla attention and one for LM-Infinite."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from lminf_cuda.evaluation.diagnosis import FIRST_TOKENS, Diagnosis, LayerDiagnosis

SHORTEST = 16  # the smallest distance and number of tokens that are shown


def principal_plane(hidden: np.ndarray) -> np.ndarray:
    """Rows of `hidden` [n, H] on the two directions in which they vary most: [n, 2]."""
    centered = hidden.astype(np.float64) - hidden.mean(0, dtype=np.float64)
    _, _, directions = np.linalg.svd(centered, full_matrices=False)
    return centered @ directions[:2].T


def _mark_training(axes: Axes, train_length: int) -> None:
    axes.axvline(train_length, color="black", linewidth=0.8, linestyle=":")
    axes.annotate(
        "training length",
        (train_length, 0.0),
        xycoords=("data", "axes fraction"),
        xytext=(-3, 4),
        textcoords="offset points",
        rotation=90,
        ha="right",
        va="bottom",
        fontsize=7,
    )


def _plot_curves(axes: Axes, diagnosis: Diagnosis, layers: list[LayerDiagnosis], what: str) -> None:
    colors = colormaps["viridis"](np.linspace(0, 1, len(layers)))
    for layer, color in zip(layers, colors, strict=True):
        if what == "logits":
            x, y = layer.distances, layer.logit_max
        else:
            x, y = layer.lengths, layer.entropy
        shown = (x >= SHORTEST) & np.isfinite(y)
        axes.plot(x[shown], y[shown], color=color, linewidth=0.9, alpha=0.9)
    axes.set_xscale("log", base=2)
    axes.set_xlim(SHORTEST, 1.1 * diagnosis.n_tokens)
    ticks = [2**n for n in range(4, int(np.log2(diagnosis.n_tokens)) + 1, 2)]
    axes.set_xticks(ticks, [f"{n // 1024}k" if n >= 1024 else str(n) for n in ticks])
    axes.minorticks_off()
    axes.grid(alpha=0.25)
    _mark_training(axes, diagnosis.train_length)


def _plot_hidden(axes: Axes, diagnosis: Diagnosis, points: np.ndarray) -> None:
    positions, train = diagnosis.positions, diagnosis.train_length
    groups = [
        (
            "within the training length",
            (positions >= FIRST_TOKENS) & (positions < train),
            "#9db8d2",
        ),
        ("beyond it", positions >= train, "#f0b64d"),
        (f"first {FIRST_TOKENS} tokens", positions < FIRST_TOKENS, "#c4453c"),
    ]
    for label, chosen, color in groups:
        x, y = points[chosen].T
        axes.scatter(x, y, s=9, color=color, label=label, linewidths=0)
    x, y = points[:1].T
    axes.scatter(x, y, s=60, facecolors="none", edgecolors="black", label="the first token")
    axes.grid(alpha=0.25)


def _let_far_points_in(panels: list[Axes], points: np.ndarray) -> None:
    """Scales that are linear where most points are, logarithmic where a few stand far off."""
    for name, values in zip("xy", np.abs(points).T, strict=True):
        usual = float(np.quantile(values, 0.98))
        if values.max() > 10 * usual:
            for axes in panels:
                getattr(axes, f"set_{name}scale")("symlog", linthresh=usual, linscale=2)


def plot_diagnosis(diagnosis: Diagnosis, title: str, path: Path) -> None:
    """Write a PNG: largest logit by distance, entropy by number of tokens, hidden states.

    The hidden states are those of the layer in the middle, in the plane in which those of both arms
    together vary most.
    """
    figure = Figure(figsize=(14, 8), layout="constrained")
    grid = figure.subplots(len(diagnosis.arms), 3, squeeze=False)
    middle = len(next(iter(diagnosis.arms.values()))) // 2
    hidden = [layers[middle].hidden for layers in diagnosis.arms.values()]
    planes = np.split(principal_plane(np.concatenate(hidden)), len(hidden))
    for row, (arm, layers), points in zip(grid, diagnosis.arms.items(), planes, strict=True):
        _plot_curves(row[0], diagnosis, layers, "logits")
        _plot_curves(row[1], diagnosis, layers, "entropy")
        _plot_hidden(row[2], diagnosis, points)
        row[0].set_ylabel(f"{arm}\nlargest logit", fontsize=10)
        row[1].set_ylabel("entropy of attention (nats)")
        row[2].set_ylabel("second direction")
    grid[0][0].set_title("1. Attention logits by distance", fontsize=10)
    grid[0][1].set_title("2. Entropy by number of tokens", fontsize=10)
    grid[0][2].set_title(f"3. Hidden states of layer {middle}, projected", fontsize=10)
    grid[-1][0].set_xlabel("distance that attention sees (tokens)")
    grid[-1][1].set_xlabel("tokens up to the query")
    grid[-1][2].set_xlabel("first direction")
    for column in range(3):  # the two arms beside each other
        limits = [axes.get_ylim() for axes in grid[:, column]]
        for axes in grid[:, column]:
            axes.set_ylim(min(low for low, _ in limits), max(high for _, high in limits))
    _let_far_points_in(list(grid[:, 2]), np.concatenate(planes))
    widths = [axes.get_xlim() for axes in grid[:, 2]]
    for axes in grid[:, 2]:
        axes.set_xlim(min(low for low, _ in widths), max(high for _, high in widths))
    grid[0][2].legend(fontsize=8, loc="best")
    n_layers = len(next(iter(diagnosis.arms.values())))
    scale = ScalarMappable(Normalize(0, n_layers - 1), "viridis")
    figure.colorbar(scale, ax=list(grid[:, :2].flat), label="layer", shrink=0.5, location="left")
    figure.suptitle(title, fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
