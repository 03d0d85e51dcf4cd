"""What the benchmarks of decode and rope, which memory bounds, share: timing, ceiling, results."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from lminf_cuda.evaluation.machine import file_name, interleaved_medians, machine
from lminf_cuda.evaluation.records import write_records

RESULTS = Path(__file__).parent / "results"
COPY_BYTES = 1 << 30
REPEATS = 100  # of a call inside one CUDA graph, so that launches cost what they cost in a model


def parser(doc: str | None, **numbers: int) -> argparse.ArgumentParser:
    """With --device, --dtype and --name, and an option for each of `numbers`, its default."""
    made = argparse.ArgumentParser(description=(doc or "").splitlines()[0])
    made.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    made.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    made.add_argument("--name", help="of the result files; default: processor and shape")
    for name, default in numbers.items():
        made.add_argument(f"--{name.replace('_', '-')}", type=int, default=default)
    return made


def captured(function: Callable[[], Any]) -> Callable[[], None]:
    """Replays REPEATS calls from a CUDA graph."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        function()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(REPEATS):
            function()
    return graph.replay


def medians(
    functions: Mapping[str, Callable[[], Any]], rounds: int, device: torch.device
) -> dict[str, float]:
    """Median seconds of one call of each; on a GPU from inside CUDA graphs."""
    with torch.inference_mode():
        if device.type != "cuda":
            return interleaved_medians(functions, rounds, device)
        graphs = {name: captured(function) for name, function in functions.items()}
        return {
            name: seconds / REPEATS
            for name, seconds in interleaved_medians(graphs, rounds, device).items()
        }


def copy_rate(rounds: int, device: torch.device) -> float:
    """Bytes a second, read and written, of a large copy."""
    source = torch.ones(COPY_BYTES, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    work = {"copy": lambda: target.copy_(source)}
    return 2 * COPY_BYTES / interleaved_medians(work, rounds, device)["copy"]


def report(
    op: str, name: str, arguments: dict[str, Any], rows: list[dict[str, Any]], device: torch.device
) -> None:
    """Prints the rows and writes them to results/<op>_<processor>_<name>.json and .csv."""
    facts = machine(device)
    table = Table(title=f"{op}, {name.replace('_', ' ')}")
    for column in rows[0]:
        table.add_column(column.replace("_", " "), justify="left" if column == "what" else "right")
    for row in rows:
        table.add_row(*(f"{x:.4g}" if isinstance(x, float) else str(x) for x in row.values()))
    console = Console()
    console.print(json.dumps(facts), highlight=False, soft_wrap=True)
    console.print(table)
    stem = arguments["name"] or f"{op}_{file_name(facts)}_{name}"
    everything = {"machine": facts, "arguments": arguments, "rows": rows}
    print(write_records(RESULTS, stem, rows, everything)[0])
