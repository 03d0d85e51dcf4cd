"""Speed of one `lambda_decode` step beside SDPA over a sliced cache and the memory's own speed.

    python -m benchmarks.decode --device cpu|cuda

prints the table and writes benchmarks/results/<name>.json and .csv with the machine named. Bytes
are the window's keys and values, each read once. What the memory can is told on a CPU by a
streaming sum that reads the same bytes with the same threads, on a GPU by a large copy, whose bytes
are read and written; there steps are timed inside a CUDA graph. `benchmarks.cpu` holds the figures
against their bars. LMINF_CPU_ISA times another instruction set (give it a --name of its own).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.memory import copy_rate, medians, parser, report
from lminf_cuda import ops  # noqa: F401  (registers torch.ops.lminf)

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
    }
    if device.type == "cpu":
        functions[STREAM] = lambda: [cache.sum() for cache in words]
    return functions, ring_k.nbytes + ring_v.nbytes


def parse_arguments(words: list[str] | None = None) -> argparse.Namespace:
    """The command line, or `words` instead; the default is a layer of an 8B model."""
    made = parser(__doc__, heads=32, kv_heads=8, head_dim=128, window=4096, n_global=16, rounds=30)
    made.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    return made.parse_args(words)


def decode_rows(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Median times and rates of all contenders at every batch size."""
    device = torch.device(args.device)
    rate = copy_rate(args.rounds, device) if device.type == "cuda" else None
    rows: list[dict[str, Any]] = []
    for batch in args.batches:
        functions, n_bytes = contenders(args, batch, device)
        times = medians(functions, args.rounds, device)
        ceiling = n_bytes / times[STREAM] if rate is None else rate
        for what, seconds in times.items():
            rows.append(
                {
                    "batch": batch,
                    "what": what,
                    "seconds": seconds,
                    "gigabytes_per_second": n_bytes / seconds / 1e9,
                    "times_ours": seconds / times[OURS],
                    "stream_share": n_bytes / seconds / ceiling,
                }
            )
    return rows


def main() -> None:
    """Time every batch size, print the table, write the results."""
    args = parse_arguments()
    rows = decode_rows(args)
    shape = f"h{args.heads}_kv{args.kv_heads}_d{args.head_dim}_w{args.window}_g{args.n_global}"
    report("decode", f"{args.dtype}_{shape}", vars(args), rows, torch.device(args.device))


if __name__ == "__main__":
    main()
