"""Questions about long documents, in the form of Qasper: document, question, answer; scored by F1.

A file has one JSON object a line: {"document": ..., "question": ..., "answer": ...}, or "answers"
with several of which the best counts.
"""

from __future__ import annotations

import json
import re
import string
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ASK = "\n\nAnswer the question about the text above as shortly as you can.\n"
NEW_TOKENS = 32


@dataclass(frozen=True)
class Question:
    """One line of a file."""

    document: str
    question: str
    answers: tuple[str, ...]

    @property
    def prompt(self) -> str:
        """What a model is to continue with the answer."""
        return f"{self.document}{ASK}Question: {self.question}\nAnswer:"


def read_questions(path: Path) -> list[Question]:
    """The lines of a file.

    Raises ValueError, naming file and line, for one that is no such object, and for an empty file.
    """
    found = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            answers = row["answers"] if "answers" in row else [row["answer"]]
            found.append(Question(row["document"], row["question"], tuple(map(str, answers))))
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path}, line {number}: {error!r}; each line is an object with document, question "
                "and answer (or answers)"
            ) from error
    if not found:
        raise ValueError(f"{path} has no line; give one JSON object a line")
    return found


def words(text: str) -> list[str]:
    """Lower case, without punctuation and articles, as SQuAD's script has it."""
    text = text.lower().translate(str.maketrans("", "", string.punctuation))
    return re.sub(r"\b(a|an|the)\b", " ", text).split()


def f1(written: str, answers: Sequence[str]) -> float:
    """The best F1 of the words that the first line written shares with an answer."""
    got = words(written.strip().split("\n")[0])

    def of(answer: str) -> float:
        expected = words(answer)
        shared = sum((Counter(got) & Counter(expected)).values())
        if not got or not expected:
            return float(got == expected)
        return 2 * shared / (len(got) + len(expected)) if shared else 0.0

    return max(map(of, answers))
