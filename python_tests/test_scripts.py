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


def test_python_understands_what_the_gpu_check_runs():
    programs = re.findall(r"^\w+='\n(.*?)^'$", GPU_CHECK.read_text(), re.MULTILINE | re.DOTALL)
    assert len(programs) == 3
    for program in programs:
        compile(program, GPU_CHECK, "exec")


@pytest.mark.parametrize("part", [[], ["all"]])
def test_the_gpu_check_names_its_parts(part):
    done = subprocess.run([GPU_CHECK, *part], capture_output=True, text=True)
    assert done.returncode == 2
    assert "must be tests, speed or models" in done.stderr
