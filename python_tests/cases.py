"""What the op tests share: how an op is called on a backend, inputs, and when a result is right.

Truth is the float64 reference. A bfloat16 or float16 result may be at most twice as wrong as the
reference run in that dtype, and 1.5 times on average (docs/design.md section 7); a float32 result
has the fixed bounds below.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import emulated
import torch
from torch import Tensor

from lminf_cuda import reference

INF = math.inf
NAN = math.nan
LOW_PRECISION = (torch.bfloat16, torch.float16)
DTYPES = (torch.float32, *LOW_PRECISION)

# Inputs are standard normal, so a score is a sum of D products, scaled to about 1: it is off by a
# few 2^-24 from its sum, and by as much again from cosines and sines rounded to float32 (2^-23 at
# the angle π). A weight is off by the same factor, relatively, and an output by that times max|v|.
FLOAT32_MAX = 3e-6
FLOAT32_MEAN = 2e-7

# The sizes at which a kernel may cut its tiles, and the lengths around them.
TILE_SIZES = (16, 32, 64, 128, 256)
TILE_EDGES = tuple(n + e for n in TILE_SIZES for e in (-1, 0, 1))


@contextlib.contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Most tensors here are so small that more than one thread would only wait for the others."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def call(backend: str, op: str, *args: Any, threads: int = 1, **kwargs: Any) -> Any:
    """torch.ops.lminf.<op>, or its CUDA kernels in one of the ways of emulated.py (on compute
    capability 9.0 for "emulated_sm90" and "ptx_sm90"); CPU tensors in, CPU tensors out, writes in
    place."""
    way = backend.removesuffix("_sm90")
    if way in emulated.WAYS:
        with emulated.way(way), contextlib.ExitStack() as stack:
            if way != backend:
                stack.enter_context(emulated.device(capability=90, multiprocessors=3))
            return getattr(emulated.ops(), op)(*args, **kwargs)
    function = getattr(torch.ops.lminf, op)
    device = "cuda" if backend == "cuda" else "cpu"
    moved: list[tuple[Tensor, Tensor]] = []

    def move(x: Any) -> Any:
        if not isinstance(x, Tensor) or device == "cpu":
            return x
        moved.append((x, x.to(device)))
        return moved[-1][1]

    with torch_threads(threads):
        result = function(*map(move, args), **{name: move(x) for name, x in kwargs.items()})
    if op == "lambda_decode":
        for here, there in moved:
            here.copy_(there)
    if isinstance(result, Tensor):
        return result.cpu()
    return tuple(x.cpu() for x in result)


def randn(seed: int, *shapes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def qkv(
    seqlen_q: int,
    seqlen_k: int,
    *,
    batch: int = 1,
    heads_q: int = 2,
    heads_kv: int = 1,
    head_dim: int = 64,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> list[Tensor]:
    keys = (batch, heads_kv, seqlen_k, head_dim)
    return randn(seed, (batch, heads_q, seqlen_q, head_dim), keys, keys, dtype=dtype)


def frequencies(rotary_dim: int, base: float = 10000.0) -> Tensor:
    t = torch.arange(rotary_dim // 2, dtype=torch.float64)
    return (base ** (-2 * t / rotary_dim)).float()


def slopes(heads: int) -> Tensor:
    """The ALiBi paper's slopes for a power of two, near enough for any other number."""
    return 2.0 ** (-8.0 * torch.arange(1, heads + 1) / heads)


# Every option of the score by itself and all together, for a number of heads and a head dim.
OPTION_NAMES = (
    "none",
    "rope",
    "rope interleaved",
    "rope partial",
    "rope scaled",
    "rope float64",
    "alibi",
    "distance bias",
    "distance bias hides",
    "sink",
    "scale",
    "softcap",
    "all",
)


def biases(heads: int, limit: int, seed: int = 5) -> Tensor:
    """A table [heads, limit + 1] of distance_bias."""
    return randn(seed, (heads, limit + 1))[0]


def hiding_biases(heads: int, limit: int) -> Tensor:
    """One in which every head hides some distances, the last of them all, and one hides its own."""
    table = biases(heads, limit)
    distance = torch.arange(limit + 1)
    for head in range(heads):
        table[head, (distance + head) % 3 == 1] = -INF
    table[-1, :] = -INF
    table[0, limit] = -INF
    return table


def options(name: str, heads: int, head_dim: int, limit: int | None = None) -> dict[str, Any]:
    """`limit`: the max_distance of the call; without it "all" leaves distance_bias out."""
    full = head_dim // 2 * 2
    partial = max(2, head_dim // 4 * 2)
    sink = torch.linspace(-2, 3, heads)
    table: dict[str, dict[str, Any]] = {
        "none": {},
        "rope": {"inv_freq": frequencies(full)},
        "rope interleaved": {"inv_freq": frequencies(full), "rope_interleaved": True},
        "rope partial": {"inv_freq": frequencies(partial)},
        "rope scaled": {"inv_freq": frequencies(full), "rope_scaling": 1.25},
        "rope float64": {"inv_freq": frequencies(full).double() * (1 + 1e-9)},
        "alibi": {"alibi_slopes": slopes(heads)},
        "sink": {"sink_logits": sink},
        "scale": {"scale": 0.3 / math.sqrt(head_dim)},
        "softcap": {"softcap": 1.5},
        "all": {
            "inv_freq": frequencies(partial),
            "rope_scaling": 1.1,
            "rope_interleaved": True,
            "alibi_slopes": slopes(heads),
            "sink_logits": sink,
            "scale": 0.8 / math.sqrt(head_dim),
            "softcap": 4.0,
        },
    }
    if limit is not None:
        table["distance bias"] = {"distance_bias": biases(heads, limit)}
        table["distance bias hides"] = {"distance_bias": hiding_biases(heads, limit)}
        table["all"]["distance_bias"] = biases(heads, limit)
    return table[name]


def widen(x: Any) -> Any:
    return x.double() if isinstance(x, Tensor) and x.is_floating_point() else x


def run_reference(
    q: Tensor, k: Tensor, v: Tensor, widened: bool, **kwargs: Any
) -> tuple[Tensor, Tensor]:
    if widened:
        q, k, v = widen(q), widen(k), widen(v)
        keep = ("inv_freq", "alibi_slopes", "sink_logits", "distance_bias")
        kwargs = {name: x if name in keep else widen(x) for name, x in kwargs.items()}
    result = reference.lambda_attention(q, k, v, **kwargs, return_lse=True)
    assert isinstance(result, tuple)
    return result


def worst(ours: Tensor, truth: Tensor, error: Tensor) -> str:
    flat = int(error.argmax())
    at = tuple(int(i) for i in torch.unravel_index(torch.tensor(flat), error.shape))
    return (
        f"worst at {at}: {ours[at].item():.8g} instead of {truth[at].item():.8g}, "
        f"off by {error[at].item():.3g}"
    )


def assert_right(what: str, ours: Tensor, truth: Tensor, eager: Tensor | None = None) -> None:
    """`ours` is as near to `truth` as its dtype allows; `eager` is needed below float32.

    Infinite entries must be the same ones. `ours` may not hold NaN where `truth` does not.
    """
    assert ours.shape == truth.shape, f"{what}: shape {ours.shape} instead of {truth.shape}"
    ours = ours.double()
    same_kind = (ours.isnan() == truth.isnan()) & (ours.isinf() == truth.isinf())
    same_kind &= ~truth.isinf() | (ours == truth)
    assert same_kind.all(), (
        f"{what}: {int((~same_kind).sum())} of {same_kind.numel()} entries differ in being finite, "
        f"first at {(~same_kind).nonzero()[0].tolist()}"
    )
    finite = truth.isfinite()
    if not finite.any():
        return
    truth, ours = truth.masked_fill(~finite, 0.0), ours.masked_fill(~finite, 0.0)
    error = (ours - truth).abs()
    size = max(1.0, truth.abs().max().item())
    if eager is None:
        max_bound, mean_bound = FLOAT32_MAX * size, FLOAT32_MEAN * size
    else:
        # In a handful of entries the yardstick may be right by luck: a quarter of the last bit,
        # which the rounding of the output alone exceeds, is never counted against us.
        unit = torch.finfo(eager.dtype).eps * truth.abs() / 4
        yardstick = (eager.double().masked_fill(~finite, 0.0) - truth).abs()
        max_bound = 2 * yardstick.max().item() + unit.max().item()
        mean_bound = 1.5 * yardstick.mean().item() + unit.mean().item()
    assert error.max().item() <= max_bound, (
        f"{what}: max error {error.max():.3g} > {max_bound:.3g}; {worst(ours, truth, error)}"
    )
    assert error.mean().item() <= mean_bound, (
        f"{what}: mean error {error.mean():.3g} > {mean_bound:.3g}; {worst(ours, truth, error)}"
    )


@torch_threads(1)
def check_lambda_attn(
    backend: str, q: Tensor, k: Tensor, v: Tensor, **kwargs: Any
) -> tuple[Tensor, Tensor]:
    """Runs the op and the reference; compares values, shapes, dtypes and strides of out and lse."""
    positional = {name: kwargs[name] for name in ("n_global", "window")}
    rest = {name: x for name, x in kwargs.items() if name not in positional}
    out, lse = call(backend, "lambda_attn", q, k, v, *positional.values(), **rest)
    assert out.dtype == q.dtype and lse.dtype == torch.float32
    assert lse.shape == q.shape[:3] and lse.is_contiguous()
    like = torch.empty_like(q)
    if like.stride(-1) == 1:
        assert out.stride() == like.stride()
    truth, truth_lse = run_reference(q, k, v, True, **kwargs)
    eager = eager_lse = None
    if q.dtype != torch.float32:
        eager, eager_lse = run_reference(q, k, v, False, **kwargs)
    assert_right("out", out, truth, eager)
    # lse stays in float32: the yardstick's lse has its scores' error, and no rounding of its own.
    if eager_lse is None:
        assert_right("lse", lse, truth_lse)
    else:
        assert_low_precision_lse(lse, truth_lse, eager_lse, q.dtype)
    return out, lse


def assert_low_precision_lse(lse: Tensor, truth: Tensor, eager: Tensor, dtype: torch.dtype) -> None:
    finite = truth.isfinite()
    assert torch.equal(lse.isfinite(), finite) and (lse[~finite] == -INF).all()
    if not finite.any():
        return
    error = (lse.double() - truth)[finite].abs()
    yardstick = (eager.double() - truth)[finite].abs()
    # One key alone has its score for lse, whose inputs are rounded after they are rotated.
    unit = torch.finfo(dtype).eps / 4 * max(1.0, truth[finite].abs().max().item())
    assert error.max() <= 2 * yardstick.max() + unit, (
        f"lse: max error {error.max():.3g}, yardstick {yardstick.max():.3g}"
    )
    assert error.mean() <= 1.5 * yardstick.mean() + unit, (
        f"lse: mean error {error.mean():.3g}, yardstick {yardstick.mean():.3g}"
    )


def poisoned(x: Tensor, where: Any, value: float) -> Tensor:
    x = x.clone()
    x[where] = value
    return x


# Of a sum over all queries that see a key, and over its dims again, in float32.
FLOAT32_GRAD_MAX = 1e-5
FLOAT32_GRAD_MEAN = 5e-7
GRADIENTS = ("q", "k", "v", "global_k", "global_v", "sink_logits", "distance_bias")


def reference_gradients(
    given: dict[str, Any], grad_out: Tensor, grad_lse: Tensor | None, widened: bool
) -> dict[str, Tensor]:
    """The gradients of the reference, by autograd. What no query sees is NaN-free here: autograd
    would multiply it by 0."""
    given = {
        name: x.nan_to_num(0.0, 0.0, -INF if name == "distance_bias" else 0.0)
        if isinstance(x, Tensor) and x.is_floating_point()
        else x
        for name, x in given.items()
    }
    if widened:
        keep = ("inv_freq", "alibi_slopes")
        given = {name: x if name in keep else widen(x) for name, x in given.items()}
    wanted = {name: given[name] for name in GRADIENTS if given.get(name) is not None}
    wanted = {name: x.detach().requires_grad_() for name, x in wanted.items()}
    result = reference.lambda_attention(**(given | wanted), return_lse=True)
    assert isinstance(result, tuple)
    out, lse = result
    total = (out * grad_out.to(out.dtype)).sum()
    if grad_lse is not None:
        total = total + (lse.masked_fill(lse == -INF, 0.0) * grad_lse).sum()
    return dict(zip(wanted, torch.autograd.grad(total, list(wanted.values())), strict=True))


def assert_gradient_right(
    what: str, ours: Tensor, truth: Tensor, eager: Tensor | None, dtype: torch.dtype
) -> None:
    """At most three times as wrong as the eager reference in the same dtype, and 1.5 times on
    average; in float32 within fixed bounds."""
    assert ours.shape == truth.shape, f"d{what} has shape {tuple(ours.shape)}"
    ours, truth = ours.double(), truth.double()
    assert ours.isfinite().all(), f"d{what} is not finite"
    if truth.numel() == 0:
        return
    error = (ours - truth).abs()
    if eager is None:
        size = max(1.0, truth.abs().max().item())
        max_bound, mean_bound = FLOAT32_GRAD_MAX * size, FLOAT32_GRAD_MEAN * size
    else:
        # As in assert_right; but of a handful of sums over all queries the yardstick may be lucky.
        unit = torch.finfo(dtype).eps * truth.abs() * (1.0 if truth.numel() < 32 else 0.25)
        yardstick = (eager.double() - truth).abs()
        max_bound = 3 * yardstick.max().item() + unit.max().item()
        mean_bound = 1.5 * yardstick.mean().item() + unit.mean().item()
    assert error.max().item() <= max_bound, (
        f"d{what}: max error {error.max():.3g} > {max_bound:.3g}; {worst(ours, truth, error)}"
    )
    # A handful of entries has no mean to speak of.
    assert ours.numel() < 32 or error.mean().item() <= mean_bound, (
        f"d{what}: mean error {error.mean():.3g} > {mean_bound:.3g}; {worst(ours, truth, error)}"
    )


def gradients(
    backend: str, given: dict[str, Any], grad_out: Tensor, grad_lse: Tensor | None, threads: int = 1
) -> dict[str, Tensor]:
    """The op's backward on so many threads, after a forward on one; by the names of the inputs."""
    rest = dict(given)
    q, k, v, *sizes = (rest.pop(name) for name in ("q", "k", "v", "n_global", "window"))
    out, lse = call(backend, "lambda_attn", q, k, v, *sizes, **rest)
    result = call(
        backend, "lambda_attn_backward", grad_out, grad_lse, out, lse, q, k, v, *sizes,
        threads=threads, **rest,
    )  # fmt: skip
    found = dict(zip(GRADIENTS, result, strict=True))
    return {name: x for name, x in found.items() if given.get(name) is not None}


@torch_threads(1)
def check_gradients(
    backend: str, q: Tensor, k: Tensor, v: Tensor, *, with_lse: bool = True, **kwargs: Any
) -> dict[str, Tensor]:
    """Runs the op's backward and the reference's, compares all gradients."""
    given = {"q": q, "k": k, "v": v} | kwargs
    grad_out, grad_lse = randn(77, tuple(q.shape), tuple(q.shape[:3]))
    grad_out = grad_out.to(q.dtype)
    wanted_lse = grad_lse if with_lse else None
    ours = gradients(backend, given, grad_out, wanted_lse)
    truth = reference_gradients(given, grad_out, wanted_lse, True)
    eager = None
    if q.dtype != torch.float32:
        eager = reference_gradients(given, grad_out, wanted_lse, False)
    assert ours.keys() == truth.keys()
    for name, x in ours.items():
        assert_gradient_right(name, x, truth[name], eager and eager[name], q.dtype)
    return ours
