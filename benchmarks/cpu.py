"""Every speed that the CPU kernels are held to, in one run, with its bar and whether it is met.

    python -m benchmarks.cpu
    python -m benchmarks.cpu --isa avx512_bf16    # as on a machine without matrix tiles

Prints one line a ratio; writes benchmarks/results/cpu_<processor>.json with every figure and the
machine, and a plot of speed and time against length beside it.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from benchmarks import decode
from benchmarks.isa import LIMITS, hold_to
from benchmarks.model import model_speeds
from benchmarks.variations import BASE, contender, variation_speeds
from lminf_cuda import ops
from lminf_cuda.evaluation.machine import file_name, interleaved_medians, machine
from lminf_cuda.evaluation.speed import FLEX, OURS, SDPA_CAUSAL, Shape, attention_rows

RESULTS = Path(__file__).parent / "results"
CPU = torch.device("cpu")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
LENGTHS = (2048, 4096, 8192, 16_384, 32_768, 65_536)
PEER_LENGTHS = 16_384  # the peers are timed up to here: causal attention grows with the square
MEBIBYTE = 1 << 20


@dataclass(frozen=True)
class Bar:
    """One figure and what it should be: at least `bar`, or at most."""

    part: str
    what: str
    value: float
    bar: float
    at_most: bool = False

    @property
    def met(self) -> bool:
        """Whether the figure is on the right side of its bar."""
        return self.value <= self.bar if self.at_most else self.value >= self.bar


def forward_bars(rounds: int, figures: dict[str, Any]) -> Iterator[Bar]:
    """The base shape beside FlexAttention and a matrix product."""
    floors = {"float32": (1.6, 0.85), "bfloat16": (5.0, 0.75)}
    rows = figures["forward"] = []
    for name, (over_flex, of_ceiling) in floors.items():
        measured = attention_rows(
            Shape(), DTYPES[name], device=CPU, peers=("flex", "sdpa-causal", "mm"), rounds=rounds
        )
        rows += [asdict(row) for row in measured]
        by_name = {row.name: row for row in measured}
        flex = by_name[FLEX].times_ours
        share = by_name[OURS].ceiling_share
        assert flex is not None and share is not None
        yield Bar("forward", f"{name}: times FlexAttention", flex, over_flex)
        yield Bar("forward", f"{name}: of torch.mm", share, of_ceiling)


def variation_bars(rounds: int, figures: dict[str, Any]) -> Iterator[Bar]:
    """Other shapes and options, as shares of the base shape's speed or as added time."""
    speeds = figures["variations"] = variation_speeds(rounds)
    halves = speeds["float16"]["base"] / speeds["float32"]["base"]
    yield Bar("forward", "float16: of our float32", halves, 0.9)
    shapes = {"head dim 64": 0.75, "head dim 256": 0.9, "32 / 8 heads": 0.9, "window 256": 0.75}
    costs = {"ALiBi": 0.1, "softcap": 0.1, "sink logits": 0.1, "partial rotation": 0.1}
    for dtype in DTYPES:
        speed = speeds[dtype]
        for name, bar in shapes.items():
            share = speed[name] / speed["base"]
            yield Bar("shapes", f"{dtype}, {name}: of the base shape", share, bar)
        for name, bar in {**costs, "rotation": 0.08}.items():
            cost = speed["base"] / speed[name] - 1
            yield Bar("options", f"{dtype}, {name}: added time", cost, bar, at_most=True)


def scratch_bytes() -> dict[str, int]:
    """The scratch memory of one thread, for windows, head counts and head dims."""
    used = {}
    for dtype in DTYPES.values():
        for head_dim, heads, kv_heads, window in (
            (64, 8, 8, 1024),
            (128, 8, 8, 256),
            (128, 8, 8, 1024),
            (128, 8, 8, 16_384),
            (128, 32, 8, 4096),
            (128, 64, 1, 4096),
            (256, 8, 8, 4096),
            (256, 32, 1, 1 << 40),
        ):
            q = torch.randn(1, heads, 4096, head_dim).to(dtype)
            k = torch.randn(1, kv_heads, 4096, head_dim).to(dtype)
            ops.cpu_scratch_bytes()
            torch.ops.lminf.lambda_attn(q, k, k, 16, window)
            name = f"{str(dtype).removeprefix('torch.')}, D {head_dim}, {heads} / {kv_heads} heads"
            used[f"{name}, window {window}"] = ops.cpu_scratch_bytes()
    return used


def length_bars(rounds: int, figures: dict[str, Any]) -> Iterator[Bar]:
    """Time against length, and the memory it takes."""
    rows = figures["lengths"] = []
    for dtype, torch_dtype in DTYPES.items():
        calls: dict[int, Callable[[], Any]] = {}
        for length in LENGTHS:
            calls[length], flops = contender(
                {"length": length, "heads": 2, "kv_heads": 2}, {}, torch_dtype
            )
            rows.append({"dtype": dtype, "name": OURS, "length": length, "flops": flops})
        medians = interleaved_medians({str(n): call for n, call in calls.items()}, rounds, CPU)
        for row in rows[-len(LENGTHS) :]:
            row["seconds"] = medians[str(row["length"])]
        for length in (n for n in LENGTHS if n <= PEER_LENGTHS):
            shape = Shape(heads=2, kv_heads=2, length=length)
            for peer in attention_rows(
                shape, torch_dtype, device=CPU, peers=("flex", "sdpa-causal"), rounds=rounds
            ):
                if peer.name in (FLEX, SDPA_CAUSAL):
                    rows.append(
                        {
                            "dtype": dtype,
                            "name": peer.name,
                            "length": length,
                            "flops": peer.gflops_per_second * peer.seconds * 1e9,
                            "seconds": peer.seconds,
                        }
                    )
        ratio = medians["65536"] / medians["8192"]
        yield Bar("length", f"{dtype}: time at 65,536 over 8,192", ratio, 8.2, at_most=True)
    scratch = figures["scratch_bytes"] = scratch_bytes()
    worst = max(scratch, key=scratch.__getitem__)
    yield Bar("length", f"MiB of scratch a thread ({worst})", scratch[worst] / MEBIBYTE, 4, True)


def decode_bars(rounds: int, figures: dict[str, Any]) -> Iterator[Bar]:
    """A decode step beside a streaming sum and SDPA."""
    rows = figures["decode"] = decode.decode_rows(
        decode.parse_arguments(["--rounds", str(6 * rounds)])
    )
    for batch in sorted({row["batch"] for row in rows}):
        by_name = {row["what"]: row for row in rows if row["batch"] == batch}
        share = by_name[decode.OURS]["stream_share"]
        yield Bar("decode", f"batch {batch}: of a streaming sum's rate", share, 0.85)
        yield Bar("decode", f"batch {batch}: times SDPA", by_name[decode.SDPA]["times_ours"], 1.5)


def model_bars(rounds: int, figures: dict[str, Any]) -> Iterator[Bar]:
    """Tokens per second of whole models."""
    del rounds  # each model reads its text twice
    speeds = model_speeds()
    figures["models"] = [asdict(speed) for speed in speeds]
    for s in speeds:
        yield Bar("model", f"{s.model}: 16k tokens, times vanilla", s.times_vanilla, 3.0)
        yield Bar("model", f"{s.model}: 16k over 4k tokens", s.long_over_short, 0.95)


PARTS = {
    "forward": forward_bars,
    "variations": variation_bars,
    "lengths": length_bars,
    "decode": decode_bars,
    "model": model_bars,
}


def plot_lengths(rows: list[dict[str, Any]], title: str, path: Path) -> None:
    """Speed and time against length, ours and the peers', one column a dtype."""
    styles = {OURS: "-o", FLEX: "--s", SDPA_CAUSAL: ":^"}
    labels = {OURS: "lambda_attn", FLEX: "FlexAttention, same mask", SDPA_CAUSAL: "SDPA, causal"}
    figure = Figure(figsize=(10, 7), layout="constrained")
    axes = figure.subplots(2, len(DTYPES), sharex=True, squeeze=False)
    for column, dtype in enumerate(DTYPES):
        speed, time = axes[0][column], axes[1][column]
        for name, style in styles.items():
            mine = [r for r in rows if r["dtype"] == dtype and r["name"] == name]
            lengths = [r["length"] for r in mine]
            speed.plot(
                lengths, [r["flops"] / r["seconds"] / 1e9 for r in mine], style, label=labels[name]
            )
            time.plot(lengths, [r["seconds"] * 1e3 for r in mine], style, label=labels[name])
        speed.set_title(dtype)
        speed.set_ylim(bottom=0)
        time.set_yscale("log")
        time.set_xscale("log", base=2)
        time.set_xticks(LENGTHS, [f"{n // 1024}k" for n in LENGTHS])
        time.set_xlabel("tokens")
        for panel in (speed, time):
            panel.grid(alpha=0.3)
    axes[0][0].set_ylabel("GFLOP/s over the visible pairs of each")
    axes[1][0].set_ylabel("milliseconds")
    axes[1][0].legend(loc="lower right")
    figure.suptitle(title)
    figure.savefig(path, dpi=120)


def main() -> None:
    """Run the parts, print each bar, write the figures and the plot."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--isa", choices=list(LIMITS), help="hold us and the peers to this")
    parser.add_argument("--only", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--name", help="of the result files; default: processor and limits")
    args = parser.parse_args()
    hold_to(args.isa)
    torch.manual_seed(0)
    facts = machine(CPU)
    figures: dict[str, Any] = {"machine": facts, "held_to": args.isa, "base": BASE}

    bars: list[Bar] = []
    for part in args.only:
        bars += PARTS[part](args.rounds, figures)
    table = Table(title="CPU kernels against their bars")
    for heading in ("part", "what", "measured", "bar", ""):
        table.add_column(heading, justify="right" if heading in ("measured", "bar") else "left")
    for bar in bars:
        sign = "≤" if bar.at_most else "≥"
        verdict = "[green]pass[/]" if bar.met else "[red]fail[/]"
        table.add_row(bar.part, bar.what, f"{bar.value:.2f}", f"{sign} {bar.bar:g}", verdict)
    console = Console()
    console.print(json.dumps(facts), highlight=False, soft_wrap=True)
    console.print(table)

    limits = f"_{args.isa}" if args.isa else ""
    name = args.name or f"cpu_{file_name(facts)}{limits}"
    figures["bars"] = [{**asdict(bar), "met": bar.met} for bar in bars]
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(figures, indent=2) + "\n")
    print(path)
    if "lengths" in figures:
        title = "window 1,024, 16 global tokens, 2 heads, head dim 128"
        plot_lengths(figures["lengths"], title, path.with_suffix(".png"))
        print(path.with_suffix(".png"))


if __name__ == "__main__":
    main()
