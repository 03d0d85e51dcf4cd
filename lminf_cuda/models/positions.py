"""What one forward of a patched model is given: what is refused of it, and where its tokens stand.

A forward gets a padding mask [batch, tokens] at most, or positions that say the same. From these
and from what the cache holds follows where each row's new tokens stand, which is all that the
attention function has to know (`ForwardState`); the Λ mask itself is never built.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .cache import LambdaCache
from .forward_state import ForwardState

# Which transformers hands on to attention functions, and which this one would not heed.
_REFUSED_INPUTS = ("head_mask", "block_table")

# Where sequences that are packed into one row begin and end, as transformers' collators for packed
# rows hand it on to attention functions.
_PACKED_QUERIES, _PACKED_KEYS = "cu_seq_lens_q", "cu_seq_lens_k"

_NO_LOOK_AHEAD = (
    "this model lets tokens of an image or of a prefix see what follows them, which Λ attention "
    "does not; give it text alone without token_type_ids, or call unpatch_model(model) first"
)

_NO_IDLE_ROW = (
    "attention_mask masks the new token of a row, and this model has recurrent layers, whose "
    "states take every token of a step; leave such rows out of the batch"
)


def refuse_inputs(config: Any, kwargs: dict[str, Any]) -> None:
    """Refuses what a decoder's forward is given and Λ attention would not heed.

    Args:
        config: of the decoder.
        kwargs: all arguments of its forward by their names.

    Raises:
        ValueError: attention weights, inputs of other attention functions, or attention that is not
            causal are asked for.
    """
    if kwargs.get("output_attentions", getattr(config, "output_attentions", False)):
        raise ValueError(
            "output_attentions=True asks for attention weights, which Λ attention never "
            "stores; leave it out, or call unpatch_model(model) first"
        )
    for name in _REFUSED_INPUTS:
        if kwargs.get(name) is not None:
            raise ValueError(
                f"{name} is given, which a patched model does not take; leave it out, or call "
                "unpatch_model(model) first"
            )
    if kwargs.get("is_causal") is False:
        raise ValueError("is_causal is False; Λ attention is causal: leave it out")


def causal_padding_mask(
    *_: Any,
    batch_size: int,
    q_length: int,
    q_offset: int = 0,
    kv_length: int,
    kv_offset: int = 0,
    mask_function: Callable[..., Any],
    attention_mask: Tensor | None = None,
    allow_is_causal_skip: bool = True,
    device: torch.device | None = None,
    **__: Any,
) -> Tensor | None:
    """The AttentionMaskInterface function `lminf`: the padding mask as bool [B, 1, 1, keys].

    Raises:
        ValueError: `mask_function` lets a token see the next one, as those of an image do in some
            models.
    """
    if not allow_is_causal_skip:  # so that something else than causality may be in it
        rows = torch.arange(batch_size, device=device)[:, None]
        queries = torch.arange(q_offset, q_offset + q_length, device=rows.device)[None]
        keys = queries + 1 - kv_offset  # of each query's next token, which the last one lacks
        # In this form the check holds for an exported model of any length.
        seen = mask_function(rows, torch.zeros_like(rows), queries, keys.clamp(max=kv_length - 1))
        sees_ahead = (torch.as_tensor(seen) & (keys < kv_length)).any()
        if torch.compiler.is_compiling():
            torch._assert_async(~sees_ahead, _NO_LOOK_AHEAD)
        elif bool(sees_ahead):
            raise ValueError(_NO_LOOK_AHEAD)
    if attention_mask is None or attention_mask.ndim != 2:
        return attention_mask
    return (attention_mask != 0)[:, None, None]


def padding_mask(mask: Any) -> Any:
    """The padding mask [B, columns] that a decoder is given, however it comes.

    A model around the decoder may have put it through `causal_padding_mask`, for each kind of layer
    once. What is something else is returned as it is, for `locate_tokens` to refuse.
    """
    masks = mask if isinstance(mask, dict) else {None: mask}
    if not masks:
        return mask
    first = next(iter(masks.values()))
    for other in masks.values():
        if other is not first and not (
            isinstance(first, Tensor) and isinstance(other, Tensor) and torch.equal(first, other)
        ):
            return mask
    is_padding = isinstance(first, Tensor) and first.ndim == 4 and first.shape[1:3] == (1, 1)
    if is_padding and first.dtype == torch.bool:
        return first[:, 0, 0]
    return first if first is None and len(masks) > 1 else mask


def _check_position_ids(position_ids: Tensor, allowed: list[Tensor], real: Tensor | None) -> None:
    """Refuses position_ids that equal none of `allowed` on the tokens marked `real`.

    `position_ids`, `real` and each of `allowed` are [B or 1, S]; without `real` all are tokens.
    """
    if position_ids.ndim == 3 and bool((position_ids == position_ids[:1]).all()):
        position_ids = position_ids[0]  # a text's, in models that place images in three dims
    if position_ids.ndim == 3:
        raise ValueError(
            "position_ids has 3 dims that differ, so tokens of an image or a video stand at "
            "positions of their own; a patched model counts tokens: give it text alone, or call "
            "unpatch_model(model) first"
        )
    if position_ids.ndim != 2:
        raise ValueError(
            f"position_ids has {position_ids.ndim} dims; a patched model takes [batch, tokens]"
        )
    if position_ids.shape[1] != allowed[0].shape[1]:
        raise ValueError(
            f"position_ids has {position_ids.shape[1]} columns, and there are "
            f"{allowed[0].shape[1]} new tokens; leave position_ids out"
        )
    is_right = torch.zeros(1, dtype=torch.bool, device=position_ids.device)
    for ids in allowed:
        fits = position_ids == ids if real is None else (position_ids == ids) | ~real
        is_right = is_right | fits.all(-1)
    if not bool(is_right.all()):
        row = int((~is_right).nonzero()[0])
        found = position_ids.expand(is_right.shape[0], -1)[row].tolist()
        shown = f"{found[:8]}..." if len(found) > 8 else f"{found}"
        raise ValueError(
            f"position_ids of row {row} are {shown}, but a patched model counts each row's tokens "
            "itself, from its padding mask and its cache; leave position_ids out, or let them "
            "count from 0 in each sequence of a row that several are packed into"
        )


def _padding(mask: Tensor, counts: Tensor | None, n_old: int) -> tuple[Tensor, bool, Tensor]:
    """Reads a 2-D padding mask.

    Args:
        mask: bool [B, n_old + S], True for tokens.
        counts: int64 [B], tokens of each row in the cache; None without a cache.
        n_old: columns in the cache.

    Returns:
        int64 [B], the padding columns at the beginning of each row's new columns; whether a row
        ends with padding; bool [B, S], which new columns hold tokens.

    Raises:
        ValueError: padding in the middle of a row, or a mask that disagrees with the cache.
    """
    old, new = mask[:, :n_old], mask[:, n_old:]
    n_new = new.sum(-1)
    n_left = (new.cumsum(-1) == 0).sum(-1)
    n_right = (new.flip(-1).cumsum(-1) == 0).sum(-1)
    is_empty = n_new == 0
    has_hole = ~is_empty & (n_left + n_new + n_right != new.shape[1])
    is_right_padded = ~is_empty & (n_right > 0)
    if counts is not None:
        if not torch.equal(old.sum(-1), counts):
            raise ValueError(
                f"attention_mask marks {old.sum(-1).tolist()} tokens in the first {n_old} "
                f"columns, but the LambdaCache holds {counts.tolist()}; pass the mask of all "
                "tokens so far"
            )
        has_hole |= (counts > 0) & (n_left > 0)
    if bool(has_hole.any()):
        row = int(has_hole.nonzero()[0])
        raise ValueError(
            f"attention_mask of row {row} has padding in the middle of its tokens; Λ attention "
            "takes padding at a row's beginning only (tokenizer.padding_side = 'left')"
        )
    return n_left, bool(is_right_padded.any()), new


def _may_read_values(inputs: Tensor) -> bool:
    """Whether the host may look at values freely: it stalls a GPU and splits a compiled graph."""
    return inputs.device.type == "cpu" and not torch.compiler.is_compiling()


def _packed_by_positions(position_ids: Tensor | None) -> Tensor | None:
    """int32 [n + 1], where the packed sequences begin and end, of positions [B, S] that count from
    0 in each of them and do so more than once in a row; else None."""
    if position_ids is None or position_ids.ndim != 2 or position_ids.shape[1] < 2:
        return None
    begins = position_ids == 0
    goes_on = position_ids[:, 1:] == position_ids[:, :-1] + 1
    is_packed = begins[:, 0].all() & (begins[:, 1:] | goes_on).all() & begins[:, 1:].any()
    if not bool(is_packed):
        return None
    begins = begins.flatten().nonzero()[:, 0].to(torch.int32)
    return torch.cat([begins, begins.new_tensor([position_ids.numel()])])


def _marks_padding(kwargs: dict[str, Any]) -> bool:
    """Whether attention_mask does."""
    mask = kwargs.get("attention_mask")
    return isinstance(mask, Tensor) and not bool((mask != 0).all())


def _restarts(positions: Any, mask: Tensor) -> bool:
    """Whether a position is 0 behind a row's first token: padding, too, mostly stands at 0."""
    if mask.ndim != 2 or mask.shape[1] != positions.shape[1]:
        return True
    real = mask != 0
    is_first = real & (real.cumsum(1) == 1)
    return bool(((positions == 0) & real & ~is_first).any())


def packed_sequences(
    kwargs: dict[str, Any], inputs: Tensor, cache: LambdaCache | None, refused: str | None
) -> Tensor | None:
    """Where the sequences of packed rows begin and end, the rows taken one after the other.

    Args:
        kwargs: all arguments of the decoder's forward by their names: cu_seq_lens_q tells, else
            position_ids that start again from 0.
        inputs: input_ids [B, S] or inputs_embeds [B, S, hidden].
        cache: the cache in use, or None.
        refused: why this model does not take packed rows, or None.

    Returns:
        int32 [n + 1], or None where each row is one sequence.

    Raises:
        ValueError: the sequences contradict the input, or are to go into a cache, or have padding.
    """
    batch, n_tokens = inputs.shape[:2]
    packed, keys = kwargs.get(_PACKED_QUERIES), kwargs.get(_PACKED_KEYS)
    if packed is None and keys is not None:
        raise ValueError(f"{_PACKED_KEYS} is given without {_PACKED_QUERIES}; give both")
    if packed is not None:
        if keys is not None and not torch.equal(packed, keys):
            raise ValueError(
                f"{_PACKED_QUERIES} and {_PACKED_KEYS} differ; a patched model takes each packed "
                "sequence whole, so they must be the same"
            )
        if batch != 1 or packed.ndim != 1 or int(packed[-1]) != n_tokens:
            raise ValueError(
                f"{_PACKED_QUERIES} has shape {list(packed.shape)} and ends with "
                f"{packed.flatten()[-1:].tolist()}, but must be [n + 1] and end with the number of "
                f"tokens of the one row; the input is {[batch, n_tokens]}"
            )
        packed = packed.to(torch.int32)
    elif cache is None or cache.get_seq_length() == 0:
        positions = kwargs.get("position_ids")
        packed = _packed_by_positions(positions)
        if packed is not None and _marks_padding(kwargs):
            packed = packed if _restarts(positions, kwargs["attention_mask"]) else None
    if packed is None:
        return None
    what = "several sequences are packed into a row (by position_ids or cu_seq_lens_q)"
    if refused is not None:
        raise ValueError(f"{what}, {refused}; give each its own row")
    if cache is not None:
        raise ValueError(
            f"{what}, and a cache is in use, which holds one sequence a row; pass use_cache=False, "
            "or give each its own row"
        )
    if _marks_padding(kwargs):
        raise ValueError(
            f"{what}, and attention_mask marks padding; leave the padding out of packed rows"
        )
    return packed


def locate_tokens(
    cache: LambdaCache | None,
    inputs: Tensor,
    attention_mask: Any,
    position_ids: Tensor | None,
    is_recurrent: bool,
    packed: Tensor | None = None,
) -> ForwardState:
    """Checks one forward's mask and positions and says where its tokens stand.

    A decode step that cannot be checked without waiting for a device takes a masked token for an
    idle row.

    Args:
        cache: the cache in use, or None.
        inputs: input_ids [B, S] or inputs_embeds [B, S, hidden].
        attention_mask: [B, all columns so far] or None.
        position_ids: [B or 1, S] or None.
        is_recurrent: whether the model has recurrent layers, which cannot leave a token out.
        packed: what `packed_sequences` says; the positions follow from it then.

    Raises:
        ValueError: mask or positions contradict the cache, or are none that Λ attention takes.
    """
    batch_size, n_tokens = inputs.shape[:2]
    if packed is not None:
        return ForwardState(
            None, None, n_tokens, is_decode=False, is_right_padded=False, packed=packed
        )
    n_old, counts = (0, None) if cache is None else (cache.get_seq_length(), cache.next_positions)
    if cache is not None and counts is None:
        counts = torch.zeros(batch_size, dtype=torch.int64, device=inputs.device)
    if attention_mask is not None:
        if not isinstance(attention_mask, Tensor) or attention_mask.ndim != 2:
            kind = (
                f"{attention_mask.ndim}-D" if isinstance(attention_mask, Tensor) else "not a tensor"
            )
            raise ValueError(
                f"attention_mask is {kind}; a patched model takes a padding mask [batch, tokens] "
                "or None, since the Λ mask is its own"
            )
        if attention_mask.shape[0] != batch_size:
            raise ValueError(
                f"attention_mask has {attention_mask.shape[0]} rows; it must have {batch_size}, as "
                "the input has"
            )
        if torch.compiler.is_exporting():
            torch._check(attention_mask.shape[1] == n_old + n_tokens)
        elif attention_mask.shape[1] != n_old + n_tokens:
            raise ValueError(
                f"attention_mask has {attention_mask.shape[1]} columns; it must have "
                f"{n_old + n_tokens}: {n_old} in the cache and {n_tokens} new ones"
            )
    first = counts
    if n_tokens == 1 and n_old > 0 and not _may_read_values(inputs):
        if attention_mask is not None and counts is not None:
            if is_recurrent:
                torch._assert_async((attention_mask[:, -1] != 0).all(), _NO_IDLE_ROW)
            first = torch.where(attention_mask[:, -1].to(counts.device) != 0, counts, -1)
        return ForwardState(cache, first, n_tokens, is_decode=True, is_right_padded=False)

    real: Tensor | None = None
    is_right_padded = False
    # Rows that began with padding alone, from whose first token on generate() counts from 1.
    late = None if cache is None else cache.late_rows
    if attention_mask is not None:
        mask = attention_mask != 0
        # Earlier columns were read when they were new.
        if not bool(mask[:, n_old:].all()):
            if is_recurrent and n_tokens == 1:
                raise ValueError(_NO_IDLE_ROW)
            mask = mask if counts is None else mask.to(counts.device)
            n_left, is_right_padded, real = _padding(mask, counts, n_old)
            first = -n_left if counts is None else counts - n_left
            is_late = n_left > 0 if counts is None else ~real.any(-1) & (counts == 0)
            if bool(is_late.any()):
                late = is_late if late is None else late | is_late
    if position_ids is not None:
        columns = torch.arange(n_tokens, device=position_ids.device)
        allowed = [(n_old + columns)[None]]  # columns, or each row's own tokens
        if first is not None:
            allowed.append(first[:, None].to(columns.device) + columns)
        if late is not None:
            allowed.append(allowed[-1] + late[:, None].to(columns.device))
        real = None if real is None else real.to(columns.device)
        _check_position_ids(position_ids, allowed, real)
    is_decode = n_tokens == 1 and n_old > 0 and real is None
    return ForwardState(cache, first, n_tokens, is_decode, is_right_padded, late)
