"""Text generation that streams: the prompt through a fixed cache in chunks, then token by token."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers.generation.streamers import BaseStreamer

from lminf_cuda.models.cache import LambdaCache
from lminf_cuda.models.compat import GENERATION_CACHE
from lminf_cuda.text.progress import waiting
from lminf_cuda.text.reading import prefill

UNFINISHED = "\ufffd"  # what decoders give for bytes that are no whole character (yet)
LONGEST_CHARACTER = 4  # bytes of the longest UTF-8 character
MIN_TEMPERATURE = 1e-6  # logits of float32 are divided by it


class TextStream(BaseStreamer):  # type: ignore[misc]
    """Turns tokens into text as they come, holding back a character until all its bytes are there.

    Args:
        tokenizer: decodes the tokens.
        write: called with each new piece of text.
    """

    def __init__(self, tokenizer: Any, write: Callable[[str], object]) -> None:
        """See the class."""
        self.tokenizer = tokenizer
        self.write = write
        self.tokens: list[int] = []  # of the last written piece, then the new ones
        self.written = 0  # how many of them are written
        self.is_prompt = True

    def _decode(self, tokens: list[int]) -> str:
        return str(self.tokenizer.decode(tokens, skip_special_tokens=True))

    def _flush(self) -> None:
        piece = self._decode(self.tokens)[len(self._decode(self.tokens[: self.written])) :]
        self.tokens = self.tokens[self.written :]
        self.written = len(self.tokens)
        if piece:
            self.write(piece)

    def put(self, value: torch.Tensor) -> None:
        """Take the next tokens; `generate` passes the whole prompt first, which is not written."""
        if self.is_prompt:
            self.is_prompt = False
            return
        for token in value.flatten().tolist():
            self.tokens.append(token)
            text = self._decode(self.tokens)
            waiting = len(self.tokens) - self.written
            if not text.endswith(UNFINISHED) or waiting >= LONGEST_CHARACTER:
                self._flush()

    def end(self) -> None:
        """Write what is left, whole or not."""
        if len(self.tokens) > self.written:
            self._flush()


def check_sampling(temperature: float, top_p: float) -> None:
    """Raises ValueError for what no token can be drawn with."""
    if not MIN_TEMPERATURE <= temperature < math.inf:
        raise ValueError(
            f"temperature must be above 0 (from {MIN_TEMPERATURE:g} on; use greedy for the "
            f"likeliest token) and finite, got {temperature}"
        )
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p must be above 0 and at most 1, got {top_p}")


def check_counts(**counts: int) -> None:
    """Raises ValueError for a count below 1."""
    for name, count in counts.items():
        if count < 1:
            raise ValueError(f"{name} must be 1 or more, got {count}")


@dataclass(frozen=True)
class Pace:
    """What a generation took; `cache_bytes` are kept at its end."""

    prompt_tokens: int
    prompt_seconds: float
    new_tokens: int
    seconds: float
    cache_bytes: int

    def __str__(self) -> str:
        rate = self.new_tokens / max(self.seconds, 1e-9)
        return (
            f"prompt: {self.prompt_tokens:,} tokens in {self.prompt_seconds:.1f} s; written: "
            f"{self.new_tokens:,} tokens, {rate:.1f} tokens/s; "
            f"cache: {self.cache_bytes / 2**20:,.1f} MiB"
        )


def render(tokenizer: Any, prompt: str, as_chat: bool) -> str:
    """The prompt as the model is to read it: as a user's turn by the chat template, or as it is.

    Raises ValueError when there is no template.
    """
    if not as_chat:
        return prompt
    if getattr(tokenizer, "chat_template", None) is None:
        raise ValueError("this tokenizer has no chat template; leave as_chat (--chat) out")
    turn = [{"role": "user", "content": prompt}]
    return str(tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True))


def pinned_tokens(tokenizer: Any, prompt: str, text: str, as_chat: bool) -> int:
    """Tokens of the rendered prompt up to the end of where `text` first stands in it.

    As n_global they keep that beginning visible, whatever follows.

    Raises ValueError when the text is empty or not in the prompt.
    """
    rendered = render(tokenizer, prompt, as_chat)
    start = rendered.find(text) if text else -1
    if start < 0:
        raise ValueError(
            f"{text!r} does not stand in the prompt; give the end of the part to keep visible, as "
            "it is written there"
        )
    beginning = rendered[: start + len(text)]
    ids = tokenizer(beginning, add_special_tokens=not as_chat, verbose=False).input_ids
    return len(ids)


def generate(
    model: Any,
    tokenizer: Any,
    prompt: str,
    write: Callable[[str], object],
    *,
    as_chat: bool = False,
    max_new_tokens: int = 256,
    greedy: bool = False,
    temperature: float = 1.0,
    top_p: float = 1.0,
    seed: int | None = None,
    chunk: int = 1024,
    tell: Callable[[Pace], object] = lambda pace: None,
) -> torch.Tensor:
    """Continue `prompt` with a patched model, writing the text as it comes.

    Args:
        model: a model that `patch_model` has patched.
        prompt: not empty; of any length, since memory does not grow with it.
        write: called with each piece of new text.
        as_chat: the prompt is a user's turn, which the tokenizer's chat template frames.
        max_new_tokens: 1 or more.
        greedy: take the likeliest token each time; temperature and top_p are then not used.
        temperature: above 0; below 1e-6 the likeliest token is all that is left, see greedy.
        top_p: in (0, 1]; samples from the likeliest tokens that hold this share of the probability.
        seed: of torch's random generator; None leaves it as it is.
        chunk: tokens of the prompt per forward.
        tell: told at the end what it took.

    Returns: the new tokens, int64 [n], n <= max_new_tokens.
    Raises ValueError when the prompt is empty or an option is out of range.
    """
    check_sampling(temperature, top_p)
    check_counts(max_new_tokens=max_new_tokens, chunk=chunk)
    with waiting(f"tokenizing {len(prompt):,} characters"):
        rendered = render(tokenizer, prompt, as_chat)
        input_ids = tokenizer(
            rendered, return_tensors="pt", add_special_tokens=not as_chat, verbose=False
        ).input_ids
    input_ids = input_ids.to(model.device)
    if input_ids.shape[1] == 0:
        raise ValueError("prompt is empty; give some text to continue")
    if seed is not None:
        torch.manual_seed(seed)
    began = time.perf_counter()
    cache = LambdaCache(model)
    prefill(model, input_ids, chunk, cache)
    prefilled = time.perf_counter()
    sampling = {} if greedy else {"temperature": temperature, "top_p": top_p, "top_k": 0}
    output: torch.Tensor = model.generate(
        input_ids,
        attention_mask=torch.ones_like(input_ids),
        streamer=TextStream(tokenizer, write),
        max_new_tokens=max_new_tokens,
        do_sample=not greedy,
        **{GENERATION_CACHE: cache},
        **sampling,
    )
    n_prompt = input_ids.shape[1]
    new = output[0, n_prompt:]
    ended = time.perf_counter()
    tell(Pace(n_prompt, prefilled - began, len(new), ended - prefilled, cache.memory_bytes()))
    return new
