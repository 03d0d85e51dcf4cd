"""What ptxas makes of the kernels for Hopper: no local memory, wgmma under way side by side, the
registers that their warpgroups share out."""

import shutil

import pytest

from benchmarks.ptxas_report import HOPPER_ARCHITECTURE, HOPPER_REGISTERS, ROOT, compile_one


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed")
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_the_prefill_for_hopper(dtype):
    source = ROOT / f"csrc/cuda/lambda_attn_sm90_{dtype}.cu"
    kernels = compile_one(source, HOPPER_ARCHITECTURE)
    assert len(kernels) == 3  # head dims 64, 128, 256
    for kernel in kernels:
        assert kernel.fault == "" and kernel.registers == HOPPER_REGISTERS, kernel
