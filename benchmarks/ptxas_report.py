"""Compiles the CUDA kernels and reads what ptxas says of each: registers, stack, spills.

    python benchmarks/ptxas_report.py [--architectures 80 90a ...] [--csv benchmarks/ptxas.csv]

Ends with 1 when a kernel spills or has a stack frame, and for the kernels for Hopper, which are
built for 90a alone, also when ptxas runs their wgmma one after the other, ignores how they share
out registers, or gives them more at launch than that counts on. On other architectures than the two
that the kernels are shaped for, a fault is shown and no more. Needs nvcc, no GPU.
"""

from __future__ import annotations

import argparse
import csv
import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "csrc/cuda"
FLAGS = ["-std=c++17", "-O3", "--expt-relaxed-constexpr", "-Xptxas", "-v", "-cubin"]

ENTRY = re.compile(r"Compiling entry function '(\S+)' for 'sm_(\w+)'")
FRAME = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
REGISTERS = re.compile(r"Used (\d+) registers")
# What ptxas says of wgmma that it serialises (C7510 and its kin), and of setmaxnreg it ignores.
COMPLAINT = re.compile(r".*(?:wgmma.*serialized|setmaxnreg.*ignored).*", re.IGNORECASE)

HOPPER = "sm90"  # in the names of their files
HOPPER_ARCHITECTURE = "90a"
SHAPED_FOR = ("80", HOPPER_ARCHITECTURE)
HOPPER_THREADS = 384  # kSm90Threads (csrc/cuda/prefill/sm90_tiles.h)
HOPPER_REGISTERS = 65536 // HOPPER_THREADS // 8 * 8  # kSm90LaunchRegisters


@dataclass
class Kernel:
    """One kernel on one architecture; byte counts are per thread."""

    file: str
    kernel: str
    architecture: str
    registers: int
    stack: int
    spill_stores: int
    spill_loads: int
    complaints: int  # of ptxas on the kernel's file

    @property
    def fault(self) -> str:
        """What is wrong with it, or nothing."""
        if not self.stack == self.spill_stores == self.spill_loads == 0:
            return "local memory"
        if self.complaints > 0:
            return "ptxas serialises wgmma or ignores setmaxnreg"
        if HOPPER in self.file and self.registers != HOPPER_REGISTERS:
            return f"not the {HOPPER_REGISTERS} registers that its warpgroups share out"
        return ""


def demangle(names: list[str]) -> dict[str, str]:
    """Readable names, without what all of them share."""
    tool = shutil.which("cu++filt") or shutil.which("c++filt")
    if tool is None:
        return {name: name for name in names}
    done = subprocess.run([tool, *names], capture_output=True, text=True, check=True)
    readable = {}
    for name, text in zip(names, done.stdout.splitlines(), strict=True):
        text = re.sub(r"lminf::cuda::|\(anonymous namespace\)::|^void ", "", text)
        text = text.replace("__nv_bfloat16", "bf16").replace("__half", "fp16")
        readable[name] = re.sub(r"\([^()]*\)(?=[,>])", "", text).split("(")[0]
    return readable


def compile_one(source: Path, architecture: str) -> list[Kernel]:
    """The kernels of one source file on one architecture; ends the run when nvcc fails."""
    with tempfile.TemporaryDirectory() as folder:
        output = str(Path(folder) / "out.cubin")
        target = f"-gencode=arch=compute_{architecture},code=sm_{architecture}"
        command = ["nvcc", *FLAGS, target, str(source), "-o", output]
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stdout}{done.stderr}")
    report = done.stdout + done.stderr
    complaints = len(COMPLAINT.findall(report))
    kernels: list[Kernel] = []
    name, frame = "", (0, 0, 0)
    for line in report.splitlines():
        if found := ENTRY.search(line):
            name = found.group(1)
        elif found := FRAME.search(line):
            stack, stores, loads = map(int, found.groups())
            frame = (stack, stores, loads)
            if not name and kernels:  # of a function that the kernel before it calls
                called = kernels[-1]
                called.stack += stack
                called.spill_stores += stores
                called.spill_loads += loads
        elif (found := REGISTERS.search(line)) and name:
            registers = int(found.group(1))
            kernels.append(
                Kernel(
                    source.relative_to(FOLDER).as_posix(),
                    name,
                    architecture,
                    registers,
                    *frame,
                    complaints,
                )
            )
            name = ""
    if kernels:
        readable = demangle([kernel.kernel for kernel in kernels])
        for kernel in kernels:
            kernel.kernel = readable[kernel.kernel]
    return kernels


def main() -> int:
    """Compile everything, print and write the table; 1 when something has a fault."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--architectures", nargs="+", default=SHAPED_FOR)
    parser.add_argument("--csv", type=Path, help="write the table here as well")
    arguments = parser.parse_args()
    if shutil.which("nvcc") is None:
        raise SystemExit("ptxas_report: nvcc is not on PATH; install the CUDA toolkit")
    jobs = [
        (source, architecture)
        for architecture in arguments.architectures
        for source in sorted(FOLDER.glob("**/*.cu"))
        if HOPPER not in source.name or architecture == HOPPER_ARCHITECTURE
    ]
    workers = int(os.environ.get("MAX_JOBS", os.cpu_count() or 1))
    found = []
    with ThreadPoolExecutor(workers) as pool:
        tasks = pool.map(lambda job: compile_one(*job), jobs)
        for (source, architecture), kernels_of_one in zip(jobs, tasks, strict=True):
            print(
                f"{source.relative_to(FOLDER)} for sm_{architecture}", file=sys.stderr, flush=True
            )
            found.append(kernels_of_one)
    kernels = sorted(
        (kernel for part in found for kernel in part),
        key=lambda kernel: (
            kernel.file,
            kernel.kernel,
            int(re.sub(r"\D", "", kernel.architecture)),
        ),
    )
    for kernel in kernels:
        mark = f"  <-- {kernel.fault}" if kernel.fault else ""
        print(
            f"sm_{kernel.architecture:5} {kernel.registers:4} registers  {kernel.stack:4} stack  "
            f"{kernel.spill_stores + kernel.spill_loads:4} spilled  {kernel.kernel}{mark}"
        )
    if arguments.csv:
        with arguments.csv.open("w", newline="") as file:
            writer = csv.DictWriter(
                file, [field.name for field in fields(Kernel)], lineterminator="\n"
            )
            writer.writeheader()
            writer.writerows(asdict(kernel) for kernel in kernels)
    failed = any(kernel.fault and kernel.architecture in SHAPED_FOR for kernel in kernels)
    return 0 if kernels and not failed else 1


if __name__ == "__main__":
    sys.exit(main())
