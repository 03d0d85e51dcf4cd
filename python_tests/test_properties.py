"""lambda_attn on random shapes and options, and the laws it obeys whatever the input."""

import itertools
from typing import Any

import pytest
import torch
from cases import (
    DTYPES,
    INF,
    NAN,
    biases,
    call,
    check_lambda_attn,
    frequencies,
    options,
    qkv,
    randn,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

LAW = settings(
    max_examples=25,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
SEARCH = settings(LAW, max_examples=120)

# The same sums in another order: float32 results differ by a few 2^-24 of their terms.
SAME = {"rtol": 0, "atol": 4e-6}


@st.composite
def arguments(draw: st.DrawFn) -> dict[str, Any]:
    """Arguments of one call: q, k, v and every option."""
    seqlen_k = draw(st.one_of(st.integers(1, 40), st.integers(41, 280)))
    seqlen_q = draw(st.one_of(st.just(seqlen_k), st.integers(1, seqlen_k)))
    batch = draw(st.integers(1, 3))
    heads_kv, group = draw(st.sampled_from([(1, 1), (1, 4), (2, 1), (2, 2), (1, 8), (2, 3)]))
    heads_q = heads_kv * group
    head_dim = draw(st.sampled_from([1, 2, 5, 8, 16, 24, 33, 64, 80, 100, 128]))
    dtype = draw(st.sampled_from(DTYPES))
    seed = draw(st.integers(0, 1000))
    q, k, v = qkv(
        seqlen_q,
        seqlen_k,
        batch=batch,
        heads_q=heads_q,
        heads_kv=heads_kv,
        head_dim=head_dim,
        dtype=dtype,
        seed=seed,
    )
    window = draw(st.one_of(st.integers(1, 20), st.integers(1, 300)))
    n_global = draw(st.one_of(st.integers(0, 20), st.integers(0, 300)))
    given_: dict[str, Any] = dict(q=q, k=k, v=v, n_global=n_global, window=window)
    if draw(st.booleans()):
        given_["max_distance"] = window + draw(st.integers(0, 100))
    if head_dim > 1 and draw(st.booleans()):
        rotary_dim = 2 * draw(st.integers(1, head_dim // 2))
        given_["inv_freq"] = frequencies(rotary_dim, draw(st.sampled_from([100.0, 1e4, 1e6])))
        given_["rope_interleaved"] = draw(st.booleans())
        given_["rope_scaling"] = draw(st.sampled_from([1.0, 0.7, 1.3]))
    if draw(st.booleans()):
        given_["alibi_slopes"] = torch.tensor(
            draw(st.lists(st.floats(0, 0.5), min_size=heads_q, max_size=heads_q))
        )
    if draw(st.booleans()):
        table = biases(heads_q, given_.get("max_distance", window), seed + 2)
        if draw(st.booleans()):
            table[table > draw(st.floats(-2, 2))] = -INF
        given_["distance_bias"] = table
    if draw(st.booleans()):
        given_["sink_logits"] = torch.tensor(
            draw(
                st.lists(
                    st.sampled_from([-INF, -3.0, 0.0, 2.0]), min_size=heads_q, max_size=heads_q
                )
            )
        )
    if draw(st.booleans()):
        given_["softcap"] = draw(st.sampled_from([0.5, 5.0, 50.0]))
    if draw(st.booleans()):
        given_["scale"] = draw(st.sampled_from([0.05, 0.2])) / head_dim**0.5
    world = draw(st.sampled_from(["plain", "padded", "packed", "dropped"]))
    if world == "padded":
        starts = draw(st.lists(st.integers(-seqlen_k, 0), min_size=batch, max_size=batch))
        given_["k_start"] = torch.tensor(starts)
        for b, start in enumerate(starts):
            k[b, :, :-start] = NAN
            v[b, :, :-start] = INF
    elif world == "packed" and batch == 1 and seqlen_q == seqlen_k:
        cuts = sorted(draw(st.lists(st.integers(0, seqlen_k), max_size=4)))
        given_["cu_seqlens"] = torch.tensor([0, *cuts, seqlen_k], dtype=torch.int32)
    elif world == "dropped":
        starts = draw(
            st.lists(
                st.sampled_from([-3, 0, 1, 50, 1000, 200_000_000]), min_size=batch, max_size=batch
            )
        )
        given_["k_start"] = torch.tensor(starts)
        shape = (batch, heads_kv, n_global, head_dim)
        given_["global_k"], given_["global_v"] = randn(seed + 1, shape, shape, dtype=dtype)
    return given_


@SEARCH
@given(arguments=arguments())
def test_equals_the_reference(backend, arguments):
    check_lambda_attn(backend, **arguments)


def attend(backend, q, k, v, n_global, window, **rest):
    return call(backend, "lambda_attn", q, k, v, n_global, window, **rest)


def assert_same(actual, expected):
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, **SAME)


@LAW
@given(
    offset=st.sampled_from([1, 64, 1000, (1 << 24) + 1, 200_000_000, (1 << 31) - 200]),
    window=st.integers(1, 150),
    seqlen_q=st.integers(1, 130),
    interleaved=st.booleans(),
)
def test_only_distances_count(backend, offset, window, seqlen_q, interleaved):
    """Moving all positions together changes nothing in the window or at the clamp."""
    q, k, v = qkv(seqlen_q, 130)
    score = dict(inv_freq=frequencies(64), rope_interleaved=interleaved)
    plain = attend(backend, q, k, v, 0, window, **score)
    moved = attend(backend, q, k, v, 0, window, k_start=torch.tensor([offset]), **score)
    assert_same(moved, plain)
    global_k, global_v = randn(1, (1, 1, 5, 64), (1, 1, 5, 64))
    beside = dict(score, global_k=global_k, global_v=global_v)
    starts = torch.tensor([window + 5]), torch.tensor([min(offset + window + 5, 2**31 - 200)])
    near, far = (attend(backend, q, k, v, 5, window, k_start=x, **beside) for x in starts)
    assert_same(far, near)


@LAW
@given(
    chunk=st.integers(1, 100),
    window=st.integers(1, 90),
    n_global=st.integers(0, 40),
    further=st.sampled_from([0, 1, 20, 1000]),
    rotated=st.booleans(),
)
def test_chunks_equal_the_whole(backend, chunk, window, n_global, further, rotated):
    """Chunked prefill: each chunk brings the last `window` keys and the global ones beside them."""
    seqlen = 200
    q, k, v = qkv(seqlen, seqlen, heads_q=4, heads_kv=2)
    score = dict(
        options("rope partial", 4, 64),
        max_distance=window + further,
        distance_bias=biases(4, window + further),
    )
    expected = attend(backend, q, k, v, n_global, window, **score)
    turned = call(backend, "clamped_rope", k, torch.arange(seqlen), score["inv_freq"])
    parts = []
    for lo in range(0, seqlen, chunk):
        hi = min(lo + chunk, seqlen)
        first = max(0, lo - window + 1)
        slots = torch.full((2, 1, 2, n_global, 64), NAN)
        kept = min(n_global, hi)
        slots[0, :, :, :kept], slots[1, :, :, :kept] = k[:, :, :kept], v[:, :, :kept]
        past = turned if rotated else k
        parts.append(
            attend(
                backend,
                q[:, :, lo:hi],
                torch.cat([past[:, :, first:lo], k[:, :, lo:hi]], dim=2),
                v[:, :, first:hi],
                n_global,
                window,
                k_start=torch.tensor([first]),
                global_k=slots[0],
                global_v=slots[1],
                k_rotated=lo - first if rotated else 0,
                **score,
            )
        )
    assert_same([torch.cat(x, dim=2) for x in zip(*parts, strict=True)], expected)


@LAW
@given(
    lengths=st.lists(st.integers(0, 90), min_size=1, max_size=5).filter(any),
    window=st.integers(1, 60),
    n_global=st.integers(0, 30),
)
def test_packed_sequences_equal_separate_calls(backend, lengths, window, n_global):
    total = sum(lengths)
    q, k, v = qkv(total, total, heads_q=4, heads_kv=2, head_dim=32)
    score = options("all", 4, 32, window)
    ends = list(itertools.accumulate(lengths))
    cu_seqlens = torch.tensor([0, *ends], dtype=torch.int32)
    packed = attend(backend, q, k, v, n_global, window, cu_seqlens=cu_seqlens, **score)
    for lo, hi in zip([0, *ends], ends, strict=False):
        one = attend(
            backend, q[:, :, lo:hi], k[:, :, lo:hi], v[:, :, lo:hi], n_global, window, **score
        )
        assert_same([x[:, :, lo:hi] for x in packed], one)


@LAW
@given(
    pads=st.lists(st.integers(0, 70), min_size=1, max_size=4),
    window=st.integers(1, 60),
    n_global=st.integers(0, 30),
)
def test_left_padding_changes_nothing(backend, pads, window, n_global):
    """A row of length 70 - pad behind pad slots of NaN equals that row by itself."""
    q, k, v = qkv(70, 70, batch=len(pads), head_dim=32)
    score = options("all", 2, 32, window)
    for b, pad in enumerate(pads):
        for x in (q, k, v):
            x[b, :, :pad] = NAN
    padded = attend(backend, q, k, v, n_global, window, k_start=-torch.tensor(pads), **score)
    for b, pad in enumerate(pads):
        alone = attend(
            backend, *(x[b : b + 1, :, pad:] for x in (q, k, v)), n_global, window, **score
        )
        assert_same([x[b : b + 1, :, pad:] for x in padded], alone)
        assert (padded[0][b, :, :pad] == 0).all() and (padded[1][b, :, :pad] == -INF).all()


@LAW
@given(
    heads=st.sampled_from([(2, 1), (4, 1), (8, 1), (4, 2), (6, 2)]),
    seqlen_q=st.integers(1, 80),
    n_global=st.integers(0, 30),
)
def test_grouped_heads_equal_repeated_heads(backend, heads, seqlen_q, n_global):
    q, k, v = qkv(seqlen_q, 80, batch=2, heads_q=heads[0], heads_kv=heads[1])
    score = options("all", heads[0], 64, 25)
    grouped = attend(backend, q, k, v, n_global, 25, **score)
    repeated = (x.repeat_interleave(heads[0] // heads[1], dim=1) for x in (k, v))
    assert_same(attend(backend, q, *repeated, n_global, 25, **score), grouped)


@LAW
@given(n_global=st.integers(0, 60), window=st.integers(1, 60), split=st.integers(1, 99))
def test_the_last_queries_are_the_last_rows(backend, n_global, window, split):
    q, k, v = qkv(100, 100)
    score = options("all", 2, 64, window)
    whole = attend(backend, q, k, v, n_global, window, **score)
    tail = attend(backend, q[:, :, split:], k, v, n_global, window, **score)
    assert_same(tail, [x[:, :, split:] for x in whole])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_visible_key_gives_its_value(backend, dtype):
    q, k, v = qkv(140, 140, dtype=dtype)
    out, _ = attend(backend, q, k, v, 0, 1, inv_freq=frequencies(64))
    torch.testing.assert_close(out, v.expand_as(out), rtol=torch.finfo(dtype).eps, atol=0)
