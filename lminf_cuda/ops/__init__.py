"""The operators torch.ops.lminf.*: schemas, fake kernels, and the extension that holds the kernels.

Importing this module registers everything. Arguments are checked in C++ (csrc/torch), once for all
callers: a broken rule raises ValueError with the argument's name, its value, and what it may be.
"""

import torch

from lminf_cuda.ops.autograd import autograd_kernel, transform_kernel, why_no_derivative
from lminf_cuda.ops.fakes import fake_kernel
from lminf_cuda.ops.gradients import GRADIENTS
from lminf_cuda.ops.schemas import SCHEMAS, define


def _register() -> torch.library.Library:
    """Defines the ops. The library object must live as long as they are to be callable."""
    library = torch.library.Library("lminf", "FRAGMENT")
    define(library)
    for name in SCHEMAS:
        torch.library.register_fake(f"lminf::{name}", fake_kernel(name), lib=library)
        op = getattr(torch.ops.lminf, name).default
        if name == "lambda_decode":
            # Called once per layer and token, it keeps the direct way: csrc/torch/derivatives.h.
            library.impl(name, transform_kernel(op), "FuncTorchDynamicLayerFrontMode")
        else:
            kernel = GRADIENTS.get(name) or autograd_kernel(op)
            library.impl(name, kernel, "Autograd", with_keyset=True)
    library.define("why_no_derivative(str op, Tensor[] tensors) -> str")
    library.impl("why_no_derivative", why_no_derivative, "CompositeExplicitAutograd")
    return library


_library = _register()

try:
    import lminf_cuda._C as _C
except ImportError as error:
    raise ImportError(
        f"lminf_cuda cannot load its compiled kernels ({error}): build them with 'pip install .' "
        "in the project's source tree (it needs a C++17 compiler), and import lminf_cuda from "
        "outside that tree"
    ) from error


def cpu_isa() -> str:
    """The instruction set in use by the CPU kernels, as in "avx512" or "portable".

    Raises ValueError when the environment variable LMINF_CPU_ISA names one that this machine or
    build does not have.
    """
    return _C.cpu_isa()


def cpu_scratch_bytes() -> int:
    """The most scratch memory that a CPU kernel has held on one thread since the last call of this
    function, in bytes; 0 if none has run."""
    return _C.cpu_scratch_bytes()


def backends() -> tuple[str, ...]:
    """The devices that this build has kernels for."""
    keys = {"cpu": "CPU", "cuda": "CUDA"}
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    return tuple(name for name, key in keys.items() if has("lminf::lambda_attn", key))
