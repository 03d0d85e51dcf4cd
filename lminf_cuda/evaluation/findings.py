"""What an evaluation shows, in sentences with its numbers."""

from __future__ import annotations

from collections.abc import Sequence

from lminf_cuda.evaluation.losses import CUT, LM_INFINITE, VANILLA, Evaluation, Row


def _past_training(evaluation: Evaluation, method: str) -> list[Row]:
    """Rows of a method beyond the training length that have a loss."""
    return [
        row
        for row in evaluation.rows
        if row.method == method
        and row.length > evaluation.train_length
        and row.nats_per_token is not None
    ]


def difference_to_cut(evaluation: Evaluation, row: Row) -> float | None:
    """How far a row of LM-Infinite is above the cut baseline; None where that has no loss."""
    if row.above_cut is not None:
        return row.above_cut
    cut = evaluation.row(CUT, row.length).nats_per_token
    return None if cut is None or row.nats_per_token is None else row.nats_per_token - cut


def _sentence(reasons: Sequence[str], facts: str) -> str:
    return f"Shown: {facts}." if not reasons else f"NOT shown ({'; '.join(reasons)}): {facts}."


def findings(evaluation: Evaluation, *, tolerance: float = 0.03) -> list[str]:
    """Two sentences with this run's numbers: fluency past the training length, then what it costs.

    Each begins with "Shown" only when its claims hold in these numbers, else with "NOT shown" and
    what fails: vanilla's loss grows by more than 0.1 nats; LM-Infinite is at most `tolerance` nats
    above the cut baseline at every length; it reads faster than the baseline; its cache has one
    size throughout.
    """
    ours = _past_training(evaluation, LM_INFINITE)
    vanilla = _past_training(evaluation, VANILLA)
    if not ours or not vanilla:
        who = LM_INFINITE if not ours else VANILLA
        fact = f"{who} has no row past the training length of {evaluation.train_length:,} tokens"
        return [_sentence(["nothing to compare"], fact)]

    before = evaluation.row(VANILLA, evaluation.lengths[0])
    start = before.nats_per_token or 0.0
    end = vanilla[-1].nats_per_token or 0.0
    losses = [row.nats_per_token or 0.0 for row in ours]
    differences = [(row.length, difference_to_cut(evaluation, row)) for row in ours]
    above = {length: x for length, x in differences if x is not None}
    fluent = (
        f"past the training length of {evaluation.train_length:,} tokens vanilla goes from "
        f"{start:.2f} nats per token at {before.length:,} to {end:.2f} at {vanilla[-1].length:,}, "
        f"LM-Infinite is between {min(losses):.2f} and {max(losses):.2f} up to "
        f"{ours[-1].length:,} tokens"
    )
    reasons = []
    if end - start <= 0.1:
        reasons.append("vanilla's loss does not grow")
    if above:
        worst = max(above, key=lambda length: above[length])
        fluent += (
            f" and, on the same tokens, at worst {abs(above[worst]):.3f} nats "
            f"{'above' if above[worst] > 0 else 'below'} the model recomputed on a cut context (at "
            f"{worst:,})"
        )
        if above[worst] > tolerance:
            reasons.append(f"LM-Infinite is more than {tolerance:g} nats above the cut baseline")

    speed = evaluation.traces[LM_INFINITE].tokens_per_second
    cut_speed = evaluation.traces[CUT].tokens_per_second if CUT in evaluation.traces else 0.0
    sizes = [row.cache_bytes or 0 for row in evaluation.rows if row.method == LM_INFINITE]
    cost = f"LM-Infinite reads {speed:,.0f} tokens/s"
    if cut_speed:
        cost += (
            f" where recomputing every {evaluation.settings['baseline_stride']} tokens reads "
            f"{cut_speed:,.0f} (a ratio of {speed / cut_speed:.1f})"
        )
    cost += (
        f", and its cache takes {mebibytes(sizes[0])} at "
        f"{evaluation.lengths[0]:,} tokens and {mebibytes(sizes[-1])} at "
        f"{evaluation.lengths[-1]:,}, vanilla's {mebibytes(vanilla[-1].cache_bytes or 0)} at "
        f"{vanilla[-1].length:,}"
    )
    cost_reasons = []
    if speed <= cut_speed:
        cost_reasons.append("LM-Infinite is not faster than the cut baseline")
    if len(set(sizes)) > 1:
        cost_reasons.append("the size of the LM-Infinite cache changes")
    return [_sentence(reasons, fluent), _sentence(cost_reasons, cost)]


def mebibytes(n_bytes: int) -> str:
    """Bytes as people read them."""
    return f"{n_bytes / 2**20:,.1f} MiB"
