"""The machine that something is measured on: its processor, its clock and its memory."""

from __future__ import annotations

import os
import platform
import re
import resource
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from lminf_cuda import ops

SPEED_FLAGS = ("avx2", "fma", "avx512f", "avx512_bf16", "avx512_fp16", "amx_bf16", "asimd", "bf16")


def _proc(file: str, name: str) -> str:
    """What stands behind the first `name` and its colon in a file of /proc; empty for nothing."""
    try:
        lines = Path("/proc", file).read_text().splitlines()
    except OSError:
        return ""
    return next((x.split(":", 1)[1].strip() for x in lines if x.startswith(name)), "")


def _proc_bytes(file: str, name: str) -> int | None:
    """A number of kB there, in bytes."""
    found = _proc(file, name).removesuffix("kB")
    return int(found) * 1024 if found else None


def cpu_flags() -> list[str]:
    """The instruction sets this processor has that matter for speed, as far as the system tells."""
    flags = set((_proc("cpuinfo", "flags") or _proc("cpuinfo", "Features")).split())
    return [flag for flag in SPEED_FLAGS if flag in flags]


def machine(device: torch.device) -> dict[str, Any]:
    """What the numbers were measured on."""
    facts: dict[str, Any] = {
        "cpu": _proc("cpuinfo", "model name") or platform.processor() or platform.machine(),
        "flags": cpu_flags(),
        "cores": os.cpu_count(),
        "instruction_set": ops.cpu_isa(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "system": platform.platform(),
    }
    if device.type == "cuda":
        facts["gpu"] = torch.cuda.get_device_name(device)
    return facts


def file_name(facts: Mapping[str, Any]) -> str:
    """The machine of these `facts` as a part of a file's name: its processor and its cores."""
    processor = re.sub(r"[^a-z0-9]+", "-", str(facts.get("gpu", facts["cpu"])).lower()).strip("-")
    return f"{processor}_{facts['cores']}c"


def interleaved_medians(
    functions: Mapping[str, Callable[[], Any]],
    rounds: int,
    device: torch.device,
    after_each: Callable[[], object] = lambda: None,
) -> dict[str, float]:
    """Median seconds of each function; they take turns, so that a busy moment hits all alike.

    `after_each` is called, outside of the clock, after every call of one of them.
    """
    samples: dict[str, list[float]] = {name: [] for name in functions}
    for round_index in range(rounds + 1):
        for name, function in functions.items():
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            began = time.perf_counter()
            function()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            if round_index:  # the first round warms up
                samples[name].append(time.perf_counter() - began)
            after_each()
    return {name: statistics.median(times) for name, times in samples.items()}


def reset_peak_rss() -> None:
    """Start a new high-water mark of resident memory, where the system allows it (Linux)."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


def peak_rss_bytes() -> int:
    """Highest resident memory since `reset_peak_rss`, or since the start where it cannot."""
    peak = _proc_bytes("self/status", "VmHWM")
    if peak is not None:
        return peak
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def available_memory(device: torch.device) -> int | None:
    """Bytes that can still be allocated on the device; None where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return _proc_bytes("meminfo", "MemAvailable")
