"""Calls the CUDA kernels on CPU tensors, without a GPU, in one of two ways:

    emulated   the same .cu files, compiled as C++ (csrc/emulation)
    ptx        what nvcc makes of them, interpreted (csrc/ptx_interpreter); needs nvcc

A module is built by CMake when it is first asked for, in build/emulation or build/ptx below the
root. LMINF_EMULATION_BUILD and LMINF_PTX_BUILD name another folder with a build of it (one with a
sanitizer, say), and LMINF_SCHEDULE_SEED another order in which the threads run.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.util
import math
import os
import re
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


@dataclasses.dataclass(frozen=True)
class Way:
    """How the kernels run: CMake's folders, the module, and who names another build of it."""

    source: str
    build: str
    module: str
    variable: str


WAYS = {
    "emulated": Way("csrc/emulation", "build/emulation", "lminf_emulated", "LMINF_EMULATION_BUILD"),
    "ptx": Way("csrc/ptx_interpreter", "build/ptx", "lminf_ptx", "LMINF_PTX_BUILD"),
}
_way = "emulated"


@contextlib.contextmanager
def way(name: str) -> Iterator[None]:
    """The ops below run in the way of that name."""
    global _way
    before, _way = _way, name
    try:
        yield
    finally:
        _way = before


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


def cuda_compiler() -> Path | None:
    """The nvcc of CUDA_HOME, on PATH, or of the PyPI packages nvidia-cuda-nvcc, nvidia-nvvm,
    nvidia-cuda-crt, nvidia-cuda-runtime and nvidia-cuda-cccl."""
    homes = [Path(home) for home in map(os.environ.get, ("CUDA_HOME", "CUDA_PATH")) if home]
    if nvcc := shutil.which("nvcc"):
        homes.append(Path(nvcc).parent.parent)
    for packages in {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}:
        homes += sorted(Path(packages).glob("nvidia/cu*"), reverse=True)
    return next((home / "bin/nvcc" for home in homes if (home / "bin/nvcc").is_file()), None)


def compiler_headers(nvcc: Path) -> Path | None:
    """Those of that compiler. What is on PATH may be a script that runs the real one, which says
    where it stands."""
    told = subprocess.run(
        [nvcc, "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True
    )
    if top := re.search(r"TOP=(.+)", told.stderr):
        folder = Path(top.group(1).strip()).resolve() / "include"
        if (folder / "cuda_bf16.h").is_file():
            return folder
    return cuda_headers()


def missing(name: str = "emulated") -> str | None:
    """What a build of the kernels in that way lacks here, or None."""
    if os.environ.get(WAYS[name].variable):
        return None
    for tool in ("cmake", "ninja", "c++"):
        if shutil.which(tool) is None:
            return f"{tool} is not installed"
    if importlib.util.find_spec("pybind11") is None:
        return "pybind11 is not installed"
    if name == "ptx" and cuda_compiler() is None:
        return "nvcc is not there (PATH, CUDA_HOME, or the package nvidia-cuda-nvcc)"
    if cuda_headers() is None:
        return "the CUDA headers are not there (packages nvidia-cuda-runtime, -crt, -cccl)"
    return None


def build(*targets: str, name: str = "emulated") -> Path:
    """Configures and builds, one process at a time; the output is shown when that fails. Returns
    the folder."""
    folder = ROOT / WAYS[name].build
    configure = ["cmake", "-S", str(ROOT / WAYS[name].source), "-B", str(folder), "-G", "Ninja"]
    headers = cuda_headers()
    if name == "ptx":
        nvcc = cuda_compiler()
        assert nvcc is not None, missing(name)
        headers = compiler_headers(nvcc)
        configure += [f"-DLMINF_NVCC={nvcc}"]
    configure += [f"-DPython_EXECUTABLE={sys.executable}", f"-DLMINF_CUDA_INCLUDE={headers}"]
    compile_ = ["cmake", "--build", str(folder), "--target", *targets]
    if jobs := os.environ.get("MAX_JOBS"):
        compile_ += ["-j", jobs]
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / ".lock"):
        for command in (configure, compile_):
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode != 0:
                raise RuntimeError(f"{' '.join(command)} failed:\n{done.stdout}{done.stderr}")
    return folder


@functools.cache
def loaded(name: str) -> ModuleType:
    chosen = os.environ.get(WAYS[name].variable)
    module_name = WAYS[name].module
    folder = Path(chosen) if chosen else build(module_name, name=name)
    [path] = folder.glob(f"{module_name}*.so")
    spec = importlib.util.spec_from_file_location(module_name, path)
    assert spec is not None and spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    made.set_schedule_seed(int(os.environ.get("LMINF_SCHEDULE_SEED", "0")))
    return made


def module() -> ModuleType:
    """With the kernels, in the way that is chosen."""
    return loaded(_way)


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
