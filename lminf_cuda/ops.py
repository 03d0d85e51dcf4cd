"""The operators torch.ops.lminf.*: schemas, fake kernels, and the extension that holds the kernels.

Importing this module registers everything. Arguments are checked in C++ (csrc/torch), once for all
callers: a broken rule raises ValueError with the argument's name, its value, and what it may be.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._functorch.pyfunctorch import retrieve_current_functorch_interpreter
from torch._ops import OpOverload
from torch.autograd import forward_ad

# torch.compile keeps the strides that the caller gave, and trusts the fake kernels below.
_TAGS = (torch.Tag.needs_exact_strides, torch.Tag.pt2_compliant_tag)

# B batch, Hq and Hkv heads, Sq queries, Sk keys, D head dim, C ring slots, G global slots.
_SCHEMAS = (
    # q [B, Hq, Sq, D], k and v [B, Hkv, Sk, D] -> out like q, lse float32 [B, Hq, Sq]
    "lambda_attn(Tensor q, Tensor k, Tensor v, int n_global, int window, *, "
    "int? max_distance=None, Tensor? inv_freq=None, float rope_scaling=1.0, "
    "bool rope_interleaved=False, Tensor? alibi_slopes=None, Tensor? sink_logits=None, "
    "float? scale=None, float softcap=0.0, Tensor? k_start=None, Tensor? global_k=None, "
    "Tensor? global_v=None, Tensor? cu_seqlens=None, int k_rotated=0, "
    "Tensor? distance_bias=None) -> (Tensor, Tensor)",
    # q [B, Hq, 1, D], k and v [B, Hkv, 1, D], ring_k and ring_v [B, Hkv, C, D] with rotated keys,
    # global_k and global_v [B, Hkv, G, D] with un-rotated keys, positions int64 [B]
    "lambda_decode(Tensor q, Tensor k, Tensor v, Tensor(a!) ring_k, Tensor(b!) ring_v, "
    "Tensor(c!) global_k, Tensor(d!) global_v, Tensor positions, int window, *, "
    "int? max_distance=None, Tensor? inv_freq=None, float rope_scaling=1.0, "
    "bool rope_interleaved=False, Tensor? alibi_slopes=None, Tensor? sink_logits=None, "
    "float? scale=None, float softcap=0.0, Tensor? distance_bias=None) -> (Tensor, Tensor)",
    # x [B, H, S, D], position_ids int64 [S] or [B, S], inv_freq [R/2] -> like x
    "clamped_rope(Tensor x, Tensor position_ids, Tensor inv_freq, *, int? max_position=None, "
    "float scaling=1.0, bool interleaved=False) -> Tensor",
    # q and lambda_out [B, Hq, 1, D], k and v [B, Hkv, Sk, D] un-rotated, lambda_lse float32
    # [B, Hq, 1], positions and k_start int64 [B] -> out like q, lse float32 [B, Hq, 1], chosen
    # int64 [B, Hq, top_k]
    "middle_topk(Tensor q, Tensor k, Tensor v, Tensor lambda_out, Tensor lambda_lse, "
    "Tensor positions, int n_global, int window, int top_k, int distance, *, "
    "Tensor? inv_freq=None, float rope_scaling=1.0, bool rope_interleaved=False, "
    "Tensor? alibi_slopes=None, Tensor? sink_logits=None, float? scale=None, float softcap=0.0, "
    "Tensor? k_start=None, Tensor? distance_bias=None) -> (Tensor, Tensor, Tensor)",
)

_NO_BACKWARD = (
    "{op} has no backward yet, but an input requires a gradient; wrap the call in "
    "torch.no_grad(), or detach the inputs"
)
_NO_FORWARD_MODE = (
    "{op} has no forward-mode derivative, but an input has a tangent; call it outside of "
    "torch.func.jvp and forward_ad.dual_level(), or on the primal alone"
)


def _output_like(x: Tensor) -> Tensor:
    """Like torch.empty_like, with the last dimension contiguous (csrc/torch/convert.h)."""
    out = torch.empty_like(x)
    if out.shape[-1] > 1 and out.stride(-1) != 1:
        return x.new_empty(x.shape)
    return out


def _check_devices(op: str, *tensors: Tensor | None) -> None:
    """With a meta tensor among them the fake kernels also run for real tensors."""
    devices = {str(tensor.device) for tensor in tensors if tensor is not None}
    if len(devices) > 1:
        raise ValueError(
            f"{op}: the tensors are on {' and '.join(sorted(devices))}; move all to one device"
        )


def _attention_fake(q: Tensor) -> tuple[Tensor, Tensor]:
    return _output_like(q), q.new_empty(q.shape[:-1], dtype=torch.float32)


def _tensors(args: tuple[object, ...], kwargs: dict[str, object]) -> list[Tensor]:
    return [arg for arg in (*args, *kwargs.values()) if isinstance(arg, Tensor)]


def _lambda_attn_fake(*args: object, **kwargs: object) -> tuple[Tensor, Tensor]:
    tensors = _tensors(args, kwargs)
    _check_devices("lambda_attn", *tensors)
    return _attention_fake(tensors[0])


def _lambda_decode_fake(*args: object, **kwargs: object) -> tuple[Tensor, Tensor]:
    tensors = _tensors(args, kwargs)
    _refuse_derivatives("lambda_decode", tensors)
    _check_devices("lambda_decode", *tensors)
    return _attention_fake(tensors[0])


def _clamped_rope_fake(*args: object, **kwargs: object) -> Tensor:
    tensors = _tensors(args, kwargs)
    _check_devices("clamped_rope", *tensors)
    return _output_like(tensors[0])


def _middle_topk_fake(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor, Tensor]:
    _check_devices("middle_topk", *_tensors(args, kwargs))
    q, positions, top_k = args[0], args[5], args[8]
    return *_attention_fake(q), positions.new_empty((*q.shape[:2], top_k))


def _why_no_derivative(op: str, tensors: list[Tensor]) -> str:
    """What is wrong where a derivative of `op` would be due; else empty."""
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        return _NO_BACKWARD.format(op=op)
    if any(forward_ad.unpack_dual(t).tangent is not None for t in tensors):
        return _NO_FORWARD_MODE.format(op=op)
    return ""


def _refuse_derivatives(op: str, tensors: list[Tensor]) -> None:
    reason = _why_no_derivative(op, tensors)
    if reason:
        raise RuntimeError(reason)


def _autograd_kernel(op: OpOverload) -> Callable[..., object]:
    """The op's autograd kernel: raises when a derivative would be due, else goes on below."""

    def kernel(keyset: torch._C.DispatchKeySet, *args: object, **kwargs: object) -> object:
        _refuse_derivatives(op._opname, _tensors(args, kwargs))
        with torch._C._AutoDispatchBelowAutograd():
            return op.redispatch(keyset & torch._C._after_autograd_keyset, *args, **kwargs)

    return kernel


def _transform_kernel(op: OpOverload) -> Callable[..., object]:
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
        _refuse_derivatives(op._opname, _tensors(args, kwargs))
        level = interpreter.level()

        def below(x: object) -> object:
            return functorch._unwrap_for_grad(x, level) if isinstance(x, Tensor) else x

        with interpreter.lower():
            out = op(*map(below, args), **{name: below(x) for name, x in kwargs.items()})
        return tuple(functorch._wrap_for_grad(x, level) for x in out)

    return kernel


def _register() -> torch.library.Library:
    """Defines the ops. The library object must live as long as they are to be callable."""
    library = torch.library.Library("lminf", "FRAGMENT")
    for schema in _SCHEMAS:
        library.define(schema, tags=_TAGS)
    torch.library.register_fake("lminf::lambda_attn", _lambda_attn_fake, lib=library)
    torch.library.register_fake("lminf::lambda_decode", _lambda_decode_fake, lib=library)
    torch.library.register_fake("lminf::clamped_rope", _clamped_rope_fake, lib=library)
    torch.library.register_fake("lminf::middle_topk", _middle_topk_fake, lib=library)
    ops = torch.ops.lminf
    for op in (ops.lambda_attn.default, ops.clamped_rope.default, ops.middle_topk.default):
        library.impl(op._opname, _autograd_kernel(op), "Autograd", with_keyset=True)
    # Called once per layer and token, it keeps the direct way: csrc/torch/derivatives.h.
    decode = ops.lambda_decode.default
    library.impl(decode._opname, _transform_kernel(decode), "FuncTorchDynamicLayerFrontMode")
    library.define("why_no_derivative(str op, Tensor[] tensors) -> str")
    library.impl("why_no_derivative", _why_no_derivative, "CompositeExplicitAutograd")
    return library


_library = _register()

try:
    import lminf_cuda._C as _C
except ImportError as error:
    raise ImportError(
        f"lminf_cuda cannot load its compiled kernels ({error}): build them with 'pip install .' "
        "in the project's source tree (it needs a C++17 compiler), and import lminf_cuda from "
        "outside that tree"
    ) from error


def cpu_isa() -> str:
    """The instruction set in use by the CPU kernels, as in "avx512" or "portable".

    Raises ValueError when the environment variable LMINF_CPU_ISA names one that this machine or
    build does not have.
    """
    return _C.cpu_isa()


def cpu_scratch_bytes() -> int:
    """The most scratch memory that a CPU kernel has held on one thread since the last call of this
    function, in bytes; 0 if none has run."""
    return _C.cpu_scratch_bytes()


def backends() -> tuple[str, ...]:
    """The devices that this build has kernels for."""
    keys = {"cpu": "CPU", "cuda": "CUDA"}
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    return tuple(name for name, key in keys.items() if has("lminf::lambda_attn", key))
