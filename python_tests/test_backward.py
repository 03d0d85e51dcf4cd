"""The gradients of lambda_attn against those of the float64 reference, at every boundary and with
every option."""

import pytest
import torch
from cases import (
    DTYPES,
    INF,
    NAN,
    OPTION_NAMES,
    TILE_EDGES,
    check_gradients,
    gradients,
    options,
    qkv,
    randn,
)
from conftest import backend_params

HUGE = (1 << 63) - 1


@pytest.fixture(params=backend_params("cpu"))
def backend(request: pytest.FixtureRequest) -> str:
    return request.param


# seqlen_q, seqlen_k, n_global, window, max_distance
SHAPES = [
    # The length around every tile size.
    *((n, n, 4, n // 3 + 1, None) for n in TILE_EDGES),
    # The window around every tile size, from one key to more than there are.
    *((300, 300, 4, window, None) for window in (1, 2, *TILE_EDGES, 299, 300, 301, 1000, HUGE)),
    # The global tokens around every tile size, none, and more than there are.
    *((290, 290, g, 40, None) for g in (0, 1, *TILE_EDGES, 289, 290, 291, 1000, HUGE)),
    # Fewer queries than keys.
    *((n, 260, 5, 70, None) for n in (1, 2, 7, 16, 63, 64, 65, 128, 129, 259)),
    # True distances past the window.
    *((200, 200, 9, 33, 33 + more) for more in (1, 2, 15, 16, 31, 64, 100, 166, 167, 168)),
    (200, 200, 9, 33, HUGE),
    (70, 200, 150, 3, 64),
    # Several segments, with windows over one of them and over many.
    (1030, 1030, 4, 30, None),
    (1100, 1100, 5, 400, 500),
    (900, 1500, 40, 129, 140),
    # Next to nothing.
    (1, 1, 0, 1, None),
    (1, 1, 1, 1, None),
    (2, 2, 0, 1, None),
    (1, 2, 1, 1, 2),
    (3, 5, 2, 1, None),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_boundaries(backend, shape, dtype):
    seqlen_q, seqlen_k, n_global, window, max_distance = shape
    q, k, v = qkv(seqlen_q, seqlen_k, dtype=dtype)
    check_gradients(
        backend, q, k, v, n_global=n_global, window=window, max_distance=max_distance,
        **options("rope", 2, 64),
    )  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("option", OPTION_NAMES)
@pytest.mark.parametrize("max_distance", [None, 60], ids=["clamp at window", "clamp at 60"])
@pytest.mark.parametrize("with_lse", [True, False], ids=["dlse", "dout alone"])
def test_options(backend, option, max_distance, with_lse, dtype):
    q, k, v = qkv(150, 170, batch=2, heads_q=4, heads_kv=2, head_dim=32, dtype=dtype)
    score = options(option, 4, 32, max_distance or 37)
    check_gradients(
        backend, q, k, v, with_lse=with_lse, n_global=5, window=37, max_distance=max_distance,
        **score,
    )  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "head_dim", [1, 2, 3, 8, 15, 16, 17, 31, 40, 64, 65, 72, 80, 96, 128, 192, 256, 260]
)
def test_head_dims(backend, head_dim, dtype):
    q, k, v = qkv(70, 90, head_dim=head_dim, dtype=dtype)
    for option in ("none", "rope", "rope partial", "rope interleaved"):
        if head_dim == 1 and option != "none":
            continue
        check_gradients(
            backend, q, k, v, n_global=3, window=20, max_distance=33, **options(option, 2, head_dim)
        )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "heads", [(1, 1), (4, 4), (4, 1), (8, 1), (8, 2), (6, 2), (7, 1), (20, 1)], ids=str
)
@pytest.mark.parametrize("seqlen_q", [1, 3, 80])
def test_head_groups(backend, heads, seqlen_q, dtype):
    q, k, v = qkv(seqlen_q, 80, batch=2, heads_q=heads[0], heads_kv=heads[1], dtype=dtype)
    check_gradients(backend, q, k, v, n_global=4, window=17, **options("all", heads[0], 64, 17))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("option", ["none", "rope", "all"])
def test_padding(backend, option, dtype):
    """Left padding of several lengths, one row all padding, NaN in all that is padding."""
    k_start = torch.tensor([0, -1, -16, -70, -130, -100])
    q, k, v = qkv(100, 130, batch=6, heads_q=2, dtype=dtype)
    for b, start in enumerate(k_start.tolist()):
        k[b, :, :-start] = NAN
        v[b, :, :-start] = NAN
        q[b, :, : max(0, -start - 30)] = NAN
    ours = check_gradients(
        backend, q, k, v, n_global=6, window=23, k_start=k_start, **options(option, 2, 64, 23)
    )
    for b, start in enumerate(k_start.tolist()):
        assert (ours["k"][b, :, :-start] == 0).all() and (ours["v"][b, :, :-start] == 0).all()
    assert (ours["q"][4] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("offset", [0, 1, 63, 1000, (1 << 24) + 1, 200_000_000, (1 << 31) - 200])
@pytest.mark.parametrize("option", ["none", "rope", "rope float64", "all"])
def test_dropped_keys(backend, option, offset, dtype):
    """Global keys beside a sequence that starts far out; slots that no query sees hold NaN."""
    n_global, window, seqlen_q, seqlen_k = 7, 40, 90, 130
    q, k, v = qkv(seqlen_q, seqlen_k, batch=2, heads_q=4, heads_kv=2, dtype=dtype)
    global_k, global_v = randn(9, *[(2, 2, n_global, 64)] * 2, dtype=dtype)
    k_start = torch.tensor([offset, max(0, offset - 5)])
    for b in range(2):
        used = int(k_start[b]) + seqlen_k - window
        global_k[b, :, max(0, used) :] = NAN
        global_v[b, :, max(0, used) :] = INF
    for max_distance in (None, 55):
        check_gradients(
            backend, q, k, v, n_global=n_global, window=window, max_distance=max_distance,
            k_start=k_start, global_k=global_k, global_v=global_v,
            **options(option, 4, 64, max_distance or window),
        )  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("k_rotated", [0, 1, 16, 40, 65, 129, 130])
@pytest.mark.parametrize("option", ["rope", "all"])
def test_keys_that_are_rotated_already(backend, option, k_rotated, dtype):
    n_global, window, seqlen_q, seqlen_k = 5, 50, 66, 130
    q, k, v = qkv(seqlen_q, seqlen_k, batch=2, dtype=dtype)
    global_k, global_v = randn(9, *[(2, 1, n_global, 64)] * 2, dtype=dtype)
    check_gradients(
        backend, q, k, v, n_global=n_global, window=window, k_rotated=k_rotated,
        k_start=torch.tensor([3, 100_000]), global_k=global_k, global_v=global_v,
        **options(option, 2, 64, window),
    )  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("cuts", [(0, 150), (0, 1, 150), (0, 0, 64, 64, 65, 150), (0, 75, 149)])
@pytest.mark.parametrize("option", ["rope", "all"])
def test_packed_sequences(backend, option, cuts, dtype):
    q, k, v = qkv(cuts[-1], cuts[-1], heads_q=4, heads_kv=2, dtype=dtype)
    check_gradients(
        backend, q, k, v, n_global=5, window=20, max_distance=30,
        cu_seqlens=torch.tensor(cuts, dtype=torch.int32), **options(option, 4, 64, 30),
    )  # fmt: skip


# batch, heads_q, heads_kv, seqlen, head_dim, n_global, window
CUTS = [
    (1, 4, 2, 700, 64, 5, 60),
    (2, 8, 1, 600, 32, 200, 90),
    (1, 2, 2, 1500, 40, 16, 700),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("cut", CUTS, ids=str)
def test_bits_do_not_depend_on_threads(cut, dtype):
    batch, heads_q, heads_kv, seqlen, head_dim, n_global, window = cut
    q, k, v = qkv(
        seqlen, seqlen, batch=batch, heads_q=heads_q, heads_kv=heads_kv, head_dim=head_dim,
        dtype=dtype,
    )  # fmt: skip
    score = options("all", heads_q, head_dim, window)
    given = {"q": q, "k": k, "v": v, "n_global": n_global, "window": window} | score
    grad_out, grad_lse = randn(7, tuple(q.shape), tuple(q.shape[:3]))
    grad_out = grad_out.to(dtype)
    first = gradients("cpu", given, grad_out, grad_lse, threads=1)
    for threads in (1, 2, 3, 8):
        again = gradients("cpu", given, grad_out, grad_lse, threads=threads)
        for name, x in first.items():
            assert torch.equal(again[name], x), f"d{name} with {threads} threads"


def test_sequences_without_anything():
    for seqlen_q, seqlen_k, batch in ((0, 5, 1), (0, 0, 1), (3, 5, 0)):
        q, k, v = qkv(seqlen_q, seqlen_k, batch=batch)
        given = {"q": q, "k": k, "v": v, "n_global": 1, "window": 2}
        found = gradients("cpu", given, torch.zeros_like(q), None)
        for name, x in found.items():
            assert x.shape == given[name].shape and (x == 0).all()
