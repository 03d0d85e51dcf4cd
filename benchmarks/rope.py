"""Speed of `clamped_rope` beside a copy of the same tensor, into memory just allocated as well.

    python -m benchmarks.rope --device cpu|cuda

prints the table and writes benchmarks/results/rope_<processor>_*.json and .csv with the machine
named. Bytes are the input read once and the output written once; on a GPU calls are timed inside
a CUDA graph.
"""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.memory import medians, parser, report
from lminf_cuda import ops  # noqa: F401  (registers torch.ops.lminf)


def main() -> None:
    """Time every length (by default of an 8B model's query heads), print the table, write it."""
    made = parser(__doc__, heads=32, head_dim=128, rounds=9)
    made.add_argument("--lengths", type=int, nargs="+", default=[1024, 32768])
    args = made.parse_args()
    device = torch.device(args.device)
    inv_freq = 10_000.0 ** (-torch.arange(0, args.head_dim, 2, device=device) / args.head_dim)
    rows: list[dict[str, Any]] = []
    for length in args.lengths:
        x = torch.randn(1, args.heads, length, args.head_dim, device=device)
        x = x.to(getattr(torch, args.dtype))
        positions = torch.arange(length, device=device)

        def rotate(x: torch.Tensor = x, positions: torch.Tensor = positions) -> torch.Tensor:
            return torch.ops.lminf.clamped_rope(x, positions, inv_freq)

        times = medians({"clamped_rope": rotate, "copy": x.clone}, args.rounds, device)
        seconds = times["clamped_rope"]
        rows.append(
            {
                "length": length,
                "seconds": seconds,
                "gigabytes_per_second": 2 * x.nbytes / seconds / 1e9,
                "copy_share": times["copy"] / seconds,
            }
        )
    report("rope", f"{args.dtype}_h{args.heads}_d{args.head_dim}", vars(args), rows, device)


if __name__ == "__main__":
    main()
