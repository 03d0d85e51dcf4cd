"""The tables that the command prints: an evaluation, passkeys, timings."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from lminf_cuda.evaluation.losses import CUT, LM_INFINITE, VANILLA, Evaluation, Row
from lminf_cuda.evaluation.passkey import Cell
from lminf_cuda.evaluation.speed import BenchRow, Shape

TABLE_WIDTH = 118  # columns where the output is not a terminal


def console() -> Console:
    """The terminal, or a page of TABLE_WIDTH columns where the output goes elsewhere."""
    wide = Console()
    return wide if wide.is_terminal else Console(width=TABLE_WIDTH)


def _mark(row: Row, value: float | None, form: str) -> str:
    return ("stopped" if row.note else "") if value is None else format(value, form)


def evaluation_table(result: Evaluation) -> Table:
    """One line a length: losses, the difference that matters, rates and the caches' sizes."""
    stride = result.settings["baseline_stride"]
    least = result.train_length - stride + 1
    if stride == 1:
        context = (
            f"the last {result.train_length} tokens for each token, one window a token (exact)"
        )
    else:
        context = (
            f"the last {least} to {result.train_length} tokens, one window every {stride} tokens "
            "(--baseline-stride 1 is the exact token-by-token version)"
        )
    notes = [
        f"{name} {trace.stopped_text}" for name, trace in result.traces.items() if trace.stopped
    ]
    table = Table(
        title=f"Loss after the previous length (nats per token), speed, size of the cache "
        f"({result.settings['dtype']})",
        caption="\n".join([f"cut: recomputed from {context}", *notes]),
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
            f"{(ours.nats_per_token or 0) - (cut.nats_per_token or 0):+.3f}",
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
