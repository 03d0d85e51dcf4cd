"""Decode and rope on a GPU, which memory bounds: bytes a second beside a large copy in one run.

    python -m benchmarks.gpu_memory

prints the table and writes benchmarks/results/gpu_memory_<GPU>.json with the machine named. A byte
is counted once for each input read and each output written; decode reads the visible keys.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
from collections.abc import Callable
from pathlib import Path

import torch

from lminf_cuda import ops  # noqa: F401  (registers torch.ops.lminf)
from lminf_cuda.bench import machine

RESULTS = Path(__file__).parent / "results"
COPY_BYTES = 1 << 30
HEADS_Q, HEADS_KV, HEAD_DIM, N_GLOBAL, WINDOW = 32, 8, 128, 16, 4096
REPEATS = 20  # of an op inside one CUDA graph, so that launches cost what they cost in a model


def seconds(work: Callable[[], object], rounds: int = 9) -> float:
    """Median time of one call of `work`, replayed REPEATS times from a CUDA graph."""
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        work()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(REPEATS):
            work()
    times = []
    for _ in range(rounds):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1e3 / REPEATS)
    return statistics.median(times)


def copy_rate() -> float:
    """Bytes a second, read and written, of a copy."""
    source = torch.ones(COPY_BYTES, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * COPY_BYTES / seconds(lambda: target.copy_(source))


def inv_freq() -> torch.Tensor:
    """Frequencies [D/2] of the usual base."""
    t = torch.arange(HEAD_DIM // 2, dtype=torch.float32, device="cuda")
    return 10000.0 ** (-2 * t / HEAD_DIM)


def decode_row(batch: int, rate: float) -> dict[str, object]:
    """One layer's step at a position far past the window."""

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=torch.bfloat16, device="cuda")

    q = randn(batch, HEADS_Q, 1, HEAD_DIM)
    k, v = (randn(batch, HEADS_KV, 1, HEAD_DIM) for _ in range(2))
    ring = [randn(batch, HEADS_KV, WINDOW, HEAD_DIM) for _ in range(2)]
    few = [randn(batch, HEADS_KV, N_GLOBAL, HEAD_DIM) for _ in range(2)]
    positions = torch.full((batch,), 1_000_000, device="cuda")
    frequencies = inv_freq()
    time = seconds(
        lambda: torch.ops.lminf.lambda_decode(
            q, k, v, *ring, *few, positions, WINDOW, inv_freq=frequencies
        )
    )
    moved = sum(x.numel() * x.element_size() for x in (q, k, v, *ring, *few, q))
    return dict(
        op="lambda_decode", batch=batch, microseconds=time * 1e6, of_copy=moved / time / rate
    )


def rope_row(length: int, rate: float) -> dict[str, object]:
    """Rotation of all query heads."""
    x = torch.randn(1, HEADS_Q, length, HEAD_DIM, dtype=torch.bfloat16, device="cuda")
    positions = torch.arange(length, device="cuda")
    frequencies = inv_freq()
    time = seconds(lambda: torch.ops.lminf.clamped_rope(x, positions, frequencies))
    moved = 2 * x.numel() * x.element_size()
    return dict(
        op="clamped_rope", length=length, microseconds=time * 1e6, of_copy=moved / time / rate
    )


def main() -> None:
    """Time decode and rope, print and write the table."""
    argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0]).parse_args()
    facts = machine(torch.device("cuda"))
    rate = copy_rate()
    rows = [decode_row(batch, rate) for batch in (1, 4, 16, 64)]
    rows += [rope_row(length, rate) for length in (1024, 32768)]
    print(f"copy: {rate / 1e9:.0f} GB/s")
    for row in rows:
        print(
            "  ".join(
                f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()
            )
        )
    name = re.sub(r"\W+", "-", torch.cuda.get_device_name()).strip("-").lower()
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"gpu_memory_{name}.json"
    path.write_text(
        json.dumps(dict(machine=facts, copy_bytes_per_second=rate, rows=rows), indent=1)
    )
    print(f"written: {path}")


if __name__ == "__main__":
    main()
