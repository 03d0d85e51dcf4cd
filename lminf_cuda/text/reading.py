"""Texts: from a file, as tokens, and into a model's cache."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lminf_cuda.models.cache import LambdaCache
from lminf_cuda.models.compat import cache_keyword
from lminf_cuda.text.progress import progress, waiting


@dataclass(frozen=True)
class Text:
    """Tokens of one long text; `byte_ends[t]` counts its bytes up to the end of token t."""

    tokens: torch.Tensor  # int64 [n]
    byte_ends: np.ndarray | None  # int64 [n]; None where the tokenizer gives no offsets

    def __len__(self) -> int:
        """Number of tokens."""
        return len(self.tokens)

    def head(self, n: int) -> Text:
        """The first n tokens."""
        return Text(self.tokens[:n], None if self.byte_ends is None else self.byte_ends[:n])

    def bytes_between(self, start: int, end: int) -> int | None:
        """Bytes of tokens start..end-1, start >= 1."""
        if self.byte_ends is None:
            return None
        return int(self.byte_ends[end - 1] - self.byte_ends[start - 1])

    def bytes_of(self, start: int, end: int, chosen: np.ndarray) -> int | None:
        """Bytes of the chosen ones, bool [end - start], of tokens start..end-1, start >= 1."""
        if self.byte_ends is None:
            return None
        return int(np.diff(self.byte_ends[start - 1 : end])[chosen].sum())


def read_text(path: Path) -> str:
    """The text of a UTF-8 file.

    Raises FileNotFoundError or ValueError, naming the file, when it is missing, not text or empty.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no such text file: {path}; give the path of a UTF-8 text file")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not UTF-8 text ({error.reason} at byte {error.start}); convert it first"
        ) from error
    if not text.strip():
        raise ValueError(f"{path} is empty; give a text file with something to read")
    return text


def tokenize(tokenizer: Any, text: str) -> Text:
    """Tokens of the text, special ones included, with byte offsets where the tokenizer has them."""
    with waiting(f"tokenizing {len(text):,} characters"):
        encoded = tokenizer(
            text, return_offsets_mapping=getattr(tokenizer, "is_fast", False), verbose=False
        )
    tokens = torch.tensor(encoded["input_ids"], dtype=torch.int64, device="cpu")
    offsets = encoded.get("offset_mapping")
    if offsets is None:
        return Text(tokens, None)
    if text.isascii():
        byte_of_char = np.arange(len(text) + 1)
    else:
        widths = [len(char.encode()) for char in text]
        byte_of_char = np.concatenate([[0], np.cumsum(widths)])
    char_ends = np.maximum.accumulate(np.array([end for _, end in offsets], dtype=np.int64))
    return Text(tokens, byte_of_char[char_ends])


@torch.inference_mode()
def prefill(model: Any, input_ids: torch.Tensor, chunk: int, cache: LambdaCache) -> None:
    """Read all of input_ids [1, n] but its last token into the cache, `chunk` tokens at a time."""
    n = input_ids.shape[1] - 1
    with_cache = cache_keyword(model, cache)
    with progress(n, "prompt", "tok") as bar:
        for start in range(0, n, chunk):
            piece = input_ids[:, start : min(start + chunk, n)]
            model(input_ids=piece, use_cache=True, logits_to_keep=1, **with_cache)
            bar.update(piece.shape[1])
