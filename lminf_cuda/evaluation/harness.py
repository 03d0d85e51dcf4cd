"""Tasks of lm-evaluation-harness (the extra lminf_cuda[eval]) with a patched model.

The same tasks run three times: with LM-Infinite and with vanilla attention on prompts of up to
`max_length` tokens, and with vanilla on prompts that the harness truncates to the training length.
A patched model reads a prompt in chunks through its cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from lminf_cuda.evaluation.tasks import LM_INFINITE, METHODS, TRUNCATED
from lminf_cuda.models.cache import LambdaCache
from lminf_cuda.models.compat import cache_keyword
from lminf_cuda.models.patch import patch_model, unpatch_model


@dataclass(frozen=True)
class Score:
    """One metric of a task with one method."""

    task: str
    metric: str
    method: str
    score: float


def check_installed() -> None:
    """Raises ValueError, saying what to install, where the harness is not there."""
    if find_spec("lm_eval") is None:
        raise ValueError(
            "these tasks are lm-evaluation-harness's, which is not installed: "
            "pip install 'lminf_cuda[eval]'"
        )


def chunked_logits(model: Any, ids: Tensor, chunk: int) -> Tensor:
    """Logits [1, n, vocabulary] of a patched model for ids [1, n], read through its cache."""
    cache = LambdaCache(model)
    parts = [
        model(input_ids=piece, use_cache=True, **cache_keyword(model, cache)).logits
        for piece in ids.split(chunk, dim=1)
    ]
    return torch.cat(parts, dim=1)


def language_model(model: Any, tokenizer: Any, max_length: int, chunk: int | None) -> Any:
    """What the harness asks; `chunk` of a patched model, None for one that is not."""
    from lm_eval.models.huggingface import HFLM

    class Chunked(HFLM):  # type: ignore[misc]
        """Reads prompts in chunks."""

        def _model_call(self, inps: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            if chunk is None or inps.shape[0] > 1:
                logits: Tensor = super()._model_call(inps, *args, **kwargs)
                return logits
            with torch.inference_mode():
                return chunked_logits(self.model, inps, chunk)

        def _model_generate(self, context: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            if chunk is not None:
                kwargs["prefill_chunk_size"] = chunk
            output: Tensor = super()._model_generate(context, *args, **kwargs)
            return output

    return Chunked(pretrained=model, tokenizer=tokenizer, max_length=max_length, batch_size=1)


def run(
    model: Any,
    tokenizer: Any,
    tasks: Sequence[str],
    *,
    patch: dict[str, Any],
    max_length: int,
    train_length: int,
    chunk: int = 1024,
    limit: int | None = None,
    include: str | None = None,
) -> list[Score]:
    """Every metric of every task, with every method.

    Args:
        model: an unpatched causal LM in eval mode; it is unpatched again on return.
        tasks: names of the harness's.
        patch: the arguments of `patch_model`.
        max_length: tokens of a prompt, for LM-Infinite and vanilla.
        train_length: for the truncated one.
        chunk: tokens per forward of the patched model.
        limit: prompts of a task; None: all.
        include: a folder with tasks of one's own.

    Raises ValueError where the harness is not installed or the tokenizer has no end token.
    """
    check_installed()
    if tokenizer.eos_token_id is None:
        raise ValueError(
            "lm-evaluation-harness needs a token that ends a text, and this tokenizer names none; "
            "set its eos_token"
        )
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=include)
    scores = []
    for method in METHODS:
        if method == LM_INFINITE:
            patch_model(model, **patch)
        try:
            length = train_length if method == TRUNCATED else max_length
            reads = chunk if method == LM_INFINITE else None
            found = simple_evaluate(
                model=language_model(model, tokenizer, length, reads),
                tasks=list(tasks),
                task_manager=manager,
                limit=limit,
                bootstrap_iters=0,
            )["results"]
        finally:
            if method == LM_INFINITE:
                unpatch_model(model)
        for task, metrics in found.items():
            for name, value in metrics.items():
                if isinstance(value, float) and "stderr" not in name:
                    scores.append(Score(task, name.partition(",")[0], method, value))
    return scores
