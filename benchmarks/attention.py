"""Forward speed of lambda_attn beside FlexAttention, SDPA and a matrix product, in one run.

    python -m benchmarks.attention --device cpu

prints the table and writes benchmarks/results/<name>.json and .csv with the machine named.
"""

from __future__ import annotations

import argparse
from dataclasses import fields
from pathlib import Path

import torch

from benchmarks.isa import LIMITS, hold_to
from lminf_cuda.evaluation.machine import file_name, machine
from lminf_cuda.evaluation.speed import PEERS, Shape, attention_rows, write_rows
from lminf_cuda.evaluation.tables import print_bench

RESULTS = Path(__file__).parent / "results"


def main() -> None:
    """Time every dtype at one shape (by default the project's first bar), print, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--peers", nargs="*", default=list(PEERS), choices=list(PEERS))
    parser.add_argument("--isa", choices=list(LIMITS), help="hold us and the peers to this (CPU)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--name", help="of the result files; default: processor and shape")
    for field in fields(Shape):
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=int, default=field.default)
    parser.set_defaults(kv_heads=None)  # as many as --heads
    args = parser.parse_args()
    hold_to(args.isa)
    device = torch.device(args.device)
    args.kv_heads = args.kv_heads or args.heads
    shape = Shape(**{field.name: getattr(args, field.name) for field in fields(Shape)})
    facts = machine(device)
    rows = []
    for dtype in args.dtypes:
        rows += attention_rows(
            shape, getattr(torch, dtype), device=device, peers=args.peers, rounds=args.rounds
        )
    print_bench(rows, shape, facts)
    limits = f"_{args.isa}" if args.isa else ""
    name = args.name or f"attention_{file_name(facts)}_{shape.name}{limits}"
    for path in write_rows(rows, shape, facts, RESULTS, name):
        print(path)


if __name__ == "__main__":
    main()
