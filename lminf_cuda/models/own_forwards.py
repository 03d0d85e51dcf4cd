"""Attention modules of transformers that do not ask its AttentionInterface, and what replaces them.

Each forward here stands for that of an attention module while the model is patched: it projects,
hands un-rotated queries, keys and values to `attend`, and projects back. `attend` is given by the
patch: (module, q [B, Hq, S, D], k [B, Hkv, S, D], v [B, Hkv, S, Dv], scale, bias=None) ->
[B, S, Hq * Dv]. It knows the cache by itself, so that none of these forwards takes it from an
argument, whose name changes from version to version.

Beside them is what such modules know of positions: ALiBi slopes, tables of sines, learned biases.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .compat import asks_interface, versions
from .rope import Rope

Attend = Callable[..., Tensor]


# What the attention modules that are served here call the dropout of their attention weights: a
# number, or a module.
_DROPOUTS = ("attention_dropout", "attn_dropout", "attn_dropout_p", "dropout")


def attention_dropout(module: Any) -> float:
    """The dropout of a module's attention weights in training."""
    for name in _DROPOUTS:
        dropout = getattr(module, name, None)
        if dropout is not None:
            return float(getattr(dropout, "p", dropout))
    raise ValueError(
        f"{type(module).__name__} is in training mode, and has no dropout of its attention under a "
        f"known name; call model.eval() ({versions()})"
    )


def falcon_forward(
    attend: Attend, module: Any, hidden_states: Tensor, *_: Any, **__: Any
) -> tuple[Tensor, None]:
    """Falcon's, in all its versions of grouped heads."""
    q, k, v = module._split_heads(module.query_key_value(hidden_states))  # [B, S, heads, D]
    if module.new_decoder_architecture:  # which repeats each key head for its query heads
        step = module.num_heads // module.num_kv_heads
        k, v = k[:, :, ::step], v[:, :, ::step]
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    out = attend(module, q, k, v, module.inv_norm_factor)
    return module.dense(out), None


def gptj_forward(
    attend: Attend, module: Any, hidden_states: Tensor, *_: Any, **__: Any
) -> tuple[Tensor, None]:
    """GPT-J's."""
    heads = (*hidden_states.shape[:2], module.num_attention_heads, module.head_dim)
    q, k, v = (
        project(hidden_states).view(heads).transpose(1, 2)
        for project in (module.q_proj, module.k_proj, module.v_proj)
    )
    out = attend(module, q, k, v, module.head_dim**-0.5)
    return module.resid_dropout(module.out_proj(out)), None


def mpt_forward(
    attend: Attend, module: Any, hidden_states: Tensor, *_: Any, **__: Any
) -> tuple[Tensor, None]:
    """MPT's."""
    qkv = module.Wqkv(hidden_states)
    if module.clip_qkv:
        qkv = qkv.clamp(-module.clip_qkv, module.clip_qkv)
    heads = (*hidden_states.shape[:2], module.n_heads, module.head_dim)
    q, k, v = (x.view(heads).transpose(1, 2) for x in qkv.chunk(3, dim=-1))
    return module.out_proj(attend(module, q, k, v, module.softmax_scale)), None


def bloom_forward(
    attend: Attend, module: Any, hidden_states: Tensor, residual: Tensor, *_: Any, **__: Any
) -> tuple[Tensor, None]:
    """Bloom's, which adds the residual itself."""
    q, k, v = module._reshape(module.query_key_value(hidden_states))
    out = attend(module, q, k, v, module.inv_norm_factor)
    out = nn.functional.dropout(module.dense(out), module.hidden_dropout, module.training)
    return residual + out, None


def codegen_forward(
    attend: Attend, module: Any, hidden_states: Tensor, *_: Any, **__: Any
) -> tuple[Tensor, None]:
    """CodeGen's, whose projections stand in the order of the four devices it was trained on."""
    batch, n_tokens = hidden_states.shape[:2]
    qvk = module.qkv_proj(hidden_states).view(batch, n_tokens, 4, 3, -1)
    heads = (batch, n_tokens, module.num_attention_heads, module.head_dim)
    q, v, k = (x.reshape(heads).transpose(1, 2) for x in qvk.unbind(3))
    out = attend(module, q, k, v, module.head_dim**-0.5)
    return module.resid_dropout(module.out_proj(out)), None


def gpt_neox_japanese_forward(
    attend: Attend, module: Any, hidden_states: Tensor, *_: Any, **__: Any
) -> tuple[Tensor, None, Tensor | None]:
    """GPT-NeoX-Japanese's, which hands its bias on to the layer."""
    qkv = module.query_key_value(hidden_states).unflatten(-1, (module.num_attention_heads, -1))
    q, k, v = (x.transpose(1, 2) for x in qkv.chunk(3, dim=-1))
    out = attend(module, q, k, v, module.head_size**-0.5)
    return module.dense(out), None, module.dense_bias


def diffllama_forward(
    attend: Attend, module: Any, hidden_states: Tensor, *_: Any, **__: Any
) -> tuple[Tensor, None]:
    """Differential attention: half of the heads are subtracted from the other half, over values of
    twice the head dim that both halves share."""
    q, k, v = (
        project(hidden_states).unflatten(-1, (-1, module.head_dim)).transpose(1, 2)
        for project in (module.q_proj, module.k_proj, module.v_proj)
    )
    v = torch.cat(v.chunk(2, dim=1), dim=-1).repeat(1, 2, 1, 1)
    out = attend(module, q, k, v, module.head_dim**-0.5)
    plus, minus = out.unflatten(-1, (-1, 2 * module.head_dim)).chunk(2, dim=2)
    first, second = (
        (a.float() * b.float()).sum().exp().to(out.dtype)
        for a, b in ((module.lambda_q1, module.lambda_k1), (module.lambda_q2, module.lambda_k2))
    )
    out = module.groupnorm(plus - (first - second + module.lambda_init) * minus)
    return module.o_proj(((1 - module.lambda_init) * out).flatten(2)), None


def t5_forward(
    attend: Attend,
    module: Any,
    hidden_states: Tensor,
    *_: Any,
    position_bias: Tensor | None = None,
    **__: Any,
) -> tuple[Tensor | None, ...]:
    """Of the decoder's self-attention. What goes from layer to layer as `position_bias` is the
    table of biases by distance; umT5's layers have one each."""
    heads = (*hidden_states.shape[:2], module.n_heads, module.key_value_proj_dim)
    q, k, v = (
        project(hidden_states).view(heads).transpose(1, 2)
        for project in (module.q, module.k, module.v)
    )
    if position_bias is None:
        position_bias = _t5_biases(module, module.lminf_layer.max_distance, q.device)
    out = module.o(attend(module, q, k, v, 1.0, position_bias))
    if "position_bias" not in inspect.signature(type(module).forward).parameters:
        return out, None
    return (out, position_bias, None) if asks_interface(module) else (out, position_bias)


def _t5_biases(module: Any, max_distance: int, device: torch.device) -> Tensor:
    """float32 [Hq, max_distance + 1]: what the layer adds for each distance from 0 on."""
    if not module.has_relative_attention_bias:
        return torch.zeros(module.n_heads, max_distance + 1, dtype=torch.float32, device=device)
    # The last of so many tokens, whose distances fall to 0.
    bias = module.compute_bias(1, max_distance + 1, device, past_seen_tokens=max_distance)
    return bias[0, :, 0].flip(-1).float().contiguous()


def _powers(heads: int, largest: int) -> Tensor:
    """2 ** (-largest * i / heads) for i = 1 .. heads, float32."""
    exponents = torch.arange(1, heads + 1, dtype=torch.float64, device="cpu")
    return (2.0 ** (-largest * exponents / heads)).float()


def bloom_slopes(module: Any) -> Tensor:
    """The ALiBi paper's: for 2^n heads 2^(-8i/2^n), further heads take every second of 2^(n+1)."""
    heads = module.num_heads
    below = 2 ** math.floor(math.log2(heads))
    return torch.cat([_powers(below, 8), _powers(2 * below, 8)[::2][: heads - below]])


def falcon_slopes(module: Any) -> Tensor | None:
    """Bloom's, rounded to bfloat16 and scaled like the scores."""
    if not module.config.alibi:
        return None
    return bloom_slopes(module).bfloat16().float() * module.inv_norm_factor


def mpt_slopes(module: Any) -> Tensor:
    """Those of the next power of two, every second first."""
    heads = module.n_heads
    above = 2 ** math.ceil(math.log2(heads))
    slopes = _powers(above, 8)
    return slopes if above == heads else torch.cat([slopes[1::2], slopes[::2]])[:heads]


def gptj_rope(module: Any) -> Rope:
    """The rotation that GPT-J and CodeGen look up in a table of sines."""
    dim = module.rotary_dim or module.embed_dim
    exponents = torch.arange(0, dim, 2, dtype=torch.int64, device="cpu").float() / dim
    inv_freq = 1.0 / 10000.0**exponents
    return Rope(inv_freq, interleaved=True)
