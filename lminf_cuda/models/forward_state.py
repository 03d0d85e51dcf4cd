"""The state of one forward of a patched model, which lives in that forward and nowhere else.

It travels as the keyword `lminf_forward` where the decoder hands keywords on to its attention
modules, and beside that as what is running in this thread, for the decoders that do not.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .cache import LambdaCache
from .cache.layers import LambdaCacheLayer
from .compat import versions
from .settings import LayerSettings

STATE_KEYWORD = "lminf_forward"


@dataclass(eq=False)
class ForwardState:
    """Where the tokens of one forward stand, and which layers it has come through.

    Attributes:
        cache: the cache in use, or None.
        first: int64 [B], the position of each row's first new token, negative where the row begins
            with padding; None for 0 in all rows (only without a cache).
        n_tokens: new columns.
        is_decode: one new column, and a cache that holds some already.
        is_right_padded: some row ends with padding.
        late_rows: bool [B], the rows whose first columns in the cache were padding alone; None for
            none.
        packed: int32 [n + 1], where the sequences that are packed into the rows begin and end, the
            rows taken one after the other; None where each row is one sequence.
        given: the names of what the decoder's forward is given.
        met: the cache layers that attention layers have met so far, in their order.
        n_attended: calls of the attention function so far.
        owner: the patch whose forward it is.
        outer: what was running when the forward began, mostly None.
    """

    cache: LambdaCache | None
    first: Tensor | None
    n_tokens: int
    is_decode: bool
    is_right_padded: bool
    late_rows: Tensor | None = None
    packed: Tensor | None = None
    given: tuple[str, ...] = ()
    met: list[int] = field(default_factory=list)
    n_attended: int = 0
    owner: Any = None
    outer: ForwardState | None = None

    def first_on(self, device: torch.device) -> Tensor | None:
        """`first` on the device of the layer that asks."""
        if self.first is None or self.first.device == device:
            return self.first
        return self.first.to(device)

    def positions_on(self, device: torch.device) -> Tensor:
        """int64 [B or 1, S], where the new tokens stand; negative for padding."""
        columns = torch.arange(self.n_tokens, device=device)[None]
        if self.packed is not None:
            starts = self.packed.to(device).long()
            tokens = torch.arange(int(starts[-1]), device=device)
            sequence = torch.searchsorted(starts, tokens, right=True) - 1
            return (tokens - starts[sequence]).view(-1, self.n_tokens)
        first = self.first_on(device)
        return columns if first is None else columns + first[:, None]

    def meet(self, module: Any, layer: LayerSettings, index: int | None) -> LambdaCacheLayer:
        """The cache layer that an attention layer stores its new keys in and attends to.

        Args:
            module: the attention module.
            layer: its settings.
            index: of the cache layer, None for the one that transformers' code has just handed the
                new keys to. A module may serve several layers, so that its own index does not tell.

        Raises:
            RuntimeError: the keys were handed to no layer, or to one that has been met already in
                this forward.
        """
        assert self.cache is not None
        if layer.keys_of is not None:
            return self.cache.layers[layer.keys_of]
        handed = self.cache.take_updated()
        index = handed if index is None else index
        if index is None or index in self.met:
            what = (
                "attended without handing its new keys to the LambdaCache of this forward"
                if index is None
                else f"came to layer {index} of the LambdaCache a second time in one forward"
            )
            raise RuntimeError(f"{type(module).__name__} {what}; {versions()}")
        self.met.append(index)
        return self.cache.layers[index]

    def check_complete(self, layers: Sequence[LayerSettings | None]) -> None:
        """Whether each attention layer attended once, to its own cache layer.

        Args:
            layers: of the settings, those that the forward was to run.

        Raises:
            RuntimeError: some did not: they attended in another way.
        """
        attention = [index for index, layer in enumerate(layers) if layer is not None]
        own = [index for index in attention if layers[index].keys_of is None]  # type: ignore[union-attr]
        if self.n_attended == len(attention) and (self.cache is None or sorted(self.met) == own):
            return
        raise RuntimeError(
            f"of {len(attention)} attention layers {self.n_attended} came to Λ attention in this "
            f"forward, and the cache layers {sorted(self.met)} of {own} got its keys: the others "
            f"attended in another way, so that the result is wrong; {versions()}"
        )


class _Traced:
    """What runs while graphs are traced: Dynamo cannot trace a ContextVar.

    Beside a forward that is one graph, with its hooks, this serves one of which parts are compiled
    and parts are not. Of several threads in such parts the last one's forward stands here; another
    one then misses layers or meets too many, which raises.
    """

    def __init__(self) -> None:
        self.state: ForwardState | None = None


_traced = _Traced()
_running: ContextVar[ForwardState | None] = ContextVar("lminf_forward", default=None)


def running() -> ForwardState | None:
    """The state of the forward that this thread is in, or None."""
    if torch.compiler.is_compiling():
        return _traced.state
    state = _running.get()
    return _traced.state if state is None else state


def enter(state: ForwardState, owner: Any) -> None:
    """Makes `state`, of `owner`'s forward, the one that is running, until `leave(owner)`."""
    state.owner = owner
    if not torch.compiler.is_compiling():
        leave(owner)  # an interrupted forward's
        state.outer = _running.get()
        _running.set(state)
    _traced.state = state  # never read before it is written, in a graph: that would be guarded


class InItsForward:
    """A checkpointing function: what it runs again in the backward is in the forward's state again.

    Args:
        original: (function, *arguments, **options) -> what the function returns.
    """

    def __init__(self, original: Callable[..., Any]) -> None:
        self.original = original

    def __call__(self, function: Callable[..., Any], *args: Any, **options: Any) -> Any:
        """As `original`."""
        state = running()
        if state is None or torch.compiler.is_compiling():
            return self.original(function, *args, **options)

        def in_state(*args: Any, **kwargs: Any) -> Any:
            token = _running.set(state)
            try:
                return function(*args, **kwargs)
            finally:
                _running.reset(token)

        return self.original(in_state, *args, **options)


def leave(owner: Any) -> None:
    """Ends the forward of `owner`, if that is what is running."""
    if torch.compiler.is_compiling():
        _traced.state = None
        return
    state = _running.get()
    if state is not None and state.owner is owner:
        _running.set(state.outer)
    if _traced.state is not None and _traced.state.owner is owner:
        _traced.state = _running.get()
