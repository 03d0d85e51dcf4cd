"""Which kernel serves a call, and how it is cut: worked out without running it, with or without a
GPU."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class KernelPlan:
    """What one call of an attention op runs.

    Attributes:
        kernel: on CUDA "sm90" (Hopper: wgmma and TMA), "sm80" (tensor cores by mma.sync) or "plain"
            (ordinary cores); on a CPU the instruction set; "none" when there is nothing to do.
        block_m: rows of q that a block, or a task on a CPU, takes at a time; 0 where it has no
            fixed number of them.
        block_n: keys that it meets at a time; 0 where that is not fixed.
        splits: blocks that share the keys of the same rows (decoding), whose results are merged.
        overlaps: whether the kernel that merges them starts while they still run (programmatic
            dependent launch: on compute capability 9.0 and up).
        blocks: blocks of the launch, tasks on a CPU.
        threads: threads of a block; on a CPU, of the pool.
        shared_bytes: shared memory of a block.
        workspace_bytes: device memory that the call needs while it runs.
    """

    kernel: str
    block_m: int
    block_n: int
    splits: int
    overlaps: bool
    blocks: int
    threads: int
    shared_bytes: int
    workspace_bytes: int


def _capability(value: int | tuple[int, int] | None) -> int:
    """Ten times the compute capability, 0 for the tensors' own device."""
    if value is None:
        return 0
    capability = 10 * value[0] + value[1] if isinstance(value, tuple) else value
    if capability < 80:
        raise ValueError(
            f"device_capability is {value}, but must be at least 80 (or (8, 0)): ten times the "
            "compute capability, as in 80, 90 or 120; leave it out for the tensors' own device"
        )
    return capability


def _plan(
    op: Callable[..., Any],
    arguments: tuple[Any, ...],
    options: dict[str, Any],
    device_capability: int | tuple[int, int] | None,
    multiprocessors: int,
) -> KernelPlan:
    if multiprocessors < 1:
        raise ValueError(f"multiprocessors is {multiprocessors}, but must be at least 1")
    device = {
        "device_capability": _capability(device_capability),
        "multiprocessors": multiprocessors,
    }
    kernel, (block_m, block_n, splits, overlaps, *sizes) = op(*arguments, **options, **device)
    return KernelPlan(kernel, block_m, block_n, splits, bool(overlaps), *sizes)


def kernel_plan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    n_global: int,
    window: int,
    *,
    device_capability: int | tuple[int, int] | None = None,
    multiprocessors: int = 132,
    **options: Any,
) -> KernelPlan:
    """What torch.ops.lminf.lambda_attn runs for these arguments; nothing is computed.

    Args:
        q: as the op takes them, and so all that follow; dtypes, shapes, strides and alignment
            decide, values do not.
        k: keys.
        v: values.
        n_global: first tokens that stay visible.
        window: last tokens that are visible.
        device_capability: plan for a CUDA device of this compute capability, ten times (90) or as a
            pair ((9, 0)), whatever device the tensors are on; no GPU and no CUDA build is needed.
            None: plan for the tensors' own device.
        multiprocessors: of that device.
        options: the op's other arguments.

    Raises:
        ValueError: arguments that the op refuses, or a capability below 80.
        RuntimeError: more blocks than a launch takes.
    """
    return _plan(
        torch.ops.lminf.lambda_attn_plan,
        (q, k, v, n_global, window),
        options,
        device_capability,
        multiprocessors,
    )


def decode_plan(
    *arguments: Any,
    device_capability: int | tuple[int, int] | None = None,
    multiprocessors: int = 132,
    **options: Any,
) -> KernelPlan:
    """What torch.ops.lminf.lambda_decode runs for `arguments` and `options`; the cache is left as
    it is. Otherwise like kernel_plan; multiprocessors decide how the keys are split."""
    return _plan(
        torch.ops.lminf.lambda_decode_plan,
        arguments,
        options,
        device_capability,
        multiprocessors,
    )
