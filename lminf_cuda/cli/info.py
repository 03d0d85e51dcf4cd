"""lminf info: versions and kernels, or which of these serve a shape."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Annotated, Any

import torch
import transformers
import typer
from rich.box import SIMPLE_HEAD
from rich.table import Table

import lminf_cuda
from lminf_cuda import ops
from lminf_cuda.cli import options
from lminf_cuda.cli.loading import DEMO_MODEL
from lminf_cuda.evaluation.tables import console
from lminf_cuda.models import compat
from lminf_cuda.ops.plan import KernelPlan, decode_plan, kernel_plan

NO_CUDA_KERNELS = (
    "no CUDA kernels in this build: install where nvcc is on the PATH (or set CUDA_HOME), then "
    "'pip install --force-reinstall --no-deps .' in the source tree"
)


@dataclass(frozen=True)
class PlanShape:
    """What `lminf info --plan` is asked about."""

    dtype: torch.dtype
    device: str
    batch: int
    heads: int
    kv_heads: int
    head_dim: int
    length: int
    queries: int
    window: int
    n_global: int
    max_distance: int | None
    rope: bool

    def tensor(self, heads: int, rows: int) -> torch.Tensor:
        """[B, heads, rows, D] in little memory: its rows are those of a dense tensor to a plan,
        which looks at no value, but each of them stands one row behind its neighbours."""
        shape = (self.batch, heads, rows, self.head_dim)
        memory = torch.empty(sum(shape[:3]) * self.head_dim, dtype=self.dtype, device=self.device)
        return memory.as_strided(shape, (self.head_dim, self.head_dim, self.head_dim, 1))


def _plan_value(x: str | int) -> str:
    if isinstance(x, bool):
        return "yes" if x else "no"
    return x if isinstance(x, str) else f"{x:,}"


def plans_table(shape: PlanShape, capability: int | None, multiprocessors: int) -> Table:
    """The table of `lminf info --plan`: the prefill and a decoding step of one shape."""
    target: dict[str, Any] = dict(device_capability=capability, multiprocessors=multiprocessors)
    given: dict[str, Any] = dict(max_distance=shape.max_distance)
    if shape.rope:
        given["inv_freq"] = torch.ones(
            shape.head_dim // 2, dtype=torch.float32, device=shape.device
        )
    keys = shape.tensor(shape.kv_heads, shape.length)
    ring = shape.tensor(shape.kv_heads, shape.window)
    few = shape.tensor(shape.kv_heads, shape.n_global)
    one = shape.tensor(shape.kv_heads, 1)
    plans = {
        "lambda_attn": kernel_plan(
            shape.tensor(shape.heads, shape.queries), keys, keys, shape.n_global, shape.window,
            **target, **given,
        ),
        "lambda_decode": decode_plan(
            shape.tensor(shape.heads, 1), one, one, ring, ring, few, few,
            torch.zeros(shape.batch, dtype=torch.int64, device=shape.device), shape.window,
            **target, **given,
        ),
    }  # fmt: skip
    where = shape.device if capability is None else f"CUDA, capability {capability}"
    table = Table(title=f"{where}, {str(shape.dtype).removeprefix('torch.')}", box=SIMPLE_HEAD)
    table.add_column("op")
    facts = [field.name for field in fields(KernelPlan)]
    for name in facts:
        table.add_column(name.replace("_", " "), justify="right", overflow="fold")
    for op, plan in plans.items():
        values = (getattr(plan, name) for name in facts)
        table.add_row(op, *(_plan_value(x) for x in values))
    return table


def info(
    plan: Annotated[
        bool, typer.Option("--plan", help="Which kernels serve a shape instead, and how.")
    ] = False,
    capability: Annotated[
        int | None,
        typer.Option(min=80, help="Plan for a GPU of this compute capability, as in 80 or 90."),
    ] = None,
    multiprocessors: Annotated[int, typer.Option(min=1, help="Of that GPU.")] = 132,
    dtype: options.DtypeOption = options.Dtype.bfloat16,
    device: options.DeviceOption = options.Device.cpu,
    batch: Annotated[int, typer.Option(min=1, help="Rows.")] = 1,
    heads: Annotated[int, typer.Option(min=1, help="Query heads.")] = 32,
    kv_heads: Annotated[int, typer.Option(min=1, help="Key heads; they divide --heads.")] = 8,
    head_dim: Annotated[int, typer.Option(min=2, help="Elements of a head.")] = 128,
    length: Annotated[int, typer.Option(min=1, help="Keys of a prefill.")] = 32768,
    queries: Annotated[
        int | None, typer.Option(min=1, help="Queries of it, the last ones; default: all.")
    ] = None,
    window: Annotated[int, typer.Option(min=1, help="Last tokens that are visible.")] = 4096,
    n_global: options.NGlobalOption = 16,
    max_distance: options.MaxDistanceOption = None,
    rope: Annotated[bool, typer.Option(help="Whether keys are rotated.")] = True,
) -> None:
    """Versions, the kernels that are built and the instruction set in use."""
    if plan:
        options.check_device(device)
        shape = PlanShape(
            options.pick_dtype(dtype, device), device.value, batch, heads, kv_heads, head_dim,
            length, queries or length, window, n_global, max_distance, rope,
        )  # fmt: skip
        with options.blamed("--plan"):
            try:
                plans = plans_table(shape, capability, multiprocessors)
            except RuntimeError as error:
                reason = str(error).splitlines()[0]
                raise ValueError(
                    f"no plan for this shape ({reason}); take a smaller one"
                ) from error
        console().print(plans)
        return
    table = Table(show_header=False)
    table.add_column("fact")
    table.add_column("value", overflow="fold")
    for fact, value in _facts().items():
        table.add_row(fact, value)
    screen = console()
    screen.print(table)
    note = compat.version_note()
    if note is not None:
        screen.print(f"warning: {note}", highlight=False, soft_wrap=True, style="yellow")
    if "cuda" not in ops.backends():
        screen.print(NO_CUDA_KERNELS, highlight=False, soft_wrap=True)


def _facts() -> dict[str, str]:
    oldest, newest = compat.TESTED
    return {
        "lminf_cuda": lminf_cuda.__version__,
        "kernels built for": ", ".join(ops.backends()),
        "CPU instruction set": ops.cpu_isa(),
        "torch": torch.__version__,
        "transformers": f"{transformers.__version__} (tested: {oldest} to {newest})",
        "threads": str(torch.get_num_threads()),
        "shipped model": str(DEMO_MODEL),
    }
