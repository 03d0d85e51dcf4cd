"""What runs around the forwards of a patched model: hooks, which change no module's code.

Before the decoder's forward its inputs are checked once, the rows' positions are worked out, and
the state of this forward is opened, which every layer's attention meets (forward_state.py). After
it comes the check that each did, and the cache is told that the tokens are in.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn

from .attention import ATTENTION_NAME
from .compat import (
    CHECKPOINTS_BY,
    attention_name,
    cache_argument,
    has_keywords,
    move_cache,
    parameter_names,
    versions,
)
from .families import WRAPPERS
from .family import Family
from .forward_state import (
    STATE_KEYWORD,
    ForwardState,
    InItsForward,
    enter,
    leave,
    running,
)
from .generation import lambda_cache, new_cache
from .positions import locate_tokens, packed_sequences, padding_mask, refuse_inputs
from .settings import LambdaSettings


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


class Hooks:
    """Those of one patched model; they can be deep-copied and pickled.

    Args:
        model: the model.
        decoder: the module in it that owns the layers.
        family: of the decoder.
        settings: that it is patched with.
    """

    def __init__(
        self, model: nn.Module, decoder: Any, family: Family, settings: LambdaSettings
    ) -> None:
        self.decoder = decoder
        self.family = family
        self.settings = settings
        self.input_names = parameter_names(decoder.forward)
        self.cache_name = _cache_name(decoder)
        self.hands_on = family.forward is None and has_keywords(decoder.forward)
        self.n_hidden_layers: int | None = getattr(decoder.config, "num_hidden_layers", None)
        self.makes_caches = getattr(model.config, "model_type", None) in WRAPPERS
        self.handles = [
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
                self.handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))

    def remove(self) -> None:
        """Takes them out again."""
        for handle in self.handles:
            handle.remove()
        for module in self.decoder.modules():
            function = module.__dict__.get(CHECKPOINTS_BY)
            if isinstance(function, InItsForward):
                setattr(module, CHECKPOINTS_BY, function.original)

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
        elif self.makes_caches and module.training and torch.is_grad_enabled():
            kwargs.setdefault("use_cache", False)
        elif self.makes_caches and self.wants_cache(kwargs):
            kwargs[cache_name] = new_cache(self.decoder)
        return (), kwargs

    def wants_cache(self, kwargs: dict[str, Any]) -> bool:
        """Whether a forward with these arguments is to use a cache."""
        use_cache = kwargs.get("use_cache")
        if use_cache is None:
            use_cache = getattr(self.decoder.config, "use_cache", False)
        return bool(use_cache)

    def refuses_packed(self) -> str | None:
        """Why the model takes no sequences packed into a row, or None."""
        if self.family.cross_attends:
            return "which a decoder with cross-attention does not take"
        if self.settings.recurrent_states:
            return "and the states of this model's recurrent layers would go from one to the next"
        if any(layer is not None and layer.middle_top_k for layer in self.settings.layers):
            return "and middle tokens join one query of a row"
        return None

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

        trains = decoder.training and torch.is_grad_enabled()
        if trains and not self.hands_on:
            self.checkpoint_in_state()
        if cache is None and trains and kwargs.get("use_cache") is None:
            kwargs["use_cache"] = False  # which its config may ask for by default
        if cache is None and self.wants_cache(kwargs):
            cache = kwargs[self.cache_name] = new_cache(decoder)
        if cache is not None:
            cache = lambda_cache(decoder, cache)
            cache.check(self.settings, *inputs.shape[:2])
            if trains and getattr(decoder, "is_gradient_checkpointing", False):
                raise ValueError(
                    "gradient checkpointing runs layers twice, and a cache would take their keys "
                    "twice; pass use_cache=False and no cache"
                )
        kwargs["attention_mask"] = padding_mask(kwargs.get("attention_mask"))
        packed = packed_sequences(kwargs, inputs, cache, self.refuses_packed())
        state = locate_tokens(
            cache,
            inputs,
            kwargs["attention_mask"],
            kwargs.get("position_ids"),
            bool(self.settings.recurrent_states),
            packed,
        )
        if self.family.reads_positions and state.first is not None:
            kwargs["position_ids"] = state.positions_on(state.first.device).clamp(min=0)
        elif packed is not None and kwargs.get("position_ids") is None:
            kwargs["position_ids"] = state.positions_on(inputs.device)
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

    def checkpoint_in_state(self) -> None:
        """Lets layers that run again in the backward find the state of their forward."""
        for module in self.decoder.modules():
            function = module.__dict__.get(CHECKPOINTS_BY)
            if function is not None and not isinstance(function, InItsForward):
                setattr(module, CHECKPOINTS_BY, InItsForward(function))

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
