"""Backward speed of lambda_attn on a CPU beside its own forward and the backward of SDPA.

    python -m benchmarks.backward
    python -m benchmarks.backward --isa avx512_bf16 --threads 1

Counts 2.5 times a forward's FLOPs over the visible pairs of each contender. Times are CPU seconds
of the process, taken in turns, so that other programs on the machine weigh little. FlexAttention
has no backward on a CPU. Writes benchmarks/results/backward_<processor>.json with the machine
named.
"""

from __future__ import annotations

import argparse
import functools
import json
import re
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.isa import LIMITS, hold_to
from lminf_cuda import ops
from lminf_cuda.evaluation.machine import machine
from lminf_cuda.evaluation.speed import Shape, visible_pairs

RESULTS = Path(__file__).parent / "results"
FORWARD, OURS = "lambda_attn forward", "lambda_attn backward"
SDPA_CAUSAL, SDPA_MASK = "SDPA causal backward", "SDPA with the mask backward"
PEER_LENGTHS = 8192  # SDPA's time grows with the square, and its mask too
MEBIBYTE = 1 << 20


def cpu_medians(calls: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Median CPU seconds of each call, all of them in every round."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    for _ in range(rounds):
        for name, call in calls.items():
            begin = time.process_time()
            call()
            times[name].append(time.process_time() - begin)
    return {name: statistics.median(seconds) for name, seconds in times.items()}


def contenders(shape: Shape, dtype: torch.dtype) -> dict[str, Callable[[], Any]]:
    """Our forward, and backwards alone: each goes through the graph of one forward again."""
    generator = torch.Generator().manual_seed(0)

    def random(heads: int) -> Tensor:
        size = (shape.batch, heads, shape.length, shape.head_dim)
        return torch.randn(size, generator=generator).to(dtype)

    q, k, v = random(shape.heads), random(shape.kv_heads), random(shape.kv_heads)
    grad = random(shape.heads)
    inv_freq = 10000.0 ** (-torch.arange(0, shape.head_dim, 2) / shape.head_dim)
    sizes = shape.n_global, shape.window
    out, lse = torch.ops.lminf.lambda_attn(q, k, v, *sizes, inv_freq=inv_freq)
    backward = torch.ops.lminf.lambda_attn_backward
    calls: dict[str, Callable[[], Any]] = {
        FORWARD: lambda: torch.ops.lminf.lambda_attn(q, k, v, *sizes, inv_freq=inv_freq),
        OURS: lambda: backward(grad, None, out, lse, q, k, v, *sizes, inv_freq=inv_freq),
    }
    if shape.length > PEER_LENGTHS:
        return calls
    position = torch.arange(shape.length)
    i, j = position[:, None], position[None]
    mask = (i >= j) & ((i - j < shape.window) | (j < shape.n_global))
    peers: dict[str, dict[str, Any]] = {
        SDPA_CAUSAL: {"is_causal": True},
        SDPA_MASK: {"attn_mask": mask},
    }
    for name, options in peers.items():
        leaves = q2, k2, v2 = [x.clone().requires_grad_() for x in (q, k, v)]
        options["enable_gqa"] = shape.heads != shape.kv_heads
        result = scaled_dot_product_attention(q2, k2, v2, **options)
        calls[name] = functools.partial(
            torch.autograd.grad, result, leaves, grad, retain_graph=True
        )
    return calls


def rows_of(shape: Shape, dtype: torch.dtype, rounds: int) -> list[dict[str, Any]]:
    """A row for each contender at one shape."""
    calls = contenders(shape, dtype)
    ops.cpu_scratch_bytes()
    calls[OURS]()
    scratch = ops.cpu_scratch_bytes()
    medians = cpu_medians(calls, rounds)
    ours = visible_pairs(shape.length, shape.window, shape.n_global)
    rows = []
    for name, seconds in medians.items():
        pairs = visible_pairs(shape.length, shape.length, 0) if name == SDPA_CAUSAL else ours
        flops = 4 * shape.head_dim * pairs * shape.heads * shape.batch
        flops = flops if name == FORWARD else 5 * flops // 2
        rows.append(
            {
                "dtype": str(dtype).removeprefix("torch."),
                "shape": shape.name,
                "name": name,
                "cpu_seconds": seconds,
                "gflops_per_cpu_second": flops / seconds / 1e9,
                "times_ours": seconds / medians[OURS],
                "scratch_mib": scratch / MEBIBYTE if name == OURS else None,
            }
        )
    return rows


def main() -> None:
    """Time every shape and dtype, print the table, write the results."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--isa", choices=list(LIMITS), help="hold us and the peers to this")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--lengths", nargs="+", type=int, default=[8192, 65_536])
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--kv-heads", type=int, help="default: as many as --heads")
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--window", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--name", help="of the result file; default: processor and limits")
    args = parser.parse_args()
    hold_to(args.isa)
    torch.set_num_threads(args.threads)
    facts = machine(torch.device("cpu")) | {"threads": args.threads, "isa": ops.cpu_isa()}
    rows = []
    for dtype in args.dtypes:
        for length in args.lengths:
            shape = Shape(
                heads=args.heads,
                kv_heads=args.kv_heads or args.heads,
                length=length,
                head_dim=args.head_dim,
                window=args.window,
            )
            rows += rows_of(shape, getattr(torch, dtype), args.rounds)
    table = Table(title="Backward on a CPU")
    for heading in ("dtype", "shape", "", "CPU s", "GFLOP / CPU s", "times ours", "scratch MiB"):
        table.add_column(heading, justify="left" if heading in ("dtype", "shape", "") else "right")
    for row in rows:
        scratch = "" if row["scratch_mib"] is None else f"{row['scratch_mib']:.1f}"
        table.add_row(
            row["dtype"], row["shape"], row["name"], f"{row['cpu_seconds']:.3f}",
            f"{row['gflops_per_cpu_second']:.1f}", f"{row['times_ours']:.2f}", scratch,
        )  # fmt: skip
    console = Console()
    console.print(json.dumps(facts), highlight=False, soft_wrap=True)
    console.print(table)
    processor = re.sub(r"[^a-z0-9]+", "-", str(facts["cpu"]).lower()).strip("-")
    limits = f"_{args.isa}" if args.isa else ""
    name = args.name or f"backward_{processor}_{args.threads}t{limits}"
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps({"machine": facts, "rows": rows}, indent=2) + "\n")
    print(path)


if __name__ == "__main__":
    main()
