"""The model that a command runs: a folder, a .gguf file, a hub name or the shipped one."""

from __future__ import annotations

import hashlib
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import transformers
import typer
from transformers import AutoModelForCausalLM, AutoTokenizer

import lminf_cuda
from lminf_cuda.cli.options import Device, Dtype, blamed, check_device, pick_dtype
from lminf_cuda.evaluation.machine import machine
from lminf_cuda.models.patch import patch_model, unpatch_model
from lminf_cuda.models.rope import training_length
from lminf_cuda.models.settings import SETTINGS_ATTRIBUTE
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


def check_patch(model: Any, patch: dict[str, Any]) -> dict[str, int]:
    """What `patch_model` makes of its arguments; a usage error when it refuses them."""
    with blamed("MODEL / --n-global / --window / --max-distance / --middle-from-layer"):
        patch_model(model, **patch)
    settings = getattr(model, SETTINGS_ATTRIBUTE)
    names = ["n_global", "window", "max_distance"]
    if settings.middle_top_k:
        names += ["middle_top_k", "middle_from_layer", "middle_distance"]
    resolved = {name: getattr(settings, name) for name in names}
    unpatch_model(model)
    return resolved


def trained_length(model: Any, given: int | None) -> int:
    """--train-length, or what the model's config says; a usage error where neither is there."""
    if given is not None:
        return given
    with blamed("MODEL / --train-length"):
        return training_length(model.config)


def run_facts(loaded: Loaded, text: Path | None = None) -> dict[str, Any]:
    """What a run's results are to be read with: model, text, versions, threads and machine."""
    facts: dict[str, Any] = {
        "model": loaded.name,
        "parameters": loaded.model.num_parameters(),
        "dtype": str(loaded.model.dtype).removeprefix("torch."),
        "device": str(loaded.model.device),
    }
    if text is not None:
        facts["text"] = text.name
        facts["text_sha256"] = hashlib.sha256(text.read_bytes()).hexdigest()
    return facts | {
        "lminf_cuda": lminf_cuda.__version__,
        "transformers": transformers.__version__,
        "machine": machine(loaded.model.device),
    }
