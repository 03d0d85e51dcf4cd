"""The ops' fake kernels: what torch.compile and meta tensors are told of the outputs."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lminf_cuda.ops.autograd import refuse_derivatives, tensors_among


def _output_like(x: Tensor) -> Tensor:
    """Like torch.empty_like, with the last dimension contiguous (csrc/torch/call.h)."""
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


def _attention_fake(q: Tensor, *_: object, **__: object) -> tuple[Tensor, Tensor]:
    return _output_like(q), q.new_empty(q.shape[:-1], dtype=torch.float32)


def _backward_fake(*args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
    lse, q, k, v = args[3:7]

    def like(name: str) -> Tensor:
        return _output_like(kwargs[name]) if kwargs.get(name) is not None else lse.new_empty(0)

    def float_like(name: str) -> Tensor:
        return lse.new_empty(kwargs[name].shape if kwargs.get(name) is not None else 0)

    global_kv = like("global_k"), like("global_v")
    per_head = float_like("sink_logits"), float_like("distance_bias")
    return _output_like(q), _output_like(k), _output_like(v), *global_kv, *per_head


def _decode_fake(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    refuse_derivatives("lambda_decode", tensors_among(args, kwargs))
    return _attention_fake(*args)


def _rope_fake(x: Tensor, *_: object, **__: object) -> Tensor:
    return _output_like(x)


def _middle_fake(*args: Any, **_: object) -> tuple[Tensor, Tensor, Tensor]:
    q, positions, top_k = args[0], args[5], args[8]
    return *_attention_fake(q), positions.new_empty((*q.shape[:2], top_k))


_FAKES: dict[str, Callable[..., object]] = {
    "lambda_attn": _attention_fake,
    "lambda_attn_backward": _backward_fake,
    "lambda_decode": _decode_fake,
    "clamped_rope": _rope_fake,
    "middle_topk": _middle_fake,
}


def fake_kernel(name: str) -> Callable[..., object]:
    """Of the op of that name."""

    def kernel(*args: object, **kwargs: object) -> object:
        _check_devices(name, *tensors_among(args, kwargs))
        return _FAKES[name](*args, **kwargs)

    return kernel
