"""The plot of a search for the Λ shape: loss against memory."""

from __future__ import annotations

from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from lminf_cuda.evaluation.tuning import Candidate, Tuning

COLORS = ("#c4453c", "#f0b64d", "#4f9d69", "#1f5fa8", "#7a4fa3", "#5b5b5b")


def plot_tuning(result: Tuning, title: str, path: Path) -> None:
    """Write a PNG: every shape by its cache and by its loss above the best one's.

    Small and pale: dropped after a stretch. The line joins what no other shape beats in both.
    """
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    n_globals = sorted({c.shape.n_global for c in result.candidates})
    colors = {n: COLORS[i % len(COLORS)] for i, n in enumerate(n_globals)}

    def point(candidate: Candidate) -> tuple[float, float]:
        return candidate.cache_bytes / 2**20, result.above_best(candidate)

    front = result.front
    axes.plot(*zip(*map(point, front), strict=True), color="black", linewidth=0.8, zorder=1)
    for candidate in result.candidates:
        if candidate.read <= result.score_from:
            continue
        last = candidate in result.finalists
        axes.scatter(
            *point(candidate),
            s=45 if last else 16,
            alpha=1.0 if last else 0.45,
            color=colors[candidate.shape.n_global],
            linewidths=0,
            zorder=2,
        )
    axes.scatter(*point(result.best), s=150, facecolors="none", edgecolors="black", zorder=3)
    axes.annotate(
        f"take: {result.best.shape}",
        point(result.best),
        xytext=(0, -16),
        textcoords="offset points",
        ha="center",
        va="top",
        fontsize=8,
        zorder=4,
    )
    for n, color in colors.items():
        axes.scatter([], [], color=color, label=f"n_global {n}")
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(10, subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_yscale("symlog", linthresh=0.01, linscale=0.7)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:+g}" if y else "0"))
    axes.margins(x=0.15, y=0.12)
    axes.set_xlabel("cache (MiB)")
    axes.set_ylabel("loss above the chosen shape's (nats per token)")
    axes.grid(alpha=0.25)
    axes.set_title(title, fontsize=10)
    figure.legend(loc="outside right upper", fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
