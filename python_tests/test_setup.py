"""What setup.py decides and says before it builds anything, and what is pinned beside it."""

import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
from packaging.requirements import Requirement
from torch.utils import cpp_extension

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


@pytest.fixture
def setup(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """setup.py, which sets up nothing when it is imported."""
    for name in ("TORCH_CUDA_ARCH_LIST", "LMINF_SKIP_CUDA_BUILD", "LMINF_FORCE_CUDA_BUILD"):
        monkeypatch.setenv(name, "")
    monkeypatch.setenv("MAX_JOBS", "2")
    monkeypatch.setattr(cpp_extension, "CUDA_HOME", None)
    spec = importlib.util.spec_from_file_location("setup_of_lminf_cuda", ROOT / "setup.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def script(path: Path, text: str) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


@pytest.fixture
def toolkit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A CUDA compiler that compiles everything and knows the architectures of CUDA 12.6."""
    home = tmp_path / "cuda"
    (home / "include").mkdir(parents=True)
    (home / "include/cuda_bf16.h").touch()
    script(home / "bin/nvcc", "printf 'compute_%s\\n' 75 80 86 87 89 90")
    monkeypatch.setenv("CUDA_HOME", str(home))
    return home


@pytest.fixture
def driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Puts an nvidia-smi on PATH that writes the text given, or fails where there is none."""
    tool = tmp_path / "driver/nvidia-smi"
    monkeypatch.setenv("PATH", str(tool.parent), prepend=os.pathsep)

    def answers(text: str | None) -> None:
        script(tool, "exit 9" if text is None else f"printf '{text}'")

    return answers


def test_a_compiler_that_does_not_compile_ends_the_build_in_one_line(toolkit):
    """As nvidia-cuda-nvcc of one version does beside nvidia-nvvm of another."""
    script(toolkit / "bin/nvcc", 'echo "ptxas fatal: Unsupported .version 9.5" >&2\nexit 255')
    done = configure()
    assert done.returncode != 0
    [line] = done.stderr.strip().splitlines()
    assert "does not compile an empty kernel (ptxas fatal: Unsupported .version 9.5)" in line
    assert "must be of one version" in line and "LMINF_SKIP_CUDA_BUILD=1" in line


@pytest.mark.parametrize(("version", "fits"), [(12040, False), (12050, True), (13000, True)])
def test_a_toolkit_too_old_ends_the_build_in_one_line(toolkit, version, fits):
    header = toolkit / "include/cuda_runtime_api.h"
    header.write_text(f"#define CUDART_VERSION  {version}\n")
    done = configure()
    assert (done.returncode == 0) == fits, done.stderr
    if not fits:
        [line] = done.stderr.strip().splitlines()
        assert f"the CUDA toolkit in {toolkit} is 12.4, but must be 12.5 or newer" in line
        assert "CUDA_HOME" in line and "LMINF_SKIP_CUDA_BUILD=1" in line


def test_a_build_without_cuda_says_so():
    done = configure(LMINF_SKIP_CUDA_BUILD="1", MAX_JOBS="2")
    assert done.returncode == 0, done.stderr
    assert (
        "LMINF_SKIP_CUDA_BUILD is set: building the CPU kernels alone, about 1 min with MAX_JOBS=2"
    ) in done.stdout


@pytest.mark.parametrize(
    ("gpus", "built"),
    [
        ("9.0\\n", "9.0a"),
        ("8.6\\n8.6\\n8.0\\n", "8.0;8.6"),
        ("8.7\\n", "8.6"),
        ("12.0\\n", "9.0+PTX;9.0a"),
        ("10.0\\n8.9\\n", "8.9;9.0+PTX;9.0a"),
        ("7.5\\n8.9\\n", "8.9"),
    ],
)
def test_the_gpus_of_the_machine_are_built_for(setup, toolkit, driver, gpus, built):
    """Each with machine code that it runs, or with PTX where this compiler knows none."""
    driver(gpus)
    home, line = setup.cuda_toolkit()
    assert home == toolkit and os.environ["TORCH_CUDA_ARCH_LIST"] == built
    assert f" for {built}, about" in line and "the GPUs of this machine" in line


@pytest.mark.parametrize("gpus", [None, "", "No devices were found\\n"])
def test_without_a_gpu_all_architectures_are_built(setup, toolkit, driver, gpus):
    driver(gpus)
    home, line = setup.cuda_toolkit()
    assert home == toolkit
    assert f"CUDA kernels with {toolkit} for 8.0;8.6;8.9;9.0+PTX;9.0a, about" in line
    assert "no GPU is in this machine; TORCH_CUDA_ARCH_LIST=9.0 builds for one" in line
    assert "LMINF_SKIP_CUDA_BUILD=1 the CPU kernels alone" in line


def test_gpus_that_are_too_old_get_no_kernels(setup, toolkit, driver, monkeypatch):
    driver("7.5\\n")
    home, line = setup.cuda_toolkit()
    assert home is None
    assert "GPUs of this machine (7.5) are older than 8.0: building the CPU kernels alone" in line
    monkeypatch.setenv("LMINF_FORCE_CUDA_BUILD", "1")
    home, line = setup.cuda_toolkit()
    assert home == toolkit and "for 8.0;8.6;8.9;9.0+PTX;9.0a" in line


def test_a_list_of_architectures_is_taken_before_any_gpu(setup, toolkit, driver, monkeypatch):
    driver("8.0\\n")
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "9.0")
    home, line = setup.cuda_toolkit()
    assert home == toolkit
    assert "for 9.0a, about 3 min with MAX_JOBS=2 (TORCH_CUDA_ARCH_LIST)" in line


def test_a_build_takes_less_time_with_more_cores_down_to_its_longest_file(setup, monkeypatch):
    assert setup.duration(6) == "about 10 min with MAX_JOBS=2"
    monkeypatch.setenv("MAX_JOBS", "64")
    assert setup.duration(6) == "about 5 min with MAX_JOBS=64"


def test_the_machines_of_the_tests_are_not_in_the_package(setup, toolkit, monkeypatch, capsys):
    """Nor what binds the ops to them (csrc/torch/testing)."""
    for name in ("LMINF_SKIP_CUDA_BUILD", "LMINF_FORCE_CUDA_BUILD"):
        monkeypatch.setenv(name, "1")
        monkeypatch.chdir(ROOT)
        sources = [Path(source) for source in setup.extension().sources]
        folders = {str(source.parent) for source in sources if source.parts[1] != "cuda"}
        assert folders == {"csrc/cpu", "csrc/torch"}
        monkeypatch.setenv(name, "")


def test_all_that_make_installs_is_pinned():
    """Each requirement of pyproject.toml to one version that satisfies it, on every Python."""
    pyproject = (ROOT / "pyproject.toml").read_text()
    pins: dict[str, list[Requirement]] = {}
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            pin = Requirement(line)
            pins.setdefault(pin.name, []).append(pin)
    lists = re.findall(r"^(?:dependencies|test|dev) = \[(.*?)\]$", pyproject, re.M | re.S)
    assert len(lists) == 3
    for text in re.findall(r'^\s*"(.*)",$|"(\w+==[\d.]+)"', "\n".join(lists), re.M):
        wanted = Requirement("".join(text))
        if wanted.name == "torch":  # chosen by the Makefile's TORCH
            assert "torch" not in pins
            continue
        if wanted.name.startswith("nvidia-"):  # a torch with CUDA brings its own
            assert [str(pin.specifier) for pin in pins[wanted.name]] == ["<14"]
            continue
        for python in ("3.10.0", "3.11.0", "3.12.0", "3.14.0"):
            here = {"python_version": python[:4], "python_full_version": python}
            found = [p for p in pins[wanted.name] if p.marker is None or p.marker.evaluate(here)]
            [[specifier]] = [pin.specifier for pin in found]
            assert specifier.operator == "=="
            assert wanted.specifier.contains(specifier.version), wanted
