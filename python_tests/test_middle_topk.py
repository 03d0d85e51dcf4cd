"""The op middle_topk against the reference: which keys it takes, and the softmax that they join."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from cases import (
    DTYPES,
    LOW_PRECISION,
    NAN,
    OPTION_NAMES,
    assert_right,
    call,
    options,
    randn,
    widen,
)
from test_instruction_sets import isa  # noqa: F401  (a fixture)
from torch import Tensor

from lminf_cuda import reference

PER_HEAD = ("inv_freq", "alibi_slopes", "sink_logits", "distance_bias")


def case(
    seqlen_k: int,
    *,
    batch: int = 1,
    heads_q: int = 2,
    heads_kv: int = 1,
    head_dim: int = 64,
    n_global: int = 3,
    window: int = 8,
    top_k: int = 5,
    distance: int = 6,
    positions: list[int] | None = None,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    **score: Any,
) -> dict[str, Any]:
    """Arguments of the op, with a Λ result from the reference itself."""
    keys = (batch, heads_kv, seqlen_k, head_dim)
    q, k, v = randn(seed, (batch, heads_q, 1, head_dim), keys, keys, dtype=dtype)
    out, lse = reference.lambda_attention(
        q.double(),
        k.double(),
        v.double(),
        n_global=n_global,
        window=window,
        return_lse=True,
        **score,
    )
    at = [seqlen_k - 1] * batch if positions is None else positions
    return {
        "q": q,
        "k": k,
        "v": v,
        "lambda_out": out.to(dtype),
        "lambda_lse": lse.float(),
        "positions": torch.tensor(at),
        "n_global": n_global,
        "window": window,
        "top_k": top_k,
        "distance": distance,
        **score,
    }


def truth_of(arguments: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    wide = {n: x if n in PER_HEAD else widen(x) for n, x in arguments.items()}
    return reference.middle_topk(**wide)


def check(backend: str, arguments: dict[str, Any], threads: int = 1) -> Tensor:
    """Runs the op and the reference; returns the positions that the op took."""
    out, lse, chosen = call(backend, "middle_topk", **arguments, threads=threads)
    truth, truth_lse, expected = truth_of(arguments)
    q = arguments["q"]
    assert out.dtype == q.dtype and lse.dtype == torch.float32 and chosen.dtype == torch.int64
    assert torch.equal(chosen, expected)
    if q.dtype == torch.float32:
        assert_right("out", out, truth)
    else:
        eager, _, _ = reference.middle_topk(**arguments)
        assert_right("out", out, truth, eager.to(q.dtype))
    assert_right("lse", lse, truth_lse)  # the scores are float32 sums of the same inputs
    return chosen


LENGTHS = [8, 11, 15, 16, 17, 63, 64, 65, 75, 139, 1100, 2500]


@pytest.mark.parametrize("seqlen_k", LENGTHS)
@pytest.mark.parametrize("top_k", [1, 5, 64])
def test_lengths(backend: str, seqlen_k: int, top_k: int) -> None:
    score = options("rope", 4, 64)
    arguments = case(seqlen_k, batch=2, heads_q=4, heads_kv=2, top_k=top_k, **score)
    chosen = check(backend, arguments)
    assert (chosen >= 0).all() == (seqlen_k - 8 - 3 + 1 > top_k)  # the last query's own is one


@pytest.mark.parametrize("threads", [1, 4])
@pytest.mark.parametrize("seed", [0, 1])
def test_splits_do_not_change_the_choice(backend: str, threads: int, seed: int) -> None:
    """Also where many scores are equal: the earlier keys are taken."""
    arguments = case(9000, heads_q=4, heads_kv=1, head_dim=16, seed=seed)
    arguments["k"] = arguments["k"].sign()
    arguments["q"] = arguments["q"].sign()
    check(backend, arguments, threads)


def case_of_options(option: str, dtype: torch.dtype) -> dict[str, Any]:
    score = options(option, 6, 48, 50)
    return case(150, batch=2, heads_q=6, heads_kv=2, head_dim=48, distance=50, dtype=dtype, **score)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("option", OPTION_NAMES)
def test_options(backend: str, dtype: torch.dtype, option: str) -> None:
    check(backend, case_of_options(option, dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("option", OPTION_NAMES)
def test_options_on_every_instruction_set(isa, dtype, option):  # noqa: F811
    check("cpu", case_of_options(option, dtype))


def case_of_a_head_dim(head_dim: int, dtype: torch.dtype) -> dict[str, Any]:
    score = options("rope" if head_dim > 1 else "none", 8, head_dim)
    return case(90, heads_q=8, heads_kv=1, head_dim=head_dim, dtype=dtype, **score)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [1, 5, 40, 64, 80, 96, 128, 256, 260, 1000])
def test_head_dims(backend: str, dtype: torch.dtype, head_dim: int) -> None:
    check(backend, case_of_a_head_dim(head_dim, dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [1, 5, 40, 64, 80, 96, 128, 256])
def test_head_dims_on_every_instruction_set(isa, dtype, head_dim):  # noqa: F811
    check("cpu", case_of_a_head_dim(head_dim, dtype))


def test_a_long_list(backend: str) -> None:
    """More keys than lanes in a warp, or in any tile, and as many as there are."""
    for top_k in (33, 300, 989):
        chosen = check(backend, case(1000, top_k=top_k, **options("rope", 2, 64)))
        assert (chosen >= 0).all()


@pytest.mark.parametrize("n_global", [0, 3, 40])
@pytest.mark.parametrize("window", [1, 8, 60, 2**40])
@pytest.mark.parametrize("distance", [0, 7, 2**31 - 1])
def test_ranges(backend: str, n_global: int, window: int, distance: int) -> None:
    arguments = case(90, n_global=n_global, window=window, distance=distance)
    if distance < 100:
        arguments |= options("rope", 2, 64)
    check(backend, arguments)


def test_rows_stand_where_they_stand(backend: str) -> None:
    """Positions and first keys of each row's own; what no row may look at holds NaN."""
    positions = [49, 20, 3, -1, 100_000_049]
    k_start = torch.tensor([0, -29, -46, -50, 100_000_000])
    arguments = case(50, batch=5, positions=positions, **options("rope", 2, 64))
    arguments["k_start"] = k_start
    clean = check(backend, arguments)
    assert (clean[:2] >= 0).all() and (clean[2:4] == -1).all() and (clean[4] >= 100_000_000).all()
    for row, (position, first) in enumerate(zip(positions, k_start.tolist(), strict=True)):
        for j in range(50):
            if not 3 <= first + j <= position - 8:
                arguments["k"][row, :, j] = NAN
                arguments["v"][row, :, j] = NAN
    assert torch.equal(check(backend, arguments), clean)


def test_unused_slots_are_not_read(backend: str) -> None:
    """Keys beyond the query's own, as in a buffer with room to spare."""
    arguments = case(200, positions=[120], **options("rope", 2, 64))
    for name in ("k", "v"):
        arguments[name][:, :, 121:] = NAN
    check(backend, arguments)


def test_a_key_that_is_nan_is_never_chosen(backend: str) -> None:
    arguments = case(60)
    expected = check(backend, arguments)
    best = int(expected[0, 0, 0])
    arguments["k"][0, 0, best] = NAN
    chosen = call(backend, "middle_topk", **arguments)[2]
    assert not (chosen == best).any()
    assert torch.equal(chosen[0, 0, :4], expected[0, 0, 1:])


@pytest.mark.parametrize("sink", [False, True])
def test_without_lambda_keys_the_middle_stands_alone(backend: str, sink: bool) -> None:
    arguments = case(60, **({"sink_logits": torch.tensor([0.5, -1.0])} if sink else {}))
    arguments["lambda_lse"].fill_(-math.inf)
    arguments["lambda_out"].zero_()
    check(backend, arguments)


def test_lse_beside_a_sink_that_outweighs_all_keys(backend: str) -> None:
    """The sink's logit is not part of lse, however far below it the scores are."""
    check(backend, case(60, sink_logits=torch.tensor([150.0, 300.0])))


def test_strided_inputs(backend: str) -> None:
    arguments = case(70, batch=2, heads_q=4, heads_kv=2, **options("rope", 4, 64))
    for name in ("q", "k", "v", "lambda_out"):
        arguments[name] = arguments[name].transpose(1, 2).contiguous().transpose(1, 2)
    check(backend, arguments)
    arguments["k"] = arguments["k"].repeat_interleave(2, dim=-1)[..., ::2]
    arguments["v"] = arguments["v"][:, :, :70]
    check(backend, arguments)


@pytest.mark.parametrize("dtype", LOW_PRECISION, ids=str)
def test_long_low_precision(backend: str, dtype: torch.dtype) -> None:
    check(backend, case(5000, heads_q=8, heads_kv=2, dtype=dtype, **options("rope", 8, 64)))


def test_equals_a_dense_softmax(backend: str) -> None:
    """From nothing but the definition: one softmax over the Λ keys and the chosen ones."""
    n, n_global, window, top_k, distance = 80, 3, 8, 5, 6
    q, k, v = randn(3, (1, 1, 1, 64), (1, 1, n, 64), (1, 1, n, 64))
    frequencies = options("rope", 1, 64)["inv_freq"]
    out, lse = torch.ops.lminf.lambda_attn(q, k, v, n_global, window, inv_freq=frequencies)
    got, got_lse, chosen = call(
        backend,
        "middle_topk",
        q,
        k,
        v,
        out,
        lse,
        torch.tensor([n - 1]),
        n_global,
        window,
        top_k,
        distance,
        inv_freq=frequencies,
    )

    def at(d: int) -> Tensor:
        rotated = reference.clamped_rope(q.double(), torch.tensor([d]), frequencies)
        return rotated[0, 0, 0]

    keys, values = k[0, 0].double(), v[0, 0].double()
    score = torch.stack([at(min(n - 1 - j, window)) @ keys[j] for j in range(n)]) / 8
    middle = torch.stack([at(distance) @ keys[j] for j in range(n)]) / 8
    candidates = range(n_global, n - window)
    best = sorted(candidates, key=lambda j: -middle[j].item())[:top_k]
    assert chosen[0, 0].tolist() == best
    seen = [*range(n_global), *range(n - window, n)]
    logits = torch.cat([score[seen], middle[best]])
    expected = logits.softmax(0) @ values[seen + best]
    torch.testing.assert_close(got[0, 0, 0].double(), expected, rtol=0, atol=3e-6)
    torch.testing.assert_close(got_lse[0, 0, 0].double(), logits.logsumexp(0), rtol=0, atol=3e-6)
