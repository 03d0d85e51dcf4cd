"""Holds a benchmark to an instruction set below the machine's: our kernels and the peers' libraries
alike, so that a machine with matrix tiles can show what one without them would."""

from __future__ import annotations

import os
import sys

# What oneDNN, MKL and PyTorch read when they are loaded. FlexAttention and torch.mm in
# bfloat16 go through oneDNN, scaled_dot_product_attention and torch.mm in float32 through MKL.
LIMITS = {
    "amx": {},
    "avx512_bf16": {
        "ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16",
        "MKL_ENABLE_INSTRUCTIONS": "AVX512_E3",
    },
    "avx512": {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE", "MKL_ENABLE_INSTRUCTIONS": "AVX512"},
    "avx2": {
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
        "ATEN_CPU_CAPABILITY": "avx2",
    },
}


def hold_to(isa: str | None) -> None:
    """Starts this program anew under the limits of `isa`, unless it runs under them or isa is None.

    The libraries read them when torch is imported, so they have to be set before.
    """
    if isa is None:
        return
    wanted = {"LMINF_CPU_ISA": isa, **LIMITS[isa]}
    if any(os.environ.get(name) != value for name, value in wanted.items()):
        os.execve(sys.executable, sys.orig_argv, {**os.environ, **wanted})
