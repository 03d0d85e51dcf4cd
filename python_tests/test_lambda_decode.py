"""lambda_decode against the reference, token by token over a cache that starts out as NaN."""

import dataclasses

import pytest
import torch
from cases import (
    DTYPES,
    INF,
    NAN,
    OPTION_NAMES,
    assert_low_precision_lse,
    assert_right,
    biases,
    call,
    check_lambda_attn,
    options,
    randn,
    torch_threads,
)
from torch import Tensor

from lminf_cuda import reference


@dataclasses.dataclass
class Cache:
    """ring_k, ring_v [B, Hkv, C, D] and global_k, global_v [B, Hkv, G, D]."""

    ring_k: Tensor
    ring_v: Tensor
    global_k: Tensor
    global_v: Tensor

    @staticmethod
    def empty(batch, heads, capacity, n_global, head_dim, dtype):
        """Every tensor is a slice of a larger one, and all of it NaN."""

        def slots(n):
            room = torch.full((2, batch, heads + 1, n + 3, head_dim), NAN, dtype=dtype)
            return room[1, :, 1:, 2 : n + 2]

        return Cache(slots(capacity), slots(capacity), slots(n_global), slots(n_global))

    def tensors(self):
        return [self.ring_k, self.ring_v, self.global_k, self.global_v]

    def copy(self, dtype):
        return Cache(*(x.to(dtype, copy=True) for x in self.tensors()))


@torch_threads(1)
def step(backend, q, k, v, cache, positions, window, **score):
    """One call of the op; out, lse and all four caches are compared with the reference's."""
    dtype = q.dtype
    wide, same = cache.copy(torch.float64), cache.copy(dtype)
    before = cache.copy(dtype)
    out, lse = call(backend, "lambda_decode", q, k, v, *cache.tensors(), positions, window, **score)
    truth, truth_lse = reference.lambda_decode(
        q.double(), k.double(), v.double(), *wide.tensors(), positions, window, **score
    )
    eager, eager_lse = reference.lambda_decode(q, k, v, *same.tensors(), positions, window, **score)
    assert out.dtype == dtype and lse.dtype == torch.float32
    assert out.shape == q.shape and lse.shape == q.shape[:3] and lse.is_contiguous()
    if dtype == torch.float32:
        assert_right("out", out, truth)
        assert_right("lse", lse, truth_lse)
    else:
        assert_right("out", out, truth, eager)
        assert_low_precision_lse(lse, truth_lse, eager_lse, dtype)

    # Only the slots of this token are written; values and global keys to the bit, rotated keys to
    # the rounding of their dtype.
    for name in ("ring_v", "global_k", "global_v"):
        ours, theirs = getattr(cache, name), getattr(same, name)
        assert torch.equal(ours.isnan(), theirs.isnan()), name
        assert torch.equal(ours.nan_to_num(), theirs.nan_to_num()), name
    capacity = cache.ring_k.shape[2]
    written = torch.zeros(cache.ring_k.shape, dtype=torch.bool)
    for b, position in enumerate(positions.tolist()):
        if position >= 0:
            written[b, :, position % capacity] = True
    untouched = cache.ring_k[~written], before.ring_k[~written]
    assert torch.equal(untouched[0].isnan(), untouched[1].isnan())
    assert torch.equal(untouched[0].nan_to_num(), untouched[1].nan_to_num())
    if written.any():
        new, exact = cache.ring_k[written].double(), wide.ring_k[written]
        unit = max(torch.finfo(dtype).eps / 2, 6e-7)
        assert (new - exact).abs().max() <= unit * max(1.0, exact.abs().max().item())
    return out, lse


# heads_q, heads_kv, head_dim, window, capacity, n_global, max_distance, steps
SEQUENCES = [
    (2, 1, 64, 8, 8, 4, None, 30),
    (2, 1, 64, 8, 8, 4, 11, 30),
    (4, 4, 32, 8, 11, 0, None, 30),
    (8, 1, 80, 16, 16, 3, 40, 50),
    (8, 2, 128, 33, 64, 17, None, 80),
    (4, 1, 7, 5, 5, 20, None, 40),
    (1, 1, 2, 1, 1, 1, None, 10),
    (2, 2, 1, 1, 3, 0, None, 10),
    (2, 1, 256, 6, 6, 2, 1 << 60, 20),
    (2, 1, 65, 40, 40, 4, None, 20),
]
# Past the head dims that the tensor-core kernel and the plain one's usual tiles take.
LARGE = [(2, 1, d, 3, 5, 2, 5, 8) for d in (264, 400, 512, 513, 1024, 2048)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sequence", SEQUENCES + LARGE, ids=str)
@pytest.mark.parametrize("option", ["none", "rope", "all"])
def test_token_by_token(backend, option, sequence, dtype):
    """Three rows: one from the start, one that joins late, one that pauses."""
    heads_q, heads_kv, head_dim, window, capacity, n_global, max_distance, steps = sequence
    if head_dim == 1 and option != "none":
        pytest.skip("one dim makes no pair")
    cache = Cache.empty(3, heads_kv, capacity, n_global, head_dim, dtype)
    limit = max_distance or window
    score = dict(
        options(option, heads_q, head_dim, limit if limit < 1000 else None),
        max_distance=max_distance,
    )
    shapes = [(3, heads_q, steps, head_dim), *[(3, heads_kv, steps, head_dim)] * 2]
    q, k, v = randn(0, *shapes, dtype=dtype)
    paused = 0
    for n in range(steps):
        now = slice(n, n + 1)
        idle = n in (5, 6)
        positions = torch.tensor([n, n - 4, -1 if idle else n - paused])
        paused += idle
        out, lse = step(
            backend, q[:, :, now], k[:, :, now], v[:, :, now], cache, positions, window, **score
        )
        for b in range(3):
            if positions[b] < 0:
                assert (out[b] == 0).all() and (lse[b] == -INF).all()
            else:
                assert out[b].isfinite().all() and lse[b].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("option", OPTION_NAMES)
def test_equals_one_forward(backend, option, dtype):
    """Decoding gives the rows of lambda_attn over the whole sequence."""
    window, n_global, steps = 9, 3, 40
    q, k, v = randn(1, (2, 4, steps, 32), *[(2, 2, steps, 32)] * 2, dtype=dtype)
    score = dict(options(option, 4, 32, 14), max_distance=14)
    expected, expected_lse = check_lambda_attn(
        backend, q, k, v, n_global=n_global, window=window, **score
    )
    cache = Cache.empty(2, 2, window, n_global, 32, dtype)
    rows = []
    for n in range(steps):
        now = slice(n, n + 1)
        positions = torch.full((2,), n)
        rows.append(
            call(
                backend,
                "lambda_decode",
                *(x[:, :, now] for x in (q, k, v)),
                *cache.tensors(),
                positions,
                window,
                **score,
            )
        )
    # Ring keys are rounded to the dtype after they are rotated, in both; the order of sums differs.
    tolerance = 4e-6 if dtype == torch.float32 else 4 * torch.finfo(dtype).eps
    out, lse = (torch.cat(parts, dim=2) for parts in zip(*rows, strict=True))
    torch.testing.assert_close(out, expected, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(lse, expected_lse, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("option", ["none", "rope", "rope float64", "all"])
@pytest.mark.parametrize("position", [300, (1 << 24) + 1, 200_000_000, (1 << 31) - 1])
def test_far_out(backend, position, option, dtype):
    """A full cache of 260 slots at any position; a window of several tiles."""
    window, capacity, n_global = 257, 260, 16
    positions = torch.tensor([position, position - 1, 270])
    caches = randn(2, *[(3, 2, capacity, 64)] * 2, *[(3, 2, n_global, 64)] * 2, dtype=dtype)
    q, k, v = randn(3, (3, 8, 1, 64), (3, 2, 1, 64), (3, 2, 1, 64), dtype=dtype)
    # Slots behind the window are in the ring and not seen.
    cache = Cache(*caches)
    for b, p in enumerate(positions.tolist()):
        for behind in range(window, capacity):
            cache.ring_k[b, :, (p - behind) % capacity] = NAN
            cache.ring_v[b, :, (p - behind) % capacity] = INF
    score = options(option, 8, 64, 280)
    step(backend, q, k, v, cache, positions, window, max_distance=280, **score)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("window", [1, 15, 16, 17, 63, 64, 65, 127, 128, 129, 1000])
@pytest.mark.parametrize("n_global", [0, 1, 17, 64, 130])
def test_boundaries(backend, n_global, window, dtype):
    """One row at each stage: the first token, a part-filled ring, the seam, and long after."""
    positions = torch.tensor([0, window // 2, window - 1, window, window + n_global, 5000])
    batch, capacity = len(positions), window + 2
    cache = Cache.empty(batch, 1, capacity, n_global, 64, dtype)
    q, k, v, ring_k, ring_v, global_k, global_v = randn(
        4,
        (batch, 2, 1, 64),
        *[(batch, 1, 1, 64)] * 2,
        *[(batch, 1, capacity, 64)] * 2,
        *[(batch, 1, n_global, 64)] * 2,
        dtype=dtype,
    )
    for b, p in enumerate(positions.tolist()):
        filled = [j % capacity for j in range(max(0, p - window + 1), p)]
        cache.ring_k[b, :, filled] = ring_k[b, :, filled]
        cache.ring_v[b, :, filled] = ring_v[b, :, filled]
        cache.global_k[b, :, :p] = global_k[b, :, :p]
        cache.global_v[b, :, :p] = global_v[b, :, :p]
    step(backend, q, k, v, cache, positions, window, **options("rope", 2, 64))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("limit", [1, 17, 63, 64, 65, 130, 200, 700])
@pytest.mark.parametrize("option", ["distance bias", "distance bias hides"])
def test_a_bias_for_every_distance(backend, option, limit, dtype):
    """Tables of many lengths, at positions that no distance is clamped at, and far out."""
    positions = torch.tensor([3, 199, 201, 5000])
    window, n_global = min(limit, 150), 70
    caches = randn(2, *[(4, 1, 160, 64)] * 2, *[(4, 1, n_global, 64)] * 2, dtype=dtype)
    q, k, v = randn(3, (4, 3, 1, 64), *[(4, 1, 1, 64)] * 2, dtype=dtype)
    score = dict(options(option, 3, 64, limit), max_distance=limit)
    step(backend, q, k, v, Cache(*caches), positions, window, **score)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [40, 64])
@pytest.mark.parametrize("option", ["none", "all"])
def test_a_hidden_distance_is_never_seen(backend, option, head_dim, dtype):
    """Head 0 hides keys with large values, the new one among them, head 1 sees them, head 2 hides
    all keys."""
    window = 100
    caches = randn(2, *[(2, 1, window, head_dim)] * 2, *[(2, 1, 4, head_dim)] * 2, dtype=dtype)
    q, k, v = randn(3, (2, 3, 1, head_dim), *[(2, 1, 1, head_dim)] * 2, dtype=dtype)
    clean = [x.clone() for x in (k, v, *caches)]
    table = biases(3, window)
    table[0, [0, 40, window]] = -INF
    table[2] = -INF
    v.fill_(300.0)
    caches[1][:, :, (1000 - 40) % window] = 300.0
    caches[3][:, :, 1] = 300.0
    arguments = (torch.tensor([1000, 1000]), window)
    score = options(option, 3, head_dim) | dict(
        distance_bias=table, softcap=4.0, sink_logits=torch.ones(3)
    )
    out, lse = call(backend, "lambda_decode", q, k, v, *caches, *arguments, **score)
    expected, expected_lse = call(backend, "lambda_decode", q, *clean, *arguments, **score)
    torch.testing.assert_close(out[:, 0], expected[:, 0], rtol=0, atol=1e-2)
    torch.testing.assert_close(lse[:, 0], expected_lse[:, 0], rtol=0, atol=1e-3)
    assert (out[:, 1] - expected[:, 1] > 1).all()
    assert (out[:, 2] == 0).all() and (lse[:, 2] == -INF).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_rows(backend, dtype):
    q, k, v, *cache = randn(0, *[(0, 2, n, 16) for n in (1, 1, 1, 5, 5, 2, 2)], dtype=dtype)
    out, lse = call(backend, "lambda_decode", q, k, v, *cache, torch.zeros(0).long(), 4)
    assert out.shape == (0, 2, 1, 16) and lse.shape == (0, 2, 1)


@pytest.mark.parametrize("poison", [NAN, INF])
def test_idle_rows_read_and_write_nothing(backend, poison):
    q, k, v = randn(5, (2, 4, 1, 16), (2, 2, 1, 16), (2, 2, 1, 16))
    cache = Cache.empty(2, 2, 6, 3, 16, torch.float32)
    for x in (q, k, v):
        x[1] = poison
    positions = torch.tensor([0, -(1 << 40)])
    sink = torch.tensor([1.0, 0.0, -1.0, 2.0])
    out, lse = step(backend, q, k, v, cache, positions, 6, sink_logits=sink)
    assert (out[1] == 0).all() and (lse[1] == -INF).all()
    for x in cache.tensors():
        assert x[1].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layouts(backend, dtype):
    """A model's layouts of q, k and v: heads behind the sequence, slices of a fused tensor."""
    (fused,) = randn(6, (2, 1, 4 + 2 + 2, 24), dtype=dtype)
    q, k, v = (x.transpose(1, 2) for x in fused.split([4, 2, 2], dim=2))
    cache = Cache.empty(2, 2, 6, 3, 24, dtype)
    step(backend, q, k, v, cache, torch.tensor([0, 0]), 6, **options("rope", 4, 24))
    dim_not_last = [x.mT.contiguous().mT for x in (q, k, v)]
    step(backend, *dim_not_last, cache, torch.tensor([1, 1]), 6, **options("rope", 4, 24))


@pytest.mark.parametrize("threads", [2, 3, 8])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_threads_change_nothing(backend, dtype, threads):
    """One row, few heads and a long window: the keys themselves are split among threads."""
    window = 2000
    caches = randn(7, *[(1, 1, window, 64)] * 2, *[(1, 1, 16, 64)] * 2, dtype=dtype)
    q, k, v = randn(8, (1, 2, 1, 64), *[(1, 1, 1, 64)] * 2, dtype=dtype)
    position = torch.tensor([10_000])
    score = options("all", 2, 64, window)
    results = [
        call(
            backend,
            "lambda_decode",
            *(q, k, v),
            *(x.clone() for x in caches),
            position,
            window,
            threads=n,
            **score,
        )
        for n in (1, threads)
    ]
    tolerance = 2e-6 if dtype == torch.float32 else torch.finfo(dtype).eps
    torch.testing.assert_close(results[1], results[0], rtol=tolerance, atol=tolerance)
    step(backend, q, k, v, Cache(*caches), position, window, **score)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("window", [24, 600])
def test_a_cuda_graph_replays_step_after_step(window):
    """Positions are read on the device, so one captured step serves all that follow; a long window
    has splits, whose merge may overlap them."""
    n_global = 3
    q, k, v = (torch.randn(2, heads, 1, 64, device="cuda") for heads in (4, 2, 2))
    sizes = (window, window, n_global, n_global)
    eager = [torch.zeros(2, 2, size, 64, device="cuda") for size in sizes]
    captured = [cache.clone() for cache in eager]
    positions = torch.tensor([0, 5], device="cuda")
    inv_freq = torch.rand(32, device="cuda")

    def step(caches):
        return torch.ops.lminf.lambda_decode(
            q, k, v, *caches, positions, window, inv_freq=inv_freq
        )[0]

    step([cache.clone() for cache in eager])  # loads the kernels outside of the capture
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed = step(captured)
    for n in range(0, 3 * window, window // 24):
        for new in (q, k, v):
            new.normal_()
        positions.copy_(torch.tensor([n, n + 5]))
        graph.replay()
        torch.testing.assert_close(replayed, step(eager))
