"""The reference against the definition written out pair by pair, and against other forms of it."""

import math

import pytest
import torch
from cases import GRADIENTS, OPTION_NAMES, options, qkv, randn
from torch import Tensor

from lminf_cuda import reference

INF = math.inf


def rotation(distance: int, inv_freq: Tensor, head_dim: int, interleaved: bool) -> Tensor:
    """R(distance) as a [D, D] matrix."""
    matrix = torch.eye(head_dim, dtype=torch.float64)
    half = len(inv_freq)
    for t, frequency in enumerate(inv_freq.tolist()):
        a, b = (2 * t, 2 * t + 1) if interleaved else (t, t + half)
        cos, sin = math.cos(distance * frequency), math.sin(distance * frequency)
        matrix[a, a], matrix[a, b] = cos, -sin
        matrix[b, a], matrix[b, b] = sin, cos
    return matrix


def literal(
    q,
    k,
    v,
    *,
    n_global,
    window,
    max_distance=None,
    inv_freq=None,
    rope_scaling=1.0,
    rope_interleaved=False,
    alibi_slopes=None,
    sink_logits=None,
    scale=None,
    softcap=0.0,
    k_start=None,
    global_k=None,
    global_v=None,
    distance_bias=None,
):
    """Design section 2, one pair at a time."""
    batch, heads, seqlen_q, head_dim = q.shape
    seqlen_k, group = k.shape[2], heads // k.shape[1]
    limit = window if max_distance is None else max_distance
    out, lse = torch.zeros_like(q), torch.full(q.shape[:3], -INF, dtype=torch.float64)
    rotary_scale = torch.ones(head_dim, dtype=torch.float64)
    if inv_freq is not None:
        rotary_scale[: 2 * len(inv_freq)] = rope_scaling
    for b in range(batch):
        start = 0 if k_start is None else int(k_start[b])
        for h in range(heads):
            for row in range(seqlen_q):
                i = start + seqlen_k - seqlen_q + row
                seen = []  # (distance, key, value)
                for n in range(seqlen_k):
                    j = start + n
                    d = i - j
                    far = j < n_global and global_k is None
                    if j >= 0 and d >= 0 and (d < window or far):
                        seen.append((d, k[b, h // group, n], v[b, h // group, n]))
                if global_k is not None:
                    for j in range(n_global):
                        if i - j >= window:
                            seen.append(
                                (i - j, global_k[b, h // group, j], global_v[b, h // group, j])
                            )
                if distance_bias is not None:
                    seen = [pair for pair in seen if distance_bias[h, min(pair[0], limit)] != -INF]
                if not seen:
                    continue
                scores = []
                for d, key, _ in seen:
                    d = min(d, limit)
                    turned = q[b, h, row] * rotary_scale
                    if inv_freq is not None:
                        turned = rotation(d, inv_freq, head_dim, rope_interleaved) @ turned
                    s = (turned @ (key * rotary_scale)).item()
                    s *= 1 / math.sqrt(head_dim) if scale is None else scale
                    if alibi_slopes is not None:
                        s -= alibi_slopes[h].item() * d
                    if distance_bias is not None:
                        s += distance_bias[h, d].item()
                    scores.append(softcap * math.tanh(s / softcap) if softcap > 0 else s)
                total = sum(math.exp(s) for s in scores)
                lse[b, h, row] = math.log(total)
                if sink_logits is not None:
                    total += math.exp(sink_logits[h].item())
                for s, (_, _, value) in zip(scores, seen, strict=True):
                    out[b, h, row] += math.exp(s) / total * value
    return out, lse


def frequencies(rotary_dim: int, base: float = 100.0) -> Tensor:
    t = torch.arange(rotary_dim // 2, dtype=torch.float64)
    return base ** (-2 * t / rotary_dim)


def tensors(seed: int, *shapes: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


HEADS_Q, HEADS_KV, HEAD_DIM = 4, 2, 8
OPTIONS = {
    "plain": {},
    "rope": {"inv_freq": frequencies(8)},
    "rope interleaved": {"inv_freq": frequencies(8), "rope_interleaved": True},
    "rope partial": {"inv_freq": frequencies(4)},
    "rope partial interleaved": {"inv_freq": frequencies(6), "rope_interleaved": True},
    "rope scaled": {"inv_freq": frequencies(6), "rope_scaling": 1.3},
    "alibi": {"alibi_slopes": torch.tensor([0.5, 0.25, 0.1, 0.0])},
    "softcap": {"softcap": 1.5},
    "sink": {"sink_logits": torch.tensor([0.5, -3.0, 2.0, -INF])},
    "scale": {"scale": 0.11},
    "all": {
        "inv_freq": frequencies(6),
        "rope_scaling": 0.8,
        "rope_interleaved": True,
        "alibi_slopes": torch.tensor([0.5, 0.25, 0.1, -0.2]),
        "sink_logits": torch.tensor([0.5, -3.0, 2.0, 0.0]),
        "softcap": 2.5,
        "scale": 0.6,
    },
}
# seqlen_q, seqlen_k, n_global, window, max_distance
SHAPES = [
    (1, 1, 0, 1, None),
    (12, 12, 0, 1, None),
    (12, 12, 3, 1, 4),
    (12, 12, 3, 4, None),
    (12, 12, 3, 4, 7),
    (5, 12, 2, 4, 6),
    (12, 12, 0, 5, None),
    (12, 12, 20, 3, 5),
    (12, 12, 3, 40, None),
    (12, 12, 3, 4, 1 << 40),
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_equals_the_definition_pair_by_pair(options, shape):
    seqlen_q, seqlen_k, n_global, window, max_distance = shape
    q, k, v = tensors(
        0,
        (1, HEADS_Q, seqlen_q, HEAD_DIM),
        (1, HEADS_KV, seqlen_k, HEAD_DIM),
        (1, HEADS_KV, seqlen_k, HEAD_DIM),
    )
    options = dict(options, n_global=n_global, window=window, max_distance=max_distance)
    out, lse = reference.lambda_attention(q, k, v, **options, return_lse=True)
    expected_out, expected_lse = literal(q, k, v, **options)
    torch.testing.assert_close(out, expected_out, rtol=0, atol=1e-12)
    torch.testing.assert_close(lse, expected_lse, rtol=0, atol=1e-12)


@pytest.mark.parametrize("shape", SHAPES[:-1], ids=str)
@pytest.mark.parametrize("options", [OPTIONS["plain"], OPTIONS["all"]], ids=["plain", "all"])
def test_a_bias_for_every_distance_pair_by_pair(options, shape):
    """Head 0 hides the clamp, head 1 its own token, head 2 every other distance, head 3 all."""
    seqlen_q, seqlen_k, n_global, window, max_distance = shape
    q, k, v, table = tensors(
        0,
        (1, HEADS_Q, seqlen_q, HEAD_DIM),
        (1, HEADS_KV, seqlen_k, HEAD_DIM),
        (1, HEADS_KV, seqlen_k, HEAD_DIM),
        (HEADS_Q, (max_distance or window) + 1),
    )
    options = dict(options, n_global=n_global, window=window, max_distance=max_distance)
    for hides in (False, True):
        if hides:
            table[0, -1] = table[1, 0] = -INF
            table[2, ::2] = table[3] = -INF
        out, lse = reference.lambda_attention(
            q, k, v, **options, distance_bias=table, return_lse=True
        )
        expected_out, expected_lse = literal(q, k, v, **options, distance_bias=table)
        torch.testing.assert_close(out, expected_out, rtol=0, atol=1e-12)
        torch.testing.assert_close(lse, expected_lse, rtol=0, atol=1e-12)
    assert (out[:, 3] == 0).all() and (lse[:, 3] == -INF).all()


@pytest.mark.parametrize("options", [OPTIONS["plain"], OPTIONS["all"]], ids=["plain", "all"])
@pytest.mark.parametrize("with_global", [False, True])
def test_k_start_and_global_keys_pair_by_pair(options, with_global):
    """Left padding, no offset, a cache without its first keys, a row of nothing but padding."""
    n_global, window, seqlen_q, seqlen_k = 3, 4, 5, 9
    k_start = torch.tensor([-2, 0, 7, -9, -5])
    q, k, v, global_k, global_v = tensors(
        1,
        (5, HEADS_Q, seqlen_q, HEAD_DIM),
        (5, HEADS_KV, seqlen_k, HEAD_DIM),
        (5, HEADS_KV, seqlen_k, HEAD_DIM),
        (5, HEADS_KV, n_global, HEAD_DIM),
        (5, HEADS_KV, n_global, HEAD_DIM),
    )
    options = dict(options, n_global=n_global, window=window, max_distance=6, k_start=k_start)
    if with_global:
        options |= {"global_k": global_k, "global_v": global_v}
    out, lse = reference.lambda_attention(q, k, v, **options, return_lse=True)
    expected_out, expected_lse = literal(q, k, v, **options)
    torch.testing.assert_close(out, expected_out, rtol=0, atol=1e-12)
    torch.testing.assert_close(lse, expected_lse, rtol=0, atol=1e-12)
    assert (out[3] == 0).all() and (lse[3] == -INF).all()


def test_is_plain_causal_attention_while_the_window_covers_the_row():
    q, k, v = tensors(2, (2, 4, 20, 16), (2, 2, 20, 16), (2, 2, 20, 16))
    window = 13
    out = reference.lambda_attention(q, k, v, n_global=2, window=window)
    causal = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, is_causal=True, enable_gqa=True
    )
    torch.testing.assert_close(out[:, :, :window], causal[:, :, :window], rtol=0, atol=1e-13)
    assert (out[:, :, window + 2 :] - causal[:, :, window + 2 :]).abs().amax(-1).min() > 1e-4


def test_equals_the_two_attention_maps_of_the_paper():
    """The paper's own form: one map at true positions, one with every query at position `window`
    and every key at 0, and the choice between them by distance."""
    n_global, window, seqlen, dim = 4, 9, 40, 16
    q, k, v = tensors(3, (2, 3, seqlen, dim), (2, 3, seqlen, dim), (2, 3, seqlen, dim))
    inv_freq = frequencies(dim, 10000.0)
    position = torch.arange(seqlen)

    def rotate(x, positions):
        return reference.clamped_rope(x, positions, inv_freq)

    moving = rotate(q, position) @ rotate(k, position).mT
    still = rotate(q, torch.full((seqlen,), window)) @ rotate(k, torch.zeros_like(position)).mT
    distance = position[:, None] - position
    hidden = (distance < 0) | ((distance >= window) & (position >= n_global))
    logits = torch.where(distance < window, moving, still) / math.sqrt(dim)
    expected = logits.masked_fill(hidden, -INF).softmax(-1) @ v
    out = reference.lambda_attention(
        q, k, v, n_global=n_global, window=window, inv_freq=inv_freq, max_distance=window
    )
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-13)


def test_packed_sequences_equal_separate_calls():
    lengths = [5, 0, 1, 13]
    cu_seqlens = torch.tensor([0, 5, 5, 6, 19], dtype=torch.int32)
    q, k, v = tensors(4, (1, 4, 19, 8), (1, 2, 19, 8), (1, 2, 19, 8))
    options = dict(OPTIONS["all"], n_global=2, window=3, max_distance=5)
    out, lse = reference.lambda_attention(
        q, k, v, **options, cu_seqlens=cu_seqlens, return_lse=True
    )
    lo = 0
    for length in lengths:
        part = slice(lo, lo + length)
        lo += length
        if length == 0:
            continue
        one_out, one_lse = reference.lambda_attention(
            q[:, :, part], k[:, :, part], v[:, :, part], **options, return_lse=True
        )
        torch.testing.assert_close(out[:, :, part], one_out, rtol=0, atol=1e-13)
        torch.testing.assert_close(lse[:, :, part], one_lse, rtol=0, atol=1e-13)


def test_keys_that_are_rotated_already():
    q, k, v, global_k, global_v = tensors(
        5, (2, 2, 4, 8), (2, 2, 10, 8), (2, 2, 10, 8), (2, 2, 2, 8), (2, 2, 2, 8)
    )
    k_start = torch.tensor([3, 1000])
    options = dict(
        n_global=2,
        window=6,
        inv_freq=frequencies(6),
        rope_scaling=1.2,
        k_start=k_start,
        global_k=global_k,
        global_v=global_v,
        return_lse=True,
    )
    expected = reference.lambda_attention(q, k, v, **options)
    positions = k_start[:, None] + torch.arange(10)
    turned = reference.clamped_rope(k, positions, options["inv_freq"], scaling=1.2)
    mixed = torch.cat([turned[:, :, :7], k[:, :, 7:]], dim=2)
    actual = reference.lambda_attention(q, mixed, v, **options, k_rotated=7)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=0, atol=1e-13)


@pytest.mark.parametrize("poison", [math.nan, INF, -INF])
def test_a_key_that_no_query_sees_reaches_no_row(poison):
    q, k, v = tensors(6, (1, 2, 5, 8), (1, 2, 16, 8), (1, 2, 16, 8))
    options = dict(n_global=2, window=4, inv_freq=frequencies(8), return_lse=True)
    options["k_start"] = torch.tensor([-1])
    expected = reference.lambda_attention(q, k, v, **options)
    for x in (k, v):
        x[:, :, 0] = poison  # padding
        x[:, :, 3:8] = poison  # between the global tokens and the first query's window
    for actual, clean in zip(reference.lambda_attention(q, k, v, **options), expected, strict=True):
        assert torch.equal(actual, clean)


def test_clamped_rope_is_the_rotation_matrix():
    (x,) = tensors(7, (2, 3, 5, 10))
    positions = torch.tensor([[0, 1, -4, 9, 200], [3, 3, 70, -1, 8]])
    for rotary_dim, interleaved in ((10, False), (10, True), (6, False), (6, True), (2, True)):
        inv_freq = frequencies(rotary_dim)
        for limit in (None, 8):
            out = reference.clamped_rope(
                x, positions, inv_freq, max_position=limit, scaling=1.1, interleaved=interleaved
            )
            for b in range(2):
                for n in range(5):
                    p = int(positions[b, n])
                    p = p if limit is None else min(p, limit)
                    scaled = x[b, :, n].clone()
                    scaled[:, :rotary_dim] *= 1.1
                    expected = scaled @ rotation(p, inv_freq, 10, interleaved).T
                    torch.testing.assert_close(out[b, :, n], expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("capacity", [5, 8])
@pytest.mark.parametrize("n_global", [0, 3])
def test_decode_token_by_token_equals_one_forward(n_global, capacity):
    """Two rows whose first tokens come at different steps; the cache starts out as NaN."""
    steps, window = 17, 5
    delay = [0, 4]  # row b is idle for so many steps
    q, k, v = tensors(8, (2, 4, steps, 8), (2, 2, steps, 8), (2, 2, steps, 8))
    options = dict(OPTIONS["all"], max_distance=7)
    ring_k, ring_v = (torch.full((2, 2, capacity, 8), math.nan).double() for _ in range(2))
    global_k, global_v = (torch.full((2, 2, n_global, 8), math.nan).double() for _ in range(2))
    expected_out, expected_lse = reference.lambda_attention(
        q,
        k,
        v,
        n_global=n_global,
        window=window,
        k_start=-torch.tensor(delay),
        return_lse=True,
        **options,
    )
    for step in range(steps):
        now = slice(step, step + 1)
        out, lse = reference.lambda_decode(
            q[:, :, now],
            k[:, :, now],
            v[:, :, now],
            ring_k,
            ring_v,
            global_k,
            global_v,
            step - torch.tensor(delay),
            window,
            **options,
        )
        torch.testing.assert_close(out, expected_out[:, :, now], rtol=0, atol=1e-12)
        torch.testing.assert_close(lse, expected_lse[:, :, now], rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_stays_in_its_dtype(dtype):
    q, k, v = (x.to(dtype) for x in tensors(9, (1, 2, 30, 16), (1, 2, 30, 16), (1, 2, 30, 16)))
    options = dict(n_global=2, window=7, inv_freq=frequencies(16), return_lse=True)
    out, lse = reference.lambda_attention(q, k, v, **options)
    truth, truth_lse = reference.lambda_attention(q.double(), k.double(), v.double(), **options)
    assert out.dtype == dtype and lse.dtype == torch.float32
    eps = torch.finfo(dtype).eps
    error = (out.double() - truth).abs().max()
    assert eps / 100 < error < 20 * eps
    assert (lse.double() - truth_lse).abs().max() < 20 * eps


@pytest.mark.parametrize("option", OPTION_NAMES)
@pytest.mark.parametrize("beside", [False, True], ids=["global keys in k", "global keys beside"])
def test_gradients_by_autograd(option, beside):
    """In float64, of every input that has one, with rows that see nothing and hidden distances."""
    n_global, window, limit = 2, 3, 5
    q, k, v = (x.double() for x in qkv(7, 9, batch=2, heads_q=4, heads_kv=2, head_dim=4))
    given = {"q": q, "k": k, "v": v} | options(option, 4, 4, limit)
    if beside:
        given["global_k"], given["global_v"] = randn(5, *[(2, 2, n_global, 4)] * 2)
    k_start = torch.tensor([3, 40]) if beside else torch.tensor([-4, 0])
    fixed = {"n_global": n_global, "window": window, "max_distance": limit, "k_start": k_start}
    fixed |= {name: given.pop(name) for name in list(given) if name not in GRADIENTS}
    names = list(given)
    hidden = [x == -INF for x in given.values()]
    leaves = [x.double().masked_fill(h, 0.0) for x, h in zip(given.values(), hidden, strict=True)]

    def f(*tensors):
        tensors = [x.masked_fill(h, -INF) for x, h in zip(tensors, hidden, strict=True)]
        out, lse = reference.lambda_attention(
            **dict(zip(names, tensors, strict=True)), **fixed, return_lse=True
        )
        return out, lse.masked_fill(lse == -INF, 0.0)

    assert torch.autograd.gradcheck(f, [x.requires_grad_() for x in leaves])
