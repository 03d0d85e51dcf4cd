"""Builds the extension lminf_cuda._C; everything else about the package stands in pyproject.toml.

The compiled module uses the stable ABI of PyTorch (from 2.11 on) and of Python (from 3.10 on), so a
wheel built once serves later versions of both. MAX_JOBS limits the number of compilers at work.
"""

from pathlib import Path

from setuptools import Extension, setup
from torch.utils.cpp_extension import BuildExtension, CppExtension

TORCH_ABI = "0x020b000000000000"  # 2.11, the oldest torch that the build runs on

CXX_FLAGS = ["-std=c++17", "-O3", "-g0", "-fvisibility=hidden", "-Wall"]
# GCC's own AVX-512 header draws these two falsely.
CXX_FLAGS += ["-Wno-uninitialized", "-Wno-maybe-uninitialized"]


def files(pattern: str) -> list[str]:
    """Paths below csrc/, relative to this file as setuptools wants them."""
    root = Path(__file__).parent
    return sorted(str(path.relative_to(root)) for path in (root / "csrc").glob(pattern))


def extension() -> Extension:
    """The extension with the CPU kernels. They choose their instruction set at run time, so no
    machine flag is passed here."""
    return CppExtension(
        name="lminf_cuda._C",
        sources=files("cpu/*.cpp") + files("torch/*.cpp"),
        depends=files("**/*.h"),
        define_macros=[("TORCH_TARGET_VERSION", TORCH_ABI)],
        extra_compile_args={"cxx": CXX_FLAGS},
        py_limited_api=True,
    )


setup(
    ext_modules=[extension()],
    cmdclass={"build_ext": BuildExtension},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
