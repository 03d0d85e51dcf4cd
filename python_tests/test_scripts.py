"""The shell scripts, as far as a machine without a GPU can tell."""

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
GPU_CHECK = ROOT / "benchmarks/gpu_check.sh"
SCRIPTS = [ROOT / ".ci/run", GPU_CHECK, *sorted(ROOT.glob("tools/*.sh"))]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_bash_understands(script):
    done = subprocess.run(["bash", "-n", script], capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == ""


def test_what_the_gpu_check_runs_is_there():
    named = re.findall(r"\b(?:python_tests|csrc|lminf_cuda)/[\w/]+\.\w+", GPU_CHECK.read_text())
    assert {"python_tests/small_shapes.py", "lminf_cuda/demo_model/held_out.txt"} <= set(named)
    assert [path for path in named if not (ROOT / path).is_file()] == []


@pytest.mark.parametrize("part", [[], ["all"]])
def test_the_gpu_check_names_its_parts(part):
    done = subprocess.run([GPU_CHECK, *part], capture_output=True, text=True)
    assert done.returncode == 2
    assert "must be tests, speed or models" in done.stderr
