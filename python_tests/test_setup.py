"""What setup.py says of the CUDA compiler before it builds anything."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def configure(**environment: str) -> subprocess.CompletedProcess[str]:
    """Runs setup.py as far as it looks for compilers."""
    return subprocess.run(
        [sys.executable, "setup.py", "--name"],
        cwd=ROOT,
        env=os.environ | {"TORCH_CUDA_ARCH_LIST": "9.0"} | environment,
        capture_output=True,
        text=True,
    )


def test_a_compiler_that_does_not_compile_ends_the_build_in_one_line(tmp_path):
    """As nvidia-cuda-nvcc of one version does beside nvidia-nvvm of another."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "include").mkdir()
    (tmp_path / "include/cuda_bf16.h").touch()
    nvcc = tmp_path / "bin/nvcc"
    nvcc.write_text('#!/bin/sh\necho "ptxas fatal: Unsupported .version 9.5" >&2\nexit 255\n')
    nvcc.chmod(0o755)
    done = configure(CUDA_HOME=str(tmp_path))
    assert done.returncode != 0
    [line] = done.stderr.strip().splitlines()
    assert "does not compile an empty kernel (ptxas fatal: Unsupported .version 9.5)" in line
    assert "must be of one version" in line and "LMINF_SKIP_CUDA_BUILD=1" in line


def test_a_build_without_cuda_says_so():
    done = configure(LMINF_SKIP_CUDA_BUILD="1")
    assert done.returncode == 0, done.stderr
    assert "LMINF_SKIP_CUDA_BUILD is set: building the CPU kernels alone" in done.stdout
