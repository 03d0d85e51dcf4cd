"""What the command's arguments stand for: choices, lists of numbers, and the model to load.

Each function here turns a value that does not do into a usage error (exit code 2) which names the
argument, or raises a ValueError for `blamed` to turn into one.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import torch
import transformers
import typer
from transformers import AutoModelForCausalLM, AutoTokenizer

from lminf_cuda.bench import cpu_flags
from lminf_cuda.models.patch import patch_model, unpatch_model
from lminf_cuda.progress import waiting

DEMO_MODEL = Path(__file__).parent / "demo_model"
LONGEST_LINE = 400  # characters of a line of another library's error


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
        metavar="MODEL",
        help="A folder, a .gguf file or a hub name; default: the shipped one.",
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
    Dtype,
    typer.Option(help="auto: bfloat16 on a GPU or a CPU with AMX, else float32."),
]
DeviceOption = Annotated[Device, typer.Option(help="Where the model runs.")]
ChunkOption = Annotated[int, typer.Option(min=1, help="Tokens of the text per forward.")]
OutOption = Annotated[Path, typer.Option(help="Folder for the CSV, JSON and PNG.")]
SeedOption = Annotated[
    int | None, typer.Option(min=0, max=2**63 - 1, help="Makes sampling repeatable.")
]
TemperatureOption = Annotated[float, typer.Option(help="Above 0.")]


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


class CannotWriteError(Exception):
    """Results that do not go into their folder; says why, and the way out."""


@contextmanager
def writing(out: Path) -> Iterator[None]:
    """Turn an error about writing results into a CannotWriteError that names the folder."""
    try:
        yield
    except OSError as error:
        raise CannotWriteError(
            f"the results cannot be written to {out}: {error.strerror or error}; make room there, "
            "or give another --out"
        ) from error


def make_folder(out: Path) -> None:
    """Usage error when the results could not be written there, before they are worked out."""
    with blamed("--out"):
        try:
            out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"{error}; give a folder that can be written to") from error
        if not os.access(out, os.W_OK):
            raise ValueError(f"{out} cannot be written to; give another folder")


def _is_hub_name(name: str) -> bool:
    return not name.startswith((".", "/", "~")) and name.count("/") <= 1


@dataclass(frozen=True)
class Loaded:
    """A model ready to run, its tokenizer, and what to call it."""

    model: Any
    tokenizer: Any
    name: str


def _locate(name: str) -> tuple[str, dict[str, str]]:
    """What from_pretrained is to be called with for MODEL: a folder or a hub name, and keywords."""
    path = Path(name)
    if path.is_dir():
        return name, {}
    if path.is_file():
        if path.suffix.lower() != ".gguf":
            raise ValueError(
                f"{name} is a file; give the folder with the saved model that it belongs to "
                "(of files only a .gguf is read)"
            )
        if find_spec("gguf") is None:
            raise ValueError(f"{name} is read by the gguf package: pip install gguf")
        return str(path.parent), {"gguf_file": path.name}
    if not _is_hub_name(name) or path.suffix.lower() == ".gguf":
        raise ValueError(
            f"no such folder: {name}; give a folder with a saved model or a hub name, or a .gguf "
            "file that is there"
        )
    return name, {}


def _reason(error: Exception, is_gguf: bool) -> str:
    """All that an error of from_pretrained says, but for its lists of hundreds of classes."""
    lines = [
        line if len(line) <= LONGEST_LINE else f"{line[:LONGEST_LINE]} ..."
        for line in str(error).strip().splitlines()
    ]
    if not isinstance(error, (OSError, ValueError, ImportError)):
        lines.insert(0, f"{type(error).__name__}:")
    packages = ("sentencepiece", "tiktoken", "protobuf")
    if not is_gguf and any(package in str(error) for package in packages):
        lines.append(
            "That is: the tokenizer's file is missing (tokenizer.json), or it is an older one that "
            "needs more packages: pip install sentencepiece tiktoken protobuf"
        )
    return "\n".join(lines)


def load(name: str | None, dtype: Dtype, device: Device) -> Loaded:
    """The model, in eval mode on the device, and its tokenizer; usage errors name MODEL."""
    check_device(device)
    with blamed("MODEL"):
        source, options = _locate(str(DEMO_MODEL) if name is None else name)
    if name is None or sys.stderr is None or not sys.stderr.isatty():
        transformers.utils.logging.disable_progress_bar()
    title = "the shipped model" if name is None else Path(name).name
    try:
        with waiting(f"loading {title}"):
            tokenizer = AutoTokenizer.from_pretrained(source, **options)
            model = AutoModelForCausalLM.from_pretrained(
                source, dtype=pick_dtype(dtype, device), attn_implementation="sdpa", **options
            )
            model = model.eval().to(device.value)
    except Exception as error:  # of many kinds: those of every file format and of every library
        raise typer.BadParameter(
            f"{source if name is None else name} does not load: {_reason(error, bool(options))}\n"
            "Give a folder or hub name of a causal language model with its tokenizer",
            param_hint="MODEL",
        ) from error
    transformers.utils.logging.set_verbosity_error()  # going past the training length is the point
    return Loaded(model, tokenizer, title)


def check_patch(model: Any, n_global: int, window: int | None, max_distance: int | None) -> None:
    """Usage error when `patch_model` refuses the model or the settings."""
    with blamed("MODEL / --n-global / --window / --max-distance"):
        patch_model(model, n_global=n_global, window=window, max_distance=max_distance)
    unpatch_model(model)


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
