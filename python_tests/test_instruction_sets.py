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
    check_gradients,
    check_lambda_attn,
    options,
    poisoned,
    qkv,
    randn,
    run_reference,
)
from test_clamped_rope import check as check_clamped_rope
from test_lambda_decode import Cache, step

from lminf_cuda import ops

INSTRUCTION_SETS = ("amx", "avx512_bf16", "avx512", "avx2", "portable")


def runs(isa):
    """Whether this machine and build have kernels of that name; portable must run everywhere."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LMINF_CPU_ISA", isa)
        try:
            return ops.cpu_isa() == isa
        except ValueError:
            return isa == "portable"


NOT_HERE = {isa: pytest.mark.skipif(not runs(isa), reason=f"no {isa}") for isa in INSTRUCTION_SETS}


@pytest.fixture(params=[pytest.param(isa, marks=NOT_HERE[isa]) for isa in INSTRUCTION_SETS])
def isa(request, monkeypatch):
    monkeypatch.setenv("LMINF_CPU_ISA", request.param)
    assert ops.cpu_isa() == request.param
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
@pytest.mark.parametrize("poison", [NAN, INF, -INF])
def test_nothing_leaks_from_padding(isa, poison, dtype):
    q, k, v = qkv(100, 100, batch=2, dtype=dtype)
    k_start = torch.tensor([0, -45])
    for x in (q, k, v):
        x[1, :, :45] = poison
    check_lambda_attn(
        "cpu", q, k, v, n_global=3, window=20, k_start=k_start, **options("rope", 2, 64)
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nothing_leaks_from_hidden_distances(isa, dtype):
    """Head 0 does not see distance 30, head 1 does; a softcap would make -inf finite."""
    q, k, v = qkv(100, 100, dtype=dtype)
    table = biases(2, 40)
    table[0, 30] = -INF
    score = dict(distance_bias=table, softcap=3.0)
    clean, _ = check_lambda_attn("cpu", q, k, v, n_global=3, window=40, **score)
    v[:, :, 60] = 30000.0
    out, _ = call("cpu", "lambda_attn", q, k, v, 3, 40, **score)
    torch.testing.assert_close(out[0, 0, 90], clean[0, 0, 90], rtol=1e-2, atol=1e-2)
    assert (out[0, 1, 90] - clean[0, 1, 90] > 1).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("option", ["none", "alibi", "softcap"])
def test_a_visible_nan_reaches_its_rows(isa, option, dtype):
    """Also through the softcap, whatever bounds its argument."""
    q, k, v = qkv(300, 300, head_dim=64, dtype=dtype)
    out, lse = call(
        "cpu", "lambda_attn", q, poisoned(k, (0, 0, 40), NAN), v, 0, 50, **options(option, 2, 64)
    )
    rows = torch.arange(300)
    sees = (rows >= 40) & (rows - 40 < 50)
    assert out[0][:, sees].isnan().all() and lse[0][:, sees].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", ["subnormal keys", "subnormal values", "vanishing weights"])
def test_subnormals_and_vanishing_weights(isa, monkeypatch, case, dtype):
    """Subnormal inputs count as themselves or as 0, and weights underflow to 0, as on the portable
    path."""
    q, k, v = qkv(200, 200, head_dim=64, dtype=dtype)
    tiny = torch.finfo(dtype).smallest_normal
    atol = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 5e-3}[dtype]
    if case == "subnormal keys":
        k = k * tiny / 8
    elif case == "subnormal values":
        v, atol = v * tiny / 8, tiny
    else:
        q, k = 8 * q, 8 * k
    results = []
    for path in (isa, "portable"):
        monkeypatch.setenv("LMINF_CPU_ISA", path)
        results.append(call("cpu", "lambda_attn", q, k, v, 3, 70))
    for ours, portable in zip(*results, strict=True):
        assert ours.isfinite().all()
        torch.testing.assert_close(ours, portable, rtol=1e-2, atol=atol)


# heads_q, heads_kv, head_dim, window
SCRATCH_SHAPES = [
    (1, 1, 64, 256),
    (2, 2, 128, 1024),
    (2, 1, 128, 1 << 40),
    (16, 1, 128, 1 << 40),
    (40, 2, 64, 3000),
    (2, 1, 256, 1 << 40),
    (16, 1, 256, 1 << 40),
    (1, 1, 512, 1 << 40),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SCRATCH_SHAPES, ids=str)
def test_scratch_memory_stays_small(isa, shape, dtype):
    """A thread holds less than 4 MB, and no more for a text twice as long (here mostly padding)."""
    heads_q, heads_kv, head_dim, window = shape
    used = []
    for length in (20_000, 40_000):
        q = torch.zeros(1, heads_q, 1200, head_dim, dtype=dtype)
        k = torch.zeros(1, heads_kv, 1, head_dim, dtype=dtype).expand(-1, -1, length, -1)
        k_start = torch.tensor([300 - length])
        ops.cpu_scratch_bytes()
        call("cpu", "lambda_attn", q, k, k, 16, window, k_start=k_start)
        used.append(ops.cpu_scratch_bytes())
    assert 0 < used[0] < 4_000_000 and used[1] == used[0]


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


# heads_q, heads_kv, head_dim
GROUPS = [(1, 1, 96), (4, 2, 160), (3, 1, 64), (8, 1, 128), (12, 1, 256), (17, 1, 80)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("group", GROUPS, ids=str)
def test_decode_over_a_long_window(isa, group, dtype):
    """Many blocks of keys on both sides of the seam, for each number of heads that share a key."""
    heads_q, heads_kv, head_dim = group
    window, n_global = 4300, 70
    caches = [(1, heads_kv, window + 5, head_dim)] * 2 + [(1, heads_kv, n_global, head_dim)] * 2
    cache = Cache(*randn(3, *caches, dtype=dtype))
    q, k, v = randn(4, (1, heads_q, 1, head_dim), *[(1, heads_kv, 1, head_dim)] * 2, dtype=dtype)
    position = torch.tensor([window + 5 + 2100])
    step("cpu", q, k, v, cache, position, window, **options("rope", heads_q, head_dim))


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


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("exponent", [20, 32, 60])
def test_scores_far_beyond_a_float_exponent(isa, dtype, exponent):
    """Each query sees next to nothing but its best key; the next one is many powers of e behind."""
    q, k, v = qkv(90, 90, heads_q=2, head_dim=24, dtype=dtype)
    options_ = {"scale": 2.0**exponent, "inv_freq": None}
    truth, truth_lse = run_reference(q, k, v, True, n_global=2, window=30, **options_)
    out, lse = call("cpu", "lambda_attn", q, k, v, 2, 30, **options_)
    torch.testing.assert_close(out.double(), truth, rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(lse.double(), truth_lse, rtol=1e-6, atol=0)
    ring_k, ring_v = torch.full((2, 1, 1, 30, 24), NAN).to(dtype)
    slots = [x[:, :, :2].clone() for x in (k, v)]
    for n in range(60, 90):
        ring_k[:, :, n % 30], ring_v[:, :, n % 30] = k[:, :, n], v[:, :, n]
    last = [x[:, :, 89:] for x in (q, k, v)]
    out, lse = call(
        "cpu", "lambda_decode", *last, ring_k, ring_v, *slots, torch.tensor([89]), 30, **options_
    )
    torch.testing.assert_close(out.double(), truth[:, :, 89:], rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(lse.double(), truth_lse[:, :, 89:], rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_references_that_move_within_a_tile(isa, dtype):
    """The softmax's reference comes from the latest keys: here older ones outweigh them, head by
    head by a growing bias, by one that jumps about, by one distance alone, or since the latest 150
    are hidden."""
    distance = torch.arange(501.0)
    jumps = 60.0 * randn(7, 26)[0].repeat_interleave(20)[:501]
    alone = torch.where(distance == 333, 700.0, -700.0)
    hidden = torch.where(distance < 150, -INF, 0.1 * distance)
    table = torch.stack([0.5 * distance, jumps, alone, hidden])
    q, k, v = qkv(600, 600, heads_q=4, heads_kv=2, head_dim=32, dtype=dtype)
    score = dict(n_global=5, window=450, max_distance=500, distance_bias=table)
    truth, truth_lse = run_reference(q, k, v, True, **score)
    score.pop("n_global"), score.pop("window")
    out, lse = call("cpu", "lambda_attn", q, k, v, 5, 450, **score)
    # Scores of some hundreds are rounded to multiples of 2^-15.
    bound = 2e-4 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(out.double(), truth, rtol=bound, atol=bound)
    torch.testing.assert_close(lse.double(), truth_lse, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gradients_of_shapes(isa, shape, dtype):
    seqlen_q, seqlen_k, heads_q, heads_kv, head_dim, n_global, window, max_distance = shape
    q, k, v = qkv(
        seqlen_q, seqlen_k, heads_q=heads_q, heads_kv=heads_kv, head_dim=head_dim, dtype=dtype
    )
    score = options("rope" if head_dim > 1 else "none", heads_q, head_dim)
    check_gradients(
        "cpu", q, k, v, n_global=n_global, window=window, max_distance=max_distance, **score
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("option", OPTION_NAMES)
def test_gradients_of_options(isa, option, dtype):
    """Over several segments and blocks, with global keys beside."""
    q, k, v = qkv(400, 410, heads_q=4, heads_kv=2, head_dim=48, dtype=dtype)
    global_k, global_v = randn(9, *[(1, 2, 5, 48)] * 2, dtype=dtype)
    check_gradients(
        "cpu", q, k, v, n_global=5, window=137, max_distance=150, k_start=torch.tensor([200]),
        global_k=global_k, global_v=global_v, **options(option, 4, 48, 150),
    )  # fmt: skip
