"""LM-Infinite as fast kernels: attention to the first n_global and the last window tokens.

Importing the package registers torch.ops.lminf.* and needs torch only; what works on Hugging Face
models is imported when first used.
"""

import importlib
from typing import TYPE_CHECKING

from lminf_cuda.ops.functional import lambda_attention

if TYPE_CHECKING:
    from lminf_cuda import reference
    from lminf_cuda.models.cache import LambdaCache
    from lminf_cuda.models.patch import patch_model, unpatch_model
    from lminf_cuda.ops.plan import KernelPlan, decode_plan, kernel_plan

__version__ = "0.1.0"
__all__ = [
    "KernelPlan",
    "LambdaCache",
    "__version__",
    "decode_plan",
    "kernel_plan",
    "lambda_attention",
    "patch_model",
    "reference",
    "unpatch_model",
]

# Public name -> module that holds it; a module stands for itself.
_LAZY = {
    "KernelPlan": "lminf_cuda.ops.plan",
    "LambdaCache": "lminf_cuda.models.cache",
    "decode_plan": "lminf_cuda.ops.plan",
    "kernel_plan": "lminf_cuda.ops.plan",
    "patch_model": "lminf_cuda.models.patch",
    "unpatch_model": "lminf_cuda.models.patch",
    "reference": "lminf_cuda.reference",
}


def __getattr__(name: str) -> object:
    if name not in _LAZY:
        raise AttributeError(f"module 'lminf_cuda' has no attribute {name!r}")
    module = importlib.import_module(_LAZY[name])
    value = module if _LAZY[name] == f"lminf_cuda.{name}" else getattr(module, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(_LAZY))
