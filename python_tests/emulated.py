"""Calls the CUDA kernels on CPU tensors: the same .cu files, compiled as C++ (csrc/emulation).

The module is built by CMake when it is first asked for, in build/emulation below the root.
LMINF_EMULATION_BUILD names another folder with a build of it (one with a sanitizer, say), and
LMINF_SCHEDULE_SEED another order in which the emulated threads run.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import math
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from filelock import FileLock
from torch import Tensor

import lminf_cuda  # noqa: F401  (registers the ops, whose schemas are read here)

ROOT = Path(__file__).resolve().parent.parent


def cuda_headers() -> Path | None:
    """The folder with cuda_bf16.h: of a toolkit, or of the PyPI packages nvidia-cuda-runtime,
    nvidia-cuda-crt and nvidia-cuda-cccl."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    if nvcc := shutil.which("nvcc"):
        homes.append(str(Path(nvcc).resolve().parent.parent))
    folders = [Path(home) / "include" for home in homes if home]
    for packages in {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}:
        folders += sorted(Path(packages).glob("nvidia/*/include"))
    return next((folder for folder in folders if (folder / "cuda_bf16.h").is_file()), None)


def missing() -> str | None:
    """What a build of the emulated kernels lacks here, or None."""
    if os.environ.get("LMINF_EMULATION_BUILD"):
        return None
    for tool in ("cmake", "ninja", "c++"):
        if shutil.which(tool) is None:
            return f"{tool} is not installed"
    if importlib.util.find_spec("pybind11") is None:
        return "pybind11 is not installed"
    if cuda_headers() is None:
        return "the CUDA headers are not there (packages nvidia-cuda-runtime, -crt, -cccl)"
    return None


def build(folder: Path, *targets: str) -> None:
    """Configures and builds, one process at a time; the output is shown when that fails."""
    configure = ["cmake", "-S", str(ROOT / "csrc/emulation"), "-B", str(folder), "-G", "Ninja"]
    configure += [f"-DPython_EXECUTABLE={sys.executable}", f"-DLMINF_CUDA_INCLUDE={cuda_headers()}"]
    compile_ = ["cmake", "--build", str(folder), "--target", *targets]
    if jobs := os.environ.get("MAX_JOBS"):
        compile_ += ["-j", jobs]
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / ".lock"):
        for command in (configure, compile_):
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode != 0:
                raise RuntimeError(f"{' '.join(command)} failed:\n{done.stdout}{done.stderr}")


@functools.cache
def module() -> ModuleType:
    chosen = os.environ.get("LMINF_EMULATION_BUILD")
    folder = Path(chosen) if chosen else ROOT / "build" / "emulation"
    if not chosen:
        build(folder, "lminf_emulated")
    [path] = folder.glob("lminf_emulated*.so")
    spec = importlib.util.spec_from_file_location("lminf_emulated", path)
    assert spec is not None and spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    loaded.set_schedule_seed(int(os.environ.get("LMINF_SCHEDULE_SEED", "0")))
    return loaded


@contextlib.contextmanager
def device(**facts: Any) -> Iterator[None]:
    """Plans are made for such a device: see set_device in csrc/emulation/bindings.cpp."""
    module().set_device(**facts)
    try:
        yield
    finally:
        module().set_device()


def dense(x: Tensor | None) -> Tensor | None:
    """With a contiguous last dimension, which the kernels require."""
    if x is None or x.shape[-1] <= 1 or x.stride(-1) == 1:
        return x
    return x.contiguous()


def output_like(x: Tensor) -> Tensor:
    out = torch.empty_like(x)
    return out if out.shape[-1] <= 1 or out.stride(-1) == 1 else x.new_empty(x.shape)


def arguments(op: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """What a call of torch.ops.lminf.<op> hands over, by the names of its schema."""
    schema = getattr(torch.ops.lminf, op).default._schema.arguments
    names = [argument.name for argument in schema]
    given = {a.name: a.default_value for a in schema if a.has_default_value()}
    given |= dict(zip(names, args, strict=False)) | kwargs
    assert set(given) == set(names), set(given) ^ set(names)
    return given


def prepared(op: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments as csrc/torch hands them to a kernel, and the sizes that all kernels know."""
    values = arguments(op, args, kwargs)
    for name, x in values.items():
        if isinstance(x, Tensor):
            values[name] = dense(x) if x.ndim == 4 else x.contiguous()
    for name in ("alibi_slopes", "sink_logits", "distance_bias"):
        if values.get(name) is not None:
            values[name] = values[name].float()
    if values["inv_freq"] is not None and values["inv_freq"].dtype != torch.float64:
        values["inv_freq"] = values["inv_freq"].float()
    x = args[0] if args else kwargs["x" if op == "clamped_rope" else "q"]
    head_dim = x.shape[3]
    values |= dict(batch=x.shape[0], head_dim=head_dim, out=output_like(x))
    if op != "clamped_rope":
        values |= dict(
            heads_q=x.shape[1],
            heads_kv=values["k"].shape[1],
            lse=x.new_empty(x.shape[:3], dtype=torch.float32),
        )
        if values["scale"] is None:
            values["scale"] = 1.0 / math.sqrt(head_dim)
        if values.get("max_distance") is None:
            values["max_distance"] = values["window"]
    return values


def lambda_attn_values(*args: Any, **kwargs: Any) -> dict[str, Any]:
    """What the module's lambda_attn takes."""
    values = prepared("lambda_attn", args, kwargs)
    if values["n_global"] == 0:
        values |= dict(global_k=None, global_v=None)
    packed = values["cu_seqlens"]
    values |= dict(
        seqlen_q=values["q"].shape[2],
        seqlen_k=values["k"].shape[2],
        n_sequences=0 if packed is None else packed.shape[0] - 1,
    )
    return values


def lambda_attn(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    values = lambda_attn_values(*args, **kwargs)
    module().lambda_attn(values)
    return values["out"], values["lse"]


def lambda_decode(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    values = prepared("lambda_decode", args, kwargs)
    values |= dict(capacity=values["ring_k"].shape[2], n_global=values["global_k"].shape[2])
    module().lambda_decode(values)
    return values["out"], values["lse"]


def middle_topk(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor, Tensor]:
    values = prepared("middle_topk", args, kwargs)
    batch, heads, top_k = values["batch"], values["heads_q"], values["top_k"]
    values["chosen"] = torch.empty(batch, heads, top_k, dtype=torch.int64)
    values["seqlen_k"] = values["k"].shape[2]
    module().middle_topk(values)
    return values["out"], values["lse"], values["chosen"]


def clamped_rope(*args: Any, **kwargs: Any) -> Tensor:
    values = prepared("clamped_rope", args, kwargs)
    _, heads, seqlen, _ = values["x"].shape
    positions = values["position_ids"]
    values |= dict(
        position_batch_stride=seqlen if positions.ndim == 2 and positions.shape[0] > 1 else 0,
        heads=heads,
        seqlen=seqlen,
        rope_scaling=values["scaling"],
        rope_interleaved=values["interleaved"],
    )
    module().clamped_rope(values)
    return values["out"]
