"""Calls the CUDA kernels on CPU tensors, without a GPU, in one of two ways:

    emulated   the same .cu files, compiled as C++ (csrc/emulation)
    ptx        what nvcc makes of them, interpreted (csrc/ptx_interpreter); needs nvcc

Both are libraries of the ops of csrc/torch, the machine in place of a device. One is built by CMake
when it is first asked for, in build/emulation or build/ptx below the root. LMINF_EMULATION_BUILD
and LMINF_PTX_BUILD name another folder with a build of it (one with a sanitizer, say), and
LMINF_SCHEDULE_SEED another order in which the threads run.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.util
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

import lminf_cuda.ops.schemas

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


_libraries: list[torch.library.Library] = []  # which hold the schemas for as long as they live


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
    _libraries.append(torch.library.Library(module_name, "FRAGMENT"))
    lminf_cuda.ops.schemas.define(_libraries[-1])
    return made


def module() -> ModuleType:
    """The machine that runs the kernels in that way (csrc/torch/testing/module.cpp)."""
    return loaded(_way)


def ops() -> Any:
    """Its ops, with the schemas of torch.ops.lminf, for CPU tensors."""
    return getattr(torch.ops, module().__name__)


def kernel(*args: Any, **kwargs: Any) -> str:
    """The name of the kernel that lambda_attn runs there for these arguments."""
    plan = ops().lambda_attn_plan(*args, **kwargs, device_capability=0, multiprocessors=0)
    return plan[0]


@contextlib.contextmanager
def device(**facts: Any) -> Iterator[None]:
    """Plans are made for such a device: see set_device in csrc/torch/testing/module.cpp."""
    module().set_device(**facts)
    try:
        yield
    finally:
        module().set_device()
