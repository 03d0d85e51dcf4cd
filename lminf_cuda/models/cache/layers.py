"""What one layer of a patched model keeps: keys and values in two buffers of fixed size.

The two of an attention layer are (docs/design.md sections 1 and 2):

- a ring of the last `window` tokens, whose keys carry the rotation of their own position, at slot
  position % capacity; its capacity is `window`, and more only where tokens are to be taken back
  (`LambdaCache.activate_past_recording`, as assisted decoding needs it);
- the first `n_global` tokens, whose keys are un-rotated, since the distance at which they are met
  is clamped and so changes from query to query.

A layer whose attention stays full has a ring that grows, so that a slot is a position.
A model patched with `middle_top_k` keeps all keys and values besides (middle.py). A layer that
attends with the keys of an earlier one keeps none, and what is not attention keeps the state that
transformers itself would keep, of fixed size as well.

One new token goes through the op lambda_decode, which appends and attends in one step. Several new
tokens go through lambda_attn over the ring's keys followed by the new ones, and are stored
afterwards.

Letters in shape comments: B batch, Hq and Hkv heads of queries and keys, S new tokens, D head dim,
W window, C ring capacity, G n_global.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ... import ops as _ops  # registers torch.ops.lminf  # noqa: F401
from ..compat import CacheLayerMixin, DummyLayer, DynamicLayer, LinearAttentionLayer, versions
from ..middle import MiddleStore, add_middle_tokens
from ..settings import LambdaSettings, LayerSettings
from ..writable import Writable, writable

FIRST_ROOM = 256  # slots of a full layer's ring at the beginning


class Progress:
    """What all layers of a cache share.

    Attributes:
        seen: columns of tokens so far, padding included.
        in_forward: whether the forward of a patched model is using the cache.
        slack: slots of each ring beyond its window.
        lost: a ring of window W has overwritten the columns below lost - W. Brought up to date by
            `forget`, before `seen` shrinks or `slack` grows.
    """

    def __init__(self) -> None:
        self.in_forward = False
        self.slack = 0
        self._seen = 0
        self._lost = 0
        self._unread: Tensor | None = None

    @property
    def seen(self) -> int:
        """See above."""
        self._read()
        return self._seen

    @seen.setter
    def seen(self, seen: int) -> None:
        self._read()
        self._seen = seen

    @property
    def lost(self) -> int:
        """See above."""
        self._read()
        return self._lost

    @lost.setter
    def lost(self, lost: int) -> None:
        self._read()
        self._lost = lost

    def counts(self) -> Tensor:
        """`seen` and `lost` as a tensor, int64 [2] on the CPU."""
        if self._unread is not None:
            return self._unread
        counts = (self._seen, self._lost)
        if all(type(count) is int for count in counts):
            return torch.tensor(counts, device="cpu")
        # Of a program that is being traced.
        return torch.stack([torch.full((), n, dtype=torch.int64, device="cpu") for n in counts])

    def set_counts(self, counts: Tensor) -> None:
        """Takes over what `counts()` has given, and reads it when it is asked for."""
        self._unread = counts

    def _read(self) -> None:
        if self._unread is None:
            return
        counts, self._unread = self._unread, None
        self._seen, self._lost = (count.item() for count in counts.unbind())  # type: ignore[assignment]
        if type(self._seen) is not int:  # a step that is being exported follows other tokens
            torch._check(self._seen > 0)

    def forget(self) -> None:
        """Notes what the rings have overwritten so far."""
        self.lost = max(self.lost, self.seen - self.slack)


def _ring_rows(ring: Tensor, positions: Tensor) -> Tensor:
    """The rows of `positions` [B, n] in a ring [B, H, C, D] taken as [B * H * C, D]: [B * H * n].

    Whole rows are copied many times faster than `gather` and `scatter_` pick their elements.
    """
    batch, heads, slots, _ = ring.shape
    first = torch.arange(batch * heads, device=ring.device).view(batch, heads, 1) * slots
    return (first + (positions % slots)[:, None]).flatten()


def _pick(ring: Tensor, positions: Tensor) -> Tensor:
    """What a ring [B, H, C, D] holds of `positions` [B, n]: [B, H, n, D]."""
    batch, heads, _, dim = ring.shape
    rows = ring.view(-1, dim).index_select(0, _ring_rows(ring, positions))
    return rows.view(batch, heads, positions.shape[1], dim)


def _put(ring: Tensor, positions: Tensor, new: Tensor) -> None:
    """Writes `new` [B, H, n, D] to the slots of `positions` [B, n], at most C neighbours a row."""
    rows = new.reshape(-1, ring.shape[3])
    ring.view(-1, ring.shape[3]).index_copy_(0, _ring_rows(ring, positions), rows)


def _wants_gradients(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(x.requires_grad for x in tensors)


def _check_dtype(kept: Tensor | None, new: Tensor) -> None:
    if kept is not None and kept.dtype != new.dtype:
        raise ValueError(
            f"past_key_values is a LambdaCache that holds {kept.dtype}, and this forward gives it "
            f"{new.dtype}; go on in the dtype (and autocast) that the cache began "
            "in, or make a new one by LambdaCache(model)"
        )


class LambdaCacheLayer(CacheLayerMixin, Writable):
    """The buffers of one layer, allocated when the first keys come by.

    Attributes:
        settings: what the layer attends to.
        progress: shared by the layers of a cache.
        ring_k, ring_v: [B, Hkv, C, D].
        global_k, global_v: [B, Hkv, G, D].
        middle: all keys and values, in a layer with middle tokens.
        keep_middle: "device" (of the layer) or "cpu".
        is_shared: whether other layers attend with these keys, too.
        lost_gradients: whether keys or values had gradients when they came; what is kept has none.
    """

    is_sliding = False
    is_compileable = False

    def __init__(
        self,
        settings: LayerSettings,
        progress: Progress,
        keep_middle: str = "device",
        is_shared: bool = False,
    ) -> None:
        super().__init__()
        self.is_shared = is_shared
        self.lost_gradients = False
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
        """Slots of the ring; of a full layer so many as there are now."""
        if self.settings.is_full:
            return self.ring_k.shape[2] if self.is_initialized else FIRST_ROOM
        return self.settings.window + self.progress.slack

    def _make_room(self, n_new: int) -> None:
        """In a full layer, slots for `n_new` more tokens: twice as many as before, or more.

        A slot is then its token's position, so that what is there stays where it is.
        """
        if not self.settings.is_full:
            return
        wanted, slots = self.progress.seen + n_new, self.ring_k.shape[2]
        if wanted <= slots:
            return
        for name in ("ring_k", "ring_v"):
            ring = getattr(self, name)
            batch, heads, _, dim = ring.shape
            with writable():
                larger = ring.new_empty((batch, heads, max(2 * slots, wanted), dim))
            larger[:, :, :slots] = ring
            setattr(self, name, larger)

    def buffers(self) -> list[Tensor]:
        """The tensors that the layer keeps; none before its first use."""
        if not self.is_initialized:
            return []
        fixed = [self.ring_k, self.ring_v, self.global_k, self.global_v]
        return fixed if self.middle is None else [*fixed, self.middle.k, self.middle.v]

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor | None = None) -> None:
        """Allocates the buffers for keys like `key_states` [B, Hkv, any, D]."""
        values = key_states if value_states is None else value_states
        with writable():
            for name, like in (("k", key_states), ("v", values)):
                batch, heads, _, dim = like.shape
                ring = like.new_empty((batch, heads, self.capacity, dim))
                first = like.new_empty((batch, heads, self.settings.n_global, dim))
                setattr(self, f"ring_{name}", ring)
                setattr(self, f"global_{name}", first)
            # Some models ask these how much an initialized layer holds.
            self.keys = self.values = key_states.new_empty(0)
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
                "that is patched; call patch_model(model) first, or pass another cache "
                f"({versions()})"
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
        _check_dtype(self.ring_k, k)
        self._make_room(1)
        out, lse = torch.ops.lminf.lambda_decode.default(
            q,
            k,
            v,
            self.ring_k,
            self.ring_v,
            self.global_k,
            self.global_v,
            positions,
            self.capacity if self.settings.is_full else self.settings.window,
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
        _check_dtype(self.ring_k, k)
        self._make_room(k.shape[2])
        self._check_gradients(q, k, v)
        global_k, global_v = self._store_globals(k, v, first)
        if self.progress.seen:
            n_old = min(self.progress.seen, window - 1)
            old = first[:, None] + torch.arange(-n_old, 0, device=q.device)  # [B, n_old]
            old_k, old_v = (_pick(ring, old) for ring in (self.ring_k, self.ring_v))
            shared = {
                "k_rotated": n_old if settings.rope is not None else 0,
                "k_start": first - n_old,
                "global_k": global_k,
                "global_v": global_v,
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
        self._store_ring(k.detach(), v.detach(), first)
        return self._with_middle(q, k, v, first, out, lse, given)

    def _check_gradients(self, q: Tensor, k: Tensor, v: Tensor) -> None:
        """Notes what the cache keeps no gradients of, and refuses to go on from that."""
        if not _wants_gradients(q, k, v):
            return
        if self.progress.seen == 0:
            self.lost_gradients = False
        if self.lost_gradients:
            raise RuntimeError(
                "a LambdaCache keeps keys and values without their gradients, and it holds tokens "
                "whose gradients this forward would need; give all tokens to one forward, or read "
                "the earlier ones under torch.no_grad()"
            )
        self.lost_gradients = k.requires_grad or v.requires_grad

    def _store_globals(self, k: Tensor, v: Tensor, first: Tensor) -> list[Tensor]:
        """Writes those of the new tokens that stand at positions below n_global. Returns the global
        keys and values with the gradients of the new ones."""
        slots = torch.arange(self.settings.n_global, device=k.device)
        source = slots - first[:, None]  # [B, G]: which new token belongs to the slot
        is_new = ((source >= 0) & (source < k.shape[2]))[:, None, :, None]
        source = source.clamp(0, k.shape[2] - 1)[:, None, :, None]
        now = []
        for kept, new in ((self.global_k, k), (self.global_v, v)):
            picked = new.gather(2, source.expand(-1, new.shape[1], -1, new.shape[3]))
            merged = torch.where(is_new, picked, kept)
            kept.copy_(merged.detach())
            now.append(merged if torch.is_grad_enabled() else kept)
        return now

    def _store_ring(self, k: Tensor, v: Tensor, first: Tensor) -> None:
        """Rotates the last C new keys to their positions and writes them over the oldest.

        Padding lands in slots that the row has not reached yet: they hold nothing, and are not read
        before a token of the row overwrites them.
        """
        if torch.compiler.is_exporting():
            self._store_ring_by_slots(k, v, first)
            return
        start = max(k.shape[2] - self.capacity, 0)
        k, v = k[:, :, start:], v[:, :, start:]
        positions = first[:, None] + torch.arange(start, start + k.shape[2], device=k.device)
        for ring, new in ((self.ring_k, self._rotated(k, positions)), (self.ring_v, v)):
            _put(ring, positions, new)

    def _rotated(self, k: Tensor, positions: Tensor) -> Tensor:
        """Keys k [B, Hkv, n, D] rotated to `positions`, int64 [B, n]."""
        rope = self.settings.rope
        if rope is None:
            return k
        rotated: Tensor = torch.ops.lminf.clamped_rope.default(
            k,
            positions,
            rope.inv_freq_on(k.device),
            scaling=rope.scaling,
            interleaved=rope.interleaved,
        )
        return rotated

    def _store_ring_by_slots(self, k: Tensor, v: Tensor, first: Tensor) -> None:
        """The same, in a form that an exported program can have for any number of new keys."""
        slots = torch.arange(self.capacity, device=k.device)
        last = first[:, None] + k.shape[2] - 1
        positions = last - (last - slots) % self.capacity  # [B, C]: the slots' last ones
        source = positions - first[:, None]  # which new token belongs to the slot
        is_new = ((source >= 0) & (positions >= 0))[:, None, :, None]
        source = source.clamp(0, k.shape[2] - 1)[:, None, :, None]
        k, v = (x.gather(2, source.expand(-1, x.shape[1], -1, x.shape[3])) for x in (k, v))
        for ring, new in ((self.ring_k, self._rotated(k, positions)), (self.ring_v, v)):
            ring.copy_(torch.where(is_new, new, ring))

    def grow(self, slack: int, next_positions: Tensor) -> None:
        """Moves the ring to one of window + slack slots, before `progress.slack` says so.

        Args:
            slack: more than `progress.slack`.
            next_positions: int64 [B], tokens of each row so far.
        """
        if not self.is_initialized or self.settings.is_full:
            return
        n_old = min(self.progress.seen, self.capacity)
        columns = torch.arange(-n_old, 0, device=self.ring_k.device)
        positions = next_positions.to(columns.device)[:, None] + columns  # [B, n_old]
        for name in ("ring_k", "ring_v"):
            ring = getattr(self, name)
            batch, heads, _, dim = ring.shape
            with writable():
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
            with writable():
                rows = buffer.index_select(0, indices.to(buffer.device))
            if rows.shape == buffer.shape:
                buffer.copy_(rows)
            else:
                setattr(self, name, rows)
        if self.middle is not None:
            self.middle.select_rows(indices)


class RecurrentLayer(LinearAttentionLayer, Writable):
    """transformers' own states of a layer that is not attention, or not attention alone."""

    def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
        """Allocates the states as transformers does."""
        with writable():
            super().lazy_initialization(*args, **kwargs)

    def update_conv_state(self, conv_states: Tensor, state_idx: int = 0, **kwargs: Any) -> Any:
        """Appends new states, which have the dtype of those before."""
        _check_dtype(self.conv_states[state_idx], conv_states)
        return super().update_conv_state(conv_states, state_idx, **kwargs)

    def select_states(self, indices: Tensor) -> None:
        """Keeps the states of the rows `indices`, int64 [rows]."""
        if self.states():
            with writable():
                self.reorder_cache(indices)

    def states(self) -> list[Tensor]:
        """The tensors that the layer keeps; none before its first use."""
        kept = [*self.conv_states.values(), *self.recurrent_states.values()]
        return [state for state in kept if state is not None]


class _HybridLayer(RecurrentLayer, LambdaCacheLayer):
    """The states of a layer that has attention and something recurrent side by side."""

    is_compileable = False

    def __init__(self, n_states: int, *args: Any) -> None:
        LambdaCacheLayer.__init__(self, *args)
        LinearAttentionLayer.__init__(self, number_of_states=n_states)

    def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
        owner = LambdaCacheLayer if args else RecurrentLayer  # which names what it initializes
        owner.lazy_initialization(self, *args, **kwargs)


def new_layer(settings: LambdaSettings, index: int, progress: Progress, keep_middle: str) -> Any:
    """The states of layer `index`, before its first use.

    Args:
        settings: of the model.
        index: of the layer.
        progress: of the cache that the layer is for.
        keep_middle: "device" (of the layer) or "cpu", for a layer with middle tokens.

    Returns:
        A LambdaCacheLayer, a RecurrentLayer, one that is both, or transformers' own layer: one that
        keeps nothing, or one that keeps the keys of an image.
    """
    if index in settings.cross_layers:
        return DynamicLayer()
    layer, states = settings.layers[index], settings.recurrent_states
    n_states = states[index] if states else 0
    if layer is None:
        return RecurrentLayer(number_of_states=n_states) if n_states else DummyLayer()
    if layer.keys_of is not None:
        return DummyLayer()
    is_shared = any(other and other.keys_of == index for other in settings.layers)
    arguments = (layer, progress, keep_middle, is_shared)
    return _HybridLayer(n_states, *arguments) if n_states else LambdaCacheLayer(*arguments)
