"""Timing of `lambda_attn` beside its peers: one run, interleaved, medians.

FLOPs are 4 * D * (visible pairs) * Hq * B, each peer's own visible pairs counted: the Λ mask's for
those that apply it, the causal triangle's for causal attention. The ceiling is a large matrix
product of the same dtype (docs/design.md section 8).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from lminf_cuda.evaluation.machine import interleaved_medians
from lminf_cuda.evaluation.records import write_records
from lminf_cuda.ops.functional import lambda_attention
from lminf_cuda.text.progress import progress, waiting

OURS, OURS_ROTATED = "lambda_attn", "lambda_attn, rotation inside"
FLEX, SDPA_MASK, SDPA_CAUSAL = "flex, same mask", "sdpa, same mask", "sdpa, causal"
CEILING = "torch.mm ceiling"
PEERS = {"flex": FLEX, "sdpa-mask": SDPA_MASK, "sdpa-causal": SDPA_CAUSAL, "mm": CEILING}
CEILING_SIZE = 3072  # rows and columns of the matrix product that measures the ceiling


@dataclass(frozen=True)
class Shape:
    """Sizes of one attention problem; as many keys as queries."""

    batch: int = 1
    heads: int = 8
    kv_heads: int = 8
    length: int = 8192
    head_dim: int = 128
    window: int = 1024
    n_global: int = 16

    @property
    def name(self) -> str:
        """All sizes in one word, for titles and file names."""
        return (
            f"b{self.batch}_h{self.heads}_kv{self.kv_heads}_s{self.length}_d{self.head_dim}"
            f"_w{self.window}_g{self.n_global}"
        )


@dataclass(frozen=True)
class BenchRow:
    """One contender: median seconds, its rate, and how it stands to ours and to the ceiling."""

    dtype: str
    name: str
    seconds: float
    gflops_per_second: float
    times_ours: float | None  # its seconds over lambda_attn's; None for the ceiling
    ceiling_share: float | None
    max_difference: float | None  # from lambda_attn's output, where it computes the same thing


def visible_pairs(length: int, window: int, n_global: int) -> int:
    """Visible (query, key) pairs of the Λ mask for `length` queries over as many keys.

    Row i sees min(i + 1, window) keys in its window, and of the i + 1 - window keys before it, if
    any, at most n_global.
    """
    inside = min(length, window)
    window_pairs = inside * (inside + 1) // 2 + (length - inside) * window
    outside = max(0, length - window)
    ramp = min(outside, n_global)
    return window_pairs + ramp * (ramp + 1) // 2 + (outside - ramp) * n_global


def _lambda_mask(shape: Shape) -> Callable[..., torch.Tensor]:
    def visible(b: Any, h: Any, i: torch.Tensor, j: torch.Tensor) -> torch.Tensor:
        return (i >= j) & ((i - j < shape.window) | (j < shape.n_global))

    return visible


def _flex(shape: Shape, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Callable[[], Any]:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    blocks = create_block_mask(
        _lambda_mask(shape), None, None, shape.length, shape.length, device=q.device
    )
    compiled = torch.compile(flex_attention)
    return lambda: compiled(q, k, v, block_mask=blocks, enable_gqa=shape.heads != shape.kv_heads)


def _sdpa_mask(
    shape: Shape, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
) -> Callable[[], Any]:
    position = torch.arange(shape.length, device=q.device)
    mask = _lambda_mask(shape)(None, None, position[:, None], position[None, :])
    gqa = shape.heads != shape.kv_heads
    return lambda: scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=gqa)


def _contenders(
    shape: Shape, dtype: torch.dtype, device: torch.device, peers: Sequence[str]
) -> dict[str, Callable[[], Any]]:
    generator = torch.Generator().manual_seed(0)

    def random(*sizes: int) -> torch.Tensor:
        x = torch.randn(*sizes, generator=generator, dtype=torch.float32, device="cpu")
        return x.to(device, dtype)

    q = random(shape.batch, shape.heads, shape.length, shape.head_dim)
    k, v = (random(shape.batch, shape.kv_heads, shape.length, shape.head_dim) for _ in range(2))
    exponents = torch.arange(0, shape.head_dim, 2, device=device).float() / shape.head_dim
    inv_freq = 10_000.0**-exponents
    a, b = (random(CEILING_SIZE, CEILING_SIZE) for _ in range(2))
    gqa = shape.heads != shape.kv_heads
    makers: dict[str, Callable[[], Callable[[], Any]]] = {
        "flex": lambda: _flex(shape, q, k, v),
        "sdpa-mask": lambda: _sdpa_mask(shape, q, k, v),
        "sdpa-causal": lambda: (
            lambda: scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=gqa)
        ),
        "mm": lambda: lambda: a @ b,
    }
    functions: dict[str, Callable[[], Any]] = {
        OURS: lambda: lambda_attention(q, k, v, n_global=shape.n_global, window=shape.window),
        OURS_ROTATED: lambda: lambda_attention(
            q, k, v, n_global=shape.n_global, window=shape.window, inv_freq=inv_freq
        ),
    }
    return functions | {PEERS[peer]: makers[peer]() for peer in peers}


def _flops(name: str, shape: Shape) -> int:
    if name == CEILING:
        return 2 * CEILING_SIZE**3
    pairs = visible_pairs(shape.length, shape.window, shape.n_global)
    if name == SDPA_CAUSAL:
        pairs = visible_pairs(shape.length, shape.length, 0)
    return 4 * shape.head_dim * pairs * shape.heads * shape.batch


def parse_peers(text: str) -> list[str]:
    """Peers from "flex,mm"; an empty text is none. Raises ValueError for a name not in PEERS."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    unknown = [name for name in names if name not in PEERS]
    if unknown:
        raise ValueError(f"peers must be among {', '.join(PEERS)}, got {', '.join(unknown)}")
    return names


def attention_rows(
    shape: Shape,
    dtype: torch.dtype,
    *,
    device: torch.device,
    peers: Sequence[str] = tuple(PEERS),
    rounds: int = 5,
) -> list[BenchRow]:
    """Time `lambda_attention` and the chosen peers (names in PEERS) on one problem, in one run.

    Raises ValueError for rounds below 1.
    """
    if rounds < 1:
        raise ValueError(f"rounds must be 1 or more, got {rounds}")
    with waiting("the first call of each peer, compilation included"):
        functions = _contenders(shape, dtype, device, peers)
        with torch.inference_mode():
            expected = functions[OURS]()
            difference = {
                name: float((functions[name]().float() - expected.float()).abs().max())
                for name in (FLEX, SDPA_MASK)
                if name in functions
            }
    n_calls = (rounds + 1) * len(functions)
    with torch.inference_mode(), progress(n_calls, "timing", "call") as bar:
        medians = interleaved_medians(functions, rounds, device, bar.update)
    rates = {name: _flops(name, shape) / seconds / 1e9 for name, seconds in medians.items()}
    return [
        BenchRow(
            str(dtype).removeprefix("torch."),
            name,
            seconds,
            rates[name],
            None if name == CEILING else seconds / medians[OURS],
            rates[name] / rates[CEILING] if CEILING in rates else None,
            difference.get(name),
        )
        for name, seconds in medians.items()
    ]


def write_rows(
    rows: Sequence[BenchRow], shape: Shape, facts: Mapping[str, Any], folder: Path, name: str
) -> list[Path]:
    """Write the rows as <name>.json, with machine and shape, and <name>.csv; returns both paths."""
    records = [asdict(row) for row in rows]
    everything = {"machine": dict(facts), "shape": asdict(shape), "rows": records}
    return write_records(folder, name, records, everything)
