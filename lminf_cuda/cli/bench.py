"""lminf bench: the attention kernel beside its peers."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer

from lminf_cuda.cli import options
from lminf_cuda.cli.reports import make_folder, writing
from lminf_cuda.evaluation import speed
from lminf_cuda.evaluation.machine import file_name, machine
from lminf_cuda.evaluation.tables import print_bench

DEFAULT_DTYPES = [options.Dtype.float32]


def bench(
    batch: Annotated[int, typer.Option(min=1)] = 1,
    heads: Annotated[int, typer.Option(min=1, help="Query heads.")] = 8,
    kv_heads: Annotated[int | None, typer.Option(min=1, help="Default: as many as heads.")] = None,
    length: Annotated[int, typer.Option(min=1, help="Queries, and as many keys.")] = 8192,
    head_dim: Annotated[int, typer.Option(min=2)] = 128,
    window: Annotated[int, typer.Option(min=1)] = 1024,
    n_global: options.NGlobalOption = 16,
    dtype: Annotated[
        list[options.Dtype], typer.Option(help="May be given several times.")
    ] = DEFAULT_DTYPES,
    device: options.DeviceOption = options.Device.cpu,
    peers: Annotated[
        str, typer.Option(help=f"Comma-separated, among {', '.join(speed.PEERS)}.")
    ] = ",".join(speed.PEERS),
    rounds: Annotated[int, typer.Option(min=1, help="Timed rounds; medians are shown.")] = 5,
    out: Annotated[
        Path | None, typer.Option(help="Folder for CSV and JSON; default: none.")
    ] = None,
) -> None:
    """Time the attention kernel beside FlexAttention, SDPA and a matrix product, in one run."""
    options.check_device(device)
    kv_heads = kv_heads or heads
    if heads % kv_heads:
        raise typer.BadParameter(
            f"must divide --heads {heads}, got {kv_heads}", param_hint="--kv-heads"
        )
    if head_dim % 2:
        raise typer.BadParameter(f"must be even, got {head_dim}", param_hint="--head-dim")
    shape = speed.Shape(batch, heads, kv_heads, length, head_dim, window, n_global)
    torch_device = torch.device(device.value)
    with options.blamed("--peers"):
        chosen = speed.parse_peers(peers)
    if out is not None:
        make_folder(out)
    rows = [
        row
        for name in dict.fromkeys(options.pick_dtype(choice, device) for choice in dtype)
        for row in speed.attention_rows(
            shape, name, device=torch_device, peers=chosen, rounds=rounds
        )
    ]
    facts = machine(torch_device)
    print_bench(rows, shape, facts)
    if out is not None:
        with writing(out):
            for path in speed.write_rows(
                rows, shape, facts, out, f"attention_{file_name(facts)}_{shape.name}"
            ):
                print(path)
