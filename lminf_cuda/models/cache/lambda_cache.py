"""The key-value cache of a patched model: the first tokens, the last tokens, and nothing else.

What each layer keeps of them is in layers.py; here are the rows and the columns, which are the same
in all layers.

Rows of a batch may start at different columns (left padding). A position therefore counts a row's
own tokens: each row's global tokens are its own first ones, and what stands left of them is never
read.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from ..settings import SETTINGS_ATTRIBUTE, LambdaSettings
from ..writable import Writable, writable
from .layers import LambdaCacheLayer, Progress, RecurrentLayer, new_layer

ROLLBACK = 64  # tokens that crop() takes back at least once recording is on


class LambdaCache(Cache, Writable):
    """A transformers cache of fixed size for a patched model: n_global + window tokens per layer.

    Layers whose attention stays full (None in `window`) grow with the text, in memory that doubles
    when it is full, and so does what the layers of a model with `middle_top_k` keep besides, all
    keys and values: 2 * key heads * head dim * element size bytes a token and layer (4 KiB for 8
    heads of 128 dims in bfloat16).

    A forward with use_cache and `generate()` make one by themselves; make it yourself to keep it
    over several calls (multi-turn chat, chunks of a long text). An encoder-decoder takes it as the
    first part of `EncoderDecoderCache(LambdaCache(model), DynamicCache())`. It can be copied and
    pickled, and it can be an input and an output of an exported program (export.py).

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
        self._progress = Progress()
        self.settings: LambdaSettings = settings
        super().__init__(
            layers=[
                new_layer(settings, index, self._progress, keep_middle or "device")
                for index in range(len(settings.layers))
            ]
        )
        self._batch_size = batch_size
        self._unusable: str | None = None
        self.next_positions: Tensor | None = None  # int64 [B]: tokens of each row so far
        self.late_rows: Tensor | None = None  # bool [B]: their first columns were padding alone
        self._updated: int | None = None  # the layer that was last handed new keys

    def attention_layers(self) -> list[LambdaCacheLayer]:
        """Those layers that keep keys and values."""
        return [layer for layer in self.layers if isinstance(layer, LambdaCacheLayer)]

    def _recurrent_layers(self) -> list[Any]:
        return [layer for layer in self.layers if isinstance(layer, RecurrentLayer)]

    def _cross_layers(self) -> list[Any]:
        """Those that keep the keys of an image."""
        return [self.layers[index] for index in self.settings.cross_layers]

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Hands new keys and values to a layer, and remembers to which.

        An attention module may serve several layers, and this is the only place that names one.
        """
        self._updated = layer_idx
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    def take_updated(self) -> int | None:
        """The layer that `update` was last called for, once; None if it was not called since."""
        layer_idx, self._updated = self._updated, None
        return layer_idx

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """The number of tokens seen, padding included; of an image's layer, its keys."""
        if layer_idx in self.settings.cross_layers:
            n_keys: int = self.layers[layer_idx].get_seq_length()
            return n_keys
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
        for layer in self._cross_layers():
            buffers += [layer.keys, layer.values] if layer.is_initialized else []
        return sum(buffer.numel() * buffer.element_size() for buffer in buffers)

    def check(self, settings: LambdaSettings, batch_size: int, n_new: int) -> None:
        """Whether a patched model with `settings` can go on from here.

        Args:
            settings: of the model.
            batch_size: rows to come.
            n_new: new tokens of each row, padding included.

        Raises:
            ValueError: the cache is of another model or other settings, or of another batch size,
                or the model reads several tokens only at the beginning.
            RuntimeError: an earlier forward left a state from which the cache cannot go on.
        """
        self.settings.check_same(settings)
        if self._unusable is not None:
            raise RuntimeError(self._unusable)
        if self._batch_size not in (None, batch_size):
            raise ValueError(
                f"the input has {batch_size} rows and the LambdaCache {self._batch_size}; use "
                "batch_repeat_interleave or batch_select_indices, or a new cache"
            )
        if settings.reads_once and n_new > 1 and self._progress.seen:
            raise ValueError(
                f"{n_new} new tokens follow {self._progress.seen} in the LambdaCache, and "
                "transformers' recurrent layers of this model forget what they have read when "
                "several tokens follow; pass them one at a time, or the whole text with a new cache"
            )

    def begin(self, first: Tensor, late_rows: Tensor | None = None) -> None:
        """Opens the cache to a forward.

        Args:
            first: int64 [B], positions of each row's first new token.
            late_rows: bool [B], rows that have held padding alone.
        """
        self.late_rows = late_rows
        if self.next_positions is None:
            with writable():
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
        self._updated = None
        for layer in self.attention_layers():
            layer.shown = None

    def reset(self) -> None:
        """Forgets all tokens and keeps the buffers."""
        self._progress.seen = 0
        self._progress.lost = 0
        self._end_forward()
        for layer in self._recurrent_layers():
            layer.reset()
        for index in self.settings.cross_layers:
            self.layers[index] = new_layer(self.settings, index, self._progress, "device")
        self._unusable = None
        self.late_rows = None
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
            layer.select_states(indices)
        for layer in self._cross_layers():
            if layer.is_initialized:
                layer.reorder_cache(indices)
        if self.late_rows is not None:
            with writable():
                self.late_rows = self.late_rows[indices.to(self.late_rows.device)]
        if self.next_positions is not None:
            with writable():
                self.next_positions = self.next_positions[indices.to(self.next_positions.device)]
        if self._batch_size is not None:
            self._batch_size = indices.numel()

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats every row `repeats` times, copies side by side."""
        if self.next_positions is None:
            if self._batch_size is not None:
                self._batch_size *= repeats
            return
        rows = torch.arange(self.next_positions.shape[0], device=self.next_positions.device)
        self.batch_select_indices(rows.repeat_interleave(repeats))
