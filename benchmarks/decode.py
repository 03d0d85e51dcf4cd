"""Speed of one `lambda_decode` step beside SDPA over a sliced cache and a streaming sum.

    python -m benchmarks.decode --device cpu

prints the table and writes benchmarks/results/<name>.json and .csv with the machine named. Bytes
are the window's keys and values, each read once; the streaming sum reads the same bytes with the
same threads. `benchmarks.cpu` holds the figures against their bars. LMINF_CPU_ISA times another
instruction set (give it a --name of its own).
"""

from __future__ import annotations

import argparse
import csv
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch.nn.functional import scaled_dot_product_attention

from lminf_cuda.bench import interleaved_medians, machine

RESULTS = Path(__file__).parent / "results"
OURS, SDPA, STREAM = "lambda_decode", "sdpa, sliced cache", "streaming sum"


def contenders(
    args: argparse.Namespace, batch: int, device: torch.device
) -> tuple[dict[str, Callable[[], Any]], int]:
    """What is timed at one batch size, and the bytes that each of them reads."""
    generator = torch.Generator().manual_seed(0)
    dtype = getattr(torch, args.dtype)

    def random(*sizes: int) -> torch.Tensor:
        return torch.randn(*sizes, generator=generator).to(device, dtype)

    q = random(batch, args.heads, 1, args.head_dim)
    k, v = (random(batch, args.kv_heads, 1, args.head_dim) for _ in range(2))
    ring_k, ring_v = (random(batch, args.kv_heads, args.window, args.head_dim) for _ in range(2))
    global_k, global_v = (
        random(batch, args.kv_heads, args.n_global, args.head_dim) for _ in range(2)
    )
    positions = torch.full((batch,), 3 * args.window + 5, device=device)
    inv_freq = 10_000.0 ** (-torch.arange(0, args.head_dim, 2, device=device) / args.head_dim)
    caches = (ring_k, ring_v, global_k, global_v)
    words = [cache.view(torch.float32) for cache in (ring_k, ring_v)]
    functions: dict[str, Callable[[], Any]] = {
        OURS: lambda: torch.ops.lminf.lambda_decode(
            q, k, v, *caches, positions, args.window, inv_freq=inv_freq
        ),
        SDPA: lambda: scaled_dot_product_attention(q, ring_k, ring_v, enable_gqa=True),
        STREAM: lambda: [cache.sum() for cache in words],
    }
    return functions, ring_k.nbytes + ring_v.nbytes


def parse_arguments(words: list[str] | None = None) -> argparse.Namespace:
    """The command line, or `words` instead; the default is a layer of an 8B model."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--window", type=int, default=4096)
    parser.add_argument("--n-global", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--name", help="of the result files; default: processor and shape")
    return parser.parse_args(words)


def decode_rows(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Median times and rates of all contenders at every batch size."""
    device = torch.device(args.device)
    rows: list[dict[str, Any]] = []
    for batch in args.batches:
        functions, n_bytes = contenders(args, batch, device)
        with torch.inference_mode():
            medians = interleaved_medians(functions, args.rounds, device)
        for what, seconds in medians.items():
            rows.append(
                {
                    "batch": batch,
                    "what": what,
                    "seconds": seconds,
                    "gigabytes_per_second": n_bytes / seconds / 1e9,
                    "times_ours": seconds / medians[OURS],
                    "stream_share": medians[STREAM] / seconds,
                }
            )
    return rows


def main() -> None:
    """Time every batch size, print the table, write the results."""
    args = parse_arguments()
    facts = machine(torch.device(args.device))
    rows = decode_rows(args)

    shape = f"h{args.heads}_kv{args.kv_heads}_d{args.head_dim}_w{args.window}_g{args.n_global}"
    table = Table(title=f"decode step, {args.dtype}, {shape.replace('_', ' ')}")
    for heading in ("batch", "what", "µs", "GB/s", "time / ours", "of streaming sum"):
        table.add_column(heading, justify="left" if heading == "what" else "right")
    for row in rows:
        table.add_row(
            str(row["batch"]),
            row["what"],
            f"{row['seconds'] * 1e6:,.0f}",
            f"{row['gigabytes_per_second']:.1f}",
            f"{row['times_ours']:.2f}",
            f"{row['stream_share']:.0%}",
        )
    console = Console()
    console.print(json.dumps(facts), highlight=False, soft_wrap=True)
    console.print(table)

    processor = re.sub(r"[^a-z0-9]+", "-", str(facts.get("gpu", facts["cpu"])).lower()).strip("-")
    name = args.name or f"decode_{processor}_{facts['cores']}c_{args.dtype}_{shape}"
    everything = {"machine": facts, "arguments": vars(args), "rows": rows}
    (RESULTS / f"{name}.json").write_text(json.dumps(everything, indent=2) + "\n")
    with (RESULTS / f"{name}.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    print(RESULTS / f"{name}.json")


if __name__ == "__main__":
    main()
