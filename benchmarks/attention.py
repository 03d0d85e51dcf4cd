"""Forward speed of lambda_attn beside FlexAttention, SDPA and a matrix product, in one run.

    python -m benchmarks.attention --device cpu

prints the table and writes benchmarks/results/<name>.json and .csv with the machine named.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

import torch

from benchmarks.isa import LIMITS, hold_to
from lminf_cuda.evaluation.machine import machine
from lminf_cuda.evaluation.speed import PEERS, Shape, attention_rows, write_rows
from lminf_cuda.evaluation.tables import print_bench

RESULTS = Path(__file__).parent / "results"


def parse_arguments() -> argparse.Namespace:
    """The command line; the default shape is the project's first bar."""
    default = Shape()
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--peers", nargs="*", default=list(PEERS), choices=list(PEERS))
    parser.add_argument("--isa", choices=list(LIMITS), help="hold us and the peers to this (CPU)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch", type=int, default=default.batch)
    parser.add_argument("--heads", type=int, default=default.heads)
    parser.add_argument("--kv-heads", type=int, help="default: as many as --heads")
    parser.add_argument("--length", type=int, default=default.length)
    parser.add_argument("--head-dim", type=int, default=default.head_dim)
    parser.add_argument("--window", type=int, default=default.window)
    parser.add_argument("--n-global", type=int, default=default.n_global)
    parser.add_argument("--name", help="of the result files; default: processor and shape")
    return parser.parse_args()


def main() -> None:
    """Time every dtype, print the table, write the results."""
    args = parse_arguments()
    hold_to(args.isa)
    device = torch.device(args.device)
    shape = Shape(
        args.batch,
        args.heads,
        args.kv_heads or args.heads,
        args.length,
        args.head_dim,
        args.window,
        args.n_global,
    )
    facts = machine(device)
    rows = []
    for dtype in args.dtypes:
        rows += attention_rows(
            shape, getattr(torch, dtype), device=device, peers=args.peers, rounds=args.rounds
        )
    print_bench(rows, shape, facts)
    processor = re.sub(r"[^a-z0-9]+", "-", str(facts.get("gpu", facts["cpu"])).lower()).strip("-")
    limits = f"_{args.isa}" if args.isa else ""
    name = args.name or f"attention_{processor}_{facts['cores']}c_{shape.name}{limits}"
    for path in write_rows(rows, shape, facts, RESULTS, name):
        print(path)


if __name__ == "__main__":
    main()
