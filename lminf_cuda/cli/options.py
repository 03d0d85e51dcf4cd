"""What the command's arguments stand for: choices and lists of numbers.

Each function here turns a value that does not do into a usage error (exit code 2) which names the
argument, or raises a ValueError for `blamed` to turn into one.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from lminf_cuda.evaluation.machine import cpu_flags


class Dtype(str, Enum):
    """Choices of --dtype."""

    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


DTYPES = {
    Dtype.float32: torch.float32,
    Dtype.bfloat16: torch.bfloat16,
    Dtype.float16: torch.float16,
}


class Device(str, Enum):
    """Choices of --device."""

    cpu = "cpu"
    cuda = "cuda"


ModelArgument = Annotated[
    str | None,
    typer.Argument(
        metavar="MODEL", help="A folder, a .gguf file or a hub name; default: the shipped one."
    ),
]
NGlobalOption = Annotated[int, typer.Option(min=0, help="First tokens that stay visible.")]
WindowOption = Annotated[
    int | None, typer.Option(min=1, help="Last tokens that are visible; default: training length.")
]
MaxDistanceOption = Annotated[
    int | None, typer.Option(min=1, help="Largest distance attention sees; default: the window.")
]
DtypeOption = Annotated[
    Dtype, typer.Option(help="auto: bfloat16 on a GPU or a CPU with AMX, else float32.")
]
DeviceOption = Annotated[Device, typer.Option(help="Where the model runs.")]
MiddleTopKOption = Annotated[
    int, typer.Option(min=0, help="Middle tokens per head (the paper: 5); 0: none.")
]
MiddleFromLayerOption = Annotated[int, typer.Option(min=0, help="First layer with middle tokens.")]
TrainLengthOption = Annotated[
    int | None,
    typer.Option(min=1, help="Tokens the model was trained on at once; default: its config's."),
]
TextOption = Annotated[
    Path,
    typer.Option(help="A long UTF-8 text file.", show_default="the shipped model's held-out text"),
]
ChunkOption = Annotated[int, typer.Option(min=1, help="Tokens of the text per forward.")]
OutOption = Annotated[Path, typer.Option(help="Folder for the CSV, JSON and PNG.")]
SeedOption = Annotated[
    int | None, typer.Option(min=0, max=2**63 - 1, help="Makes sampling repeatable.")
]
TemperatureOption = Annotated[float, typer.Option(help="Above 0.")]


def patch_arguments(
    n_global: int,
    window: int | None,
    max_distance: int | None,
    middle_top_k: int = 0,
    middle_from_layer: int = 4,
) -> dict[str, Any]:
    """What the options come to as arguments of `patch_model`."""
    arguments: dict[str, Any] = {
        "n_global": n_global,
        "window": window,
        "max_distance": max_distance,
    }
    if middle_top_k:
        arguments |= {"middle_top_k": middle_top_k, "middle_from_layer": middle_from_layer}
    return arguments


@contextmanager
def blamed(argument: str) -> Iterator[None]:
    """Turn an error about a value into a usage error that names the argument (exit code 2)."""
    try:
        yield
    except (ValueError, TypeError, OSError) as error:
        raise typer.BadParameter(str(error), param_hint=argument) from error


def pick_dtype(dtype: Dtype, device: Device) -> torch.dtype:
    """The dtype asked for; auto is bfloat16 only where its matrix products are quick."""
    if dtype is not Dtype.auto:
        return DTYPES[dtype]
    quick = device is Device.cuda or "amx_bf16" in cpu_flags()
    return torch.bfloat16 if quick else torch.float32


def check_device(device: Device) -> None:
    """Usage error when the device is not there."""
    if device is Device.cuda and not torch.cuda.is_available():
        raise typer.BadParameter(
            "this PyTorch sees no CUDA device; use --device cpu", param_hint="--device"
        )


def parse_lengths(text: str) -> list[int]:
    """Lengths from "256,512,1024"; "..." between two of them stands for doubling.

    Raises ValueError when a part is no number or doubling does not arrive at what follows it.
    """
    example = "give numbers such as 256,512,1024 or 256,512,...,65536"
    lengths: list[int] = []
    doubling = False
    for part in (piece.strip() for piece in text.split(",")):
        if part in ("...", "…") and lengths:
            doubling = True
            continue
        try:
            value = int(part)
        except ValueError:
            raise ValueError(f"{part!r} is not a length; {example}") from None
        while doubling and 0 < lengths[-1] * 2 < value:
            lengths.append(lengths[-1] * 2)
        if doubling and lengths[-1] * 2 != value:
            raise ValueError(f"doubling {lengths[-1]} does not arrive at {value}; {example}")
        lengths.append(value)
        doubling = False
    if doubling:
        raise ValueError(f"nothing follows the dots; {example}")
    return lengths


def parse_layers(text: str) -> list[int]:
    """Numbers of layers from "0,15,29".

    Raises ValueError when a part is no number.
    """
    try:
        return sorted({int(part) for part in text.split(",")})
    except ValueError:
        raise ValueError(f"{text!r} is no list of layers; give numbers such as 0,15,29") from None


def parse_depths(text: str) -> list[float]:
    """Depths from "0,0.5,1", or from a count such as "5": so many, evenly from 0 to 1.

    Raises ValueError when a part is no number.
    """
    parts = [piece.strip() for piece in text.split(",")]
    try:
        if len(parts) == 1 and parts[0].isdigit() and int(parts[0]) > 1:
            count = int(parts[0])
            return [n / (count - 1) for n in range(count)]
        return [float(part) for part in parts]
    except ValueError:
        raise ValueError(
            f"{text!r} is no list of depths; give numbers such as 0,0.25,0.5 or a count such as 5"
        ) from None
