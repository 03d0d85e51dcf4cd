"""What the ops do where a derivative would be due that they do not have: they refuse, with the way
out."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch._functorch.pyfunctorch import retrieve_current_functorch_interpreter
from torch._ops import OpOverload
from torch.autograd import forward_ad

_NO_BACKWARD = (
    "{op} has no backward, but an input requires a gradient; wrap the call in "
    "torch.no_grad(), or detach the inputs"
)
_NO_FORWARD_MODE = (
    "{op} has no forward-mode derivative, but an input has a tangent; call it outside of "
    "torch.func.jvp and forward_ad.dual_level(), or on the primal alone"
)


def tensors_among(args: tuple[object, ...], kwargs: dict[str, object]) -> list[Tensor]:
    """The tensors that an op is called with."""
    return [arg for arg in (*args, *kwargs.values()) if isinstance(arg, Tensor)]


def why_no_derivative(op: str, tensors: list[Tensor]) -> str:
    """What is wrong where a derivative of `op` would be due; else empty."""
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        return _NO_BACKWARD.format(op=op)
    if _any_tangent(tensors):
        return _NO_FORWARD_MODE.format(op=op)
    return ""


def _any_tangent(tensors: list[Tensor]) -> bool:
    return any(forward_ad.unpack_dual(t).tangent is not None for t in tensors)


def refuse_tangents(op: str, tensors: list[Tensor]) -> None:
    """Raises RuntimeError where a forward-mode derivative of `op` would be due."""
    if _any_tangent(tensors):
        raise RuntimeError(_NO_FORWARD_MODE.format(op=op))


def refuse_derivatives(op: str, tensors: list[Tensor]) -> None:
    """Raises RuntimeError where a derivative of `op` would be due."""
    reason = why_no_derivative(op, tensors)
    if reason:
        raise RuntimeError(reason)


def autograd_kernel(op: OpOverload) -> Callable[..., object]:
    """The op's autograd kernel: raises when a derivative would be due, else goes on below."""

    def kernel(keyset: torch._C.DispatchKeySet, *args: object, **kwargs: object) -> object:
        refuse_derivatives(op._opname, tensors_among(args, kwargs))
        with torch._C._AutoDispatchBelowAutograd():
            return op.redispatch(keyset & torch._C._after_autograd_keyset, *args, **kwargs)

    return kernel


def transform_kernel(op: OpOverload) -> Callable[..., object]:
    """For an op without an autograd kernel: what it does inside of torch.func's transforms.

    Its kernels for tensors see none of their derivatives there.
    """
    functorch = torch._C._functorch
    front = torch._C.DispatchKeySet(torch._C.DispatchKey.FuncTorchDynamicLayerFrontMode)

    def kernel(*args: object, **kwargs: object) -> object:
        interpreter = retrieve_current_functorch_interpreter()
        if interpreter.key() not in (functorch.TransformType.Grad, functorch.TransformType.Jvp):
            with torch._C._ExcludeDispatchKeyGuard(front):
                return op(*args, **kwargs)  # torch refuses it by name
        refuse_derivatives(op._opname, tensors_among(args, kwargs))
        level = interpreter.level()

        def below(x: object) -> object:
            return functorch._unwrap_for_grad(x, level) if isinstance(x, Tensor) else x

        with interpreter.lower():
            out = op(*map(below, args), **{name: below(x) for name, x in kwargs.items()})
        return tuple(functorch._wrap_for_grad(x, level) for x in out)

    return kernel
