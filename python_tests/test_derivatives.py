"""Derivatives that the kernels do not have are refused by name, never lost; test_autograd.py has
those that they have."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from tiny_models import one_thread, tiny_model, tokens
from torch import Tensor
from torch.autograd import forward_ad

from lminf_cuda import LambdaCache, patch_model

NO_BACKWARD = r"{} has no backward, but an input requires a gradient.*torch\.no_grad\(\)"
NO_GRADIENT = r"{} has no gradient of {}, which requires one.*torch\.no_grad\(\)"
NO_TANGENT = r"{} has no forward-mode derivative, but an input has a tangent"


@pytest.fixture(autouse=True, scope="module")
def single_threaded() -> Iterator[None]:
    with one_thread():
        yield


def arguments(op: str) -> dict[str, Any]:
    """Of a call with all its tensors of floats; 4 query heads, 2 key heads, 8 dims."""
    torch.manual_seed(0)
    q = torch.rand(1, 4, 1, 8)
    per_head = {
        "inv_freq": torch.rand(4),
        "alibi_slopes": torch.rand(4),
        "sink_logits": torch.rand(4),
        "distance_bias": torch.rand(4, 7),
    }

    def kv(n: int) -> Tensor:
        return torch.rand(1, 2, n, 8)

    calls: dict[str, dict[str, Any]] = {
        "lambda_attn": {"q": q, "k": kv(9), "v": kv(9), "n_global": 2, "window": 6} | per_head,
        "lambda_decode": {"q": q, "k": kv(1), "v": kv(1), "ring_k": kv(6), "ring_v": kv(6)}
        | {"global_k": kv(2), "global_v": kv(2), "positions": torch.tensor([9]), "window": 6}
        | per_head,
        "middle_topk": {"q": q, "k": kv(20), "v": kv(20), "lambda_out": torch.rand_like(q)}
        | {"lambda_lse": torch.rand(1, 4, 1), "positions": torch.tensor([19]), "n_global": 2}
        | {"window": 6, "top_k": 3, "distance": 4}
        | per_head,
        "clamped_rope": {
            "x": q,
            "position_ids": torch.arange(1),
            "inv_freq": per_head["inv_freq"],
        },
    }
    return calls[op]


OPS = ("lambda_attn", "lambda_decode", "middle_topk", "clamped_rope")
FORWARD_ONLY = ("lambda_decode", "middle_topk")
CONSTANTS = {"lambda_attn": ("inv_freq", "alibi_slopes"), "clamped_rope": ("inv_freq",)}
CASES = [
    (op, name)
    for op in OPS
    for name, value in arguments(op).items()
    if isinstance(value, Tensor) and value.is_floating_point()
]

REFUSED = [(op, name) for op, name in CASES if op in FORWARD_ONLY or name in CONSTANTS[op]]


def no_gradient(op: str, name: str) -> str:
    return NO_BACKWARD.format(op) if op in FORWARD_ONLY else NO_GRADIENT.format(op, name)


def call(op: str, changed: dict[str, Any]) -> Tensor:
    out = getattr(torch.ops.lminf, op)(**(arguments(op) | changed))
    first: Tensor = out if isinstance(out, Tensor) else out[0]
    return first


@pytest.mark.parametrize(("op", "name"), REFUSED)
def test_gradients(op: str, name: str) -> None:
    wanted = arguments(op)[name].requires_grad_()
    expected = call(op, {})
    with pytest.raises(RuntimeError, match=no_gradient(op, name)):
        call(op, {name: wanted})
    with pytest.raises(RuntimeError, match=no_gradient(op, name)):
        call(op, {name: wanted * 1})
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert torch.equal(call(op, {name: wanted.detach()}), expected)
            if not name.startswith(("ring", "global")):  # a leaf is not written
                assert torch.equal(call(op, {name: wanted}), expected)


@pytest.mark.parametrize(("op", "name"), REFUSED)
def test_gradients_of_transforms(op: str, name: str) -> None:
    with pytest.raises(RuntimeError, match=no_gradient(op, name)):
        torch.func.grad(lambda x: call(op, {name: x}).sum())(arguments(op)[name])


@pytest.mark.parametrize(("op", "name"), CASES)
def test_tangents(op: str, name: str) -> None:
    x = arguments(op)[name]
    with pytest.raises(RuntimeError, match=NO_TANGENT.format(op)):
        torch.func.jvp(lambda x: call(op, {name: x}), (x,), (torch.ones_like(x),))
    with torch.no_grad(), pytest.raises(RuntimeError, match=NO_TANGENT.format(op)):
        torch.func.jvp(lambda x: call(op, {name: x}), (x,), (torch.ones_like(x),))
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match=NO_TANGENT.format(op)):
        call(op, {name: forward_ad.make_dual(x, torch.ones_like(x))})


@pytest.mark.parametrize("op", OPS)
def test_derivatives_of_something_else(op: str) -> None:
    """Within a transform or a level, inputs that are constants are none of its business."""
    total, x, given = call(op, {}).sum(), torch.tensor(2.0), arguments(op)
    name = "x" if op == "clamped_rope" else "q"

    def f(x: Tensor) -> Tensor:
        out = getattr(torch.ops.lminf, op)(**given)
        return x * (out if isinstance(out, Tensor) else out[0]).sum()

    def wrapped(x: Tensor) -> Tensor:  # of the transform, but without a derivative
        return x * call(op, {name: given[name] + torch.zeros_like(x)}).sum()

    for function in (f, wrapped):
        assert torch.equal(torch.func.grad(function)(x), total)
        assert torch.equal(torch.func.jvp(function, (x,), (torch.ones(()),))[1], total)
    assert torch.equal(torch.func.jacrev(torch.func.grad(f))(x), torch.zeros(()))
    assert torch.equal(torch.func.grad(torch.func.grad(f))(x), torch.zeros(()))
    with forward_ad.dual_level():
        dual = f(forward_ad.make_dual(x, torch.ones(())))
        assert torch.equal(forward_ad.unpack_dual(dual).tangent, total)


def test_the_writes_of_a_step_within_a_transform() -> None:
    given = arguments("lambda_decode")
    expected = arguments("lambda_decode")
    torch.ops.lminf.lambda_decode(**expected)
    torch.func.grad(lambda x: x * torch.ops.lminf.lambda_decode(**given)[0].sum())(torch.ones(()))
    for name in ("ring_k", "ring_v", "global_k", "global_v"):
        assert torch.equal(given[name], expected[name])


@pytest.mark.parametrize("op", ["lambda_decode", "middle_topk"])
def test_compiled_calls(op: str) -> None:
    torch._dynamo.reset()
    given = arguments(op)
    x = given["v"].clone().requires_grad_()
    compiled = torch.compile(
        lambda x: getattr(torch.ops.lminf, op)(**(given | {"v": x}))[0], backend="aot_eager"
    )
    with pytest.raises(Exception, match=f"{op} has no backward"):
        compiled(x)
    with torch.no_grad():
        assert torch.equal(compiled(x), call(op, {}))
    torch._dynamo.reset()


TRAINED: dict[str, tuple[str, Callable[[Any], Tensor]]] = {
    "q_proj": ("llama", lambda model: model.model.layers[0].self_attn.q_proj.weight),
    "k_proj": ("llama", lambda model: model.model.layers[0].self_attn.k_proj.weight),
    "v_proj": ("llama", lambda model: model.model.layers[0].self_attn.v_proj.weight),
    "sinks": ("gpt_oss", lambda model: model.model.layers[0].self_attn.sinks),
}


@pytest.mark.parametrize("trained", TRAINED)
def test_a_patched_model_of_which_little_trains(trained: str) -> None:
    """A forward has a gradient, and a step over the cache says that it has none."""
    name, parameter = TRAINED[trained]
    layers = {"num_hidden_layers": 1} | (
        {"layer_types": ["full_attention"]} if name == "gpt_oss" else {}
    )
    model = patch_model(tiny_model(name, **layers), n_global=3, window=12)
    cache = LambdaCache(model)
    ids = tokens(1, 25)
    with torch.no_grad():
        model(ids[:, :20], past_key_values=cache)
    parameter(model).requires_grad_()
    model(ids[:, 20:24], past_key_values=cache).logits.square().sum().backward()
    assert parameter(model).grad.abs().max() > 0
    with pytest.raises(
        RuntimeError, match=r"lambda_decode has no backward|without their gradients"
    ):
        model(ids[:, 24:], past_key_values=cache)
    parameter(model).grad = None
    model(ids, use_cache=False).logits.square().sum().backward()
    assert parameter(model).grad.abs().max() > 0


def test_frozen_attention_below_what_trains() -> None:
    """Gradients may be on, and may be due to what stands behind attention."""
    model = patch_model(tiny_model(), n_global=3, window=12)
    model.lm_head.weight.requires_grad_()
    ids = tokens(1, 30)
    cache = LambdaCache(model)
    logits = [model(piece, past_key_values=cache).logits for piece in ids.split([20, 1, 9], 1)]
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
    torch.testing.assert_close(torch.cat(logits, 1).detach(), expected, rtol=0, atol=1e-5)
    torch.cat(logits, 1).sum().backward()
    got = model.lm_head.weight.grad
    model.lm_head.weight.grad = None
    model(ids, use_cache=False).logits.sum().backward()
    torch.testing.assert_close(got, model.lm_head.weight.grad, rtol=1e-4, atol=1e-4)
