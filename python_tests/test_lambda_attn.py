"""lambda_attn against the float64 reference, at every boundary and with every option."""

import itertools

import pytest
import torch
from cases import (
    DTYPES,
    INF,
    NAN,
    OPTION_NAMES,
    TILE_EDGES,
    biases,
    call,
    check_lambda_attn,
    options,
    poisoned,
    qkv,
    randn,
    run_reference,
    slopes,
)
from conftest import backend_params

from lminf_cuda import reference

HUGE = (1 << 63) - 1


@pytest.fixture(
    params=backend_params("cpu", "emulated", "emulated_sm90", "ptx", "ptx_sm90", "cuda")
)
def backend(request: pytest.FixtureRequest) -> str:
    """The shared fixture's backends, and the kernel for Hopper (not in float32: conftest)."""
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
    check_lambda_attn(
        backend,
        q,
        k,
        v,
        n_global=n_global,
        window=window,
        max_distance=max_distance,
        **options("rope", 2, 64),
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("option", OPTION_NAMES)
@pytest.mark.parametrize("max_distance", [None, 60], ids=["clamp at window", "clamp at 60"])
def test_options(backend, option, max_distance, dtype):
    q, k, v = qkv(150, 170, batch=2, heads_q=4, heads_kv=2, head_dim=32, dtype=dtype)
    score = options(option, 4, 32, max_distance or 37)
    check_lambda_attn(backend, q, k, v, n_global=5, window=37, max_distance=max_distance, **score)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "head_dim", [1, 2, 3, 8, 15, 16, 17, 31, 40, 64, 65, 72, 80, 96, 128, 192, 256, 260]
)
def test_head_dims(backend, head_dim, dtype):
    q, k, v = qkv(70, 90, head_dim=head_dim, dtype=dtype)
    for option in ("none", "rope", "rope partial", "rope interleaved"):
        if head_dim == 1 and option != "none":
            continue
        check_lambda_attn(
            backend, q, k, v, n_global=3, window=20, max_distance=33, **options(option, 2, head_dim)
        )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [264, 384, 400, 511, 512, 513, 640, 1024, 2048])
def test_large_head_dims(backend, head_dim, dtype):
    q, k, v = qkv(9, 40, head_dim=head_dim, dtype=dtype)
    for option in ("rope", "all"):
        check_lambda_attn(
            backend, q, k, v, n_global=3, window=12, max_distance=20, **options(option, 2, head_dim)
        )


@pytest.mark.parametrize("head_dim", range(1, 256, 6))
def test_a_sweep_of_head_dims(backend, head_dim):
    """Every rest of a division by 8 and 16, below and above each size that is compiled."""
    q, k, v = qkv(5, 20, head_dim=head_dim, dtype=DTYPES[head_dim % 3])
    option = "all" if head_dim > 1 else "alibi"
    check_lambda_attn(backend, q, k, v, n_global=2, window=6, **options(option, 2, head_dim))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("heads", [(1, 1), (4, 4), (4, 1), (8, 1), (8, 2), (6, 2), (7, 1)], ids=str)
@pytest.mark.parametrize("seqlen_q", [1, 3, 80])
def test_head_groups(backend, heads, seqlen_q, dtype):
    q, k, v = qkv(seqlen_q, 80, batch=2, heads_q=heads[0], heads_kv=heads[1], dtype=dtype)
    check_lambda_attn(backend, q, k, v, n_global=4, window=17, **options("all", heads[0], 64, 17))


def layouts(dtype):
    """q, k, v of one shape in several layouts; what lies between the rows is NaN."""
    batch, heads, seqlen, dim = 2, 2, 75, 24
    (data,) = randn(3, (3, batch, heads, seqlen, dim), dtype=dtype)

    def into(room, view):
        views = []
        for x in data:
            view_of = view(torch.full(room, NAN, dtype=dtype))
            view_of.copy_(x)
            views.append(view_of)
        return views

    return {
        "contiguous": list(data),
        "sequence before heads": into((batch, seqlen, heads, dim), lambda x: x.transpose(1, 2)),
        "sequence first": into((seqlen, batch, heads, dim), lambda x: x.permute(1, 2, 0, 3)),
        "sliced": into(
            (batch + 1, heads + 2, seqlen + 9, dim + 5), lambda x: x[1:, 1:-1, 4:-5, 2:-3]
        ),
        "every second row": into((batch, heads, 2 * seqlen, dim), lambda x: x[:, :, ::2]),
        "dim not last": into((batch, heads, dim, seqlen), lambda x: x.mT),
        "every second dim": into((batch, heads, seqlen, 2 * dim), lambda x: x[..., ::2]),
        "fused": into(
            (batch, seqlen, heads, 3 * dim), lambda x: x[..., dim : 2 * dim].transpose(1, 2)
        ),
    }


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", layouts(torch.float32).keys())
def test_layouts(backend, layout, dtype):
    q, k, v = layouts(dtype)[layout]
    check_lambda_attn(backend, q, k, v, n_global=3, window=21, **options("rope", 2, 24))


def test_keys_expanded_over_batch_and_heads(backend):
    q, k, v = qkv(40, 40, batch=3, heads_q=4)
    k, v = (x[:1, :1].expand(3, 2, -1, -1) for x in (k, v))
    check_lambda_attn(backend, q, k, v, n_global=3, window=9, **options("rope", 4, 64))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("poison", [NAN, INF])
@pytest.mark.parametrize("option", ["none", "rope", "all"])
def test_padding_is_never_seen(backend, option, poison, dtype):
    """Left padding of several lengths, one row all padding, whatever it holds in q, k and v."""
    k_start = torch.tensor([0, -1, -16, -70, -130, -100])
    q, k, v = qkv(100, 130, batch=6, heads_q=2, dtype=dtype)
    for b, start in enumerate(k_start.tolist()):
        k[b, :, :-start] = poison
        v[b, :, :-start] = poison
        q[b, :, : max(0, -start - 30)] = poison
    out, lse = check_lambda_attn(
        backend, q, k, v, n_global=6, window=23, k_start=k_start, **options(option, 2, 64, 23)
    )
    assert (out[4] == 0).all() and (lse[4] == -INF).all()
    assert out.isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("poison", [NAN, INF, -INF])
@pytest.mark.parametrize("into", ["k", "v"])
def test_a_token_that_is_not_finite_stays_in_its_tile(backend, into, poison, dtype):
    """It reaches the rows that see it, and no row that meets none of its tile."""
    bad, seqlen = 300, 350
    q, k, v = qkv(seqlen, seqlen, heads_q=4, heads_kv=2, dtype=dtype)
    score = options("rope", 4, 64)
    clean, _ = call(backend, "lambda_attn", q, k, v, 3, 20, **score)
    where = (0, 1, bad, slice(5, 9))
    k_bad = poisoned(k, where, poison) if into == "k" else k
    v_bad = poisoned(v, where, poison) if into == "v" else v
    out, lse = call(backend, "lambda_attn", q, k_bad, v_bad, 3, 20, **score)
    assert torch.equal(out[:, :2], clean[:, :2])
    assert torch.equal(out[:, 2:, :200], clean[:, 2:, :200])
    sees = slice(bad, bad + 20)
    if into == "v":
        assert not out[:, 2:, sees, 5:9].isfinite().any()
    elif poison != poison:
        assert out[:, 2:, sees].isnan().all() and lse[:, 2:, sees].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("exponent", [20, 32, 60])
@pytest.mark.parametrize("option", ["scale", "alibi"])
def test_scores_far_beyond_a_float_exponent(backend, option, exponent, dtype):
    """Each query sees next to nothing but its best key; the next one is many powers of e behind."""
    q, k, v = qkv(90, 90, heads_q=2, head_dim=64, dtype=dtype)
    options_ = {"scale": 2.0**exponent}
    if option == "alibi":
        options_["alibi_slopes"] = torch.tensor([0.37, 0.11]) * 2.0**exponent
    truth, truth_lse = run_reference(q, k, v, True, n_global=2, window=30, **options_)
    out, lse = call(backend, "lambda_attn", q, k, v, 2, 30, **options_)
    torch.testing.assert_close(out.double(), truth, rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(lse.double(), truth_lse, rtol=1e-6, atol=0)


OFFSETS = [0, 1, 63, 1000, (1 << 24) + 1, 200_000_000, (1 << 31) - 200]


# seqlen_q, seqlen_k, n_global, window, max_distance: some keys stand between the global ones and
# the first query's window, or the two just meet or overlap.
FEW_QUERIES = [
    *((5, 400, g, 30, limit) for g in (0, 4, 70, 365, 366, 367) for limit in (None, 100, 2000)),
    (33, 500, 20, 64, 300),
    (1, 129, 3, 1, None),
    (70, 600, 16, 128, 130),
    (300, 300, 4, 30, 100),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", FEW_QUERIES, ids=str)
def test_few_queries_after_many_keys(backend, shape, dtype):
    """Keys that no query sees may hold anything, with padding before them or keys dropped."""
    seqlen_q, seqlen_k, n_global, window, max_distance = shape
    k_start = torch.tensor([0, -2, -17, 1, 1000])
    q, k, v = qkv(seqlen_q, seqlen_k, batch=len(k_start), heads_kv=2, dtype=dtype)
    for b, start in enumerate(k_start.tolist()):
        seen = slice(max(0, n_global - start), max(0, seqlen_k - seqlen_q - window + 1))
        k[b, :, seen] = NAN
        k[b, :, : max(0, -start)] = v[b, :, : max(0, -start)] = NAN
    check_lambda_attn(
        backend, q, k, v, n_global=n_global, window=window, max_distance=max_distance,
        k_start=k_start, **options("rope scaled", 2, 64),
    )  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("offset", OFFSETS)
@pytest.mark.parametrize("option", ["none", "rope", "rope float64", "all"])
def test_dropped_keys(backend, option, offset, dtype):
    """A cache that lost its first keys and kept the global ones beside it, far out as well."""
    n_global, window, seqlen_q, seqlen_k = 7, 40, 90, 130
    q, k, v = qkv(seqlen_q, seqlen_k, batch=2, heads_q=4, heads_kv=2, dtype=dtype)
    global_k, global_v = randn(9, *[(2, 2, n_global, 64)] * 2, dtype=dtype)
    k_start = torch.tensor([offset, max(0, offset - 5)])
    for max_distance in (None, 55):
        check_lambda_attn(
            backend,
            q,
            k,
            v,
            n_global=n_global,
            window=window,
            max_distance=max_distance,
            k_start=k_start,
            global_k=global_k,
            global_v=global_v,
            **options(option, 4, 64, max_distance or window),
        )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n_global", [0, 3, 16, 17, 64, 65])
@pytest.mark.parametrize("window", [1, 13, 16])
def test_global_keys_beside_a_short_sequence(backend, window, n_global, dtype):
    """Global slots that no token has reached hold NaN, beside some in one tile that are seen."""
    seqlen = 50
    q, k, v = qkv(seqlen, seqlen, dtype=dtype)
    global_k, global_v = (torch.full((1, 1, n_global, 64), NAN, dtype=dtype) for _ in range(2))
    kept = min(n_global, seqlen)
    global_k[:, :, :kept] = k[:, :, :kept]
    global_v[:, :, :kept] = v[:, :, :kept]
    common = dict(n_global=n_global, window=window, **options("rope", 2, 64))
    with_global, _ = check_lambda_attn(
        backend, q, k, v, global_k=global_k, global_v=global_v, **common
    )
    without, _ = check_lambda_attn(backend, q, k, v, **common)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(with_global, without, rtol=4 * eps, atol=4 * eps)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("k_rotated", [0, 1, 15, 16, 40, 63, 64, 65, 129, 130])
@pytest.mark.parametrize("option", ["rope", "all"])
def test_keys_that_are_rotated_already(backend, option, k_rotated, dtype):
    n_global, window, seqlen_q, seqlen_k = 5, 50, 66, 130
    q, k, v = qkv(seqlen_q, seqlen_k, batch=2, dtype=dtype)
    global_k, global_v = randn(9, *[(2, 1, n_global, 64)] * 2, dtype=dtype)
    k_start = torch.tensor([3, 100_000])
    score = options(option, 2, 64, window)
    positions = k_start[:, None] + torch.arange(seqlen_k)
    turned = reference.clamped_rope(
        k.double(),
        positions,
        score["inv_freq"],
        scaling=score.get("rope_scaling", 1.0),
        interleaved=score.get("rope_interleaved", False),
    ).to(dtype)
    k[:, :, :k_rotated] = turned[:, :, :k_rotated]
    check_lambda_attn(
        backend,
        q,
        k,
        v,
        n_global=n_global,
        window=window,
        k_start=k_start,
        global_k=global_k,
        global_v=global_v,
        k_rotated=k_rotated,
        **score,
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("option", ["none", "rope", "all"])
@pytest.mark.parametrize(
    "lengths",
    [(1,), (130,), (1, 1, 1), (63, 64, 65), (0, 16, 0, 17, 15, 0), (2, 150, 3), (31, 33, 1, 127)],
    ids=str,
)
def test_packed_sequences(backend, lengths, option, dtype):
    total = sum(lengths)
    cu_seqlens = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
    q, k, v = qkv(total, total, heads_q=4, heads_kv=2, head_dim=40, dtype=dtype)
    check_lambda_attn(
        backend,
        q,
        k,
        v,
        n_global=3,
        window=20,
        max_distance=30,
        cu_seqlens=cu_seqlens,
        **options(option, 4, 40, 30),
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("limit", [1, 5, 6, 31, 63, 64, 65, 126, 127, 128, 129, 200, 299, 300, 700])
@pytest.mark.parametrize("option", ["distance bias", "distance bias hides"])
def test_a_bias_for_every_distance(backend, option, limit, dtype):
    """Tables of many lengths, read to their ends and no further: what lies around them is NaN."""
    q, k, v = qkv(300, 300, heads_q=3, dtype=dtype)
    table = options(option, 3, 64, limit)["distance_bias"]
    room = torch.full((5, limit + 3), NAN)
    room[1:4, 1:-1] = table
    common = dict(n_global=70, window=min(limit, 64), max_distance=limit)
    expected = check_lambda_attn(backend, q, k, v, distance_bias=room[1:4, 1:-1], **common)
    got = check_lambda_attn(backend, q, k, v, distance_bias=table, **common)
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n_global", [0, 3, 40])
def test_a_hidden_distance_is_never_seen(backend, n_global, dtype):
    """Whatever weight a softcap leaves it, beside a sink, too; a row that hides all has out 0."""
    q, k, v = qkv(100, 100, heads_q=4, heads_kv=2, dtype=dtype)
    bad, hidden = 50, torch.tensor([True, False, True, False])
    table = biases(4, 30)
    table[hidden] = -INF
    # The heads that see it: at distance 0 to 12, and from n_global > 40 on at the clamp.
    table[~hidden, :13] = -INF
    sees = (torch.arange(100) >= bad + 13) & (torch.arange(100) < bad + 20)
    results = []
    for value in (0.0, 30000.0):
        v[:, :, bad] = value
        results.append(
            call(
                backend, "lambda_attn", q, k, v, n_global, 20, max_distance=30,
                distance_bias=table, softcap=3.0, sink_logits=torch.ones(4),
            )
        )  # fmt: skip
    (without, _), (out, lse) = results
    assert (out[:, hidden] == 0).all() and (lse[:, hidden] == -INF).all()
    torch.testing.assert_close(out[:, :, ~sees], without[:, :, ~sees], rtol=1e-2, atol=1e-2)
    assert (out[:, ~hidden][:, :, sees] > 1).all()


def test_a_bias_beside_alibi_and_rope_adds_up(backend):
    """A table that says what ALiBi says gives what ALiBi gives."""
    q, k, v = qkv(90, 90, heads_q=4, heads_kv=2)
    common = dict(options("rope", 4, 64), max_distance=33)
    table = -slopes(4)[:, None] * torch.arange(34)
    alibi = call(backend, "lambda_attn", q, k, v, 5, 20, alibi_slopes=slopes(4), **common)
    same = call(backend, "lambda_attn", q, k, v, 5, 20, distance_bias=table, **common)
    half = call(
        backend, "lambda_attn", q, k, v, 5, 20,
        alibi_slopes=slopes(4) / 2, distance_bias=table / 2, **common,
    )  # fmt: skip
    for result in (same, half):
        torch.testing.assert_close(result, alibi, rtol=0, atol=4e-6)


@pytest.mark.parametrize("size", [1e4, 1e30, 1e38])
def test_biases_of_any_size(backend, size):
    """One huge bias for all keys leaves the weights as they are, as far as float32 can tell."""
    q, k, v = qkv(60, 60)
    for sign in (-1, 1):
        table = torch.full((2, 21), sign * size)
        out, lse = call(backend, "lambda_attn", q, k, v, 4, 20, distance_bias=table, scale=0.0)
        mean, _ = call(backend, "lambda_attn", q, k, v, 4, 20, scale=0.0)
        torch.testing.assert_close(out, mean, rtol=0, atol=4e-6)
        torch.testing.assert_close(lse, torch.full_like(lse, sign * size), rtol=1e-3, atol=0)


def test_a_sink_is_in_out_and_not_in_lse(backend):
    q, k, v = qkv(30, 30, batch=2)
    k_start = torch.tensor([0, -30])
    sink = torch.tensor([3.0, -INF])
    out, lse = check_lambda_attn(
        backend, q, k, v, n_global=2, window=8, sink_logits=sink, k_start=k_start
    )
    plain, plain_lse = check_lambda_attn(backend, q, k, v, n_global=2, window=8, k_start=k_start)
    torch.testing.assert_close(lse, plain_lse, rtol=0, atol=1e-6)
    share = (plain_lse - sink[:, None]).sigmoid()[..., None]
    torch.testing.assert_close(out[0], (plain * share)[0], rtol=0, atol=2e-6)
    assert (out[1] == 0).all() and (lse[1] == -INF).all()


@pytest.mark.parametrize("size", [30.0, 1000.0])
def test_scores_of_any_size(backend, size):
    """exp overflows float32 at 89; the running maximum keeps every weight in range."""
    q, k, v = qkv(100, 100)
    q = q * size
    out, lse = call(backend, "lambda_attn", q, k, v, 4, 30)
    truth, truth_lse = reference.lambda_attention(
        q.double(), k.double(), v.double(), n_global=4, window=30, return_lse=True
    )
    # A score of size s is off by s * 2^-24 a few times over, and a weight by the same factor.
    tolerance = 4 * size * 2**-22
    torch.testing.assert_close(out.double(), truth, rtol=0, atol=tolerance)
    torch.testing.assert_close(lse.double(), truth_lse, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", [(1, 0, 10), (1, 0, 0), (0, 5, 10), (0, 0, 0)], ids=str)
def test_no_rows(backend, sizes, dtype):
    """No queries, no keys, no batch entries."""
    batch, seqlen_q, seqlen_k = sizes
    q, k, v = qkv(seqlen_q, seqlen_k, batch=batch, dtype=dtype)
    out, lse = call(backend, "lambda_attn", q, k, v, 2, 4, **options("rope", 2, 64))
    assert out.shape == (batch, 2, seqlen_q, 64) and lse.shape == (batch, 2, seqlen_q)


def test_queries_expanded_over_heads_and_rows(backend):
    """Strides of 0; the output has memory of its own."""
    q, k, v = qkv(40, 40, heads_q=4, dtype=torch.bfloat16)
    q = q[:, :1, :1].expand(-1, 4, 40, -1)
    check_lambda_attn(backend, q, k, v, n_global=3, window=9, **options("alibi", 4, 64))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_inputs_are_left_alone_and_calls_repeat(backend, dtype):
    q, k, v = qkv(150, 150, batch=2, heads_q=4, heads_kv=2, dtype=dtype)
    inputs = [x.clone() for x in (q, k, v)]
    arguments = dict(options("all", 4, 64, 40))
    first = call(backend, "lambda_attn", q, k, v, 4, 40, **arguments)
    second = call(backend, "lambda_attn", q, k, v, 4, 40, **arguments)
    for before, after in zip(inputs, (q, k, v), strict=True):
        assert torch.equal(before, after)
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("threads", [2, 3, 8])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("seqlen_q", [1, 64, 400])
def test_threads_change_nothing(backend, seqlen_q, dtype, threads):
    """The work may be cut otherwise, so sums may be taken in another order."""
    q, k, v = qkv(seqlen_q, 400, batch=2, heads_q=4, heads_kv=2, dtype=dtype)
    k_start = torch.tensor([0, -120])
    score = dict(options("all", 4, 64, 300), k_start=k_start)
    one = call(backend, "lambda_attn", q, k, v, 20, 300, **score)
    many = call(backend, "lambda_attn", q, k, v, 20, 300, threads=threads, **score)
    tolerance = 2e-6 if dtype == torch.float32 else torch.finfo(dtype).eps
    torch.testing.assert_close(many, one, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_small_tensors_of_any_float_dtype(backend, dtype):
    """inv_freq in half precision, slopes and sinks in any: they mean what they hold."""
    q, k, v = qkv(60, 60)
    score = {
        "inv_freq": options("rope", 2, 64)["inv_freq"].to(dtype),
        "alibi_slopes": torch.tensor([0.3, 0.1]).to(dtype),
        "sink_logits": torch.tensor([0.7, -1.1]).to(dtype),
        "distance_bias": biases(2, 11).to(dtype).mT.contiguous().mT,
    }
    check_lambda_attn(backend, q, k, v, n_global=4, window=11, **score)
