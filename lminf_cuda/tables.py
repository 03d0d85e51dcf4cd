"""The tables that the command prints: an evaluation, passkeys, timings, kernel plans."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from lminf_cuda.arguments import writing
from lminf_cuda.bench import BenchRow, Shape
from lminf_cuda.evaluate import CUT, LM_INFINITE, VANILLA, Evaluation, Row, mebibytes, write_results
from lminf_cuda.passkey import Cell
from lminf_cuda.passkey import write_results as write_passkeys
from lminf_cuda.plan import KernelPlan, decode_plan, kernel_plan

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


def report(result: Evaluation, out: Path) -> None:
    """Write CSV, JSON and PNG to the folder and print the table and where they are.

    Whatever becomes of the one, the other is tried: the results are not worked out a second time.
    """
    from lminf_cuda.plots import plot_evaluation  # matplotlib takes a second to import

    screen = console()
    try:
        with writing(out):
            write_results(result, out)
            plot_evaluation(result, out / "evaluation.png")
    finally:
        screen.print(evaluation_table(result))
        peaks = ", ".join(
            f"{name} {mebibytes(trace.peak_rss_bytes)}" for name, trace in result.traces.items()
        )
        screen.print(f"peak resident memory of the process during: {peaks}", highlight=False)
    screen.print(f"table: {out / 'evaluation.csv'}", highlight=False, soft_wrap=True)
    screen.print(f"plot:  {out / 'evaluation.png'}", highlight=False, soft_wrap=True)


def report_passkeys(
    results: dict[str, list[Cell]], settings: dict[str, Any], title: str, out: Path
) -> None:
    """As `report`, of passkeys."""
    from lminf_cuda.plots import plot_passkey

    screen = console()
    try:
        with writing(out):
            write_passkeys(results, settings, out)
            plot_passkey(results, title, out / "passkey.png")
    finally:
        for method, cells in results.items():
            screen.print(passkey_table(method, cells))
    screen.print(f"table: {out / 'passkey.csv'}", highlight=False, soft_wrap=True)
    screen.print(f"plot:  {out / 'passkey.png'}", highlight=False, soft_wrap=True)


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


@dataclass(frozen=True)
class PlanShape:
    """What `lminf info --plan` is asked about."""

    dtype: torch.dtype
    device: str
    batch: int
    heads: int
    kv_heads: int
    head_dim: int
    length: int
    queries: int
    window: int
    n_global: int
    max_distance: int | None
    rope: bool

    def tensor(self, heads: int, rows: int) -> torch.Tensor:
        """[B, heads, rows, D] in little memory: its rows are those of a dense tensor to a plan,
        which looks at no value, but each of them stands one row behind its neighbours."""
        shape = (self.batch, heads, rows, self.head_dim)
        memory = torch.empty(sum(shape[:3]) * self.head_dim, dtype=self.dtype, device=self.device)
        return memory.as_strided(shape, (self.head_dim, self.head_dim, self.head_dim, 1))


def _plan_value(x: str | int) -> str:
    if isinstance(x, bool):
        return "yes" if x else "no"
    return x if isinstance(x, str) else f"{x:,}"


def plans_table(shape: PlanShape, capability: int | None, multiprocessors: int) -> Table:
    """The table of `lminf info --plan`: the prefill and a decoding step of one shape."""
    target: dict[str, Any] = dict(device_capability=capability, multiprocessors=multiprocessors)
    options: dict[str, Any] = dict(max_distance=shape.max_distance)
    if shape.rope:
        options["inv_freq"] = torch.ones(
            shape.head_dim // 2, dtype=torch.float32, device=shape.device
        )
    keys = shape.tensor(shape.kv_heads, shape.length)
    ring = shape.tensor(shape.kv_heads, shape.window)
    few = shape.tensor(shape.kv_heads, shape.n_global)
    one = shape.tensor(shape.kv_heads, 1)
    plans = {
        "lambda_attn": kernel_plan(
            shape.tensor(shape.heads, shape.queries), keys, keys, shape.n_global, shape.window,
            **target, **options,
        ),
        "lambda_decode": decode_plan(
            shape.tensor(shape.heads, 1), one, one, ring, ring, few, few,
            torch.zeros(shape.batch, dtype=torch.int64, device=shape.device), shape.window,
            **target, **options,
        ),
    }  # fmt: skip
    where = shape.device if capability is None else f"CUDA, capability {capability}"
    table = Table(title=f"{where}, {str(shape.dtype).removeprefix('torch.')}", box=SIMPLE_HEAD)
    table.add_column("op")
    facts = [field.name for field in fields(KernelPlan)]
    for name in facts:
        table.add_column(name.replace("_", " "), justify="right", overflow="fold")
    for op, plan in plans.items():
        values = (getattr(plan, name) for name in facts)
        table.add_row(op, *(_plan_value(x) for x in values))
    return table
