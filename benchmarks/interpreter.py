"""What the op tests cost on the two ways of running the CUDA kernels without a GPU.

    python -m benchmarks.interpreter [FILE ...]    # of python_tests; a few minutes

Runs the same test files with `-m emulated` and `-m ptx` (every pair of parameter values) in one
process each, after the builds, and prints tests, CPU seconds, and CPU seconds a test.
"""

from __future__ import annotations

import re
import resource
import subprocess
import sys
from pathlib import Path

import torch

from lminf_cuda.evaluation.machine import machine

TESTS = Path(__file__).resolve().parents[1] / "python_tests"
FILES = ("test_lambda_attn.py", "test_lambda_decode.py")
WAYS = ("emulated", "ptx")


def cpu_seconds() -> float:
    """Of all child processes so far, user and system."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def run(way: str, files: list[str]) -> tuple[int, float]:
    """Tests that passed, and CPU seconds; ends with pytest's output where one fails."""
    before = cpu_seconds()
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--quick", "-m", way]
    done = subprocess.run([*command, *files], cwd=TESTS, capture_output=True, text=True)
    passed = re.search(r"(\d+) passed", done.stdout)
    if done.returncode or passed is None:
        raise SystemExit(f"{way}: {done.stdout}{done.stderr}")
    return int(passed[1]), cpu_seconds() - before


def main() -> None:
    """The command of this file's docstring."""
    files = sys.argv[1:] or list(FILES)
    facts = machine(torch.device("cpu"))
    print(f"{facts['cores']} cores of {facts['cpu']}; {', '.join(files)}", flush=True)
    build = "import emulated, sys\nwith emulated.way(sys.argv[1]): emulated.module()"
    for way in WAYS:
        print(f"{way}: building, then running", flush=True)
        subprocess.run([sys.executable, "-c", build, way], cwd=TESTS, check=True)
        tests, seconds = run(way, files)
        print(
            f"{way}: {tests} tests, {seconds:.0f} CPU s, {seconds / tests:.3f} s a test", flush=True
        )


if __name__ == "__main__":
    main()
