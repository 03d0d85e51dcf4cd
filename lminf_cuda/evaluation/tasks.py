"""A model on tasks over long prompts: LM-Infinite beside vanilla and a truncated prompt.

- *vanilla* reads the whole prompt with the model as it is;
- *LM-Infinite* reads it patched, in chunks through its cache;
- *truncated* is vanilla on the prompt's last tokens, as many as LM-Infinite's window: what a system
  does that cuts its prompts.

Scores of tasks whose evidence stands at one place are split by where that is for LM-Infinite: among
the first tokens, in the window, or in the middle, which it does not see.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from lminf_cuda.evaluation import questions, synthetic
from lminf_cuda.evaluation.passkey import write_on
from lminf_cuda.evaluation.records import write_records
from lminf_cuda.models.patch import patch_model, unpatch_model
from lminf_cuda.models.settings import SETTINGS_ATTRIBUTE
from lminf_cuda.text.progress import progress

VANILLA, LM_INFINITE, TRUNCATED = "vanilla", "LM-Infinite", "truncated"
METHODS = (VANILLA, LM_INFINITE, TRUNCATED)
FIRST, WINDOW, MIDDLE, SPREAD = "first tokens", "window", "middle", "spread"


@dataclass(frozen=True)
class Prompt:
    """One thing to answer.

    Attributes:
        task, length: which it belongs to; length 0: as long as it is.
        text: what is read.
        score: of what is written, 0 to 1.
        evidence: tokens before it, or None where it is spread.
        new_tokens: to write.
    """

    task: str
    length: int
    text: str
    score: Callable[[str], float]
    evidence: int | None
    new_tokens: int


@dataclass(frozen=True)
class Result:
    """One method on the prompts of a task, a length and a region."""

    task: str
    length: int
    method: str
    region: str
    prompts: int
    score: float


def synthetic_prompts(
    tokenizer: Any, task: str, length: int, count: int, seed: int = 0
) -> list[Prompt]:
    """Of a task in synthetic.py; see `synthetic.samples`."""
    prompts = []
    for sample in synthetic.samples(tokenizer, task, length, count, seed):
        evidence = None
        if sample.depth is not None:
            before = sample.prompt[: sample.prompt.index(sample.answers[0])]
            evidence = len(tokenizer(before, verbose=False).input_ids)

        def score(written: str, sample: synthetic.Sample = sample) -> float:
            return synthetic.score(written, sample)

        prompts.append(Prompt(task, length, sample.prompt, score, evidence, sample.new_tokens))
    return prompts


def question_prompts(path: Path) -> list[Prompt]:
    """Of a file of questions; see `questions.read_questions`."""
    prompts = []
    for question in questions.read_questions(path):

        def score(written: str, question: questions.Question = question) -> float:
            return questions.f1(written, question.answers)

        prompts.append(Prompt(path.stem, 0, question.prompt, score, None, questions.NEW_TOKENS))
    return prompts


def region(evidence: int | None, n_tokens: int, n_global: int, window: int) -> str:
    """Where the last token of a prompt has its evidence, by the definition of what is visible."""
    if evidence is None:
        return SPREAD
    if n_tokens - 1 - evidence < window:
        return WINDOW
    return FIRST if evidence < n_global else MIDDLE


def run(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    *,
    patch: dict[str, Any],
    methods: Sequence[str] = METHODS,
    chunk: int = 1024,
) -> list[Result]:
    """Every method on every prompt, greedily.

    Args:
        model: an unpatched causal LM in eval mode; it is unpatched again on return.
        prompts: at least one.
        patch: the arguments of `patch_model`.
        methods: among METHODS.
        chunk: tokens per forward of the patched model.
    """
    patch_model(model, **patch)
    settings = getattr(model, SETTINGS_ATTRIBUTE)
    unpatch_model(model)
    encoded = [tokenizer(prompt.text, return_tensors="pt", verbose=False) for prompt in prompts]
    ids = [encoding.input_ids.to(model.device) for encoding in encoded]
    scores: dict[tuple[str, int, str, str], list[float]] = {}
    for method in methods:
        if method == LM_INFINITE:
            patch_model(model, **patch)
        try:
            with progress(sum(x.shape[1] for x in ids), method, "tok") as bar:
                for prompt, whole in zip(prompts, ids, strict=True):
                    read = whole[:, -settings.window :] if method == TRUNCATED else whole
                    new = write_on(model, read, prompt.new_tokens, chunk)
                    text = tokenizer.decode(new[0], skip_special_tokens=True)
                    place = region(
                        prompt.evidence, whole.shape[1], settings.n_global, settings.window
                    )
                    key = (prompt.task, prompt.length, method, place)
                    scores.setdefault(key, []).append(prompt.score(text))
                    bar.update(whole.shape[1])
        finally:
            if method == LM_INFINITE:
                unpatch_model(model)
    return [Result(*key, len(found), mean(found)) for key, found in scores.items()]


def write_results(results: Sequence[Result], settings: dict[str, Any], folder: Path) -> None:
    """Write tasks.csv (a line a task, length, method and region) and tasks.json."""
    rows = [asdict(result) for result in results]
    write_records(folder, "tasks", rows, {"settings": settings, "results": rows})
