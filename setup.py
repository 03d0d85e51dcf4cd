"""Builds the extension lminf_cuda._C; everything else about the package stands in pyproject.toml.

The compiled module uses the stable ABI of PyTorch (from 2.11 on) and of Python (from 3.10 on), so a
wheel built once serves later versions of both. MAX_JOBS limits the number of compilers at work.

The CUDA kernels are built where a CUDA compiler is found: by CUDA_HOME or CUDA_PATH, on PATH, or in
the PyPI packages nvidia-cuda-nvcc and nvidia-cuda-runtime. Neither a GPU nor a torch with CUDA is
needed: a CPU-only torch loads the same wheel. They are built for the GPUs in the machine, where
there is none for all of CUDA_ARCHITECTURES, or for those that TORCH_CUDA_ARCH_LIST names.
LMINF_SKIP_CUDA_BUILD=1 leaves the CUDA kernels out, LMINF_FORCE_CUDA_BUILD=1 ends the build where
there is no compiler for them. One line says what is built and how long it takes.
"""

import contextlib
import os
import re
import shutil
import subprocess
import sysconfig
import tempfile
from pathlib import Path

from setuptools import Extension, setup
from torch.utils import cpp_extension
from torch.utils.cpp_extension import BuildExtension, CppExtension

TORCH_ABI = "0x020b000000000000"  # 2.11, the oldest torch that the build runs on

# -fno-wrapv: Python is built with -fwrapv, which costs the CPU kernels a tenth of their speed.
CXX_FLAGS = ["-std=c++17", "-O3", "-g0", "-fno-wrapv", "-fvisibility=hidden", "-Wall"]
# GCC's own AVX-512 header draws these two falsely.
CXX_FLAGS += ["-Wno-uninitialized", "-Wno-maybe-uninitialized"]


OLDEST_CUDA = 12, 5  # its runtime has cudaGetDriverEntryPointByVersion

# What an architecture's own code gains is its tuning of instructions; any newer one runs the PTX.
# 9.0 gains whole kernels: `with_hopper`.
CUDA_ARCHITECTURES = ("8.0", "8.6", "8.9", "9.0", "10.0", "12.0")
NVCC_FLAGS = ["-std=c++17", "-O3", "--expt-relaxed-constexpr", "-Xcompiler", "-fvisibility=hidden"]

# Seconds of one core of 2023: for the CPU kernels, for the CUDA kernels on one architecture, and
# the longest of the source files on one architecture, which no number of cores makes shorter.
CPU_SECONDS, ARCHITECTURE_SECONDS, LONGEST_SECONDS = 150, 170, 50


def flag(name: str) -> bool:
    """Whether an environment variable is set to anything but a no."""
    return os.environ.get(name, "0").lower() not in ("", "0", "off", "no", "false")


def find_cuda() -> Path | None:
    """The toolkit's root folder, the one with bin/nvcc and the runtime's headers; None if there is
    none."""
    homes = [Path(home) for home in map(os.environ.get, ("CUDA_HOME", "CUDA_PATH")) if home]
    if nvcc := shutil.which("nvcc"):
        # What is on PATH may be a script that runs the real one: that one says where it stands.
        told = subprocess.run(
            [nvcc, "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True
        )
        if top := re.search(r"TOP=(.+)", told.stderr):
            homes.append(Path(top.group(1).strip()).resolve())
    for packages in {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}:
        homes += sorted(Path(packages).glob("nvidia/cu*"), reverse=True)
    for home in homes:
        if (home / "bin/nvcc").is_file() and (home / "include/cuda_bf16.h").is_file():
            return home
    return None


def check_compiler(home: Path) -> None:
    """Ends the build in one line where an empty kernel does not compile, as when PyPI packages of
    several versions make up the compiler."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "empty.cu")
        source.write_text("__global__ void empty() {}\n")
        command: list[str | Path] = [home / "bin/nvcc", "-cubin", "-o"]
        command += [source.with_suffix(".cubin"), source]
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        reason = (done.stderr or done.stdout).strip().splitlines() or [f"exit {done.returncode}"]
        raise SystemExit(
            f"lminf_cuda: {home / 'bin/nvcc'} does not compile an empty kernel ({reason[0]}); from "
            "PyPI, nvidia-cuda-nvcc, nvidia-nvvm, nvidia-cuda-crt and nvidia-cuda-runtime must be "
            "of one version; or set LMINF_SKIP_CUDA_BUILD=1"
        )


def check_version(home: Path) -> None:
    """Ends the build in one line where the toolkit lacks what the kernels' launchers call."""
    header = home / "include/cuda_runtime_api.h"
    text = header.read_text(errors="replace") if header.is_file() else ""
    if told := re.search(r"#define\s+CUDART_VERSION\s+(\d+)", text):
        number = int(told.group(1))
        found = number // 1000, number % 1000 // 10
        if found < OLDEST_CUDA:
            raise SystemExit(
                f"lminf_cuda: the CUDA toolkit in {home} is {found[0]}.{found[1]}, but must be "
                f"{OLDEST_CUDA[0]}.{OLDEST_CUDA[1]} or newer; name a newer one in CUDA_HOME, or "
                "set LMINF_SKIP_CUDA_BUILD=1"
            )


def known_architectures(home: Path) -> list[str]:
    """Those of CUDA_ARCHITECTURES that this compiler knows."""
    listed = subprocess.run([home / "bin/nvcc", "--list-gpu-arch"], capture_output=True, text=True)
    known = [a for a in CUDA_ARCHITECTURES if f"compute_{a.replace('.', '')}\n" in listed.stdout]
    if not known:
        raise SystemExit(
            f"lminf_cuda: {home / 'bin/nvcc'} knows none of the architectures "
            f"{', '.join(CUDA_ARCHITECTURES)}; name others in TORCH_CUDA_ARCH_LIST, or set "
            "LMINF_SKIP_CUDA_BUILD=1"
        )
    return known


def gpus() -> list[str]:
    """Compute capabilities of the GPUs in this machine, each once, as the driver's tool tells."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return []
    query = [tool, "--query-gpu=compute_cap", "--format=csv,noheader"]
    told = subprocess.run(query, capture_output=True, text=True).stdout
    return sorted(set(re.findall(r"^\d+\.\d+$", told, re.MULTILINE)), key=version)


def version(architecture: str) -> tuple[int, ...]:
    """10.0 is newer than 9.0."""
    return tuple(map(int, architecture.split(".")))


def serving(gpu: str, known: list[str]) -> str | None:
    """The architecture to build for a GPU: the newest that is not newer than it is; as PTX where it
    is of an older generation, whose machine code does not run there. None for a GPU too old."""
    older = [a for a in known if version(a) <= version(gpu)]
    if not older:
        return None
    return older[-1] if version(older[-1])[0] == version(gpu)[0] else older[-1] + "+PTX"


def architectures(known: list[str]) -> tuple[str, str]:
    """What to build for in the manner of TORCH_CUDA_ARCH_LIST, or nothing; and why."""
    found = gpus()
    served = [name for name in dict.fromkeys(serving(gpu, known) for gpu in found) if name]
    if served:
        return ";".join(served), f"the GPUs of this machine ({', '.join(found)})"
    if found and not flag("LMINF_FORCE_CUDA_BUILD"):
        return "", f"the GPUs of this machine ({', '.join(found)}) are older than {known[0]}"
    return ";".join(known) + "+PTX", (
        "no GPU is in this machine; TORCH_CUDA_ARCH_LIST=9.0 builds for one architecture, "
        "LMINF_SKIP_CUDA_BUILD=1 the CPU kernels alone"
    )


def with_hopper(architectures: str) -> str:
    """The list with 9.0a where it names 9.0: the target that has Hopper's matrix instructions. The
    kernels that use them are empty for all others, and absent when the list has no 9.0."""
    names = architectures.replace("Hopper", "9.0+PTX").replace(" ", ";").split(";")
    if "9.0a" not in names:
        names = ["9.0a" if name == "9.0" else name for name in names]
    if "9.0+PTX" in names and "9.0a" not in names:
        names.append("9.0a")  # the PTX beside it is what newer devices run
    return ";".join(names)


def duration(architectures: int) -> str:
    """How long a build takes, roughly."""
    asked = os.environ.get("MAX_JOBS", "")
    jobs = max(1, int(asked) if asked.isdecimal() else os.cpu_count() or 1)
    seconds = max(
        (CPU_SECONDS + architectures * ARCHITECTURE_SECONDS) / jobs,
        LONGEST_SECONDS * max(1, architectures),
    )
    return f"about {max(1, round(seconds / 60))} min with MAX_JOBS={jobs}"


def cuda_toolkit() -> tuple[Path | None, str]:
    """Where to build the CUDA kernels from, or None for the CPU kernels alone, and that in one
    line. Sets TORCH_CUDA_ARCH_LIST, which torch reads."""
    alone = f"building the CPU kernels alone, {duration(0)}"
    if flag("LMINF_SKIP_CUDA_BUILD"):
        return None, f"LMINF_SKIP_CUDA_BUILD is set: {alone}"
    home = find_cuda()
    if home is None:
        text = "no CUDA compiler (nvcc with its headers) by CUDA_HOME, on PATH or from PyPI"
        if flag("LMINF_FORCE_CUDA_BUILD"):
            raise SystemExit(f"lminf_cuda: LMINF_FORCE_CUDA_BUILD is set, but there is {text}")
        return None, f"{text}: {alone}"
    check_version(home)
    check_compiler(home)
    chosen, why = os.environ.get("TORCH_CUDA_ARCH_LIST"), "TORCH_CUDA_ARCH_LIST"
    if not chosen:
        chosen, why = architectures(known_architectures(home))
    if not chosen:
        return None, f"{why}: {alone}"
    os.environ["TORCH_CUDA_ARCH_LIST"] = chosen = with_hopper(chosen)
    # A CPU-only torch looks for no toolkit; then it builds with this one all the same.
    cpp_extension.CUDA_HOME = str(home)
    count = len(chosen.split(";"))
    return home, f"building CUDA kernels with {home} for {chosen}, {duration(count)} ({why})"


class Build(BuildExtension):
    """torch's, that keeps its objects and is heard."""

    line = ""

    def finalize_options(self) -> None:
        """A wheel after an editable installation, or a build after an edit, compiles what is new
        alone."""
        super().finalize_options()
        self.build_temp = "build/objects"

    def run(self) -> None:
        """Says on the terminal what is built: pip shows nothing of a build that succeeds."""
        with contextlib.suppress(OSError), open("/dev/tty", "w") as terminal:
            print(f"\nlminf_cuda: {self.line}", file=terminal)
        super().run()


def files(pattern: str) -> list[str]:
    """Paths below csrc/, relative to this file as setuptools wants them."""
    root = Path(__file__).parent
    return sorted(str(path.relative_to(root)) for path in (root / "csrc").glob(pattern))


def extension() -> Extension:
    """The extension with the CPU kernels, and the CUDA kernels where they can be built. The CPU
    kernels choose their instruction set at run time, so no machine flag is passed here."""
    home, Build.line = cuda_toolkit()
    print(f"lminf_cuda: {Build.line}")
    sources = files("cpu/*.cpp") + files("torch/*.cpp") + files("cuda/**/*.cpp")
    macros = [("TORCH_TARGET_VERSION", TORCH_ABI)]
    folders: dict[str, list[str]] = {}
    libraries: list[str] = []
    if home is not None:
        sources += files("cuda/**/*.cu")
        macros.append(("LMINF_WITH_CUDA", "1"))
        if "9.0a" in os.environ["TORCH_CUDA_ARCH_LIST"]:
            macros.append(("LMINF_WITH_SM90A", "1"))
        # The runtime is linked in: the module then needs nothing but a driver, and loads without.
        libraries = ["cudart_static", "rt", "dl", "pthread"]
        folders = dict(
            include_dirs=[str(home / "include")],
            library_dirs=[str(home / name) for name in ("lib64", "lib") if (home / name).is_dir()],
        )
    return CppExtension(
        name="lminf_cuda._C",
        sources=sources,
        depends=files("**/*.h") + files("**/*.cuh"),
        define_macros=macros,
        extra_compile_args={"cxx": CXX_FLAGS, "nvcc": NVCC_FLAGS},
        libraries=libraries,
        py_limited_api=True,
        **folders,
    )


if __name__ == "__main__":
    setup(
        ext_modules=[extension()],
        cmdclass={"build_ext": Build},
        options={"bdist_wheel": {"py_limited_api": "cp310"}},
    )
