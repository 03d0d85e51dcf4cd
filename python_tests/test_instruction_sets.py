"""A core of the op tests under every instruction set that this machine can run."""

import pytest
import torch
from cases import (
    DTYPES,
    INF,
    NAN,
    OPTION_NAMES,
    biases,
    call,
    check_lambda_attn,
    options,
    poisoned,
    qkv,
    randn,
)
from test_clamped_rope import check as check_clamped_rope
from test_lambda_decode import Cache, step

from lminf_cuda import ops

INSTRUCTION_SETS = ("amx", "avx512_bf16", "avx512", "avx2", "portable")


@pytest.fixture(params=INSTRUCTION_SETS)
def isa(request, monkeypatch):
    monkeypatch.setenv("LMINF_CPU_ISA", request.param)
    try:
        assert ops.cpu_isa() == request.param
    except ValueError:
        assert request.param != "portable", "portable must run everywhere"
        pytest.skip(f"this machine or build has no {request.param} kernels")
    return request.param


# seqlen_q, seqlen_k, heads_q, heads_kv, head_dim, n_global, window, max_distance
SHAPES = [
    (1, 1, 1, 1, 64, 0, 1, None),
    (33, 33, 2, 1, 5, 3, 7, None),
    (65, 65, 2, 2, 40, 0, 17, None),
    (130, 150, 4, 1, 64, 5, 33, 80),
    (1, 200, 8, 1, 128, 16, 100, None),
    (129, 129, 8, 2, 80, 17, 64, None),
    (257, 257, 2, 1, 128, 65, 63, None),
    (70, 70, 2, 1, 256, 4, 31, 50),
    (100, 300, 3, 3, 96, 130, 129, None),
    (50, 50, 2, 1, 1, 4, 9, None),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(isa, shape, dtype):
    seqlen_q, seqlen_k, heads_q, heads_kv, head_dim, n_global, window, max_distance = shape
    q, k, v = qkv(
        seqlen_q, seqlen_k, heads_q=heads_q, heads_kv=heads_kv, head_dim=head_dim, dtype=dtype
    )
    score = options("rope" if head_dim > 1 else "none", heads_q, head_dim)
    check_lambda_attn(
        "cpu", q, k, v, n_global=n_global, window=window, max_distance=max_distance, **score
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("option", OPTION_NAMES)
def test_options(isa, option, dtype):
    q, k, v = qkv(90, 110, batch=2, heads_q=4, heads_kv=2, head_dim=48, dtype=dtype)
    check_lambda_attn(
        "cpu", q, k, v, n_global=5, window=37, max_distance=50, **options(option, 4, 48, 50)
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nothing_leaks_from_padding_or_hidden_keys(isa, dtype):
    n_global, window, bad = 3, 20, 70
    q, k, v = qkv(100, 100, batch=2, dtype=dtype)
    k_start = torch.tensor([0, -45])
    for x in (q, k, v):
        x[1, :, :45] = NAN
    score = options("rope", 2, 64)
    clean, _ = check_lambda_attn(
        "cpu", q, k, v, n_global=n_global, window=window, k_start=k_start, **score
    )
    rows = torch.arange(100)
    sees = (rows >= bad) & (rows - bad < window)
    for into in ("k", "v"):
        k_bad = poisoned(k, (0, 0, bad), NAN) if into == "k" else k
        v_bad = poisoned(v, (0, 0, bad), NAN) if into == "v" else v
        out, _ = call(
            "cpu", "lambda_attn", q, k_bad, v_bad, n_global, window, k_start=k_start, **score
        )
        torch.testing.assert_close(out[0, :, ~sees], clean[0, :, ~sees], rtol=1e-2, atol=1e-2)
        torch.testing.assert_close(out[1], clean[1], rtol=1e-2, atol=1e-2)
        assert out[0][:, sees].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nothing_leaks_from_hidden_distances(isa, dtype):
    """Head 0 does not see distance 30, head 1 does; a softcap would make -inf finite."""
    q, k, v = qkv(100, 100, dtype=dtype)
    table = biases(2, 40)
    table[0, 30] = -INF
    score = dict(distance_bias=table, softcap=3.0)
    clean, _ = check_lambda_attn("cpu", q, k, v, n_global=3, window=40, **score)
    for x in (k, v):
        x[:, :, 60] = NAN
    out, _ = call("cpu", "lambda_attn", q, k, v, 3, 40, **score)
    torch.testing.assert_close(out[0, 0, 90], clean[0, 0, 90], rtol=1e-2, atol=1e-2)
    assert out[0, 1, 90].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dropped_and_rotated_keys_far_out(isa, dtype):
    q, k, v = qkv(70, 130, batch=2, heads_q=4, heads_kv=2, dtype=dtype)
    global_k, global_v = randn(9, *[(2, 2, 7, 64)] * 2, dtype=dtype)
    for k_rotated in (0, 60):
        check_lambda_attn(
            "cpu",
            q,
            k,
            v,
            n_global=7,
            window=40,
            max_distance=55,
            k_start=torch.tensor([(1 << 24) + 1, 200_000_000]),
            global_k=global_k,
            global_v=global_v,
            k_rotated=k_rotated,
            **options("rope interleaved", 4, 64),
        )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [5, 64, 80, 128])
@pytest.mark.parametrize("option", ["rope", "all"])
def test_decode(isa, option, head_dim, dtype):
    """A cache that starts out as NaN, over its seam; then a full one far out."""
    window, n_global, score = 17, 5, options(option, 8, head_dim, 17)
    cache = Cache.empty(2, 2, window, n_global, head_dim, dtype)
    shapes = [(2, 8, 40, head_dim), *[(2, 2, 40, head_dim)] * 2]
    q, k, v = randn(0, *shapes, dtype=dtype)
    for n in range(40):
        now = slice(n, n + 1)
        positions = torch.tensor([n, n - 3])
        step("cpu", q[:, :, now], k[:, :, now], v[:, :, now], cache, positions, window, **score)
    full = [(2, 2, 300, head_dim)] * 2 + [(2, 2, n_global, head_dim)] * 2
    cache = Cache(*randn(1, *full, dtype=dtype))
    positions = torch.tensor([200_000_000, 400])
    score = options(option, 8, head_dim, 290)
    step("cpu", *(x[:, :, :1] for x in (q, k, v)), cache, positions, 290, **score)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dims", [(3, 2), (40, 20), (64, 64), (128, 96)], ids=str)
def test_clamped_rope(isa, dims, interleaved, dtype):
    (x,) = randn(2, (2, 3, 37, dims[0]), dtype=dtype)
    inv_freq = options("rope", 1, dims[1])["inv_freq"]
    for start in (-20, 200_000_000):
        check_clamped_rope(
            "cpu", x, torch.arange(37) + start, inv_freq, scaling=1.2, interleaved=interleaved
        )


@pytest.mark.parametrize("name", ["sse9", "AVX2", " avx2"])
def test_an_unknown_instruction_set_is_refused(monkeypatch, name):
    monkeypatch.setenv("LMINF_CPU_ISA", name)
    q, k, v = qkv(4, 4)
    with pytest.raises(ValueError, match="LMINF_CPU_ISA"):
        torch.ops.lminf.lambda_attn(q, k, v, 1, 2)
    with pytest.raises(ValueError, match="portable"):
        ops.cpu_isa()
