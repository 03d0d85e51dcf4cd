"""Bad input gets an error that names the argument, its value, and what it may be.

The checks stand once, in C++ (csrc/torch), so every case runs through torch.ops and through the
documented front and must raise the same.
"""

import math

import pytest
import torch
from torch.autograd import forward_ad

import lminf_cuda

B, HQ, HKV, SQ, SK, D, G = 2, 4, 2, 6, 10, 8, 3
HUGE = (1 << 63) - 1


def attn_arguments():
    return {
        "q": torch.randn(B, HQ, SQ, D),
        "k": torch.randn(B, HKV, SK, D),
        "v": torch.randn(B, HKV, SK, D),
        "n_global": G,
        "window": 4,
    }


def zeros(*shape, **kwargs):
    return torch.zeros(shape, **kwargs)


def globals_like(g=G, **kwargs):
    return {"global_k": zeros(B, HKV, g, D, **kwargs), "global_v": zeros(B, HKV, g, D, **kwargs)}


def packed(*offsets, **change):
    """One row of six packed tokens."""
    row = {"q": zeros(1, HQ, SQ, D), "k": zeros(1, HKV, SQ, D), "v": zeros(1, HKV, SQ, D)}
    return {**row, "cu_seqlens": torch.tensor(offsets, dtype=torch.int32), **change}


# Changes to good arguments, and what the message must say.
ATTN_CASES = [
    # Shapes
    ({"q": zeros(HQ, SQ, D)}, "q has shape [4, 6, 8], but must have 4 dimensions [B, Hq, Sq, D]"),
    ({"k": zeros(HKV, SK, D)}, "k has shape [2, 10, 8], but must have 4 dimensions"),
    (
        {"v": zeros(HKV, SK, D)},
        "v has shape [2, 10, 8], but must be the shape of k = [2, 2, 10, 8]",
    ),
    ({"v": zeros(B, HKV, SK - 1, D)}, "v has shape [2, 2, 9, 8], but must be the shape of k"),
    ({"v": zeros(B, HKV, SK, D + 1)}, "v has shape [2, 2, 10, 9], but must be the shape of k"),
    ({"k": zeros(B + 1, HKV, SK, D)}, "k has shape [3, 2, 10, 8], but must be"),
    ({"k": zeros(B, HKV, SK, D + 1)}, "k has shape [2, 2, 10, 9], but must be"),
    ({"q": zeros(B, 5, SQ, D)}, "q has 5 heads and k has 2, but the heads of q must be"),
    ({"q": zeros(B, 0, SQ, D)}, "q has 0 heads"),
    ({"k": zeros(B, 0, SK, D), "v": zeros(B, 0, SK, D)}, "and k has 0, but the heads of q must be"),
    ({"q": zeros(B, HQ, SK + 1, D)}, "q has 11 queries and k has 10 keys"),
    (
        {"q": zeros(B, HQ, SQ, 0), "k": zeros(B, HKV, SK, 0), "v": zeros(B, HKV, SK, 0)},
        "q has head dim 0, but it must be at least 1",
    ),
    # Dtypes and devices
    ({"k": zeros(B, HKV, SK, D).bfloat16()}, "k has dtype bfloat16, but q has float32"),
    ({"v": zeros(B, HKV, SK, D).half()}, "v has dtype float16, but q has float32"),
    *(
        (
            {name: zeros(*attn_arguments()[name].shape, dtype=dtype) for name in "qkv"},
            f"q has dtype {text}, but must be float32, bfloat16 or float16",
        )
        for dtype, text in [(torch.float64, "float64"), (torch.int32, "int32")]
    ),
    ({"k": zeros(B, HKV, SK, D, device="meta")}, "the tensors are on cpu and meta"),
    ({"inv_freq": zeros(2, device="meta")}, "the tensors are on cpu and meta"),
    # The window
    ({"window": 0}, "window is 0, but must be at least 1"),
    ({"window": -3}, "window is -3, but must be at least 1"),
    ({"n_global": -1}, "n_global is -1, but must be at least 0"),
    ({"max_distance": 3}, "max_distance is 3, but must be at least window, which is 4"),
    ({"max_distance": -1}, "max_distance is -1, but must be at least window"),
    # Rotary embedding
    ({"inv_freq": zeros(0)}, "inv_freq has 0 frequencies, but must have 1 to 4"),
    ({"inv_freq": zeros(5)}, "inv_freq has 5 frequencies, but must have 1 to 4"),
    ({"inv_freq": zeros(2, 2)}, "inv_freq has shape [2, 2], but must have 1 dimension [R/2]"),
    ({"inv_freq": zeros(2).int()}, "inv_freq has dtype int32, but must be float32 or float64"),
    ({"inv_freq": zeros(2), "rope_scaling": math.inf}, "rope_scaling is inf, but must be a finite"),
    ({"inv_freq": zeros(2), "rope_scaling": math.nan}, "rope_scaling is nan, but must be a finite"),
    # Scores
    ({"scale": math.nan}, "scale is nan, but must be a finite number"),
    ({"scale": -math.inf}, "scale is -inf, but must be a finite number"),
    ({"softcap": -1.0}, "softcap is -1, but must be 0 (none) or a positive number from 1e-30"),
    ({"softcap": math.nan}, "softcap is nan"),
    ({"softcap": math.inf}, "softcap is inf"),
    ({"softcap": 1e-40}, "softcap is 1e-40, but must be 0 (none) or a positive number from 1e-30"),
    ({"softcap": 1e37}, "softcap is 1e+37, but must be 0 (none) or a positive number from 1e-30"),
    ({"scale": 1e39}, "scale is 1e+39, but must be a finite number, in float32 too"),
    ({"alibi_slopes": zeros(HQ - 1)}, "alibi_slopes has shape [3], but must be [Hq] = [4]"),
    ({"alibi_slopes": zeros(HQ, 1)}, "alibi_slopes has shape [4, 1], but must be [Hq] = [4]"),
    ({"alibi_slopes": zeros(HQ).int()}, "alibi_slopes has dtype int32, but must be float32"),
    ({"sink_logits": zeros(HKV)}, "sink_logits has shape [2], but must be [Hq] = [4]"),
    ({"sink_logits": zeros(HQ).long()}, "sink_logits has dtype int64, but must be float32"),
    (
        {"distance_bias": zeros(HQ, 4)},
        "distance_bias has shape [4, 4], but must be [Hq, max_distance + 1] = [4, 5]",
    ),
    ({"distance_bias": zeros(HQ, 9), "max_distance": 7}, "[Hq, max_distance + 1] = [4, 8]"),
    ({"distance_bias": zeros(HQ, 9), "max_distance": HUGE}, "distance_bias has shape [4, 9], but"),
    ({"distance_bias": zeros(HKV, 5)}, "distance_bias has shape [2, 5], but must be [Hq, max_"),
    ({"distance_bias": zeros(5)}, "distance_bias has shape [5], but must be [Hq, max_distance + 1"),
    (
        {"distance_bias": zeros(1).expand(HQ, 2**30 + 1), "max_distance": 2**30},
        "distance_bias has 1073741825 distances, but may have at most 2^30",
    ),
    ({"distance_bias": zeros(HQ, 5).int()}, "distance_bias has dtype int32, but must be float32"),
    ({"distance_bias": zeros(HQ, 5, device="meta")}, "the tensors are on cpu and meta"),
    # Positions
    ({"k_start": zeros(B).int()}, "k_start has dtype int32, but must be int64"),
    ({"k_start": zeros(B + 1).long()}, "k_start has shape [3], but must be [B] = [2]"),
    ({"k_start": zeros(1, B).long()}, "k_start has shape [1, 2], but must be [B] = [2]"),
    ({"k_start": torch.tensor([0, 2**31 - SK + 1])}, "k_start[1] is 2147483639, but with 10 keys"),
    ({"k_start": torch.tensor([HUGE, 0])}, "k_start[0] is 9223372036854775807, but"),
    ({"k_start": torch.tensor([-HUGE - 1, 0])}, "k_start[0] is -9223372036854775808, but"),
    ({"k_start": torch.tensor([-(2**31), 0])}, "k_start[0] is -2147483648, but"),
    # Separate global keys
    ({"global_k": zeros(B, HKV, G, D)}, "global_k is given without global_v"),
    ({"global_v": zeros(B, HKV, G, D)}, "global_v is given without global_k"),
    (globals_like(G + 1), "global_k has shape [2, 2, 4, 8], but must be [B, Hkv, n_global, D]"),
    (globals_like(dtype=torch.half), "global_k has dtype float16, but q has float32"),
    (
        {**globals_like(), "global_v": zeros(B, HKV, G, D + 1)},
        "global_v has shape [2, 2, 3, 9], but must be [B, Hkv, n_global, D] = [2, 2, 3, 8]",
    ),
    # Rotated keys
    ({"k_rotated": 1}, "k_rotated is 1, but without inv_freq nothing is rotated"),
    ({"k_rotated": 1, "inv_freq": zeros(2)}, "k_rotated is 1, but with n_global 3 the global keys"),
    ({"k_rotated": -1}, "k_rotated is -1, but must be from 0 to the number of keys, which is 10"),
    ({"k_rotated": SK + 1}, "k_rotated is 11, but must be from 0 to the number of keys"),
    # Packed sequences
    (packed(0, 2, 6, cu_seqlens=zeros(3).long()), "cu_seqlens has dtype int64, but must be int32"),
    (packed(0, 2, 6, cu_seqlens=zeros(1, 3).int()), "cu_seqlens has shape [1, 3], but must have 1"),
    (packed(0), "cu_seqlens has 1 entries, but must have one more than there are sequences"),
    (packed(1, 6), "cu_seqlens[0] is 1, but must be 0"),
    (packed(0, 5), "cu_seqlens ends with 5, but must end with the length of q, which is 6"),
    (packed(0, 7), "cu_seqlens ends with 7, but must end with the length of q, which is 6"),
    (packed(0, 4, 3, 6), "cu_seqlens goes down from 4 to 3 at entry 2, but must never decrease"),
    (packed(0, -1, 6), "cu_seqlens goes down from 0 to -1 at entry 1"),
    (packed(0, 6, k_start=zeros(1).long()), "cu_seqlens is given together with k_start, global_k"),
    (packed(0, 6, n_global=0, k_rotated=1, inv_freq=zeros(2)), "cu_seqlens is given together with"),
    ({"cu_seqlens": torch.tensor([0, 6], dtype=torch.int32)}, "need batch size 1 and as many"),
]


@pytest.mark.parametrize("way", ["op", "front"])
@pytest.mark.parametrize(("change", "text"), ATTN_CASES, ids=[text for _, text in ATTN_CASES])
def test_lambda_attn(change, text, way):
    arguments = {**attn_arguments(), **change}
    function = torch.ops.lminf.lambda_attn if way == "op" else lminf_cuda.lambda_attention
    with pytest.raises(ValueError, match=r"^lambda_attn: ") as error:
        function(**arguments)
    assert text in str(error.value)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"q": [1.0]}, "q is a list, but must be a torch.Tensor"),
        ({"k": None}, "k is a NoneType, but must be a torch.Tensor"),
        ({"n_global": 1.5}, "n_global is a float, but must be an int"),
        ({"window": None}, "window is a NoneType, but must be an int"),
        ({"max_distance": 8.0}, "max_distance is a float, but must be an int or None"),
        ({"scale": "1"}, "scale is a str, but must be an int or a float or None"),
        ({"softcap": None}, "softcap is a NoneType, but must be an int or a float"),
        ({"rope_interleaved": "no"}, "rope_interleaved is a str, but must be a bool"),
        ({"inv_freq": [1.0]}, "inv_freq is a list, but must be a torch.Tensor or None"),
        ({"k_start": 0}, "k_start is a int, but must be a torch.Tensor or None"),
        ({"sink_logits": 0.0}, "sink_logits is a float, but must be a torch.Tensor or None"),
        ({"distance_bias": 0}, "distance_bias is a int, but must be a torch.Tensor or None"),
        ({"global_k": 0}, "global_k is a int, but must be a torch.Tensor or None"),
        ({"cu_seqlens": (0, 6)}, "cu_seqlens is a tuple, but must be a torch.Tensor or None"),
    ],
)
def test_wrong_types(change, text):
    arguments = {**attn_arguments(), **change}
    with pytest.raises(TypeError) as error:
        lminf_cuda.lambda_attention(**arguments)
    assert text in str(error.value)
    with pytest.raises((RuntimeError, ValueError), match=next(iter(change))):
        torch.ops.lminf.lambda_attn(**arguments)


C = 6


def decode_arguments():
    return {
        "q": torch.randn(B, HQ, 1, D),
        "k": torch.randn(B, HKV, 1, D),
        "v": torch.randn(B, HKV, 1, D),
        "ring_k": zeros(B, HKV, C, D),
        "ring_v": zeros(B, HKV, C, D),
        "global_k": zeros(B, HKV, G, D),
        "global_v": zeros(B, HKV, G, D),
        "positions": torch.tensor([0, 7]),
        "window": 4,
    }


DECODE_CASES = [
    ({"q": zeros(B, HQ, D)}, "q has shape [2, 4, 8], but must have 4 dimensions [B, Hq, 1, D]"),
    ({"q": zeros(B, HQ, 2, D)}, "q has shape [2, 4, 2, 8], but must be [B, Hq, 1, D], one new"),
    ({"q": zeros(B, 3, 1, D)}, "q has 3 heads and k has 2, but"),
    ({"k": zeros(B, HKV, 2, D)}, "k has shape [2, 2, 2, 8], but must be [B, Hkv, 1, D]"),
    ({"v": zeros(B, HKV, 1, D - 1)}, "v has shape [2, 2, 1, 7], but must be the shape of k"),
    ({"ring_k": zeros(B, HKV, D)}, "ring_k has shape [2, 2, 8], but must have 4 dimensions"),
    ({"ring_k": zeros(B, HKV + 1, C, D)}, "ring_k has shape [2, 3, 6, 8], but must be"),
    (
        {"ring_v": zeros(B, HKV, C - 1, D)},
        "ring_v has shape [2, 2, 5, 8], but must be the shape of",
    ),
    ({"global_k": zeros(B, HKV, G, D + 1)}, "global_k has shape [2, 2, 3, 9], but must be"),
    (
        {"global_v": zeros(B, HKV, G + 1, D)},
        "global_v has shape [2, 2, 4, 8], but must be the shape",
    ),
    ({"q": zeros(B, HQ, 1, D).double()}, "q has dtype float64, but must be float32, bfloat16"),
    ({"ring_k": zeros(B, HKV, C, D).half()}, "ring_k has dtype float16, but q has float32"),
    ({"global_v": zeros(B, HKV, G, D).half()}, "global_v has dtype float16, but q has float32"),
    ({"positions": zeros(B).int()}, "positions has dtype int32, but must be int64"),
    ({"positions": zeros(B + 1).long()}, "positions has shape [3], but must be [B] = [2]"),
    ({"positions": torch.tensor([0, 2**31])}, "positions[1] is 2147483648, but must be below 2^31"),
    ({"positions": zeros(B, device="meta").long()}, "the tensors are on cpu and meta"),
    ({"window": 0}, "window is 0, but must be at least 1"),
    ({"window": C + 1}, "ring_k has 6 slots, but must have at least window of them, which is 7"),
    ({"max_distance": 3}, "max_distance is 3, but must be at least window, which is 4"),
    ({"inv_freq": zeros(D)}, "inv_freq has 8 frequencies, but must have 1 to 4"),
    ({"scale": math.inf}, "scale is inf, but must be a finite number"),
    ({"softcap": -0.5}, "softcap is -0.5, but must be 0 (none) or a positive number from 1e-30"),
    ({"sink_logits": zeros(HQ + 1)}, "sink_logits has shape [5], but must be [Hq] = [4]"),
    ({"alibi_slopes": zeros(1)}, "alibi_slopes has shape [1], but must be [Hq] = [4]"),
    ({"distance_bias": zeros(HQ, 6)}, "but must be [Hq, max_distance + 1] = [4, 5]"),
    (
        {"ring_k": zeros(B, HKV, D, C).mT},
        "ring_k has stride 6 in its last dimension, but the op writes to it in place",
    ),
    (
        {"global_v": zeros(B, HKV, G, 2 * D)[..., ::2]},
        "global_v has stride 2 in its last dimension, but the op writes to it in place",
    ),
    (
        {"ring_v": zeros(1, HKV, C, D).expand(B, -1, -1, -1)},
        "ring_v is expanded along dimension 0, but the op writes to it in place",
    ),
]


@pytest.mark.parametrize(("change", "text"), DECODE_CASES, ids=[text for _, text in DECODE_CASES])
def test_lambda_decode(change, text):
    arguments = {**decode_arguments(), **change}
    with pytest.raises(ValueError, match=r"^lambda_decode: ") as error:
        torch.ops.lminf.lambda_decode(**arguments)
    assert text in str(error.value)
    assert all(not arguments[name].any() for name in ("ring_k", "ring_v", "global_k", "global_v"))


def middle_arguments():
    return {
        "q": zeros(B, HQ, 1, D),
        "k": zeros(B, HKV, 20, D),
        "v": zeros(B, HKV, 20, D),
        "lambda_out": zeros(B, HQ, 1, D),
        "lambda_lse": zeros(B, HQ, 1),
        "positions": torch.tensor([19, 12]),
        "n_global": G,
        "window": 4,
        "top_k": 5,
        "distance": 2,
    }


MIDDLE_CASES = [
    ({"distance_bias": zeros(HQ, 2)}, "but must have 4 rows, one a head, and more than distance"),
    ({"distance_bias": zeros(HQ + 1, 9)}, "distance_bias has shape [5, 9], but must have 4 rows"),
    ({"distance_bias": zeros(9)}, "distance_bias has shape [9], but must have 2 dimensions"),
    ({"q": zeros(B, HQ, 2, D)}, "q has shape [2, 4, 2, 8], but must be [B, Hq, 1, D]"),
    ({"k": zeros(B, HKV, D)}, "k has shape [2, 2, 8], but must have 4 dimensions"),
    ({"v": zeros(B, HKV, 19, D)}, "v has shape [2, 2, 19, 8], but must be the shape of k"),
    ({"v": zeros(B, HKV, 20, D).half()}, "v has dtype float16, but q has float32"),
    ({"q": zeros(B, HKV + 1, 1, D), "lambda_out": zeros(B, HKV + 1, 1, D)}, "[2, 4, 1]"),
    ({"lambda_out": zeros(B, HQ, 1, D + 1)}, "lambda_out has shape [2, 4, 1, 9], but must be"),
    ({"lambda_lse": zeros(B, HQ, 1).half()}, "lambda_lse has dtype float16, but must be float32"),
    ({"lambda_lse": zeros(B, HQ)}, "lambda_lse has shape [2, 4], but must be [B, Hq, 1]"),
    ({"positions": zeros(B).int()}, "positions has dtype int32, but must be int64"),
    ({"positions": torch.tensor([0, 2**31])}, "positions[1] is 2147483648, but positions must"),
    ({"k_start": torch.tensor([0, -(2**31)])}, "k_start[1] is -2147483648, but positions must"),
    ({"k_start": zeros(B + 1).long()}, "k_start has shape [3], but must be [B] = [2]"),
    ({"positions": zeros(B, device="meta").long()}, "the tensors are on cpu and meta"),
    ({"n_global": -1}, "n_global is -1, but must be at least 0"),
    ({"window": 0}, "window is 0, but must be at least 1"),
    ({"top_k": 0}, "top_k is 0, but must be at least 1"),
    ({"distance": -1}, "distance is -1, but must be at least 0"),
    ({"distance": 2**31}, "distance is 2147483648, but must be at least 0 and below 2^31"),
    ({"inv_freq": zeros(D)}, "inv_freq has 8 frequencies, but must have 1 to 4"),
    ({"softcap": -0.5}, "softcap is -0.5, but must be 0 (none) or a positive number from 1e-30"),
    ({"sink_logits": zeros(HQ + 1)}, "sink_logits has shape [5], but must be [Hq] = [4]"),
]


@pytest.mark.parametrize(("change", "text"), MIDDLE_CASES, ids=[text for _, text in MIDDLE_CASES])
def test_middle_topk(change, text):
    with pytest.raises(ValueError, match=r"^middle_topk: ") as error:
        torch.ops.lminf.middle_topk(**middle_arguments() | change)
    assert text in str(error.value)


ROPE_CASES = [
    ({"x": zeros(HQ, SQ, D)}, "x has shape [4, 6, 8], but must have 4 dimensions [B, H, S, D]"),
    ({"x": zeros(B, HQ, SQ, D).double()}, "x has dtype float64, but must be float32, bfloat16"),
    ({"x": zeros(B, HQ, SQ, 0)}, "x has head dim 0, but it must be at least 1"),
    ({"position_ids": zeros(SQ).int()}, "position_ids has dtype int32, but must be int64"),
    ({"position_ids": zeros(SQ - 1).long()}, "position_ids has shape [5], but must be [S] = [6]"),
    ({"position_ids": zeros(B + 1, SQ).long()}, "position_ids has shape [3, 6], but must be"),
    ({"position_ids": zeros(B, SQ, 1).long()}, "position_ids has shape [2, 6, 1], but must be"),
    ({"position_ids": torch.full((SQ,), 2**31)}, "position_ids holds 2147483648, but positions"),
    ({"position_ids": torch.full((B, SQ), -(2**31))}, "position_ids holds -2147483648, but"),
    ({"inv_freq": zeros(0)}, "inv_freq has 0 frequencies, but must have 1 to 4"),
    ({"inv_freq": zeros(5)}, "inv_freq has 5 frequencies, but must have 1 to 4"),
    ({"inv_freq": zeros(1, 4)}, "inv_freq has shape [1, 4], but must have 1 dimension"),
    ({"inv_freq": zeros(4).long()}, "inv_freq has dtype int64, but must be float32 or float64"),
    ({"scaling": math.nan}, "scaling is nan, but must be a finite number"),
    ({"max_position": -HUGE}, "max_position is -9223372036854775807, but must be above -2^31"),
    ({"inv_freq": zeros(4, device="meta")}, "the tensors are on cpu and meta"),
]


@pytest.mark.parametrize(("change", "text"), ROPE_CASES, ids=[text for _, text in ROPE_CASES])
def test_clamped_rope(change, text):
    arguments = {
        "x": torch.randn(B, HQ, SQ, D),
        "position_ids": torch.arange(SQ),
        "inv_freq": torch.rand(D // 2),
        **change,
    }
    with pytest.raises(ValueError, match=r"^clamped_rope: ") as error:
        torch.ops.lminf.clamped_rope(**arguments)
    assert text in str(error.value)


def test_tangents_are_refused():
    x = torch.randn(1, 2, 3, 4)
    rest = (torch.arange(3), torch.rand(2))
    for function in (
        lambda q: torch.ops.lminf.lambda_attn(q, x, x, 1, 2)[0],
        lambda q: torch.ops.lminf.clamped_rope(q, *rest),
    ):
        with pytest.raises(RuntimeError, match="no forward-mode derivative, but an input has a"):
            torch.func.jvp(function, (x,), (x,))
        with torch.no_grad(), forward_ad.dual_level(), pytest.raises(RuntimeError, match="tangent"):
            function(forward_ad.make_dual(x, x))


def test_an_unknown_instruction_set(monkeypatch):
    monkeypatch.setenv("LMINF_CPU_ISA", "mmx")
    with pytest.raises(ValueError, match=r"LMINF_CPU_ISA is 'mmx'.*portable"):
        torch.ops.lminf.lambda_attn(**attn_arguments())


EMPTY = [
    # B, Hq, Hkv, Sq, Sk
    (0, 4, 2, 6, 10),
    (2, 4, 2, 0, 10),
    (2, 4, 2, 0, 0),
    (0, 4, 2, 0, 0),
]


@pytest.mark.parametrize(("b", "hq", "hkv", "sq", "sk"), EMPTY)
def test_nothing_in_nothing_out(b, hq, hkv, sq, sk):
    q, k, v = zeros(b, hq, sq, D), zeros(b, hkv, sk, D), zeros(b, hkv, sk, D)
    out, lse = torch.ops.lminf.lambda_attn(q, k, v, G, 4, inv_freq=torch.rand(2))
    assert out.shape == q.shape
    assert lse.shape == (b, hq, sq)
    assert lse.dtype == torch.float32


def test_rows_without_keys_are_zero():
    arguments = attn_arguments()
    arguments["k_start"] = torch.full((B,), -SK)  # all of it is padding
    arguments["sink_logits"] = torch.ones(HQ)
    out, lse = torch.ops.lminf.lambda_attn(**arguments)
    assert torch.equal(out, torch.zeros(B, HQ, SQ, D))
    assert torch.equal(lse, torch.full((B, HQ, SQ), -math.inf))


def test_an_empty_batch_decodes_to_nothing():
    arguments = {
        name: value[:0] if isinstance(value, torch.Tensor) else value
        for name, value in decode_arguments().items()
    }
    out, lse = torch.ops.lminf.lambda_decode(**arguments)
    assert out.shape == (0, HQ, 1, D)
    assert lse.shape == (0, HQ, 1)


def test_an_empty_rotation():
    x = zeros(0, 2, 3, 4)
    assert torch.ops.lminf.clamped_rope(x, torch.arange(3), torch.rand(2)).shape == x.shape


@pytest.mark.parametrize("scale", [0.0, -0.7])
def test_any_finite_scale_is_good(scale):
    arguments = attn_arguments()
    out = lminf_cuda.lambda_attention(**arguments, scale=scale)
    truth = lminf_cuda.reference.lambda_attention(**arguments, scale=scale)
    torch.testing.assert_close(out, truth)


def test_a_strided_last_dimension_is_copied():
    arguments = attn_arguments()
    truth = torch.ops.lminf.lambda_attn(**arguments)
    for name in "qkv":
        wide = torch.zeros(*arguments[name].shape[:3], 2 * D)
        wide[..., ::2] = arguments[name]
        arguments[name] = wide[..., ::2]
    out, lse = torch.ops.lminf.lambda_attn(**arguments)
    assert torch.equal(out, truth[0])
    assert torch.equal(lse, truth[1])
    assert out.stride(-1) == 1
