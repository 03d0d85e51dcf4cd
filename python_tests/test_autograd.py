"""lambda_attn and clamped_rope under autograd: gradients, torch.func, torch.compile, checkpoints,
autocast. What the gradients must be is tested in test_backward.py."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from cases import GRADIENTS, reference_gradients
from functorch.compile import make_boxed_func
from tiny_models import one_thread
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch.library import opcheck
from torch.utils.checkpoint import checkpoint

from lminf_cuda import lambda_attention, reference


@pytest.fixture(autouse=True, scope="module")
def single_threaded() -> Iterator[None]:
    with one_thread():
        yield


def inputs(dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """Of a call with every input that has a gradient, keys dropped before the first."""
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    return {
        "q": randn(2, 4, 30, 16).to(dtype),
        "k": randn(2, 2, 40, 16).to(dtype),
        "v": randn(2, 2, 40, 16).to(dtype),
        "n_global": 3,
        "window": 12,
        "max_distance": 15,
        "inv_freq": torch.rand(8, generator=generator),
        "sink_logits": randn(4),
        "k_start": torch.tensor([100, 5]),
        "global_k": randn(2, 2, 3, 16).to(dtype),
        "global_v": randn(2, 2, 3, 16).to(dtype),
        "distance_bias": randn(4, 16),
    }


def with_leaves(given: dict[str, Any], names: tuple[str, ...] = GRADIENTS) -> dict[str, Any]:
    """The inputs, those of `names` as leaves."""
    return given | {name: given[name].detach().clone().requires_grad_() for name in names}


def loss(given: dict[str, Any]) -> Tensor:
    """Of out, each entry with a weight of its own, and of lse."""
    out, lse = lambda_attention(**given, return_lse=True)
    weights = torch.linspace(-1, 1, out.numel()).view(out.shape)
    return (out * weights).sum() + lse.sin().sum()


def expected() -> dict[str, Tensor]:
    given = inputs()
    out, lse = lambda_attention(**given, return_lse=True)
    weights = torch.linspace(-1, 1, out.numel()).view(out.shape)
    return reference_gradients(given, weights, lse.cos(), True)


def assert_close(found: Tensor | None, wanted: Tensor) -> None:
    assert found is not None
    torch.testing.assert_close(found.double(), wanted.double(), rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("name", GRADIENTS)
def test_one_input_at_a_time(name: str) -> None:
    given = with_leaves(inputs(), (name,))
    loss(given).backward()
    assert_close(given[name].grad, expected()[name])


def test_all_inputs_at_once() -> None:
    given = with_leaves(inputs())
    loss(given).backward()
    for name, wanted in expected().items():
        assert_close(given[name].grad, wanted)


@pytest.mark.parametrize("of", ["out", "lse"])
def test_one_result_alone(of: str) -> None:
    given = with_leaves(inputs())
    out, lse = lambda_attention(**given, return_lse=True)
    (out if of == "out" else lse).square().sum().backward()
    truth = reference_gradients(
        inputs(),
        2 * out.detach() if of == "out" else torch.zeros_like(out),
        2 * lse.detach() if of == "lse" else None,
        True,
    )
    for name, wanted in truth.items():
        assert_close(given[name].grad, wanted)


@pytest.mark.parametrize("name", ["sink_logits", "distance_bias"])
def test_gradients_have_the_dtype_of_their_input(name: str) -> None:
    given = inputs()
    given = with_leaves(given | {name: given[name].double()}, (name,))
    loss(given).backward()
    assert given[name].grad.dtype == torch.float64
    assert_close(given[name].grad, expected()[name])


def test_views_and_expanded_inputs() -> None:
    """One key head for all, a transposed query: gradients go back through the views."""
    stored = torch.randn(1, 30, 4, 16, requires_grad=True)  # [B, S, H, D]
    shared = torch.randn(1, 1, 30, 16, requires_grad=True)
    k = shared.expand(1, 4, 30, 16)
    lambda_attention(stored.transpose(1, 2), k, k, n_global=2, window=9).sum().backward()
    stored_ref, shared_ref = (x.detach().double().requires_grad_() for x in (stored, shared))
    k = shared_ref.expand(1, 4, 30, 16)
    out = reference.lambda_attention(stored_ref.transpose(1, 2), k, k, n_global=2, window=9)
    out.sum().backward()  # type: ignore[union-attr]
    assert_close(stored.grad, stored_ref.grad)  # type: ignore[arg-type]
    assert_close(shared.grad, shared_ref.grad)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", GRADIENTS)
def test_transforms(name: str) -> None:
    given = inputs()
    found = torch.func.grad(lambda x: loss(given | {name: x}))(given[name])
    assert_close(found, expected()[name])
    _, vjp = torch.func.vjp(lambda x: loss(given | {name: x}), given[name])
    assert_close(vjp(torch.tensor(2.0))[0], 2 * expected()[name])


def test_no_double_backward() -> None:
    given = with_leaves(inputs())
    grads = torch.autograd.grad(loss(given), given["q"], create_graph=True)  # first order is there
    assert_close(grads[0].detach(), expected()["q"])
    with pytest.raises(RuntimeError, match=r"lambda_attn has no double backward.*reference"):
        grads[0].sum().backward()
    one = inputs()
    with pytest.raises(RuntimeError, match="lambda_attn has no double backward"):
        torch.func.grad(lambda x: torch.func.grad(lambda x: loss(one | {"q": x}))(x).sum())(
            one["q"]
        )


def test_nothing_is_kept_without_gradients() -> None:
    given = with_leaves(inputs())
    with torch.no_grad():
        assert loss(given).grad_fn is None
    assert loss(inputs()).grad_fn is None


def test_opcheck() -> None:
    given = with_leaves(inputs())
    q, k, v, *sizes = (given.pop(name) for name in ("q", "k", "v", "n_global", "window"))
    opcheck(torch.ops.lminf.lambda_attn.default, (q, k, v, *sizes), given)
    out, lse = torch.ops.lminf.lambda_attn(q, k, v, *sizes, **given)
    args = [x.detach() for x in (torch.randn_like(out), torch.randn_like(lse), out, lse, q, k, v)]
    fixed = {name: x.detach() if isinstance(x, Tensor) else x for name, x in given.items()}
    op = torch.ops.lminf.lambda_attn_backward.default
    opcheck(op, (*args, *sizes), fixed)
    opcheck(op, (args[0], None, *args[2:], *sizes), {"k_rotated": 0})


class Graphs:
    """A compiler that counts the graphs it is given, forward and backward."""

    def __init__(self) -> None:
        self.forward: list[torch.fx.GraphModule] = []
        self.backward: list[torch.fx.GraphModule] = []
        self.backend = aot_autograd(
            fw_compiler=self._into(self.forward), bw_compiler=self._into(self.backward)
        )

    @staticmethod
    def _into(graphs: list[torch.fx.GraphModule]) -> Callable[..., Any]:
        def compile(graph: torch.fx.GraphModule, _: Any) -> Any:
            graphs.append(graph)
            return make_boxed_func(graph.forward)

        return compile


def ops_in(graph: torch.fx.GraphModule) -> list[str]:
    return [str(n.target) for n in graph.graph.nodes if str(n.target).startswith("lminf.")]


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_in_one_graph_each(dynamic: bool) -> None:
    torch._dynamo.reset()
    graphs = Graphs()
    compiled = torch.compile(loss, fullgraph=True, backend=graphs.backend, dynamic=dynamic)
    given = with_leaves(inputs())
    compiled(given).backward()
    for name, wanted in expected().items():
        assert_close(given[name].grad, wanted)
    assert [ops_in(graph) for graph in graphs.forward] == [["lminf.lambda_attn.default"]]
    assert [ops_in(graph) for graph in graphs.backward] == [["lminf.lambda_attn_backward.default"]]
    torch._dynamo.reset()


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoints(reentrant: bool) -> None:
    given = with_leaves(inputs())
    names = list(GRADIENTS)

    def run(*tensors: Tensor) -> Tensor:
        return loss(given | dict(zip(names, tensors, strict=True)))

    total = checkpoint(run, *(given[name] for name in names), use_reentrant=reentrant)
    assert isinstance(total, Tensor)
    total.backward()
    for name, wanted in expected().items():
        assert_close(given[name].grad, wanted)


def test_saved_tensors_are_what_hooks_see() -> None:
    """The forward keeps its inputs, out and lse, and nothing that is larger."""
    given = with_leaves(inputs())
    seen: list[int] = []

    def pack(x: Tensor) -> Tensor:
        seen.append(x.numel())
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        out, lse = lambda_attention(**given, return_lse=True)
    tensors = [x for x in given.values() if isinstance(x, Tensor)]
    assert sorted(seen) == sorted(x.numel() for x in (out, lse, *tensors))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype: torch.dtype) -> None:
    """Projections in 16 bits, weights and their gradients in 32."""
    x = torch.randn(1, 50, 64)
    layer = torch.nn.Linear(64, 3 * 64)

    def run(attend: Callable[..., Any]) -> Tensor:
        q, k, v = layer(x).view(1, 50, 3, 4, 16).permute(2, 0, 3, 1, 4)
        return attend(q, k, v, n_global=2, window=9).float().square().sum()

    with torch.autocast("cpu", dtype):
        run(lambda_attention).backward()
    found = layer.weight.grad
    layer.weight.grad = None
    run(reference.lambda_attention).backward()
    assert found is not None and found.dtype == torch.float32
    error = (found - layer.weight.grad).abs().max() / layer.weight.grad.abs().max()
    assert error < 8 * torch.finfo(dtype).eps


ROPE: dict[str, dict[str, Any]] = {
    "halves": {},
    "interleaved": {"interleaved": True},
    "scaled": {"scaling": 1.3},
    "clamped": {"max_position": 7},
}


@pytest.mark.parametrize("option", ROPE)
@pytest.mark.parametrize("per_row", [True, False])
def test_clamped_rope(option: str, per_row: bool) -> None:
    position_ids = torch.arange(-5, 15)
    if per_row:
        position_ids = torch.stack([position_ids, position_ids * 10_000_000])
    x = torch.randn(2, 3, 20, 24, requires_grad=True)
    weights, inv_freq = torch.randn(2, 3, 20, 24), torch.rand(8)
    args = position_ids, inv_freq
    truth = torch.autograd.grad(
        (reference.clamped_rope(x, *args, **ROPE[option]) * weights).sum(), x
    )
    total = (torch.ops.lminf.clamped_rope(x, *args, **ROPE[option]).square() * weights).sum() / 2
    (found,) = torch.autograd.grad(total, x, create_graph=True)
    rotated = torch.ops.lminf.clamped_rope(x, *args, **ROPE[option]).detach()
    (wanted,) = torch.autograd.grad(
        (reference.clamped_rope(x, *args, **ROPE[option]) * weights * rotated).sum(), x
    )
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    # A rotation is linear, so its derivative is a rotation, and that has a derivative again.
    (twice,) = torch.autograd.grad(found.sum(), x)
    assert twice.isfinite().all() and truth[0].isfinite().all()
    opcheck(torch.ops.lminf.clamped_rope.default, (x, *args), ROPE[option])
