"""Turns a transformers causal LM into one with Λ attention, and back.

The mechanism, for families whose decoder hands `position_embeddings` to attention modules that ask
the AttentionInterface (docs/design.md section 3):

- the model's rotary module is replaced by one that rotates nothing, so the attention function gets
  un-rotated queries and keys (after the families' own norms of them);
- the config names the attention function `lminf`, which calls the ops; the mask function of the
  same name passes the 2-D padding mask on, so no mask of n x n entries is ever built;
- a hook before the decoder's forward checks its inputs once, works out the rows' positions, and
  sends them to every layer as the keyword argument `lminf_forward`;
- a hook after it tells the cache that the tokens are in.

families.py says which models are served and where they differ.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from types import MethodType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.generation import GenerationMixin

from .cache import LambdaCache
from .decoding import OVERRIDES, lambda_cache, new_cache
from .families import ENCODER_DECODERS, FAMILIES, WRAPPERS, Family, find_decoder, layer_type
from .middle import add_middle_tokens
from .rope import IdentityRotary, is_rotary, training_length
from .settings import SETTINGS_ATTRIBUTE, LambdaSettings, LayerSettings

__all__ = ["ENCODER_DECODERS", "FAMILIES", "Family", "patch_model", "unpatch_model"]

Model = TypeVar("Model", bound=nn.Module)

ATTENTION_NAME = "lminf"
_PATCH_ATTRIBUTE = "_lminf_patch"  # of a decoder: its _Patch
_LAYER_ATTRIBUTE = "lminf_layer"  # of an attention module: its LayerSettings
_STATE_ATTRIBUTE = "_lminf_state"  # of one that gets no keywords: the ForwardState


# Per forward: what the hook before the decoder tells the attention function.


@dataclass(eq=False)
class ForwardState:
    """Where the tokens of one forward stand.

    Attributes:
        cache: the cache in use, or None.
        first: int64 [B], the position of each row's first new token, negative where the row begins
            with padding; None for 0 in all rows (only without a cache).
        n_tokens: new columns.
        is_decode: one new column, and a cache that holds some already.
        is_right_padded: some row ends with padding.
    """

    cache: LambdaCache | None
    first: Tensor | None
    n_tokens: int
    is_decode: bool
    is_right_padded: bool

    def first_on(self, device: torch.device) -> Tensor | None:
        """`first` on the device of the layer that asks."""
        if self.first is None or self.first.device == device:
            return self.first
        return self.first.to(device)


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    state: ForwardState | None,
    options: dict[str, Any],
) -> Tensor:
    """Λ attention of one layer over its new tokens and what the cache holds.

    Args:
        module: the attention module of a patched model.
        query: [B, Hq, S, D], un-rotated.
        key, value: [B, Hkv, S, D] and [B, Hkv, S, Dv], un-rotated, the new tokens' only.
        state: from the hook before the decoder's forward.
        options: scale, softcap and sink_logits of the op.

    Returns:
        [B, S, Hq, Dv], contiguous.
    """
    layer: LayerSettings | None = getattr(module, _LAYER_ATTRIBUTE, None)
    if layer is None or state is None:
        raise RuntimeError(
            f"attention implementation {ATTENTION_NAME!r} works in a patched model only; load the "
            "model with another attn_implementation and call lminf_cuda.patch_model(model)"
        )
    if query.requires_grad:
        raise RuntimeError(
            "a patched model has no backward yet: run it under torch.no_grad() or "
            "torch.inference_mode()"
        )
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
    first = state.first_on(query.device)
    options |= layer.options(query.device)
    if state.cache is None:
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
        index = module.layer_idx if layer.keys_of is None else layer.keys_of
        cache_layer = state.cache.layers[index]  # type: ignore[index]
        attend = cache_layer.decode if state.is_decode else cache_layer.extend
        out = attend(query, key, value, first, options)  # type: ignore[arg-type]
    return out[..., :value_dim].transpose(1, 2).contiguous()


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
    **_: Any,
) -> tuple[Tensor, None]:
    """The AttentionInterface function `lminf`.

    Args:
        module: the attention module of a patched model.
        query: [B, Hq, S, D], un-rotated.
        key, value: [B, Hkv, S, D], un-rotated, the new tokens' only.
        attention_mask: not used: `lminf_forward` knows the padding.
        scaling: of <q, k>; 1/sqrt(D) by default.
        dropout: must be 0.
        softcap: of the scores.
        s_aux: a learned logit of each head that joins the softmax's denominator, [Hq].
        lminf_forward: from the hook before the decoder's forward.

    Returns:
        [B, S, Hq, D], and None for the attention weights.
    """
    if dropout:
        raise ValueError(
            f"attention dropout is {dropout}, and Λ attention has none; call model.eval()"
        )
    if lminf_forward is None:
        lminf_forward = getattr(module, _STATE_ATTRIBUTE, None)
    options = {"scale": scaling, "softcap": softcap or 0.0, "sink_logits": s_aux}
    return _attend(module, query, key, value, lminf_forward, options), None


def _attend_in_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cache: Any,
    scale: float,
    distance_bias: Tensor | None = None,
) -> Tensor:
    """What the forwards in families.py call: [B, S, Hq * D] of queries and keys as in `_attend`."""
    if module.training:
        raise ValueError(
            f"this {type(module).__name__} is in training mode, whose dropout Λ attention does not "
            "have; call model.eval()"
        )
    if cache is not None:
        key, value = cache.update(key, value, module.layer_idx)
    state: ForwardState | None = getattr(module, _STATE_ATTRIBUTE, None)
    options = {"scale": scale, "distance_bias": distance_bias}
    return _attend(module, query, key, value, state, options).flatten(2)


_NO_LOOK_AHEAD = (
    "this model lets tokens of an image see what follows them, which Λ attention does not; give it "
    "text alone, or call unpatch_model(model) first"
)


def _mask(
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
        queries = torch.arange(q_offset, min(q_offset + q_length, kv_offset + kv_length - 1))
        queries = queries.to(rows.device)[None]
        seen = mask_function(rows, torch.zeros_like(rows), queries, queries + 1 - kv_offset)
        sees_ahead = torch.as_tensor(seen).any()
        if torch.compiler.is_compiling():
            torch._assert_async(~sees_ahead, _NO_LOOK_AHEAD)
        elif bool(sees_ahead):
            raise ValueError(_NO_LOOK_AHEAD)
    if attention_mask is None or attention_mask.ndim != 2:
        return attention_mask
    return (attention_mask != 0)[:, None, None]


def _padding_mask(mask: Any) -> Any:
    """The padding mask [B, columns] in what a model around the decoder made of it by `_mask`."""
    if not isinstance(mask, dict) or not mask:
        return mask
    first = next(iter(mask.values()))
    for other in mask.values():
        if other is not first and not (
            isinstance(first, Tensor) and isinstance(other, Tensor) and torch.equal(first, other)
        ):
            return mask
    is_padding = isinstance(first, Tensor) and first.ndim == 4 and first.shape[1:3] == (1, 1)
    if is_padding and first.dtype == torch.bool:
        return first[:, 0, 0]
    return first if first is None and len(mask) > 1 else mask


AttentionInterface.register(ATTENTION_NAME, _attention)
AttentionMaskInterface.register(ATTENTION_NAME, _mask)


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
            "itself, from its padding mask and its cache; leave position_ids out. Sequences "
            "packed into one row are not supported here: give each its own row, or call "
            "lambda_attn with cu_seqlens"
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


_NO_IDLE_ROW = (
    "attention_mask masks the new token of a row, and this model has recurrent layers, whose "
    "states take every token of a step; leave such rows out of the batch"
)


def _forward_state(
    cache: LambdaCache | None,
    inputs: Tensor,
    attention_mask: Any,
    position_ids: Tensor | None,
    is_recurrent: bool,
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
    """
    batch_size, n_tokens = inputs.shape[:2]
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
        if attention_mask.shape[1] != n_old + n_tokens:
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
    if attention_mask is not None:
        mask = attention_mask != 0
        # Earlier columns were read when they were new.
        if not bool(mask[:, n_old:].all()):
            if is_recurrent and n_tokens == 1:
                raise ValueError(_NO_IDLE_ROW)
            mask = mask if counts is None else mask.to(counts.device)
            n_left, is_right_padded, real = _padding(mask, counts, n_old)
            first = -n_left if counts is None else counts - n_left
    if position_ids is not None:
        columns = torch.arange(n_tokens, device=position_ids.device)
        allowed = [(n_old + columns)[None]]  # columns, or each row's own tokens
        if first is not None:
            allowed.append(first[:, None].to(columns.device) + columns)
        real = None if real is None else real.to(columns.device)
        _check_position_ids(position_ids, allowed, real)
    is_decode = n_tokens == 1 and n_old > 0 and real is None
    return ForwardState(cache, first, n_tokens, is_decode, is_right_padded)


# Which transformers hands on to attention functions, and which this one would not heed.
_REFUSED_INPUTS = ("head_mask", "cu_seq_lens_q", "cu_seq_lens_k", "block_table")


class _Patch:
    """What `patch_model` changed in a model. Its methods are the hooks; it can be deep-copied."""

    def __init__(
        self, model: nn.Module, decoder: Any, family: Family, settings: LambdaSettings
    ) -> None:
        self.model = model
        self.decoder = decoder
        self.settings = settings
        self.family = family
        modules = family.attention_modules(decoder)
        self.attention = [module for module in modules if module is not None]
        self.input_names = list(inspect.signature(decoder.forward).parameters)
        self.attn_implementation: str | None = decoder.config._attn_implementation

        # A config may be shared with another model, which must not change; one around the decoder's
        # holds it.
        shared = decoder.config
        copies: dict[int, Any] = {}
        for module in model.modules():
            config: Any = module.__dict__.get("config")
            around = vars(config).values() if config is not None else ()
            if config is shared or any(value is shared for value in around):
                module.config = copy.deepcopy(config, copies)
        if not family.cross_attends:  # where the cross-attention goes on to ask for it
            decoder.config._attn_implementation = ATTENTION_NAME

        self.overridden: list[tuple[nn.Module, str, Any]] = []  # with what the instance had
        for module, layer_settings in zip(modules, settings.layers, strict=True):
            if module is None:
                continue
            setattr(module, _LAYER_ATTRIBUTE, layer_settings)
            if family.forward is not None:
                forward = functools.partial(family.forward, _attend_in_forward)
                self.override(module, "forward", forward)
        for name, module in list(decoder.named_modules()):
            if is_rotary(module):
                decoder.set_submodule(name, IdentityRotary(module))
        self.hooks = [
            decoder.register_forward_pre_hook(self.before_forward, with_kwargs=True),
            decoder.register_forward_hook(self.after_forward, with_kwargs=True),
        ]
        if getattr(model.config, "model_type", None) in WRAPPERS:
            self.hooks += [
                module.register_forward_pre_hook(self.before_wrapper, with_kwargs=True)
                for module in model.modules()
                if module is not decoder
                and any(child is decoder for child in module.modules())
                and "past_key_values" in inspect.signature(module.forward).parameters
            ]

        for module in model.modules():
            if isinstance(module, GenerationMixin):
                for name, function in OVERRIDES.items():
                    self.override(module, name, function)
                for name in family.plain_methods:
                    self.override(module, name, getattr(GenerationMixin, name))
            if isinstance(module, GenerationMixin) or module in (model, decoder):
                setattr(module, SETTINGS_ATTRIBUTE, settings)
        setattr(decoder, _PATCH_ATTRIBUTE, self)

    def override(self, module: nn.Module, name: str, function: Callable[..., Any]) -> None:
        """Lets one instance answer to `name` by `function`."""
        self.overridden.append((module, name, module.__dict__.get(name)))
        setattr(module, name, MethodType(function, module))

    def remove(self) -> None:
        """Puts everything back."""
        for hook in self.hooks:
            hook.remove()
        for module, name, before in self.overridden:
            if before is None:
                delattr(module, name)
            else:
                setattr(module, name, before)
        names = (SETTINGS_ATTRIBUTE, _PATCH_ATTRIBUTE, _LAYER_ATTRIBUTE, _STATE_ATTRIBUTE)
        for module in self.model.modules():
            for name in names:
                if name in module.__dict__:
                    delattr(module, name)
        for name, module in list(self.decoder.named_modules()):
            if isinstance(module, IdentityRotary):
                self.decoder.set_submodule(name, module.original)
        self.decoder.config._attn_implementation = self.attn_implementation

    def before_wrapper(
        self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Hook before the forward of a model around the decoder, which may make a cache itself."""
        names = list(inspect.signature(module.forward).parameters)
        kwargs = dict(zip(names, args, strict=False)) | kwargs
        if kwargs.get("past_key_values") is None:
            use_cache = kwargs.get("use_cache")
            if self.decoder.config.use_cache if use_cache is None else use_cache:
                kwargs["past_key_values"] = new_cache(self.decoder)
        else:
            lambda_cache(self.decoder, kwargs["past_key_values"])
        return (), kwargs

    def before_forward(
        self, decoder: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Hook before the decoder's forward: checks, makes a cache, works out positions."""
        kwargs = dict(zip(self.input_names, args, strict=False)) | kwargs
        config = decoder.config
        if config._attn_implementation != ATTENTION_NAME and not self.family.cross_attends:
            raise RuntimeError(
                "attn_implementation of a patched model was set to "
                f"{config._attn_implementation!r}; call unpatch_model(model) before changing it"
            )
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
        inputs = kwargs.get("input_ids")
        if inputs is None:
            inputs = kwargs.get("inputs_embeds")
        if inputs is None:
            return (), kwargs  # the model's own error is clear

        cache = kwargs.get("past_key_values")
        if cache is None:
            use_cache = kwargs.get("use_cache")
            if getattr(config, "use_cache", False) if use_cache is None else use_cache:
                cache = kwargs["past_key_values"] = new_cache(decoder)
        if cache is not None:
            cache = lambda_cache(decoder, cache)
            cache.check(self.settings, inputs.shape[0])
        kwargs["attention_mask"] = _padding_mask(kwargs.get("attention_mask"))
        state = _forward_state(
            cache,
            inputs,
            kwargs["attention_mask"],
            kwargs.get("position_ids"),
            bool(self.settings.recurrent_states),
        )
        if cache is not None:
            assert state.first is not None
            cache.begin(state.first)
        if self.family.passes_kwargs:
            kwargs["lminf_forward"] = state
        else:
            for module in self.attention:
                setattr(module, _STATE_ATTRIBUTE, state)
        if self.family.cross_attends:
            # A finished mask is passed on as it is, and nobody reads it: none of n x n is built.
            kwargs["attention_mask"] = inputs.new_ones((1, 1, 1, 1), dtype=torch.bool)
        if self.family.needs_mask and kwargs.get("attention_mask") is None:
            n_columns = inputs.shape[1] + (0 if cache is None else cache.get_seq_length())
            kwargs["attention_mask"] = inputs.new_ones(
                (inputs.shape[0], n_columns), dtype=torch.int64
            )
        return (), kwargs

    def after_forward(
        self, decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        """Hook after the decoder's forward: the tokens are in the cache."""
        if self.family.passes_kwargs:
            state: ForwardState = kwargs["lminf_forward"]
        else:
            state = getattr(self.attention[0], _STATE_ATTRIBUTE)
            for module in self.attention:
                setattr(module, _STATE_ATTRIBUTE, None)
        if state.cache is None or state.first is None:
            return
        if state.is_right_padded:
            state.cache.close(
                "the LambdaCache holds rows that end with padding, after which no token can "
                "follow; pad on the left (tokenizer.padding_side = 'left')"
            )
        else:
            state.cache.commit(state.first, state.n_tokens, state.is_decode)


def _sliding_window(config: Any, layer_idx: int) -> int | None:
    """The window of a layer that slides in the unpatched model, or None."""
    sliding: int | None = getattr(config, "sliding_window", None)
    if sliding is None or layer_type(config, layer_idx) not in (None, "sliding_attention"):
        return None
    return sliding


def _check_setting(name: str, value: Any, minimum: int, why: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} is {value!r}; it must be an int")
    if value < minimum:
        raise ValueError(f"{name} is {value}; it must be at least {minimum}{why}")


def _own_windows(decoder: Any, family: Family) -> list[int | None]:
    """For each attention layer the window over which it slides in the unpatched model, or None."""
    return [
        _sliding_window(decoder.config, index)
        for index, module in enumerate(family.attention_modules(decoder))
        if module is not None
    ]


def _resolve_lengths(
    decoder: Any, family: Family, n_global: Any, window: Any, max_distance: Any
) -> tuple[int, int, int]:
    """Checks patch_model's arguments and fills in what is None: n_global, window, max_distance."""
    if window is None:
        window = training_length(decoder.config)
        own = _own_windows(decoder, family)
        if all(length is not None for length in own):
            window = min([window, *filter(None, own)])
    _check_setting("n_global", n_global, 0, "")
    _check_setting("window", window, 1, " (the query's own key)")
    if max_distance is None:
        max_distance = window
    _check_setting("max_distance", max_distance, window, ", the window")
    return n_global, window, max_distance


def _resolve_middle(
    max_distance: int, top_k: Any, from_layer: Any, distance: Any
) -> tuple[int, int, int]:
    """Checks patch_model's middle_* arguments and fills in what is None."""
    _check_setting("middle_top_k", top_k, 0, " (0: no middle tokens)")
    _check_setting("middle_from_layer", from_layer, 0, "")
    if distance is None:
        distance = max_distance // 2
    _check_setting("middle_distance", distance, 0, "")
    if distance > max_distance:
        raise ValueError(
            f"middle_distance is {distance}; it must be at most max_distance, which is "
            f"{max_distance}"
        )
    return (top_k, from_layer, distance) if top_k else (0, 0, 0)


def _add_middle(settings: LambdaSettings) -> None:
    """Tells the layers that have middle tokens."""
    if settings.middle_top_k == 0:
        return
    # A layer that slides by itself sees no token from afar.
    layers = [
        layer
        for layer in settings.layers[settings.middle_from_layer :]
        if layer is not None
        and (layer.n_global, layer.window) == (settings.n_global, settings.window)
    ]
    if any(layer is not None and layer.keys_of is not None for layer in settings.layers):
        raise ValueError(
            f"middle_top_k is {settings.middle_top_k}, but this model has layers that share their "
            "keys, among which the middle is not searched; leave middle_top_k out"
        )
    if not layers:
        raise ValueError(
            f"middle_from_layer is {settings.middle_from_layer}, but this model has "
            f"{len(settings.layers)} layers, and from there on none that does not slide by itself; "
            "choose an earlier layer"
        )
    for layer in layers:
        layer.middle_top_k = settings.middle_top_k
        layer.middle_distance = settings.middle_distance


def _resolve_layers(
    decoder: Any, family: Family, n_global: int, window: int, max_distance: int
) -> list[LayerSettings | None]:
    """Every layer's share of the settings; None for a layer without attention."""
    layers: list[LayerSettings | None] = []
    sources = family.keys_of(decoder)
    for index, module in enumerate(family.attention_modules(decoder)):
        if module is None:
            layers.append(None)
            continue
        # A layer that slides was trained to see no further, and never saw the first from afar.
        lengths = (n_global, window, max_distance)
        own = _sliding_window(decoder.config, index)
        if own is not None and own < window:
            lengths = (0, own, own)
        rope, slopes = family.layer_rope(decoder, index), family.alibi_slopes(module)
        layers.append(LayerSettings(*lengths, rope, slopes, sources[index]))
    return layers


def patch_model(
    model: Model,
    *,
    n_global: int = 16,
    window: int | None = None,
    max_distance: int | None = None,
    middle_top_k: int = 0,
    middle_from_layer: int = 4,
    middle_distance: int | None = None,
) -> Model:
    """Gives a transformers causal LM Λ attention (docs/design.md section 2), in place.

    Every layer then attends to the first `n_global` and the last `window` tokens, and `generate()`
    and forwards with use_cache keep a `LambdaCache` of that size. A layer that already slides over
    a shorter window keeps its own attention. `model.config` becomes a copy of what it was.

    Args:
        model: of one of the types in `FAMILIES`, or in `ENCODER_DECODERS` (T5), of which the
            decoder's self-attention is replaced; the encoder, which is not causal, and the
            cross-attention stay.
        n_global: tokens at the beginning that are seen from everywhere; at least 0.
        window: tokens, the query's own included, that are seen behind every query; at least 1. None
            is the training length, or the shorter window over which all layers slide.
        max_distance: no larger distance enters the attention; at least `window`, which is the
            default.
        middle_top_k: so many keys between the global tokens and the window, for each head those
            with the largest score, join the softmax of a forward's last query (middle.py; the paper
            takes 5). The cache then keeps all keys and values and grows with the text. 0: none.
        middle_from_layer: the first layer that does so, counted from 0.
        middle_distance: at which these keys are met, at most max_distance; None is half of that.

    Returns:
        `model`. Patching again with the same settings changes nothing.

    Raises:
        TypeError: a setting is not an int.
        ValueError: a setting is out of range, the model's type is not supported, or the model is
            patched with other settings.
    """
    decoder, family = find_decoder(model)
    lengths = _resolve_lengths(decoder, family, n_global, window, max_distance)
    middle = _resolve_middle(lengths[2], middle_top_k, middle_from_layer, middle_distance)
    patch: _Patch | None = getattr(decoder, _PATCH_ATTRIBUTE, None)
    if patch is None:
        layers = _resolve_layers(decoder, family, *lengths)
        settings = LambdaSettings(
            *lengths,
            layers,
            *middle,
            family.recurrent_states(decoder),
            cross_attends=family.cross_attends,
        )
        _add_middle(settings)
        _Patch(model, decoder, family, settings)
        return model
    asked, is_now = LambdaSettings(*lengths, [], *middle), patch.settings
    if str(asked) != str(is_now):
        raise ValueError(
            f"this {type(model).__name__} is patched with {is_now} and cannot be patched with "
            f"{asked} on top; call unpatch_model(model) first"
        )
    return model


def unpatch_model(model: Model) -> Model:
    """Undoes `patch_model`, in place: the same logits as before, bit for bit.

    Returns:
        `model`.

    Raises:
        ValueError: `model` is not patched.
    """
    for module in model.modules():
        patch: _Patch | None = getattr(module, _PATCH_ATTRIBUTE, None)
        if patch is not None:
            patch.remove()
            return model
    raise ValueError(f"this {type(model).__name__} is not patched; call patch_model(model) first")
