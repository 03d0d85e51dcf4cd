"""The tables that the command prints: an evaluation, passkeys, timings."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from lminf_cuda.evaluation.diagnosis import LayerNumbers
from lminf_cuda.evaluation.documents import LengthRow
from lminf_cuda.evaluation.findings import difference_to_cut
from lminf_cuda.evaluation.losses import CUT, LM_INFINITE, VANILLA, Evaluation, Row
from lminf_cuda.evaluation.model_speed import SpeedRow
from lminf_cuda.evaluation.passkey import Cell
from lminf_cuda.evaluation.speed import BenchRow, Shape
from lminf_cuda.evaluation.tasks import METHODS
from lminf_cuda.evaluation.tuning import Tuning

TABLE_WIDTH = 118  # columns where the output is not a terminal


def console() -> Console:
    """The terminal, or a page of TABLE_WIDTH columns where the output goes elsewhere."""
    wide = Console()
    return wide if wide.is_terminal else Console(width=TABLE_WIDTH)


def _mark(row: Row, value: float | None, form: str) -> str:
    if value is None and row.note:
        return "stopped" if row.note.startswith("stopped") else "no sample"
    return "" if value is None else format(value, form)


def _cut_context(result: Evaluation) -> str:
    stride, context = result.settings["baseline_stride"], result.settings["cut_length"]
    if stride == 1:
        return f"the last {context} tokens for each token, one window a token (exact)"
    return (
        f"the last {context - stride + 1} to {context} tokens, one window every {stride} tokens "
        "(--baseline-stride 1 is the exact token-by-token version)"
    )


def evaluation_table(result: Evaluation) -> Table:
    """One line a length: losses, the difference that matters, rates and the caches' sizes."""
    notes = [
        f"{name} {trace.stopped_text}" for name, trace in result.traces.items() if trace.stopped
    ]
    notes += [f"{name}: {trace.sampled}" for name, trace in result.traces.items() if trace.sampled]
    if CUT in result.traces:
        notes.insert(0, f"cut: recomputed from {_cut_context(result)}")
    table = Table(
        title=f"Loss after the previous length (nats per token), speed, size of the cache "
        f"({result.settings['dtype']})",
        caption="\n".join(notes),
        caption_justify="left",
        box=SIMPLE_HEAD,
        collapse_padding=True,
    )
    names = ("vanilla", "LM-Inf.", "cut")
    for heading in (
        "tokens\nup to",
        *(f"{name}\nnats" for name in names),
        "LM-Inf.\n- cut",
        *(f"{name}\ntokens/s" for name in names),
        *(f"{name}\nMiB" for name in names[:2]),
    ):
        table.add_column(heading, justify="right")
    for length in result.lengths:
        vanilla, ours, cut = (result.row(m, length) for m in (VANILLA, LM_INFINITE, CUT))
        table.add_row(
            f"{length:,}",
            *(_mark(row, row.nats_per_token, ".3f") for row in (vanilla, ours, cut)),
            _mark(cut, difference_to_cut(result, ours), "+.3f"),
            *(_mark(row, row.tokens_per_second, ",.0f") for row in (vanilla, ours, cut)),
            *(
                _mark(row, None if row.cache_bytes is None else row.cache_bytes / 2**20, ",.2f")
                for row in (vanilla, ours)
            ),
        )
    return table


def passkey_table(method: str, cells: Sequence[Cell]) -> Table:
    """One line a depth, one column a length."""
    table = Table(title=f"{method}: keys found", box=SIMPLE_HEAD)
    lengths = sorted({cell.length for cell in cells})
    table.add_column("depth", justify="right")
    for length in lengths:
        table.add_column(f"{length:,} tokens", justify="right")
    for depth in sorted({cell.depth for cell in cells}):
        row = {cell.length: cell.accuracy for cell in cells if cell.depth == depth}
        table.add_row(f"{depth:.0%}", *(f"{row[length]:.0%}" for length in lengths))
    total = sum(cell.found for cell in cells) / sum(cell.trials for cell in cells)
    table.caption = f"all together {total:.0%}"
    return table


def diagnosis_table(rows: Sequence[LayerNumbers]) -> Table:
    """One line a layer, vanilla attention and LM-Infinite beside each other."""
    table = Table(
        title="Attention and hidden states by layer",
        caption="largest logit within and beyond the training length; mean entropy in nats at the "
        "training length and at the end;\nattention on the first token; the first token's hidden "
        "state and the mean beyond training, from the mean within, in spreads",
        caption_justify="left",
        box=SIMPLE_HEAD,
        collapse_padding=True,
    )
    table.add_column("layer", justify="right")
    for arm in ("vanilla", "LM-Inf."):
        for heading in ("logit", "entropy", "first", "apart", "drift"):
            table.add_column(f"{arm}\n{heading}", justify="right")
    by_layer: dict[int, list[LayerNumbers]] = {}
    for row in rows:
        by_layer.setdefault(row.layer, []).append(row)
    for layer, arms in by_layer.items():
        cells = []
        for row in arms:
            beyond = "" if row.logit_beyond != row.logit_beyond else f", {row.logit_beyond:.1f}"
            cells += [
                f"{row.logit_within:.1f}{beyond}",
                f"{row.entropy_at_training:.2f}, {row.entropy_at_end:.2f}",
                f"{row.first_token_share:.0%}",
                f"{row.first_apart:.1f}",
                f"{row.drift:.2f}",
            ]
        table.add_row(str(layer), *cells)
    return table


def tuning_table(result: Tuning) -> Table:
    """One line a shape: those that read most first, and of these the one with the lowest loss."""
    table = Table(
        title="Shapes by loss (nats per token)",
        caption=f"loss of the tokens after {result.score_from:,}, minus the chosen shape's on the "
        "same tokens; *: none beats it in loss and memory both",
        caption_justify="left",
        box=SIMPLE_HEAD,
        collapse_padding=True,
    )
    headings = (
        *("n_global", "window", "max_distance", "full layers"),
        *("tokens read", "loss", "above", "MiB", "ms"),
    )
    for heading in headings:
        table.add_column(heading, justify="right")
    read = [c for c in result.candidates if c.read > result.score_from]
    front = result.front
    for c in sorted(read, key=lambda c: (-c.read, result.above_best(c))):
        step = c.decode_seconds
        table.add_row(
            f"{c.shape.n_global}",
            f"{c.shape.window:,}",
            f"{c.shape.max_distance:,}",
            ",".join(map(str, c.shape.full_layers)),
            f"{c.read:,}",
            f"{c.loss(result.score_from):.3f}",
            f"{result.above_best(c):+.3f}{' *' if c in front else ''}",
            f"{c.cache_bytes / 2**20:,.2f}",
            "" if step is None else f"{step * 1e3:.1f}",
        )
    return table


def speed_table(rows: Sequence[SpeedRow]) -> Table:
    """One line a length: both methods beside each other, and vanilla's time over ours."""
    table = Table(title="Reading a text and writing on", box=SIMPLE_HEAD, collapse_padding=True)
    costs = ("read, s", "write, ms", "cache, MiB")
    for heading in ("tokens", "method", *(x for cost in costs for x in (cost, "times"))):
        table.add_column(heading, justify="left" if heading == "method" else "right")
    for length in sorted({row.length for row in rows}):
        of_length = {row.method: row for row in rows if row.length == length}
        ours = of_length[LM_INFINITE]
        for row in of_length.values():
            cells = []
            for value, unit, form in (
                (row.encode_seconds, ours.encode_seconds, ",.1f"),
                (row.decode_ms, ours.decode_ms, ",.1f"),
                (row.cache_bytes / 2**20, ours.cache_bytes / 2**20, ",.1f"),
            ):
                cells += [format(value, form), f"{value / unit:.2f}"]
            table.add_row(f"{length:,}", row.method, *cells)
    return table


def tasks_table(results: Sequence[dict[str, Any]], more: Sequence[str]) -> Table:
    """One line a task, a length where it has one and what `more` names; a column a method."""
    names = [name for name in ("task", "length", *more) if name in results[0]]
    table = Table(title="Scores", box=SIMPLE_HEAD, collapse_padding=True)
    for name in names:
        table.add_column(name, justify="left" if name == "task" else "right")
    for method in METHODS:
        table.add_column(method, justify="right")
    lines: dict[tuple[Any, ...], dict[str, float]] = {}
    for result in results:
        key = tuple(result[name] for name in names)
        lines.setdefault(key, {})[result["method"]] = result["score"]
    for key, scores in lines.items():
        cells = [f"{x:,}" if isinstance(x, int) else str(x) for x in key]
        table.add_row(*cells, *(f"{scores[m]:.3f}" if m in scores else "" for m in METHODS))
    return table


def documents_table(rows: Sequence[LengthRow]) -> Table:
    """One line a length; means with their intervals, a column a method."""
    table = Table(
        title="Loss after the previous length (nats per token, 95% interval over documents)",
        box=SIMPLE_HEAD,
        collapse_padding=True,
    )
    table.add_column("tokens", justify="right")
    table.add_column("documents", justify="right")
    methods = list(dict.fromkeys(row.method for row in rows))
    for method in methods:
        table.add_column(method, justify="right")
    for length in sorted({row.length for row in rows}):
        of = {row.method: row for row in rows if row.length == length}
        cells = [
            f"{of[m].nats_per_token:.3f} ({of[m].low:.3f} to {of[m].high:.3f})" for m in methods
        ]
        table.add_row(f"{length:,}", f"{next(iter(of.values())).documents}", *cells)
    return table


def print_bench(rows: Sequence[BenchRow], shape: Shape, facts: dict[str, Any]) -> None:
    """Print the rows of a benchmark as one table under the machine they were measured on."""
    table = Table(title=f"forward, {shape.name.replace('_', ' ')}")
    for heading in ("dtype", "what", "ms", "GFLOP/s", "time / ours", "of ceiling", "max diff"):
        table.add_column(heading, justify="left" if heading in ("dtype", "what") else "right")
    for row in rows:
        table.add_row(
            row.dtype,
            row.name,
            f"{row.seconds * 1e3:,.2f}",
            f"{row.gflops_per_second:,.0f}",
            "" if row.times_ours is None else f"{row.times_ours:.2f}",
            "" if row.ceiling_share is None else f"{row.ceiling_share:.0%}",
            "" if row.max_difference is None else f"{row.max_difference:.1e}",
        )
    screen = console()
    screen.print(json.dumps(facts), highlight=False, soft_wrap=True)
    screen.print(table)
