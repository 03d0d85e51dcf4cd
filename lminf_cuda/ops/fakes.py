"""The ops' fake kernels: what torch.compile and meta tensors are told of the outputs."""

from typing import Any

import torch
from torch import Tensor

from lminf_cuda.ops.autograd import refuse_derivatives, tensors_among


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


def lambda_attn(*args: object, **kwargs: object) -> tuple[Tensor, Tensor]:
    """Of the op of that name."""
    tensors = tensors_among(args, kwargs)
    _check_devices("lambda_attn", *tensors)
    return _attention_fake(tensors[0])


def lambda_decode(*args: object, **kwargs: object) -> tuple[Tensor, Tensor]:
    """Of the op of that name."""
    tensors = tensors_among(args, kwargs)
    refuse_derivatives("lambda_decode", tensors)
    _check_devices("lambda_decode", *tensors)
    return _attention_fake(tensors[0])


def clamped_rope(*args: object, **kwargs: object) -> Tensor:
    """Of the op of that name."""
    tensors = tensors_among(args, kwargs)
    _check_devices("clamped_rope", *tensors)
    return _output_like(tensors[0])


def middle_topk(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Of the op of that name."""
    _check_devices("middle_topk", *tensors_among(args, kwargs))
    q, positions, top_k = args[0], args[5], args[8]
    return *_attention_fake(q), positions.new_empty((*q.shape[:2], top_k))
