"""Calls the CUDA kernels on CPU tensors: the same .cu files, compiled as C++ (csrc/emulation).

The module is built by CMake when it is first asked for, in build/emulation below the root.
LMINF_EMULATION_BUILD names another folder with a build of it (one with a sanitizer, say), and
LMINF_SCHEDULE_SEED another order in which the emulated threads run.
"""

from __future__ import annotations

import functools
import importlib.util
import math
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

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
    """Configures and builds; the output is shown when that fails."""
    configure = ["cmake", "-S", str(ROOT / "csrc/emulation"), "-B", str(folder), "-G", "Ninja"]
    configure += [f"-DPython_EXECUTABLE={sys.executable}", f"-DLMINF_CUDA_INCLUDE={cuda_headers()}"]
    compile_ = ["cmake", "--build", str(folder), "--target", *targets]
    if jobs := os.environ.get("MAX_JOBS"):
        compile_ += ["-j", jobs]
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


def dense(x: Tensor | None) -> Tensor | None:
    """With a contiguous last dimension, which the kernels require."""
    if x is None or x.shape[-1] <= 1 or x.stride(-1) == 1:
        return x
    return x.contiguous()


def output_like(x: Tensor) -> Tensor:
    out = torch.empty_like(x)
    return out if out.shape[-1] <= 1 or out.stride(-1) == 1 else x.new_empty(x.shape)


def score_values(
    head_dim: int,
    inv_freq: Tensor | None,
    rope_scaling: float,
    rope_interleaved: bool,
    alibi_slopes: Tensor | None,
    sink_logits: Tensor | None,
    scale: float | None,
    softcap: float,
    distance_bias: Tensor | None,
) -> dict[str, Any]:
    def as_float(x: Tensor | None) -> Tensor | None:
        return None if x is None else x.float().contiguous()

    return dict(
        inv_freq=frequencies(inv_freq),
        rope_scaling=rope_scaling,
        rope_interleaved=rope_interleaved,
        alibi_slopes=as_float(alibi_slopes),
        sink_logits=as_float(sink_logits),
        scale=1.0 / math.sqrt(head_dim) if scale is None else scale,
        softcap=softcap,
        distance_bias=as_float(distance_bias),
    )


def frequencies(inv_freq: Tensor | None) -> Tensor | None:
    if inv_freq is None or inv_freq.dtype == torch.float64:
        return None if inv_freq is None else inv_freq.contiguous()
    return inv_freq.float().contiguous()


def lambda_attn_values(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    n_global: int,
    window: int,
    *,
    max_distance: int | None = None,
    inv_freq: Tensor | None = None,
    rope_scaling: float = 1.0,
    rope_interleaved: bool = False,
    alibi_slopes: Tensor | None = None,
    sink_logits: Tensor | None = None,
    scale: float | None = None,
    softcap: float = 0.0,
    k_start: Tensor | None = None,
    global_k: Tensor | None = None,
    global_v: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    k_rotated: int = 0,
    distance_bias: Tensor | None = None,
) -> dict[str, Any]:
    """What the module's lambda_attn takes; its results are written to "out" and "lse"."""
    batch, heads_q, seqlen_q, head_dim = q.shape
    return dict(
        q=dense(q),
        k=dense(k),
        v=dense(v),
        global_k=dense(global_k) if n_global > 0 else None,
        global_v=dense(global_v) if n_global > 0 else None,
        out=output_like(q),
        lse=q.new_empty(q.shape[:3], dtype=torch.float32),
        k_start=None if k_start is None else k_start.contiguous(),
        cu_seqlens=None if cu_seqlens is None else cu_seqlens.contiguous(),
        n_sequences=0 if cu_seqlens is None else cu_seqlens.shape[0] - 1,
        batch=batch,
        heads_q=heads_q,
        heads_kv=k.shape[1],
        seqlen_q=seqlen_q,
        seqlen_k=k.shape[2],
        head_dim=head_dim,
        n_global=n_global,
        window=window,
        max_distance=window if max_distance is None else max_distance,
        k_rotated=k_rotated,
        **score_values(
            head_dim,
            inv_freq,
            rope_scaling,
            rope_interleaved,
            alibi_slopes,
            sink_logits,
            scale,
            softcap,
            distance_bias,
        ),
    )


def lambda_attn(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    values = lambda_attn_values(*args, **kwargs)
    module().lambda_attn(values)
    return values["out"], values["lse"]


def lambda_decode_values(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    ring_k: Tensor,
    ring_v: Tensor,
    global_k: Tensor,
    global_v: Tensor,
    positions: Tensor,
    window: int,
    *,
    max_distance: int | None = None,
    inv_freq: Tensor | None = None,
    rope_scaling: float = 1.0,
    rope_interleaved: bool = False,
    alibi_slopes: Tensor | None = None,
    sink_logits: Tensor | None = None,
    scale: float | None = None,
    softcap: float = 0.0,
    distance_bias: Tensor | None = None,
) -> dict[str, Any]:
    batch, heads_q, _, head_dim = q.shape
    return dict(
        q=dense(q),
        k=dense(k),
        v=dense(v),
        ring_k=ring_k,
        ring_v=ring_v,
        global_k=global_k,
        global_v=global_v,
        out=output_like(q),
        lse=q.new_empty(q.shape[:3], dtype=torch.float32),
        positions=positions.contiguous(),
        batch=batch,
        heads_q=heads_q,
        heads_kv=k.shape[1],
        head_dim=head_dim,
        capacity=ring_k.shape[2],
        n_global=global_k.shape[2],
        window=window,
        max_distance=window if max_distance is None else max_distance,
        **score_values(
            head_dim,
            inv_freq,
            rope_scaling,
            rope_interleaved,
            alibi_slopes,
            sink_logits,
            scale,
            softcap,
            distance_bias,
        ),
    )


def lambda_decode(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    values = lambda_decode_values(*args, **kwargs)
    module().lambda_decode(values)
    return values["out"], values["lse"]


def clamped_rope(
    x: Tensor,
    position_ids: Tensor,
    inv_freq: Tensor,
    *,
    max_position: int | None = None,
    scaling: float = 1.0,
    interleaved: bool = False,
) -> Tensor:
    out = output_like(x)
    positions = position_ids.contiguous()
    batch, heads, seqlen, head_dim = x.shape
    module().clamped_rope(
        dict(
            x=dense(x),
            out=out,
            position_ids=positions,
            position_batch_stride=seqlen if positions.ndim == 2 and positions.shape[0] > 1 else 0,
            batch=batch,
            heads=heads,
            seqlen=seqlen,
            head_dim=head_dim,
            max_position=max_position,
            inv_freq=frequencies(inv_freq),
            rope_scaling=scaling,
            rope_interleaved=interleaved,
        )
    )
    return out
