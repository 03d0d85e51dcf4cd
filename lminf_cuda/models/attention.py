"""The attention function of a patched model: transformers' AttentionInterface knows it as `lminf`.

It is handed un-rotated queries and the new tokens' un-rotated keys and values, and calls the ops,
with the cache's help where there is one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from .compat import versions
from .forward_state import ForwardState, running
from .middle import add_middle_tokens
from .own_forwards import attention_dropout
from .positions import causal_padding_mask
from .settings import LayerSettings

ATTENTION_NAME = "lminf"
LAYER_ATTRIBUTE = "lminf_layer"  # of an attention module: its LayerSettings


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    state: ForwardState | None,
    options: dict[str, Any],
    index: int | None = None,
) -> Tensor:
    """Λ attention of one layer over its new tokens and what the cache holds.

    Args:
        module: the attention module of a patched model.
        query: [B, Hq, S, D], un-rotated.
        key, value: [B, Hkv, S, D] and [B, Hkv, S, Dv], un-rotated, the new tokens' only.
        state: of the decoder's forward.
        options: scale, softcap and sink_logits of the op.
        index: of the cache layer that the module attends to; None for the one that the module has
            just handed its keys to by itself.

    Returns:
        [B, S, Hq, Dv], contiguous.
    """
    layer: LayerSettings | None = getattr(module, LAYER_ATTRIBUTE, None)
    if layer is None or state is None:
        raise RuntimeError(
            f"attention implementation {ATTENTION_NAME!r} works in a patched model only; load the "
            "model with another attn_implementation and call lminf_cuda.patch_model(model)"
        )
    first = state.first_on(query.device)
    if layer.query_scale is not None:
        positions = state.positions_on(query.device).clamp(min=0)
        query = (query * layer.query_scale(positions)[:, None, :, None]).to(query.dtype)
    # Under autocast a rotary embedding makes float32 of queries and keys, but not of values.
    query, key = query.to(value.dtype), key.to(value.dtype)
    # The op takes one head dim, whose first dims rotate.
    value_dim = value.shape[-1]
    query, key = layer.arrange(query), layer.arrange(key)
    if options["scale"] is None:
        options["scale"] = query.shape[-1] ** -0.5
    dim = max(value_dim, query.shape[-1])
    query, key, value = (
        x if x.shape[-1] == dim else nn.functional.pad(x, (0, dim - x.shape[-1]))
        for x in (query, key, value)
    )
    options |= layer.options(query.device)
    if layer.observer is not None:
        layer.observer(query, key, options)
    state.n_attended += 1
    if state.packed is not None:
        out = _attend_packed(layer, query, key, value, state.packed, options)
    elif state.cache is None:
        out, lse = torch.ops.lminf.lambda_attn.default(
            query, key, value, layer.n_global, layer.window, k_start=first, **options
        )
        if layer.middle_top_k:
            last = query.shape[2] - 1
            positions = query.new_full((query.shape[0],), last, dtype=torch.int64)
            out[:, :, -1:] = add_middle_tokens(
                layer,
                query[:, :, -1:],
                key,
                value,
                out[:, :, -1:],
                lse[:, :, -1:],
                positions if first is None else positions + first,
                options,
                k_start=first,
            )
    else:
        cache_layer = state.meet(module, layer, index)
        attend = cache_layer.decode if state.is_decode else cache_layer.extend
        out = attend(query, key, value, first, options)  # type: ignore[arg-type]
    return out[..., :value_dim].transpose(1, 2).contiguous()


def _attend_packed(
    layer: LayerSettings,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    packed: Tensor,
    options: dict[str, Any],
) -> Tensor:
    """Λ attention within each of the sequences that are packed into the rows, as if the rows stood
    one after the other in one.

    Args:
        layer: its settings.
        query: [B, Hq, S, D], un-rotated.
        key, value: [B, Hkv, S, D], un-rotated.
        packed: int32 [n + 1], where the sequences begin and end in the B * S tokens.
        options: of the op.

    Returns:
        [B, Hq, S, D].
    """
    batch, _, n_tokens, _ = query.shape
    if batch > 1:
        query, key, value = (x.transpose(0, 1).flatten(1, 2)[None] for x in (query, key, value))
    out, _ = torch.ops.lminf.lambda_attn.default(
        query,
        key,
        value,
        layer.n_global,
        layer.window,
        cu_seqlens=packed.to(query.device),
        **options,
    )
    return out if batch == 1 else out[0].unflatten(1, (batch, n_tokens)).transpose(0, 1)


def _refuse_dropout(module: nn.Module, dropout: float) -> None:
    """Raises ValueError where an attention module drops weights of its attention."""
    if dropout:
        raise ValueError(
            f"attention dropout is {dropout} in {type(module).__name__}, and Λ attention has none; "
            "load the model with 0 for it in its config (attention_dropout=0.0, or what the config "
            "calls it), or call model.eval()"
        )


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    lminf_forward: ForwardState | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """The AttentionInterface function `lminf`.

    Args:
        module: the attention module of a patched model.
        query: [B, Hq, S, D], un-rotated.
        key, value: [B, Hkv, S, D], un-rotated, the new tokens' only.
        attention_mask: not used: `lminf_forward` knows the padding.
        scaling: of <q, k>; 1/sqrt(D) by default.
        dropout: of the attention weights; must be 0.
        softcap: of the scores.
        s_aux: a learned logit of each head that joins the softmax's denominator, [Hq].
        lminf_forward: the state of the decoder's forward, where that hands keywords on.
        others: what does not bear on Λ attention; see `_check_heeded`.

    Returns:
        [B, S, Hq, D], and None for the attention weights.
    """
    _refuse_dropout(module, dropout)
    if lminf_forward is None:
        lminf_forward = running()
    _check_heeded(module, lminf_forward, others)
    options = {"scale": scaling, "softcap": softcap or 0.0, "sink_logits": s_aux}
    return _attend(module, query, key, value, lminf_forward, options), None


# Of what attention modules add to the keywords: what the state of the forward knows better, and
# what may belong into the scores.
_KNOWN_BETTER = ("position_ids", "cache_position")
_NUMBERS = (Tensor, float)


def _check_heeded(module: nn.Module, state: ForwardState | None, others: dict[str, Any]) -> None:
    """Refuses a number or a tensor that an attention module adds and this function does not know.

    It may belong into the scores, as a sink or a softcap under another name does.

    Raises:
        RuntimeError: there is one, that did not come from the caller of the decoder.
        ValueError: the layer is not causal.
    """
    for name, value in others.items():
        if not isinstance(value, _NUMBERS) or name in _KNOWN_BETTER:
            continue
        if state is None or name not in state.given:
            raise RuntimeError(
                f"{type(module).__name__} hands {name} to its attention function, and Λ attention "
                f"does not know that; {versions()}"
            )
    if others.get("is_causal") is False:
        raise ValueError(f"{type(module).__name__} is not causal, and Λ attention is")


def attend_in_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    distance_bias: Tensor | None = None,
) -> Tensor:
    """What the forwards in own_forwards.py call: [B, S, Hq * Dv] of tensors as in `_attend`."""
    if module.training:
        _refuse_dropout(module, attention_dropout(module))
    options = {"scale": scale, "distance_bias": distance_bias}
    index: int = module.layer_idx  # type: ignore[assignment]
    return _attend(module, query, key, value, running(), options, index).flatten(2)


AttentionInterface.register(ATTENTION_NAME, _attention)
AttentionMaskInterface.register(ATTENTION_NAME, causal_padding_mask)
