"""Synthetic long-context tasks in the manner of RULER (arXiv 2404.06654), made without downloads.

Each sample is a prompt of about the length wanted, the answers that count, and where in the prompt
the evidence stands. The words are made of syllables and the filler is the passkey task's, so that
nothing has to be fetched; the scores are not comparable with RULER's own, which has other words.

- niah_single: one key's number among filler; niah_multikey: four keys, one is asked for;
- vt: variables that take their value from each other; which ones hold a given number?
- cwe: the ten words that are frequent among rare ones; fwe: the three most frequent coded words.
"""

from __future__ import annotations

import random
import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from lminf_cuda.evaluation.passkey import FILLER

CONSONANTS, VOWELS = "bdfgklmnprstvz", "aeiou"
NEEDLE = "One of the special magic numbers for {key} is: {value}. "
ASK = (
    "What is the special magic number for {key} mentioned in the provided text? The special magic "
    "number for {key} mentioned in the provided text is"
)
N_KEYS = 4
N_CHAIN = 4  # variables that hold the number
N_COMMON, COMMON_TIMES, RARE_TIMES = 10, 30, 3
N_FREQUENT = 3


@dataclass(frozen=True)
class Sample:
    """One prompt.

    Attributes:
        prompt: the text.
        answers: each counts the same.
        depth: where the evidence stands, 0 at the beginning and 1 at the end; None if it is spread.
        new_tokens: so many hold the answers.
    """

    prompt: str
    answers: tuple[str, ...]
    depth: float | None
    new_tokens: int


Fits = Callable[[str], bool]  # whether a prompt is no longer than wanted


def word(rng: random.Random, syllables: int = 3) -> str:
    """A word that is none, such as "balimo"."""
    return "".join(rng.choice(CONSONANTS) + rng.choice(VOWELS) for _ in range(syllables))


def _distinct(rng: random.Random, count: int) -> list[str]:
    found: dict[str, None] = {}
    while len(found) < count:
        found[word(rng)] = None
    return list(found)


def _longest(make: Callable[[int], str], fits: Fits) -> int:
    """The largest size whose text fits, 0 where none does."""
    if not fits(make(1)):
        return 0
    low, high = 1, 2
    while fits(make(high)):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(make(middle)) else (low, middle)
    return low


def _in_filler(
    fits: Fits,
    head: str,
    pieces: Sequence[str],
    depths: Sequence[float],
    ask: str,
) -> str:
    """Filler with `pieces` at `depths` (increasing), as long as fits."""
    sentences = [sentence + ". " for sentence in FILLER.strip().rstrip(".").split(". ")]

    def make(size: int) -> str:
        filler = [sentences[n % len(sentences)] for n in range(size)]
        places = [round(depth * size) for depth in depths]
        text, before = head, 0
        for piece, place in zip(pieces, places, strict=True):
            text += "".join(filler[before:place]) + piece
            before = place
        return text + "".join(filler[before:]) + "\n" + ask

    return make(_longest(make, fits))


def needle(rng: random.Random, fits: Fits, depth: float, n_keys: int) -> Sample:
    """niah_single (n_keys 1) and niah_multikey: the number of one key is asked for."""
    keys = _distinct(rng, n_keys)
    values = [str(rng.randrange(10**6, 10**7)) for _ in keys]
    others = sorted(rng.random() for _ in keys[1:])
    places = sorted([(depth, 0), *((x, n + 1) for n, x in enumerate(others))])
    head = (
        "Some special magic numbers are hidden within the following text. Make sure to memorize "
        "them. I will quiz you about the numbers afterwards.\n"
    )
    pieces = [NEEDLE.format(key=keys[n], value=values[n]) for _, n in places]
    prompt = _in_filler(fits, head, pieces, [x for x, _ in places], ASK.format(key=keys[0]))
    return Sample(prompt, (values[0],), depth, 16)


def variables(rng: random.Random, fits: Fits, depth: float) -> Sample:
    """vt: VAR B = VAR A and so on; all that hold the number are asked for."""
    names: dict[str, None] = {}
    while len(names) < 2 * N_CHAIN:
        names["".join(rng.choice(string.ascii_uppercase) for _ in range(5))] = None
    chain, other = list(names)[:N_CHAIN], list(names)[N_CHAIN:]
    value, unlike = rng.sample(range(10_000, 100_000), 2)
    pieces = []
    for first, number in ((chain, value), (other, unlike)):
        lines = [f"VAR {first[0]} = {number}. "]
        lines += [f"VAR {b} = VAR {a}. " for a, b in pairwise(first)]
        pieces.append(lines)
    lines = [line for pair in zip(*pieces, strict=True) for line in pair]
    depths = sorted(rng.random() for _ in lines)
    head = "Memorize and track the chain of variable assignments hidden in the following text.\n"
    ask = (
        f"Question: Find all variables that are assigned the value {value} in the text above. "
        f"Answer: According to the chain of variable assignments in the text above, {N_CHAIN} "
        f"variables are assigned the value {value}, they are:"
    )
    return Sample(_in_filler(fits, head, lines, depths, ask), tuple(chain), None, 40)


def common_words(rng: random.Random, fits: Fits, depth: float) -> Sample:
    """cwe: ten words stand there many times, all others a few."""
    pool = _distinct(rng, N_COMMON + 20_000 // RARE_TIMES)
    common, rare = pool[:N_COMMON], pool[N_COMMON:]
    seed = rng.random()
    head = (
        "Below is a numbered list of words. In these words, some appear more often than others. "
        "Memorize the ones that appear most often.\n"
    )
    ask = (
        f"\nQuestion: What are the {N_COMMON} most common words in the above list? Answer: The top "
        f"{N_COMMON} words that appear most often in the list are:"
    )

    def make(size: int) -> str:
        words = common * COMMON_TIMES + rare[:size] * RARE_TIMES
        random.Random(seed).shuffle(words)
        return head + " ".join(f"{n}. {word}" for n, word in enumerate(words, 1)) + ask

    return Sample(make(_longest(make, fits)), tuple(common), None, 120)


def frequent_words(rng: random.Random, fits: Fits, depth: float) -> Sample:
    """fwe: coded words, the n-th of which stands there in proportion to 1/n^2."""
    words = _distinct(rng, 50)
    weights = [1 / (n + 1) ** 2 for n in range(len(words))]
    seed = rng.random()
    head = (
        "Read the following coded text and track the frequency of each coded word. Find the three "
        "most frequently appeared coded words.\n"
    )
    ask = (
        "\nQuestion: Do not provide any explanation. What are the three most frequently appeared "
        "words in the above coded text? Answer: According to the coded text above, the three most "
        "frequently appeared words are:"
    )

    def make(size: int) -> str:
        drawn = random.Random(seed).choices(words, weights, k=size)
        return head + " ".join(drawn) + ask

    return Sample(make(_longest(make, fits)), tuple(words[:N_FREQUENT]), None, 40)


TASKS: dict[str, Callable[[random.Random, Fits, float], Sample]] = {
    "niah_single": lambda rng, fits, depth: needle(rng, fits, depth, 1),
    "niah_multikey": lambda rng, fits, depth: needle(rng, fits, depth, N_KEYS),
    "vt": variables,
    "cwe": common_words,
    "fwe": frequent_words,
}


def samples(tokenizer: Any, task: str, length: int, count: int, seed: int = 0) -> list[Sample]:
    """`count` samples of a task whose prompts have at most `length` tokens, and nearly as many.

    The depths of the evidence go evenly from the beginning to the end.

    Raises ValueError when the task is unknown or its shortest prompt is longer.
    """
    if task not in TASKS:
        raise ValueError(f"there is no task {task!r}; there are {', '.join(TASKS)}")

    def fits(text: str) -> bool:
        return len(tokenizer(text, verbose=False).input_ids) <= length

    found = []
    for n in range(count):
        rng = random.Random(f"{task} {length} {n} {seed}")
        sample = TASKS[task](rng, fits, n / max(count - 1, 1))
        if not fits(sample.prompt):
            raise ValueError(
                f"a prompt of {task} takes more than {length} tokens with this tokenizer; give a "
                "larger length"
            )
        found.append(sample)
    return found


def score(answer: str, sample: Sample) -> float:
    """The share of the answers that were written."""
    written = answer.lower()
    return sum(text.lower() in written for text in sample.answers) / len(sample.answers)
