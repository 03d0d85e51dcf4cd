"""Speed of `lambda_attn` for other shapes and options, as a share of its speed at the base shape.

    python -m benchmarks.variations

GFLOP/s are counted on visible pairs, so 1.00 is what a variation costs that costs nothing but its
pairs. Writes benchmarks/results/variations_<processor>.json with the machine named.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.isa import LIMITS, hold_to
from lminf_cuda.evaluation.machine import file_name, interleaved_medians, machine
from lminf_cuda.evaluation.speed import visible_pairs

RESULTS = Path(__file__).parent / "results"
BASE = dict(heads=8, kv_heads=8, length=8192, head_dim=128, window=1024, n_global=16)


def variations() -> dict[str, tuple[dict[str, int], dict[str, Any]]]:
    """Name -> (sizes that differ from BASE, options of the op)."""

    def inv_freq(rotary_dim: int) -> torch.Tensor:
        return 10_000.0 ** (-torch.arange(0, rotary_dim, 2) / rotary_dim)

    return {
        "base": ({}, {}),
        "window 256": ({"window": 256}, {}),
        "window 4096": ({"window": 4096}, {}),
        "head dim 64": ({"head_dim": 64}, {}),
        "head dim 256": ({"head_dim": 256}, {}),
        "32 / 8 heads": ({"heads": 32, "length": 4096}, {}),
        "rotation": ({}, {"inv_freq": inv_freq(128)}),
        "interleaved": ({}, {"inv_freq": inv_freq(128), "rope_interleaved": True}),
        "partial rotation": ({}, {"inv_freq": inv_freq(64)}),
        "ALiBi": ({}, {"alibi_slopes": torch.rand(8)}),
        "softcap": ({}, {"softcap": 30.0}),
        "sink logits": ({}, {"sink_logits": torch.randn(8)}),
    }


def contender(
    sizes: dict[str, int], options: dict[str, Any], dtype: torch.dtype
) -> tuple[Callable[[], Any], int]:
    """A call of the op on random inputs, and its FLOPs."""
    s = BASE | sizes
    q = torch.randn(1, s["heads"], s["length"], s["head_dim"]).to(dtype)
    k, v = torch.randn(2, 1, s["kv_heads"], s["length"], s["head_dim"]).to(dtype)
    pairs = visible_pairs(s["length"], s["window"], s["n_global"])
    flops = 4 * s["head_dim"] * pairs * s["heads"]
    return lambda: torch.ops.lminf.lambda_attn(
        q, k, v, s["n_global"], s["window"], **options
    ), flops


def variation_speeds(rounds: int) -> dict[str, dict[str, float]]:
    """GFLOP/s by dtype and variation."""
    speeds: dict[str, dict[str, float]] = {}
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        calls = {name: contender(*what, dtype) for name, what in variations().items()}
        medians = interleaved_medians(
            {name: call for name, (call, _) in calls.items()}, rounds, torch.device("cpu")
        )
        speeds[str(dtype).removeprefix("torch.")] = {
            name: flops / medians[name] / 1e9 for name, (_, flops) in calls.items()
        }
    return speeds


def main() -> None:
    """Time every variation in every dtype, print the table, write the results."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--isa", choices=list(LIMITS), help="hold the kernels to this")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    hold_to(args.isa)
    torch.manual_seed(0)
    speeds = variation_speeds(args.rounds)

    facts = machine(torch.device("cpu"))
    table = Table(title="lambda_attn, GFLOP/s (share of the base shape's)")
    table.add_column("variation")
    for name in speeds:
        table.add_column(name, justify="right")
    for variation in variations():
        cells = (f"{s[variation]:,.0f} ({s[variation] / s['base']:.2f})" for s in speeds.values())
        table.add_row(variation, *cells)
    console = Console()
    console.print(json.dumps(facts), highlight=False, soft_wrap=True)
    console.print(table)
    path = RESULTS / f"variations_{file_name(facts)}.json"
    path.write_text(json.dumps({"machine": facts, "base": BASE, "gflops": speeds}, indent=2) + "\n")
    print(path)


if __name__ == "__main__":
    main()
