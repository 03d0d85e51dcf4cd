"""The model that a command runs: a folder, a .gguf file, a hub name or the shipped one."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import transformers
import typer
from transformers import AutoModelForCausalLM, AutoTokenizer

from lminf_cuda.cli.options import Device, Dtype, blamed, check_device, pick_dtype
from lminf_cuda.models.patch import patch_model, unpatch_model
from lminf_cuda.text.progress import waiting

DEMO_MODEL = Path(__file__).parents[1] / "demo_model"
HELD_OUT = DEMO_MODEL / "held_out.txt"
LONGEST_LINE = 400  # characters of a line of another library's error


@dataclass(frozen=True)
class Loaded:
    """A model ready to run, its tokenizer, and what to call it."""

    model: Any
    tokenizer: Any
    name: str


def _is_hub_name(name: str) -> bool:
    return not name.startswith((".", "/", "~")) and name.count("/") <= 1


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
