"""A conversation of any length in constant memory: one LambdaCache, and no copy of the text."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from transformers.generation import LogitsProcessorList, TemperatureLogitsWarper, TopPLogitsWarper

from lminf_cuda.models.cache import LambdaCache
from lminf_cuda.models.compat import cache_keyword
from lminf_cuda.text.generating import TextStream, check_counts, check_sampling
from lminf_cuda.text.progress import progress

_ANSWER = "lminf answer"  # stands for an answer where only what follows it is wanted


class Chat:
    """Turns of a user and of a patched model.

    With a chat template each turn is the text that the template puts after the last answer; without
    one a turn is the user's text as it stands, and the model writes on from there.

    Args:
        model: a model that `patch_model` has patched.
        tokenizer: its tokenizer.
        system: an instruction ahead of the first turn; needs a chat template.
        max_new_tokens: of an answer, 1 or more.
        greedy: take the likeliest token each time; temperature and top_p are then not used.
        temperature: above 0.
        top_p: in (0, 1].
        chunk: tokens of a turn per forward.

    Raises ValueError when an option is out of range, or `system` is given without a template.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        system: str | None = None,
        max_new_tokens: int = 512,
        greedy: bool = False,
        temperature: float = 0.8,
        top_p: float = 0.95,
        chunk: int = 1024,
    ) -> None:
        """See the class."""
        check_sampling(temperature, top_p)
        check_counts(max_new_tokens=max_new_tokens, chunk=chunk)
        self.has_template = getattr(tokenizer, "chat_template", None) is not None
        if system is not None and not self.has_template:
            raise ValueError(
                "system needs a chat template, and this tokenizer has none; put the instruction "
                "into the first turn"
            )
        self.model = model
        self.tokenizer = tokenizer
        self.system = system
        self.max_new_tokens = max_new_tokens
        self.chunk = chunk
        self.greedy = greedy
        self.warpers = LogitsProcessorList(
            [] if greedy else [TemperatureLogitsWarper(temperature), TopPLogitsWarper(top_p)]
        )
        self.ends = _end_tokens(model, tokenizer)
        self.cache = LambdaCache(model)
        self.with_cache = cache_keyword(model, self.cache)
        self.unread: list[int] = []  # the last token of an answer that was cut off

    def reset(self) -> None:
        """Forgets the conversation."""
        self.cache.reset()
        self.unread = []

    @property
    def tokens(self) -> int:
        """Tokens of the conversation so far."""
        return self.cache.get_seq_length() + len(self.unread)

    def _turn(self, text: str) -> list[int]:
        """What the model is to read next, as tokens."""
        is_first = self.tokens == 0
        if not self.has_template:
            ids: list[int] = self.tokenizer(
                text, add_special_tokens=is_first, verbose=False
            ).input_ids
            return ids
        user = {"role": "user", "content": text}
        render = self.tokenizer.apply_chat_template
        if is_first:
            system = [] if self.system is None else [{"role": "system", "content": self.system}]
            rendered = render([*system, user], tokenize=False, add_generation_prompt=True)
        else:
            # The template closes the answer before, and opens the next one.
            before = [{"role": "user", "content": "?"}, {"role": "assistant", "content": _ANSWER}]
            rendered = render([*before, user], tokenize=False, add_generation_prompt=True)
            rendered = rendered[rendered.index(_ANSWER) + len(_ANSWER) :]
        ids = self.tokenizer(rendered, add_special_tokens=False, verbose=False).input_ids
        return ids

    @torch.inference_mode()
    def _write(self, ids: Tensor) -> Iterator[int]:
        """Reads ids [1, n] and yields the answer's tokens, the one that ends it included."""
        logits: Tensor | None = None
        with progress(ids.shape[1], "reading", "tok") as bar:
            for piece in ids.split(self.chunk, dim=1):
                logits = self._step(piece)
                bar.update(piece.shape[1])
        for n in range(self.max_new_tokens):
            assert logits is not None
            scores = self.warpers(None, logits.float())
            token = (
                scores.argmax(-1, keepdim=True)
                if self.greedy
                else torch.multinomial(scores.softmax(-1), 1)
            )
            value = int(token)
            yield value
            if value in self.ends:
                return
            if n + 1 == self.max_new_tokens:
                self.unread = [value]
                return
            logits = self._step(token)

    def _step(self, ids: Tensor) -> Tensor:
        """Logits [1, vocabulary] after ids [1, n]."""
        output = self.model(input_ids=ids, use_cache=True, logits_to_keep=1, **self.with_cache)
        logits: Tensor = output.logits[:, -1]
        return logits

    def say(self, text: str, write: Callable[[str], object]) -> int:
        """One turn: reads `text` and writes the answer piece by piece.

        Returns: the number of tokens of the answer.
        Raises ValueError when there is nothing to read.
        """
        ids = self.unread + self._turn(text)
        if not ids:
            raise ValueError("the turn is empty; say something")
        self.unread = []
        stream = TextStream(self.tokenizer, write)
        stream.is_prompt = False
        count = 0
        for token in self._write(torch.tensor([ids], device=self.model.device)):
            count += 1
            if token not in self.ends:
                stream.put(torch.tensor([token], device="cpu"))
        stream.end()
        return count


def _end_tokens(model: Any, tokenizer: Any) -> set[int]:
    """The tokens that end an answer."""
    ends: set[int] = set()
    config = getattr(model, "generation_config", None)
    for value in (getattr(config, "eos_token_id", None), getattr(tokenizer, "eos_token_id", None)):
        if value is not None:
            ends |= set(value) if isinstance(value, (list, tuple)) else {value}
    return ends
