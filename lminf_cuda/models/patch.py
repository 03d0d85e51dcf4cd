"""Turns a transformers causal LM into one with Λ attention, and back.

The mechanism, for families whose decoder hands `position_embeddings` to attention modules that ask
the AttentionInterface (docs/design.md section 3):

- the model's rotary module is replaced by one that rotates nothing, so the attention function gets
  un-rotated queries and keys (after the families' own norms of them);
- the config names the attention function `lminf`, which calls the ops; the mask function of the
  same name passes the 2-D padding mask on, so no mask of n x n entries is ever built;
- hooks check what a forward is given, and that each layer came to its attention (hooks.py).

families.py says which models are served and where they differ; description.py reads off one of them
what a patch has to know.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Sequence
from types import MethodType
from typing import Any, TypeVar

from torch import nn
from transformers.generation import GenerationMixin

from .attention import ATTENTION_NAME, LAYER_ATTRIBUTE, attend_in_forward
from .compat import WRAPPED_FORWARD, attention_name, set_attention_name
from .description import Description, describe
from .families import find_decoder
from .generation import OVERRIDES
from .hooks import Hooks
from .resolve import add_middle, refuse_meta, resolve_layers, resolve_lengths, resolve_middle
from .rope import IdentityRotary, is_rotary
from .settings import SETTINGS_ATTRIBUTE, LambdaSettings, model_shape

Model = TypeVar("Model", bound=nn.Module)

_PATCH_ATTRIBUTE = "_lminf_patch"  # of a decoder: its _Patch


class _Patch:
    """What `patch_model` changed in a model; it can be deep-copied and pickled."""

    def __init__(
        self, model: nn.Module, description: Description, settings: LambdaSettings
    ) -> None:
        self.model = model
        self.description = description
        self.settings = settings
        decoder, family = description.decoder, description.family
        self.attn_implementation = attention_name(decoder.config)
        self.hooks = Hooks(model, decoder, family, settings)

        # A config may be shared with another model, which must not change; one around the decoder's
        # holds it.
        shared = decoder.config
        copies: dict[int, Any] = {}
        for module in model.modules():
            config: Any = module.__dict__.get("config")
            around = vars(config).values() if config is not None else ()
            if config is shared or any(value is shared for value in around):
                module.config = copy.deepcopy(config, copies)
        plain = copy.deepcopy(decoder.config) if description.cross_attention else None
        for module in description.cross_attention.values():
            module.config = plain
        if not family.cross_attends:  # where the cross-attention goes on to ask for it
            set_attention_name(decoder.config, ATTENTION_NAME)

        # With what the instance had, and what it has now.
        self.overridden: list[tuple[nn.Module, str, Any, Any]] = []
        for layer, layer_settings in zip(description.layers, settings.layers, strict=True):
            module = layer.attention
            if module is None:
                continue
            setattr(module, LAYER_ATTRIBUTE, layer_settings)
            for name in family.switched_off:
                self.override(module, name, False)
            if family.forward is not None:
                forward = functools.partial(family.forward, attend_in_forward, module)
                self.override(module, "forward", forward)
        attention = [layer.attention for layer in description.attention]
        for name, module in list(decoder.named_modules()):
            if is_rotary(module):
                decoder.set_submodule(name, IdentityRotary(module, attention))
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
        self.hooks.remove()
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
        decoder = self.description.decoder
        for name, module in list(decoder.named_modules()):
            if isinstance(module, IdentityRotary):
                decoder.set_submodule(name, module.original)
        set_attention_name(decoder.config, self.attn_implementation)
        for module in self.description.cross_attention.values():
            module.config = decoder.config


def patch_model(
    model: Model,
    *,
    n_global: int | Sequence[int] = 16,
    window: int | Sequence[int | None] | None = None,
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
        n_global: tokens at the beginning that are seen from everywhere; at least 0. A list has one
            value for each layer.
        window: tokens, the query's own included, that are seen behind every query; at least 1. None
            is the training length, or the shorter window over which all layers slide. A list has
            one value for each layer, and None in it leaves a layer's attention full: it sees all
            keys at their true distances, and its part of the cache grows with the text.
        max_distance: no larger distance enters the attention; at least `window`, which is the
            default. Full layers have none.
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
    patch: _Patch | None = getattr(decoder, _PATCH_ATTRIBUTE, None)
    description = describe(decoder, family) if patch is None else patch.description
    lengths = resolve_lengths(description, n_global, window, max_distance)
    middle = resolve_middle(lengths.max_distance, middle_top_k, middle_from_layer, middle_distance)
    asked_lengths = (lengths.n_global, lengths.window, lengths.max_distance)
    if patch is None:
        settings = LambdaSettings(
            *asked_lengths,
            resolve_layers(description, lengths),
            *middle,
            description.recurrent_states,
            cross_attends=family.cross_attends,
            cross_layers=list(description.cross_attention),
            reads_once=family.reads_once,
            by_layer=lengths.by_layer,
            shape=model_shape(decoder.config),
        )
        add_middle(settings)
        settings.seal()
        _Patch(model, description, settings)
        return model
    asked = LambdaSettings(*asked_lengths, [], *middle, by_layer=lengths.by_layer)
    is_now = patch.settings
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
