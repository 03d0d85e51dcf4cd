"""The ops' derivatives: what autograd is told of lambda_attn and clamped_rope (docs/design.md
section 9).

Each op has a kernel for PyTorch's Autograd key, which is the one Python function on the way of a
call. Where nothing requires a gradient it goes on below at once.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._functorch.autograd_function import enable_single_level_autograd_function
from torch._ops import OpOverload
from torch.autograd import Function

from lminf_cuda.ops.autograd import refuse_tangents, tensors_among

_Keys = torch._C.DispatchKeySet

_NO_GRADIENT = (
    "{op} has no gradient of {name}, which requires one; detach it, or wrap the call in "
    "torch.no_grad()"
)
_NO_CUDA_BACKWARD = (
    "lambda_attn has no backward on CUDA devices yet, but an input requires a gradient; wrap the "
    "call in torch.no_grad(), or train on a CPU"
)
_NO_DOUBLE_BACKWARD = (
    "lambda_attn has no double backward; take gradients of its gradients from "
    "lminf_cuda.reference.lambda_attention, which is plain torch"
)

# Of lambda_attn's inputs in the order of lambda_attn_backward's results: they have gradients.
_OPTIONS_WITH_GRADIENTS = ("global_k", "global_v", "sink_logits", "distance_bias")


def _below(op: OpOverload, keys: _Keys, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Goes on with a call, without autograd."""
    with torch._C._AutoDispatchBelowAutograd():
        return op.redispatch(keys & torch._C._after_autograd_keyset, *args, **kwargs)


def _without_autograd(op: OpOverload, *args: object, **kwargs: object) -> Any:
    """Calls an op in the forward of a Function, which runs without gradients; those of an outer
    transform of torch.func are on all the same."""
    with torch.enable_grad(), torch._C._AutoDispatchBelowAutograd():
        return op(*args, **kwargs)


def _wants_gradient(tensors: list[Tensor]) -> bool:
    return torch.is_grad_enabled() and any(x.requires_grad for x in tensors)


def _refuse_gradients(op: str, **constants: object) -> None:
    for name, x in constants.items():
        if isinstance(x, Tensor) and x.requires_grad:
            raise RuntimeError(_NO_GRADIENT.format(op=op, name=name))


class _AtItsLevel(Function):
    """A Function to be applied in an autograd kernel. A transform of torch.func has brought the
    call to its own level by then, which `Function.apply` would want to do again."""

    @classmethod
    def apply(cls, *args: Any) -> Any:
        with enable_single_level_autograd_function():
            return super(Function, cls).apply(*args)  # type: ignore[misc]


class _LambdaAttn(_AtItsLevel):
    """Of q, k, v, n_global, window, the options that have gradients, and the others by name."""

    @staticmethod
    def forward(*inputs: Any) -> Any:
        args, options = _split(inputs)
        return _without_autograd(torch.ops.lminf.lambda_attn.default, *args, **options)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        (q, k, v, *sizes), options = _split(inputs)
        # All tensors are saved the same way, so that hooks on saved tensors see each of them.
        names = [name for name, x in options.items() if isinstance(x, Tensor)]
        ctx.save_for_backward(*output, q, k, v, *(options[name] for name in names))
        ctx.names, ctx.sizes = names, sizes
        ctx.numbers = {name: x for name, x in options.items() if not isinstance(x, Tensor)}
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> Any:  # type: ignore[override]
        if grad_out is None and grad_lse is None:
            return (None,) * 10
        out, lse, q, k, v, *tensors = ctx.saved_tensors
        options = dict(zip(ctx.names, tensors, strict=True))
        if grad_out is None:
            grad_out = torch.zeros_like(out)
        grads = torch.ops.lminf.lambda_attn_backward.default(
            grad_out, grad_lse, out, lse, q, k, v, *ctx.sizes, **options, **ctx.numbers
        )
        of_options = (
            grad.to(options[name].dtype) if name in options else None
            for name, grad in zip(_OPTIONS_WITH_GRADIENTS, grads[3:], strict=True)
        )
        return *grads[:3], None, None, *of_options, None


def _split(inputs: tuple[Any, ...]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The op's arguments and options out of the inputs of `_LambdaAttn`."""
    *with_gradients, others = inputs[5:]
    return inputs[:5], dict(zip(_OPTIONS_WITH_GRADIENTS, with_gradients, strict=True)) | others


class _LambdaAttnBackward(_AtItsLevel):
    """The backward of what requires a gradient itself: there is no double backward."""

    @staticmethod
    def forward(options: dict[str, Any], *args: Any) -> Any:
        return _without_autograd(torch.ops.lminf.lambda_attn_backward.default, *args, **options)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:  # type: ignore[override]
        raise RuntimeError(_NO_DOUBLE_BACKWARD)


class _ClampedRope(_AtItsLevel):
    """Rotates by the negative angle on the way back."""

    @staticmethod
    def forward(x: Tensor, position_ids: Tensor, inv_freq: Tensor, options: dict[str, Any]) -> Any:
        op = torch.ops.lminf.clamped_rope.default
        return _without_autograd(op, x, position_ids, inv_freq, **options)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, position_ids, inv_freq, ctx.options = inputs
        ctx.save_for_backward(position_ids, inv_freq)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        position_ids, inv_freq = ctx.saved_tensors
        options = dict(ctx.options)
        limit = options.pop("max_position", None)
        if limit is not None:
            position_ids = position_ids.clamp(max=limit)
        back = torch.ops.lminf.clamped_rope.default(grad, -position_ids, inv_freq, **options)
        return back, None, None, None


def lambda_attn(keys: _Keys, *args: Any, **kwargs: Any) -> Any:
    """The op's autograd kernel."""
    tensors = tensors_among(args, kwargs)
    refuse_tangents("lambda_attn", tensors)
    if not _wants_gradient(tensors):
        return _below(torch.ops.lminf.lambda_attn.default, keys, args, kwargs)
    constants = {name: kwargs.get(name) for name in ("alibi_slopes", "inv_freq")}
    _refuse_gradients("lambda_attn", **constants)
    if args[0].is_cuda:
        raise RuntimeError(_NO_CUDA_BACKWARD)
    with_gradients = [kwargs.pop(name, None) for name in _OPTIONS_WITH_GRADIENTS]
    return _LambdaAttn.apply(*args, *with_gradients, kwargs)


def lambda_attn_backward(keys: _Keys, *args: Any, **kwargs: Any) -> Any:
    """The op's autograd kernel."""
    tensors = tensors_among(args, kwargs)
    refuse_tangents("lambda_attn_backward", tensors)
    if not _wants_gradient(tensors):
        return _below(torch.ops.lminf.lambda_attn_backward.default, keys, args, kwargs)
    return _LambdaAttnBackward.apply(kwargs, *args)


def clamped_rope(keys: _Keys, *args: Any, **kwargs: Any) -> Any:
    """The op's autograd kernel."""
    tensors = tensors_among(args, kwargs)
    refuse_tangents("clamped_rope", tensors)
    if not _wants_gradient(tensors):
        return _below(torch.ops.lminf.clamped_rope.default, keys, args, kwargs)
    _refuse_gradients("clamped_rope", inv_freq=args[2])
    return _ClampedRope.apply(*args, kwargs)


# The autograd kernels of the ops that have one beyond a refusal.
GRADIENTS: dict[str, Callable[..., Any]] = {
    "lambda_attn": lambda_attn,
    "lambda_attn_backward": lambda_attn_backward,
    "clamped_rope": clamped_rope,
}
