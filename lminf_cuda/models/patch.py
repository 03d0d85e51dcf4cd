"""Turns a transformers causal LM into one with Λ attention, and back.

The mechanism, for families whose decoder hands `position_embeddings` to attention modules that ask
the AttentionInterface (docs/design.md section 3):

- the model's rotary module is replaced by one that rotates nothing, so the attention function gets
  un-rotated queries and keys (after the families' own norms of them);
- the config names the attention function `lminf`, which calls the ops; the mask function of the
  same name passes the 2-D padding mask on, so no mask of n x n entries is ever built;
- a hook before the decoder's forward checks its inputs once, works out the rows' positions, and
  opens the state of this forward, which every layer's attention meets (forward_state.py);
- a hook after it checks that each did, and tells the cache that the tokens are in.

positions.py holds these checks; families.py says which models are served and where they differ.
"""

from __future__ import annotations

import copy
import functools
from types import MethodType
from typing import Any, TypeVar

import torch
from torch import nn
from transformers.generation import GenerationMixin

from .attention import ATTENTION_NAME, LAYER_ATTRIBUTE, attend_in_forward
from .compat import (
    WRAPPED_FORWARD,
    attention_name,
    cache_argument,
    has_keywords,
    move_cache,
    parameter_names,
    set_attention_name,
    versions,
)
from .families import ENCODER_DECODERS, FAMILIES, WRAPPERS, find_decoder
from .family import Family
from .forward_state import STATE_KEYWORD, ForwardState, enter, leave, running
from .generation import OVERRIDES, lambda_cache, new_cache
from .positions import locate_tokens, padding_mask, refuse_inputs
from .resolve import add_middle, refuse_meta, resolve_layers, resolve_lengths, resolve_middle
from .rope import IdentityRotary, is_rotary
from .settings import SETTINGS_ATTRIBUTE, LambdaSettings, model_shape

__all__ = ["ENCODER_DECODERS", "FAMILIES", "Family", "patch_model", "unpatch_model"]

Model = TypeVar("Model", bound=nn.Module)

_PATCH_ATTRIBUTE = "_lminf_patch"  # of a decoder: its _Patch


def _cache_name(decoder: Any) -> str:
    """What the decoder's forward calls the cache."""
    name = cache_argument(decoder.forward)
    if name is None:
        raise ValueError(
            f"the forward of {type(decoder).__name__} takes no argument that could be recognised "
            f"as the cache (its parameters: {', '.join(parameter_names(decoder.forward))}); "
            f"{versions()}"
        )
    return name


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
        self.input_names = parameter_names(decoder.forward)
        self.cache_name = _cache_name(decoder)
        self.hands_on = family.forward is None and has_keywords(decoder.forward)
        self.n_hidden_layers: int | None = getattr(decoder.config, "num_hidden_layers", None)
        self.attn_implementation = attention_name(decoder.config)

        # A config may be shared with another model, which must not change; one around the decoder's
        # holds it.
        shared = decoder.config
        copies: dict[int, Any] = {}
        for module in model.modules():
            config: Any = module.__dict__.get("config")
            around = vars(config).values() if config is not None else ()
            if config is shared or any(value is shared for value in around):
                module.config = copy.deepcopy(config, copies)
        self.cross_attention = list(family.cross_attention_modules(decoder).values())
        plain = copy.deepcopy(decoder.config) if self.cross_attention else None
        for module in self.cross_attention:
            module.config = plain
        if not family.cross_attends:  # where the cross-attention goes on to ask for it
            set_attention_name(decoder.config, ATTENTION_NAME)

        # With what the instance had, and what it has now.
        self.overridden: list[tuple[nn.Module, str, Any, Any]] = []
        for module, layer_settings in zip(modules, settings.layers, strict=True):
            if module is None:
                continue
            setattr(module, LAYER_ATTRIBUTE, layer_settings)
            for name in family.switched_off:
                self.override(module, name, False)
            if family.forward is not None:
                forward = functools.partial(family.forward, attend_in_forward, module)
                self.override(module, "forward", forward)
        for name, module in list(decoder.named_modules()):
            if is_rotary(module):
                decoder.set_submodule(name, IdentityRotary(module, self.attention))
        self.makes_caches = getattr(model.config, "model_type", None) in WRAPPERS
        self.hooks = [
            decoder.register_forward_pre_hook(self.before_forward, with_kwargs=True),
            decoder.register_forward_hook(self.after_forward, with_kwargs=True),
            decoder.register_forward_hook(self.leave_forward, always_call=True),
        ]
        for module in model.modules():
            if module is decoder or all(child is not decoder for child in module.modules()):
                continue
            if cache_name := cache_argument(module.forward):
                names = parameter_names(module.forward)
                hook = functools.partial(self.before_around, names, cache_name)
                self.hooks.append(module.register_forward_pre_hook(hook, with_kwargs=True))

        for module in model.modules():
            if isinstance(module, GenerationMixin):
                methods = OVERRIDES | {
                    name: getattr(GenerationMixin, name) for name in family.plain_methods
                }
                for name, function in methods.items():
                    # not a bound method, which pickle would look up by its name
                    self.override(module, name, functools.partial(function, module))
            if isinstance(module, GenerationMixin) or module in (model, decoder):
                setattr(module, SETTINGS_ATTRIBUTE, settings)
        setattr(decoder, _PATCH_ATTRIBUTE, self)

    def override(self, module: nn.Module, name: str, value: Any) -> None:
        """Lets one instance answer to `name` by `value`."""
        if name == "forward" and WRAPPED_FORWARD in module.__dict__:
            name = WRAPPED_FORWARD  # so that accelerate's hooks go on around it
        self.overridden.append((module, name, module.__dict__.get(name), value))
        setattr(module, name, value)

    def remove(self) -> None:
        """Puts everything back."""
        for hook in self.hooks:
            hook.remove()
        for module, name, before, value in self.overridden:
            # A forward may have been wrapped since, or taken out of a wrapper.
            if name in ("forward", WRAPPED_FORWARD):
                is_wrapped = module.__dict__.get(WRAPPED_FORWARD) is value
                name = WRAPPED_FORWARD if is_wrapped else "forward"
                if is_wrapped and before is None:
                    before = MethodType(type(module).forward, module)
            if before is None:
                delattr(module, name)
            else:
                setattr(module, name, before)
        names = (SETTINGS_ATTRIBUTE, _PATCH_ATTRIBUTE, LAYER_ATTRIBUTE)
        for module in self.model.modules():
            for name in names:
                if name in module.__dict__:
                    delattr(module, name)
        for name, module in list(self.decoder.named_modules()):
            if isinstance(module, IdentityRotary):
                self.decoder.set_submodule(name, module.original)
        set_attention_name(self.decoder.config, self.attn_implementation)
        for module in self.cross_attention:
            module.config = self.decoder.config

    def before_around(
        self,
        names: list[str],
        cache_name: str,
        module: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Hook before the forward of a module around the decoder: passes a cache on by its name.

        Models that also see or hear would make one of their own.
        """
        kwargs = dict(zip(names, args, strict=False)) | kwargs
        cache = move_cache(kwargs, cache_name)
        if cache is not None:
            lambda_cache(self.decoder, cache)
        elif self.makes_caches and self.wants_cache(kwargs):
            kwargs[cache_name] = new_cache(self.decoder)
        return (), kwargs

    def wants_cache(self, kwargs: dict[str, Any]) -> bool:
        """Whether a forward with these arguments is to use a cache."""
        use_cache = kwargs.get("use_cache")
        if use_cache is None:
            use_cache = getattr(self.decoder.config, "use_cache", False)
        return bool(use_cache)

    def before_forward(
        self, decoder: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Hook before the decoder's forward: checks, makes a cache, works out positions."""
        kwargs = dict(zip(self.input_names, args, strict=False)) | kwargs
        config = decoder.config
        if attention_name(config) != ATTENTION_NAME and not self.family.cross_attends:
            raise RuntimeError(
                "attn_implementation of a patched model was set to "
                f"{attention_name(config)!r}; call unpatch_model(model) before changing it"
            )
        refuse_inputs(config, kwargs)
        cache = move_cache(kwargs, self.cache_name)
        inputs = kwargs.get("input_ids")
        if inputs is None:
            inputs = kwargs.get("inputs_embeds")
        if inputs is None:
            return (), kwargs  # the model's own error is clear

        if cache is None and self.wants_cache(kwargs):
            cache = kwargs[self.cache_name] = new_cache(decoder)
        if cache is not None:
            cache = lambda_cache(decoder, cache)
            cache.check(self.settings, *inputs.shape[:2])
        kwargs["attention_mask"] = padding_mask(kwargs.get("attention_mask"))
        state = locate_tokens(
            cache,
            inputs,
            kwargs["attention_mask"],
            kwargs.get("position_ids"),
            bool(self.settings.recurrent_states),
        )
        if self.family.reads_positions and state.first is not None:
            columns = torch.arange(state.n_tokens, device=state.first.device)
            kwargs["position_ids"] = (state.first[:, None] + columns).clamp(min=0)
        state.given = tuple(kwargs)
        if self.hands_on:
            kwargs[STATE_KEYWORD] = state
        if self.family.cross_attends:
            # A finished mask is passed on as it is, and nobody reads it: none of n x n is built.
            kwargs["attention_mask"] = inputs.new_ones((1, 1, 1, 1), dtype=torch.bool)
        if self.family.needs_mask and kwargs.get("attention_mask") is None:
            n_columns = inputs.shape[1] + (0 if cache is None else cache.get_seq_length())
            kwargs["attention_mask"] = inputs.new_ones(
                (inputs.shape[0], n_columns), dtype=torch.int64
            )
        if cache is not None:
            assert state.first is not None
            cache.begin(state.first, state.late_rows)
        enter(state, self)
        return (), kwargs

    def leave_forward(self, *_: Any) -> None:
        """Hook after the decoder's forward, also where it raised."""
        leave(self)

    def after_forward(
        self, decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        """Hook after the decoder's forward: the tokens are in the cache."""
        state: ForwardState | None = kwargs.get(STATE_KEYWORD) or running()
        if state is None:
            return  # without inputs
        layers = self.settings.layers
        n_hidden = getattr(decoder.config, "num_hidden_layers", None)
        if n_hidden != self.n_hidden_layers:  # as transformers' early exit has it
            layers = layers[:n_hidden]
        state.check_complete(layers)
        if state.cache is None or state.first is None:
            return
        if state.is_right_padded:
            state.cache.close(
                "the LambdaCache holds rows that end with padding, after which no token can "
                "follow; pad on the left (tokenizer.padding_side = 'left')"
            )
        else:
            state.cache.commit(state.first, state.n_tokens, state.is_decode)


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
        ValueError: a setting is out of range, the model's type is not supported, the model is on
            the meta device, or it is patched with other settings.
    """
    decoder, family = find_decoder(model)
    refuse_meta(model)
    lengths = resolve_lengths(decoder, family, n_global, window, max_distance)
    middle = resolve_middle(lengths[2], middle_top_k, middle_from_layer, middle_distance)
    patch: _Patch | None = getattr(decoder, _PATCH_ATTRIBUTE, None)
    if patch is None:
        layers = resolve_layers(decoder, family, *lengths)
        settings = LambdaSettings(
            *lengths,
            layers,
            *middle,
            family.recurrent_states(decoder),
            cross_attends=family.cross_attends,
            cross_layers=list(family.cross_attention_modules(decoder)),
            reads_once=family.reads_once,
            shape=model_shape(decoder.config),
        )
        add_middle(settings)
        settings.seal()
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
