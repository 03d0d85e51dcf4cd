"""Passkey retrieval (arXiv 2308.16137, section 5.3): a number hidden in a long text of filler.

A prompt says what to look for, repeats a few sentences until it has the length wanted, names the
key once at some depth, and asks for it at the end. A method's accuracy at a length and depth is the
share of keys that it writes first when it goes on greedily.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lminf_cuda.evaluation.records import write_records
from lminf_cuda.evaluation.traces import kept_bytes
from lminf_cuda.models.cache import LambdaCache
from lminf_cuda.models.compat import GENERATION_CACHE
from lminf_cuda.models.patch import patch_model, unpatch_model
from lminf_cuda.models.settings import SETTINGS_ATTRIBUTE
from lminf_cuda.text.progress import progress
from lminf_cuda.text.reading import prefill

INTRODUCTION = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize it. "
    "I will quiz you about the important information there.\n"
)
FILLER = (
    "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. "
)
NEEDLE = "\nThe pass key is {key}. Remember it. {key} is the pass key.\n"
QUESTION = "\nWhat is the pass key? The pass key is"
DIGITS = 5


@dataclass(frozen=True)
class Cell:
    """One field of the grid.

    Attributes:
        length: tokens of the prompt.
        depth: where the key stands, 0 at the beginning and 1 at the end.
        trials: keys that were asked for.
        found: keys that were written.
        cache_bytes: kept of one prompt.
    """

    length: int
    depth: float
    trials: int
    found: int
    cache_bytes: int | None = None

    @property
    def accuracy(self) -> float:
        """The share of keys that were found."""
        return self.found / self.trials


def begin_tokens(tokenizer: Any) -> list[int]:
    """What the tokenizer puts before a text by itself: a bos token, or nothing."""
    bare: list[int] = tokenizer("x", add_special_tokens=False, verbose=False).input_ids
    whole: list[int] = tokenizer("x", verbose=False).input_ids
    for start in range(len(whole) - len(bare) + 1):
        if whole[start : start + len(bare)] == bare:
            return whole[:start]
    return []


class Prompts:
    """Builds prompts of an exact length, token by token.

    Args:
        tokenizer: of the model.
    """

    def __init__(self, tokenizer: Any) -> None:
        """See the class."""
        self.tokenizer = tokenizer
        self.begin = begin_tokens(tokenizer) + self._tokens(INTRODUCTION)
        self.filler = self._tokens(FILLER)
        self.question = self._tokens(QUESTION)

    def _tokens(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=False, verbose=False).input_ids
        return ids

    def shortest(self) -> int:
        """Tokens of a prompt without filler, for the longest of a few keys."""
        keys = ("10000", "77777", "98765")
        needle = max(len(self._tokens(NEEDLE.format(key=key))) for key in keys)
        return len(self.begin) + needle + len(self.question)

    def default_lengths(self, train_length: int) -> list[int]:
        """The training length and its first doublings, three that have room for a key."""
        length = train_length
        while length < self.shortest():
            length *= 2
        return [length, 2 * length, 4 * length]

    def prompt(self, length: int, depth: float, key: str) -> list[int]:
        """The `length` token ids of a prompt with `key` at `depth`.

        Raises ValueError when the fixed parts alone are longer.
        """
        needle = self._tokens(NEEDLE.format(key=key))
        n_filler = length - len(self.begin) - len(needle) - len(self.question)
        if n_filler < 0:
            raise ValueError(
                f"a prompt of {length} tokens has no room for the key: the shortest has "
                f"{length - n_filler} with this tokenizer; give larger lengths"
            )
        before = round(depth * n_filler)
        filler = (self.filler * (n_filler // len(self.filler) + 1))[:n_filler]
        return self.begin + filler[:before] + needle + filler[before:] + self.question

    def answer_tokens(self) -> int:
        """So many tokens hold a key and what may stand before it."""
        return len(self._tokens(" 98765")) + 3


@torch.inference_mode()
def write_on(model: Any, prompts: Tensor, n_tokens: int, chunk: int) -> Tensor:
    """The greedy continuation of `prompts` int64 [B, n]: int64 [B, n_tokens].

    A patched model reads them in chunks through a LambdaCache, another one at once.
    """
    options: dict[str, Any] = {}
    if hasattr(model, SETTINGS_ATTRIBUTE):
        options[GENERATION_CACHE] = LambdaCache(model)
        prefill(model, prompts, chunk, options[GENERATION_CACHE])
    output: Tensor = model.generate(
        prompts,
        attention_mask=torch.ones_like(prompts),
        max_new_tokens=n_tokens,
        min_new_tokens=n_tokens,
        do_sample=False,
        **options,
    )
    return output[:, prompts.shape[1] :]


def check_grid(prompts: Prompts, lengths: Sequence[int], depths: Sequence[float]) -> None:
    """Raises ValueError for an empty grid, a depth outside [0, 1] or a length that is too short."""
    if not lengths or not depths:
        raise ValueError("the grid is empty; give at least one length and one depth")
    for depth in depths:
        if not 0 <= depth <= 1:
            raise ValueError(f"depth {depth:g} is outside of 0 (the beginning) to 1 (the end)")
    if min(lengths) < prompts.shortest():
        raise ValueError(
            f"length {min(lengths)} is too short; the prompt without filler takes "
            f"{prompts.shortest()} tokens with this tokenizer"
        )


def retrieve(
    model: Any,
    tokenizer: Any,
    lengths: Sequence[int],
    depths: Sequence[float],
    *,
    trials: int = 5,
    chunk: int = 1024,
    seed: int = 0,
    label: str = "passkey",
    known: Sequence[Cell] = (),
    after_each: Callable[[list[Cell]], object] = lambda cells: None,
) -> list[Cell]:
    """Asks for a random key at every length and depth, `trials` times, in one batch each.

    Args:
        model: a causal LM in eval mode, patched or not.
        lengths: tokens of the prompts.
        depths: from 0 to 1.
        trials: 1 or more.
        chunk: tokens of the prompt per forward, in a patched model.
        seed: of the keys.
        known: cells that are there already, from the same arguments.
        after_each: called with the cells so far after each one.

    Raises ValueError when an option is out of range.
    """
    if trials < 1:
        raise ValueError(f"trials must be 1 or more, got {trials}")
    prompts = Prompts(tokenizer)
    check_grid(prompts, lengths, depths)
    generator = torch.Generator().manual_seed(seed)
    cells: list[Cell] = []
    by_place = {(cell.length, cell.depth): cell for cell in known}
    grid = [(length, depth) for length in lengths for depth in depths]
    low, high = 10 ** (DIGITS - 1), 10**DIGITS
    with progress(trials * len(depths) * sum(lengths), label, "tok") as bar:
        sizes = {length: kept_bytes(model, length) for length in set(lengths)}
        for length, depth in grid:
            draws = torch.randint(low, high, (trials,), generator=generator, device="cpu")
            keys = [str(key) for key in draws.tolist()]
            if (length, depth) in by_place:
                cells.append(by_place[length, depth])
                continue
            rows = [prompts.prompt(length, depth, key) for key in keys]
            ids = torch.tensor(rows, device=model.device)
            answers = write_on(model, ids, prompts.answer_tokens(), chunk)
            texts = tokenizer.batch_decode(answers, skip_special_tokens=True)
            found = sum(text.strip().startswith(key) for text, key in zip(texts, keys, strict=True))
            cells.append(Cell(length, depth, trials, found, sizes[length]))
            after_each(cells)
            bar.update(trials * length)
    return cells


def with_full_layers(model: Any, patch: dict[str, Any], full: Sequence[int]) -> dict[str, Any]:
    """The arguments of `patch_model` with the attention of some layers full.

    Raises ValueError for a layer that is not there.
    """
    patch_model(model, **patch)
    settings = getattr(model, SETTINGS_ATTRIBUTE)
    unpatch_model(model)
    n_layers = len(settings.layers)
    if not all(0 <= index < n_layers for index in full):
        raise ValueError(f"full layers are {list(full)}, and the model's are 0 to {n_layers - 1}")
    windows = [None if index in full else settings.window for index in range(n_layers)]
    return patch | {"window": windows}


def compare(
    model: Any,
    tokenizer: Any,
    lengths: Sequence[int],
    depths: Sequence[float],
    *,
    vanilla: bool = False,
    patch: dict[str, Any],
    full_layers: Sequence[Sequence[int]] = (),
    known: dict[str, list[Cell]] | None = None,
    after_each: Callable[[dict[str, list[Cell]]], object] = lambda results: None,
    **options: Any,
) -> dict[str, list[Cell]]:
    """`retrieve` with LM-Infinite, with its middle tokens if it has some, and with vanilla.

    Args:
        model: an unpatched causal LM; it is unpatched again on return.
        vanilla: whether the unpatched model is asked, too.
        patch: the arguments of `patch_model`, with a window that is a number.
        full_layers: each adds a method, LM-Infinite with these layers' attention full.
        known: cells of each method that are there already, from the same arguments.
        after_each: called with all cells so far after each one.
        options: of `retrieve`.

    Returns: the cells of each method.
    """
    methods: dict[str, dict[str, Any] | None] = {}
    if patch.get("middle_top_k"):
        methods["LM-Infinite, middle tokens"] = patch
    no_middle = {name: x for name, x in patch.items() if not name.startswith("middle_")}
    methods["LM-Infinite"] = no_middle
    for full in full_layers:
        name = f"LM-Infinite, full layers {', '.join(map(str, full))}"
        methods[name] = with_full_layers(model, no_middle, full)
    if vanilla:
        methods["vanilla"] = None
    results: dict[str, list[Cell]] = {}

    def keep(name: str, cells: list[Cell]) -> None:
        after_each(results | {name: cells})

    for name, arguments in methods.items():
        if arguments is not None:
            patch_model(model, **arguments)
        try:
            results[name] = retrieve(
                model,
                tokenizer,
                lengths,
                depths,
                label=name,
                known=(known or {}).get(name, ()),
                after_each=partial(keep, name),
                **options,
            )
        finally:
            if arguments is not None:
                unpatch_model(model)
    return results


def read_unfinished(settings: dict[str, Any], folder: Path) -> dict[str, list[Cell]]:
    """The cells of each method that a run with the same settings wrote before it was broken off."""
    path = folder / "passkey.json"
    if not path.is_file():
        return {}
    try:
        facts = json.loads(path.read_text())
        if facts["finished"] or facts["settings"] != json.loads(json.dumps(settings)):
            return {}
        names = ("length", "depth", "trials", "found", "cache_bytes")
        found: dict[str, list[Cell]] = {}
        for row in facts["cells"]:
            found.setdefault(row["method"], []).append(Cell(*(row[name] for name in names)))
        return found
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def write_results(
    results: dict[str, list[Cell]], settings: dict[str, Any], folder: Path, finished: bool = True
) -> None:
    """Write passkey.csv (one line a cell) and passkey.json (cells and settings)."""
    rows = [
        {"method": method, **asdict(cell), "accuracy": cell.accuracy}
        for method, cells in results.items()
        for cell in cells
    ]
    facts = {"settings": settings, "finished": finished, "cells": rows}
    write_records(folder, "passkey", rows, facts)
