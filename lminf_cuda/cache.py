"""The key-value cache of a patched model: the first tokens, the last tokens, and nothing else.

Each layer keeps two buffers of fixed size (docs/design.md sections 1 and 2):

- a ring of the last `window` tokens, whose keys carry the rotation of their own position, at slot
  position % capacity; its capacity is `window`, and more only where tokens are to be taken back
  (`LambdaCache.activate_past_recording`, as assisted decoding needs it);
- the first `n_global` tokens, whose keys are un-rotated, since the distance at which they are met
  is clamped and so changes from query to query.

A model patched with `middle_top_k` keeps all keys and values besides (middle.py). A layer that
attends with the keys of an earlier one keeps none, and what is not attention keeps the state that
transformers itself would keep, of fixed size as well.

One new token goes through the op lambda_decode, which appends and attends in one step. Several new
tokens go through lambda_attn over the ring's keys followed by the new ones, and are stored
afterwards.

Rows of a batch may start at different columns (left padding). A position therefore counts a row's
own tokens: each row's global tokens are its own first ones, and what stands left of them is never
read.

Letters in shape comments: B batch, Hq and Hkv heads of queries and keys, S new tokens, D head dim,
W window, C ring capacity, G n_global.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import cache_utils
from transformers.cache_utils import Cache, CacheLayerMixin

from . import ops as _ops  # registers torch.ops.lminf  # noqa: F401
from .middle import MiddleStore, add_middle_tokens
from .rope import Rope

__all__ = ["LambdaCache", "LambdaCacheLayer", "LambdaSettings", "LayerSettings"]

# The attribute of a patched module that holds its LambdaSettings.
SETTINGS_ATTRIBUTE = "_lminf_settings"

ROLLBACK = 64  # tokens that crop() takes back at least once recording is on

# What a model with other layers than attention keeps of them; old versions of transformers have no
# such classes, and `recurrent_layers_are_known` says so.
_LinearAttentionLayer: Any = getattr(cache_utils, "LinearAttentionLayer", object)
_DummyLayer: Any = getattr(cache_utils, "DummyLayer", object)

_patch_ids = itertools.count()


def recurrent_layers_are_known() -> bool:
    """Whether the installed transformers has cache layers for what is not attention."""
    return _LinearAttentionLayer is not object and _DummyLayer is not object


@dataclass(eq=False)
class LayerSettings:
    """What one attention layer attends to, and how it rotates.

    Attributes:
        n_global: the first so many tokens are seen from everywhere.
        window: so many keys, the query's own included, are seen behind every query.
        max_distance: no larger distance enters a score.
        rope: the layer's rotation, or None for a layer without one.
        slopes: ALiBi slopes, float32 [Hq], or None.
        middle_top_k: so many keys of the middle join the last query of a forward; 0 for none.
        middle_distance: at which they are met.
        keys_of: the earlier layer whose keys and values this one attends with, or None for its own.
    """

    n_global: int
    window: int
    max_distance: int
    rope: Rope | None
    slopes: Tensor | None = None
    keys_of: int | None = None
    middle_top_k: int = 0
    middle_distance: int = 0
    _options: dict[torch.device, dict[str, Any]] = field(default_factory=dict, repr=False)

    def options(self, device: torch.device) -> dict[str, Any]:
        """The keyword arguments for lambda_attn and lambda_decode on tensors of `device`."""
        options = self._options.get(device)
        if options is None:
            options = {"max_distance": self.max_distance}
            if self.rope is not None:
                options["inv_freq"] = self.rope.inv_freq_on(device)
                options["rope_scaling"] = self.rope.scaling
                options["rope_interleaved"] = self.rope.interleaved
            if self.slopes is not None:
                options["alibi_slopes"] = self.slopes.to(device)
            self._options[device] = options
        return options

    def arrange(self, x: Tensor) -> Tensor:
        """Queries or keys x [B, H, S, D] with the dims that rotate first, as the op wants them."""
        if self.rope is None or not self.rope.rotates_last:
            return x
        rest = x.shape[-1] - 2 * self.rope.inv_freq.numel()
        return torch.cat([x[..., rest:], x[..., :rest]], dim=-1)


@dataclass(eq=False)
class LambdaSettings:
    """What `patch_model` was asked for, and what follows from it for each layer.

    Attributes:
        n_global, window, max_distance: of the layers that do not slide by themselves.
        layers: one entry per decoder layer, None for a layer without attention.
        recurrent_states: of each layer the number of convolution or recurrent states that it keeps;
            empty for a model that has none.
        middle_top_k, middle_from_layer, middle_distance: of the middle tokens (middle.py).
        cross_attends: of an encoder-decoder, whose cross-attention has a cache of its own.
        patch_id: tells the caches of one patched model from those of another. A deep copy of the
            model or of a cache keeps it.
    """

    n_global: int
    window: int
    max_distance: int
    layers: list[LayerSettings | None]
    middle_top_k: int = 0
    middle_from_layer: int = 0
    middle_distance: int = 0
    recurrent_states: list[int] = field(default_factory=list)
    cross_attends: bool = False
    patch_id: int = field(default_factory=lambda: next(_patch_ids))

    def __str__(self) -> str:
        text = f"n_global={self.n_global}, window={self.window}, max_distance={self.max_distance}"
        if self.middle_top_k == 0:
            return text
        return (
            f"{text}, middle_top_k={self.middle_top_k}, "
            f"middle_from_layer={self.middle_from_layer}, middle_distance={self.middle_distance}"
        )


@dataclass(eq=False)
class _Progress:
    """What all layers of a cache share.

    Attributes:
        seen: columns of tokens so far, padding included.
        in_forward: whether the forward of a patched model is using the cache.
        slack: slots of each ring beyond its window.
        lost: a ring of window W has overwritten the columns below lost - W. Brought up to date by
            `forget`, before `seen` shrinks or `slack` grows.
    """

    seen: int = 0
    in_forward: bool = False
    slack: int = 0
    lost: int = 0

    def forget(self) -> None:
        """Notes what the rings have overwritten so far."""
        self.lost = max(self.lost, self.seen - self.slack)


def _ring_slots(ring: Tensor, positions: Tensor) -> Tensor:
    """The slots of `positions` [B, n] in a ring [B, H, C, D], as an index [B, H, n, D]."""
    slots = (positions % ring.shape[2])[:, None, :, None]
    return slots.expand(-1, ring.shape[1], -1, ring.shape[3])


def _pick(ring: Tensor, positions: Tensor) -> Tensor:
    """What a ring [B, H, C, D] holds of `positions` [B, n]: [B, H, n, D]."""
    return ring.gather(2, _ring_slots(ring, positions))


def _put(ring: Tensor, positions: Tensor, new: Tensor) -> None:
    """Writes `new` [B, H, n, D] to the slots of `positions` [B, n], at most C neighbours a row."""
    ring.scatter_(2, _ring_slots(ring, positions), new)


class LambdaCacheLayer(CacheLayerMixin):
    """The buffers of one layer, allocated when the first keys come by.

    Attributes:
        settings: what the layer attends to.
        progress: shared by the layers of a cache.
        ring_k, ring_v: [B, Hkv, C, D].
        global_k, global_v: [B, Hkv, G, D].
        middle: all keys and values, in a layer with middle tokens.
        keep_middle: "device" (of the layer) or "cpu".
        is_shared: whether other layers attend with these keys, too.
    """

    is_sliding = False
    is_compileable = False

    def __init__(
        self,
        settings: LayerSettings,
        progress: _Progress,
        keep_middle: str = "device",
        is_shared: bool = False,
    ) -> None:
        super().__init__()
        self.is_shared = is_shared
        self.keep_middle = keep_middle
        self.middle: MiddleStore | None = None
        self.settings = settings
        self.progress = progress
        self.ring_k: Tensor
        self.ring_v: Tensor
        self.global_k: Tensor
        self.global_v: Tensor
        # In a forward of several tokens: what the layers with the same keys attend to.
        self.shown: tuple[Tensor, Tensor, dict[str, Any]] | None = None

    @property
    def capacity(self) -> int:
        """Slots of the ring."""
        return self.settings.window + self.progress.slack

    def buffers(self) -> list[Tensor]:
        """The tensors that the layer keeps; none before its first use."""
        if not self.is_initialized:
            return []
        fixed = [self.ring_k, self.ring_v, self.global_k, self.global_v]
        return fixed if self.middle is None else [*fixed, self.middle.k, self.middle.v]

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor | None = None) -> None:
        """Allocates the buffers for keys like `key_states` [B, Hkv, any, D]."""
        values = key_states if value_states is None else value_states
        # Tensors made in inference mode could not be written outside of it.
        with torch.inference_mode(False):
            for name, like in (("k", key_states), ("v", values)):
                batch, heads, _, dim = like.shape
                ring = like.new_empty((batch, heads, self.capacity, dim))
                first = like.new_empty((batch, heads, self.settings.n_global, dim))
                setattr(self, f"ring_{name}", ring)
                setattr(self, f"global_{name}", first)
        if self.settings.middle_top_k:
            on_cpu = self.keep_middle == "cpu"
            device = torch.device("cpu") if on_cpu else key_states.device
            self.middle = MiddleStore(key_states, values, device)
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Hands new keys and values on as they are: the attention function stores them.

        What arrives here may be something else than keys and values, as in latent attention.

        Raises:
            RuntimeError: called by a model that is not patched, which would attend to the new
                tokens alone.
        """
        if not self.progress.in_forward:
            raise RuntimeError(
                "a LambdaCache works only inside the forward of the model it was made for, while "
                "that is patched; call patch_model(model) first, or pass another cache"
            )
        return key_states, value_states

    def decode(
        self, q: Tensor, k: Tensor, v: Tensor, positions: Tensor, options: dict[str, Any]
    ) -> Tensor:
        """Stores one new token of each row and attends from it.

        Args:
            q: [B, Hq, 1, D], un-rotated.
            k, v: [B, Hkv, 1, D], un-rotated.
            positions: int64 [B]; negative in a row whose new token is padding.
            options: of the op, those of the layer's settings among them.

        Returns:
            [B, Hq, 1, D].
        """
        if not self.is_initialized:
            self.lazy_initialization(k, v)
        out, lse = torch.ops.lminf.lambda_decode.default(
            q,
            k,
            v,
            self.ring_k,
            self.ring_v,
            self.global_k,
            self.global_v,
            positions,
            self.settings.window,
            **options,
        )
        return self._with_middle(q, k, v, positions, out, lse, options)

    def _with_middle(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        first: Tensor,
        out: Tensor,
        lse: Tensor,
        options: dict[str, Any],
    ) -> Tensor:
        """Keeps the new keys and values for later, and adds middle tokens to the last query."""
        if self.middle is None:
            return out
        seen, n_new = self.progress.seen, k.shape[2]
        self.middle.append(k, v, first, seen)
        kept_k, kept_v = self.middle.held(seen + n_new)
        out[:, :, -1:] = add_middle_tokens(
            self.settings,
            q[:, :, -1:],
            kept_k,
            kept_v,
            out[:, :, -1:],
            lse[:, :, -1:],
            first + n_new - 1,
            options,
        )
        return out

    def extend(
        self, q: Tensor, k: Tensor, v: Tensor, first: Tensor, options: dict[str, Any]
    ) -> Tensor:
        """Attends from several new tokens of each row to the kept and the new ones, and keeps them.

        In the same forward a later layer may come again with its own queries.

        Args:
            q: [B, Hq, S, D], un-rotated.
            k, v: [B, Hkv, S, D], un-rotated.
            first: int64 [B], the position of each row's first new token; negative where the row
                begins with padding.
            options: of the op, those of the layer's settings among them.

        Returns:
            [B, Hq, S, D]; of padding, zeros.
        """
        settings, given = self.settings, options
        n_global, window = settings.n_global, settings.window
        if self.shown is not None:
            all_k, all_v, shared = self.shown
            out, _ = torch.ops.lminf.lambda_attn.default(
                q, all_k, all_v, n_global, window, **(options | shared)
            )
            return out
        if not self.is_initialized:
            self.lazy_initialization(k, v)
        self._store_globals(k, v, first)
        if self.progress.seen:
            n_old = min(self.progress.seen, window - 1)
            old = first[:, None] + torch.arange(-n_old, 0, device=q.device)  # [B, n_old]
            old_k, old_v = (_pick(ring, old) for ring in (self.ring_k, self.ring_v))
            shared = {
                "k_rotated": n_old if settings.rope is not None else 0,
                "k_start": first - n_old,
                "global_k": self.global_k,
                "global_v": self.global_v,
            }
            all_k, all_v = torch.cat([old_k, k], dim=2), torch.cat([old_v, v], dim=2)
        else:
            shared = {"k_start": first}
            all_k, all_v = k, v
        out, lse = torch.ops.lminf.lambda_attn.default(
            q, all_k, all_v, n_global, window, **(options | shared)
        )
        if self.is_shared:
            self.shown = all_k, all_v, shared
        self._store_ring(k, v, first)
        return self._with_middle(q, k, v, first, out, lse, given)

    def _store_globals(self, k: Tensor, v: Tensor, first: Tensor) -> None:
        """Writes those of the new tokens that stand at positions below n_global."""
        slots = torch.arange(self.settings.n_global, device=k.device)
        source = slots - first[:, None]  # [B, G]: which new token belongs to the slot
        is_new = ((source >= 0) & (source < k.shape[2]))[:, None, :, None]
        source = source.clamp(0, k.shape[2] - 1)[:, None, :, None]
        for kept, new in ((self.global_k, k), (self.global_v, v)):
            picked = new.gather(2, source.expand(-1, new.shape[1], -1, new.shape[3]))
            kept.copy_(torch.where(is_new, picked, kept))

    def _store_ring(self, k: Tensor, v: Tensor, first: Tensor) -> None:
        """Rotates the last C new keys to their positions and writes them over the oldest.

        Padding lands in slots that the row has not reached yet: they hold nothing, and are not read
        before a token of the row overwrites them.
        """
        rope = self.settings.rope
        start = max(k.shape[2] - self.capacity, 0)
        k, v = k[:, :, start:], v[:, :, start:]
        positions = first[:, None] + torch.arange(start, start + k.shape[2], device=k.device)
        if rope is not None:
            k = torch.ops.lminf.clamped_rope.default(
                k,
                positions,
                rope.inv_freq_on(k.device),
                scaling=rope.scaling,
                interleaved=rope.interleaved,
            )
        for ring, new in ((self.ring_k, k), (self.ring_v, v)):
            _put(ring, positions, new)

    def grow(self, slack: int, next_positions: Tensor) -> None:
        """Moves the ring to one of window + slack slots, before `progress.slack` says so.

        Args:
            slack: more than `progress.slack`.
            next_positions: int64 [B], tokens of each row so far.
        """
        if not self.is_initialized:
            return
        n_old = min(self.progress.seen, self.capacity)
        columns = torch.arange(-n_old, 0, device=self.ring_k.device)
        positions = next_positions.to(columns.device)[:, None] + columns  # [B, n_old]
        for name in ("ring_k", "ring_v"):
            ring = getattr(self, name)
            batch, heads, _, dim = ring.shape
            with torch.inference_mode(False):
                larger = ring.new_empty((batch, heads, self.settings.window + slack, dim))
            _put(larger, positions, _pick(ring, positions))
            setattr(self, name, larger)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(Number of keys, index of the first) as seen by a mask: all columns so far."""
        return self.progress.seen + query_length, 0

    def get_seq_length(self) -> int:
        """The number of tokens seen, padding included."""
        return self.progress.seen

    def get_max_length(self) -> int:
        """-1: there is no limit."""
        return -1

    get_max_cache_shape = get_max_length  # its name in older transformers

    def reset(self) -> None:
        """Nothing: the cache forgets by counting from 0, and the buffers stay."""

    def select_rows(self, indices: Tensor) -> None:
        """Keeps the rows `indices` int64 [rows], in place where the batch size stays."""
        if not self.is_initialized:
            return
        for name in ("ring_k", "ring_v", "global_k", "global_v"):
            buffer = getattr(self, name)
            rows = buffer.index_select(0, indices.to(buffer.device))
            if rows.shape == buffer.shape:
                buffer.copy_(rows)
            else:
                setattr(self, name, rows)
        if self.middle is not None:
            self.middle.select_rows(indices)


class _RecurrentLayer(_LinearAttentionLayer):
    """transformers' own states of a layer that is not attention, or not attention alone."""

    def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
        # Tensors made in inference mode could not be written outside of it.
        with torch.inference_mode(False):
            super().lazy_initialization(*args, **kwargs)

    def states(self) -> list[Tensor]:
        """The tensors that the layer keeps; none before its first use."""
        kept = [*self.conv_states.values(), *self.recurrent_states.values()]
        return [state for state in kept if state is not None]


class _HybridLayer(_RecurrentLayer, LambdaCacheLayer):
    """The states of a layer that has attention and something recurrent side by side."""

    is_compileable = False

    def __init__(self, n_states: int, *args: Any) -> None:
        LambdaCacheLayer.__init__(self, *args)
        _LinearAttentionLayer.__init__(self, number_of_states=n_states)

    def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
        owner = LambdaCacheLayer if args else _RecurrentLayer  # which names what it initializes
        owner.lazy_initialization(self, *args, **kwargs)


class LambdaCache(Cache):
    """A transformers cache of fixed size for a patched model: n_global + window tokens per layer.

    Only for a model patched with `middle_top_k` it grows: the layers with middle tokens keep all
    keys and values besides, 2 * key heads * head dim * element size bytes a token and layer (4 KiB
    for 8 heads of 128 dims in bfloat16), in memory that doubles when it is full.

    A forward with use_cache and `generate()` make one by themselves; make it yourself to keep it
    over several calls (multi-turn chat, chunks of a long text). An encoder-decoder takes it as the
    first part of `EncoderDecoderCache(LambdaCache(model), DynamicCache())`.

    Args:
        model: a model patched by `patch_model`, whose settings the cache takes.
        batch_size: rows, known from the first forward on when None.
        keep_middle: where a model with middle tokens keeps all keys and values: on the "device" of
            each layer, which is the default, or on the "cpu", where they are then searched, too.

    Raises:
        ValueError: `model` is not patched, batch_size < 1, or keep_middle is something else or
            given for a model without middle tokens.
    """

    def __init__(
        self, model: Any, *, batch_size: int | None = None, keep_middle: str | None = None
    ) -> None:
        settings = getattr(model, SETTINGS_ATTRIBUTE, None)
        if settings is None:
            raise ValueError(
                "LambdaCache takes its sizes from a patched model, and this "
                f"{type(model).__name__} is not patched; call patch_model(model) first"
            )
        if batch_size is not None and batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; it must be at least 1, or None")
        if keep_middle not in (None, "device", "cpu"):
            raise ValueError(f"keep_middle is {keep_middle!r}; it must be 'device' or 'cpu'")
        if keep_middle is not None and settings.middle_top_k == 0:
            raise ValueError(
                f"keep_middle is {keep_middle!r}, but the model has no middle tokens to keep; "
                "leave it out, or patch with middle_top_k"
            )
        self._progress = _Progress()
        self.settings: LambdaSettings = settings
        super().__init__(
            layers=[
                self._layer(index, keep_middle or "device") for index in range(len(settings.layers))
            ]
        )
        self._batch_size = batch_size
        self._unusable: str | None = None
        self.next_positions: Tensor | None = None  # int64 [B]: tokens of each row so far

    def _layer(self, index: int, keep_middle: str) -> Any:
        """The states of one layer, before its first use."""
        settings, states = self.settings.layers[index], self.settings.recurrent_states
        n_states = states[index] if states else 0
        if settings is None:
            return _RecurrentLayer(number_of_states=n_states) if n_states else _DummyLayer()
        if settings.keys_of is not None:
            return _DummyLayer()
        is_shared = any(layer and layer.keys_of == index for layer in self.settings.layers)
        arguments = (settings, self._progress, keep_middle, is_shared)
        return _HybridLayer(n_states, *arguments) if n_states else LambdaCacheLayer(*arguments)

    def attention_layers(self) -> list[LambdaCacheLayer]:
        """Those layers that keep keys and values."""
        return [layer for layer in self.layers if isinstance(layer, LambdaCacheLayer)]

    def _recurrent_layers(self) -> list[Any]:
        return [layer for layer in self.layers if isinstance(layer, _RecurrentLayer)]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """The number of tokens seen, padding included."""
        return self._progress.seen

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        """(Number of keys, index of the first) as seen by a mask: all columns so far."""
        return self._progress.seen + query_length, 0

    @property
    def batch_size(self) -> int:
        """Rows; -1 before the first forward when it was not given."""
        return -1 if self._batch_size is None else self._batch_size

    @property
    def max_batch_size(self) -> int:
        """The same as `batch_size`."""
        return self.batch_size

    @property
    def is_initialized(self) -> bool:
        """Whether the buffers are allocated."""
        return all(layer.is_initialized for layer in self.attention_layers())

    def memory_bytes(self) -> int:
        """Bytes of all buffers: 0 before the first forward, and constant from then on.

        Those of a model with middle tokens grow with the text.
        """
        buffers = [buffer for layer in self.attention_layers() for buffer in layer.buffers()]
        buffers += [state for layer in self._recurrent_layers() for state in layer.states()]
        return sum(buffer.numel() * buffer.element_size() for buffer in buffers)

    def check(self, settings: LambdaSettings, batch_size: int) -> None:
        """Whether a patched model with `settings` can go on from here with `batch_size` rows.

        Raises:
            ValueError: the cache is of another model or other settings, or of another batch size.
            RuntimeError: an earlier forward left a state from which the cache cannot go on.
        """
        if settings.patch_id != self.settings.patch_id:
            raise ValueError(
                "past_key_values is a LambdaCache made for another patched model or for other "
                f"settings ({self.settings}); this model has {settings}: make a new one by "
                "LambdaCache(model)"
            )
        if self._unusable is not None:
            raise RuntimeError(self._unusable)
        if self._batch_size not in (None, batch_size):
            raise ValueError(
                f"the input has {batch_size} rows and the LambdaCache {self._batch_size}; use "
                "batch_repeat_interleave or batch_select_indices, or a new cache"
            )

    def begin(self, first: Tensor) -> None:
        """Opens the cache to a forward whose new tokens start at positions `first`, int64 [B]."""
        if self.next_positions is None:
            with torch.inference_mode(False):
                self.next_positions = torch.zeros_like(first)
            self._batch_size = first.shape[0]
        self._progress.in_forward = True
        self._unusable = (
            "the last forward with this LambdaCache did not finish and may have written half of "
            "its tokens; call cache.reset() and start again, or make a new cache"
        )

    def commit(self, first: Tensor, n_new: int, is_decode: bool) -> None:
        """Closes a forward of `n_new` columns, whose first tokens stood at positions `first` [B].

        In a decode step a negative position is an idle row's, which gained nothing.
        """
        assert self.next_positions is not None
        if is_decode:
            self.next_positions.add_(first >= 0)
        else:
            self.next_positions.copy_(first + n_new)
        self._progress.seen += n_new
        self._end_forward()
        self._unusable = None

    def close(self, reason: str) -> None:
        """Ends a forward that the cache cannot be continued from, until `reset()`."""
        self._end_forward()
        self._unusable = reason

    def _end_forward(self) -> None:
        self._progress.in_forward = False
        for layer in self.attention_layers():
            layer.shown = None

    def reset(self) -> None:
        """Forgets all tokens and keeps the buffers."""
        self._progress.seen = 0
        self._progress.lost = 0
        self._end_forward()
        for layer in self._recurrent_layers():
            layer.reset()
        self._unusable = None
        if self.next_positions is not None:
            self.next_positions.zero_()

    def activate_past_recording(self, tokens: int = ROLLBACK) -> None:
        """From now on keeps what `crop` needs to take back the last `tokens` tokens.

        Each layer's ring gets so many slots more than its window, once. `generate()` asks for as
        many as assisted decoding drafts.

        Raises:
            ValueError: tokens < 1, or the model has recurrent layers.
        """
        if tokens < 1:
            raise ValueError(f"tokens is {tokens}; it must be at least 1")
        if not self.is_croppable:
            raise ValueError(
                "the model has recurrent layers, whose state cannot be taken back; generate "
                "without an assistant and without prompt_lookup_num_tokens, or keep a "
                "copy.deepcopy of the cache to go back to"
            )
        progress = self._progress
        if tokens <= progress.slack:
            return
        progress.forget()
        if self.next_positions is not None:
            for layer in self.attention_layers():
                layer.grow(tokens, self.next_positions)
        progress.slack = tokens

    @property
    def is_croppable(self) -> bool:
        """Whether `crop` takes back what `activate_past_recording` asked for.

        It does in a model of attention alone: a recurrent state cannot be taken back.
        """
        return not self._recurrent_layers()

    def crop(self, tokens_to_remove: int) -> None:
        """Takes back the last tokens, unless the ring has overwritten what is then needed.

        Args:
            tokens_to_remove: minus the number of tokens to remove; 0 does nothing; a positive value
                is the length to shorten to, as older transformers pass it.

        Raises:
            RuntimeError: a ring has dropped keys that the shorter text needs, or the model has
                recurrent layers.
        """
        progress = self._progress
        seen = progress.seen
        n_remove = -tokens_to_remove if tokens_to_remove <= 0 else max(seen - tokens_to_remove, 0)
        n_remove = min(n_remove, seen)
        if n_remove == 0:
            return
        if not self.is_croppable:
            raise RuntimeError(
                f"crop({tokens_to_remove}) removes {n_remove} of {seen} tokens, but the model has "
                "recurrent layers, whose state cannot be taken back; keep a copy.deepcopy of the "
                "cache to go back to"
            )
        progress.forget()
        window = min(layer.settings.window for layer in self.attention_layers())
        # The next query sees window - 1 earlier keys: a full ring has one to spare.
        if progress.lost > window and seen - n_remove + 1 < progress.lost:
            raise RuntimeError(
                f"crop({tokens_to_remove}) removes {n_remove} of {seen} tokens, but the ring of "
                f"{window + progress.slack} tokens has overwritten keys that are needed then; call "
                f"cache.activate_past_recording({n_remove}) before the tokens come, or start again "
                "from a new LambdaCache"
            )
        progress.seen -= n_remove
        if self.next_positions is not None:
            self.next_positions.sub_(n_remove).clamp_(min=0)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Makes row b what row beam_idx[b] was; beam_idx int64 [B]."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps the rows `indices`, int64 [rows] or bool [B]."""
        if indices.dtype == torch.bool:
            indices = indices.nonzero().flatten()
        for layer in self.attention_layers():
            layer.select_rows(indices)
        for layer in self._recurrent_layers():
            if layer.states():
                _LinearAttentionLayer.reorder_cache(layer, indices)
        if self.next_positions is not None:
            self.next_positions = self.next_positions[indices.to(self.next_positions.device)]
            self._batch_size = indices.numel()

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats every row `repeats` times, copies side by side."""
        if self.next_positions is None:
            return
        rows = torch.arange(self.next_positions.shape[0], device=self.next_positions.device)
        self.batch_select_indices(rows.repeat_interleave(repeats))
