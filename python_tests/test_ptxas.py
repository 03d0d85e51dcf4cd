"""What ptxas makes of the kernels for Hopper: no local memory, wgmma under way side by side, the
registers that their warpgroups share out, the softmax beside the products."""

import re
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest

from benchmarks.ptxas_report import HOPPER_ARCHITECTURE, HOPPER_REGISTERS, ROOT, compile_one

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed"),
    pytest.mark.parametrize("dtype", ["bf16", "fp16"]),
]
KEYS = {
    64: 128,
    128: 128,
    256: 48,
}  # of a window tile (csrc/cuda/prefill/sm90_tiles.h), by head dim
FROM_PYPI = sorted(Path(sysconfig.get_path("purelib")).glob("nvidia/cu*/bin/nvdisasm"))
NVDISASM = shutil.which("nvdisasm") or next(map(str, reversed(FROM_PYPI)), None)


def source_of(dtype):
    return ROOT / f"csrc/cuda/prefill/sm90_{dtype}.cu"


def test_the_prefill_for_hopper(dtype):
    kernels = compile_one(source_of(dtype), HOPPER_ARCHITECTURE)
    assert len(kernels) == len(KEYS)
    for kernel in kernels:
        assert kernel.fault == "" and kernel.registers == HOPPER_REGISTERS, kernel


@pytest.mark.skipif(NVDISASM is None, reason="nvdisasm is not installed")
def test_the_softmax_runs_beside_the_product_with_the_values(dtype, tmp_path):
    """ptxas is free to move the wait for that product up, before the softmax."""
    cubin = tmp_path / "kernels.cubin"
    target = f"arch=compute_{HOPPER_ARCHITECTURE},code=sm_{HOPPER_ARCHITECTURE}"
    nvcc = ["nvcc", "-std=c++17", "-O3", "--expt-relaxed-constexpr", "-cubin", "-gencode", target]
    subprocess.run([*nvcc, "-o", cubin, source_of(dtype)], check=True, capture_output=True)
    code = subprocess.run([NVDISASM, "-c", cubin], check=True, capture_output=True, text=True)
    kernels = re.split(r"\.section\s+\.text\.", code.stdout)[1:]
    assert len(kernels) == len(KEYS)
    for kernel in kernels:
        keys = KEYS[int(re.search(r"Li(\d+)E", kernel)[1])]
        # Between the wait for all products but the last, which is that with the values, and the
        # wait for that one. A thread has keys / 2 scores, and an exponential each in softcap, too.
        between = re.search(r"DEPBAR\.LE gsb0, 0x1 ;(.*?)DEPBAR\.LE gsb0, 0x0 ;", kernel, re.DOTALL)
        assert between[1].count("MUFU.EX2") >= keys
