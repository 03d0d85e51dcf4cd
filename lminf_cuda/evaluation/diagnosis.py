"""What takes a model out of the distribution it was trained on (arXiv 2308.16137, section 3).

The paper names three factors, and this measures each, by layer, with vanilla attention and with
LM-Infinite over the same text:

1. distances: attention logits at distances that training never had;
2. the number of tokens attended to: the entropy of attention grows with it;
3. the first tokens: their hidden states stand apart from all later ones, so that a window that
   drops them leaves attention without what it leans on.

Both arms run through the same kernels. Vanilla is the patched model with a window as long as the
text, which is plain causal attention; each layer's observer is handed the un-rotated queries and
keys, from which the logits of some queries are worked out here once more, all of them, in float32.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lminf_cuda.evaluation.records import write_records
from lminf_cuda.models.attention import LAYER_ATTRIBUTE
from lminf_cuda.models.patch import patch_model, unpatch_model
from lminf_cuda.models.settings import SETTINGS_ATTRIBUTE, LayerSettings

VANILLA, LM_INFINITE = "vanilla", "LM-Infinite"
BUCKETS_PER_OCTAVE = 4  # of distances
LENGTHS_PER_OCTAVE = 2  # at which entropies are taken
NEIGHBOURS = 8  # queries at each of these lengths
FIRST_TOKENS = 16
HIDDEN_POSITIONS = 512  # whose hidden states are kept, evenly along the text


@dataclass
class LayerDiagnosis:
    """One layer of one arm.

    Attributes:
        distances: the smallest distance of each bucket.
        logit_mean, logit_max: over all heads, of the queries in the text's second half; nan where
            none was seen at the distance.
        lengths: numbers of tokens before and with a query.
        entropy: of attention, nats, the mean over heads and NEIGHBOURS queries at each length.
        first_share: of the attention of the queries in the second half, on the FIRST_TOKENS.
        first_token_share: the same on the first token alone.
        hidden: float32 [positions, H], what the layer puts out.
    """

    distances: np.ndarray
    logit_mean: np.ndarray
    logit_max: np.ndarray
    lengths: np.ndarray
    entropy: np.ndarray
    first_share: float
    first_token_share: float
    hidden: np.ndarray = field(default_factory=lambda: np.empty((0, 0), np.float32))


@dataclass
class Diagnosis:
    """Every layer of both arms.

    Attributes:
        train_length: tokens that the model was trained on at once.
        n_tokens: of the text.
        positions: those of the hidden states; the FIRST_TOKENS come first.
        settings: what the arms were patched with.
        arms: by name, one entry a layer with attention.
    """

    train_length: int
    n_tokens: int
    positions: np.ndarray
    settings: dict[str, Any]
    arms: dict[str, list[LayerDiagnosis]]


def query_positions(n_tokens: int) -> Tensor:
    """Where entropies are taken, int64, increasing: NEIGHBOURS each, from 16 tokens to all."""
    steps = int(np.log2(n_tokens / 16) * LENGTHS_PER_OCTAVE)
    lengths = n_tokens / 2 ** (np.arange(steps, -1, -1) / LENGTHS_PER_OCTAVE)
    ends = np.unique(lengths.astype(np.int64))
    return torch.from_numpy((ends[:, None] - np.arange(NEIGHBOURS, 0, -1)).flatten())


def hidden_positions(n_tokens: int) -> np.ndarray:
    """The FIRST_TOKENS and up to HIDDEN_POSITIONS evenly spaced later ones."""
    later = np.linspace(FIRST_TOKENS, n_tokens - 1, min(HIDDEN_POSITIONS, n_tokens - FIRST_TOKENS))
    return np.concatenate([np.arange(FIRST_TOKENS), np.unique(later.astype(np.int64))])


def logits(
    q: Tensor, k: Tensor, positions: Tensor, layer: LayerSettings, options: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    """The attention logits of some queries, by the definition (docs/design.md section 2).

    Args:
        q: [1, Hq, S, D], un-rotated.
        k: [1, Hkv, S, D], un-rotated.
        positions: int64 [P] of the queries wanted.
        layer: what it attends to.
        options: of the op.

    Returns: logits float32 [Hq, P, S], -inf where a key is not seen; distances int64 [P, S] as
    attention sees them, clamped.
    """
    n = k.shape[2]
    keys = torch.arange(n, device=q.device)
    positions = positions.to(q.device)
    distance = positions[:, None] - keys
    clamped = distance.clamp(max=layer.max_distance)
    rows = q[:, :, positions].float()
    k = k.float()
    groups = rows.shape[1] // k.shape[1]

    def products(queries: Tensor, others: Tensor) -> Tensor:
        grouped = queries.unflatten(1, (-1, groups)).flatten(2, 3)  # [1, Hkv, groups * P, D]
        return (grouped @ others.transpose(2, 3)).unflatten(2, (groups, -1)).flatten(1, 2)[0]

    inv_freq = options.get("inv_freq")
    if inv_freq is None:
        scores = products(rows, k)
    else:
        rotated = partial(
            torch.ops.lminf.clamped_rope,
            inv_freq=inv_freq,
            scaling=options.get("rope_scaling", 1.0),
            interleaved=options.get("rope_interleaved", False),
        )
        scores = products(rotated(rows, positions), rotated(k, keys))
        if layer.max_distance < n:
            limit = torch.full_like(positions, layer.max_distance)
            far = products(rotated(rows, limit), rotated(k, torch.zeros_like(keys)))
            scores = torch.where(distance > layer.max_distance, far, scores)
    scores = scores * options["scale"]
    if options.get("alibi_slopes") is not None:
        scores = scores - options["alibi_slopes"].float()[:, None, None] * clamped
    if options.get("distance_bias") is not None:
        bias = options["distance_bias"].float()
        scores = scores + bias[:, clamped.clamp(0, bias.shape[1] - 1)]
    if options.get("softcap"):
        scores = options["softcap"] * torch.tanh(scores / options["softcap"])
    seen = (distance >= 0) & ((distance < layer.window) | (keys < layer.n_global))
    return scores.masked_fill(~seen, -torch.inf), clamped


def diagnose_layer(
    q: Tensor, k: Tensor, layer: LayerSettings, options: dict[str, Any]
) -> LayerDiagnosis:
    """The first two factors of one layer; shapes as in `logits`."""
    n = k.shape[2]
    positions = query_positions(n)
    scores, distances = logits(q, k, positions, layer, options)
    sinks = options.get("sink_logits")
    lse = torch.logsumexp(scores, dim=2)
    if sinks is not None:
        lse = torch.logaddexp(lse, sinks.float()[:, None].expand_as(lse))
    logs = scores - lse[..., None]
    weights = logs.exp()
    entropy = -(weights * logs.masked_fill(weights == 0, 0.0)).sum(2).mean(0)  # [P]

    late = (positions >= n // 2).to(q.device)
    buckets = int(np.ceil(np.log2(n) * BUCKETS_PER_OCTAVE)) + 1
    seen = scores[:, late].isfinite()
    bucket = (distances[late].clamp(min=1).double().log2() * BUCKETS_PER_OCTAVE).long()
    bucket = bucket.expand_as(seen)[seen]
    values = scores[:, late][seen]
    count = torch.bincount(bucket, minlength=buckets)
    total = torch.zeros(buckets, device=q.device).index_add_(0, bucket, values)
    most = torch.full((buckets,), -torch.inf, device=q.device)
    most = most.scatter_reduce(0, bucket, values, "amax")
    most = most.masked_fill(count == 0, torch.nan)
    first = weights[:, late, :FIRST_TOKENS]
    return LayerDiagnosis(
        distances=2 ** (np.arange(buckets) / BUCKETS_PER_OCTAVE),
        logit_mean=(total / count).cpu().numpy(),
        logit_max=most.cpu().numpy(),
        lengths=positions.view(-1, NEIGHBOURS)[:, -1].numpy() + 1,
        entropy=entropy.view(-1, NEIGHBOURS).mean(1).cpu().numpy(),
        first_share=float(first.sum(2).mean()),
        first_token_share=float(first[..., 0].mean()),
    )


def _layer_modules(model: nn.Module) -> list[nn.Module]:
    """The decoder layers with patched attention: the entries of module lists that hold it."""
    layers: list[nn.Module] = []
    for name, module in model.named_modules():
        if not hasattr(module, LAYER_ATTRIBUTE):
            continue
        parts = name.split(".")
        number = max(i for i, part in enumerate(parts) if part.isdigit())
        layers.append(model.get_submodule(".".join(parts[: number + 1])))
    return layers


@contextmanager
def _observed(model: Any, kept: Tensor, layers: list[LayerDiagnosis]) -> Iterator[None]:
    """Fills `layers` in the next forward, with the hidden states at positions `kept`."""

    def observe(settings: LayerSettings, q: Tensor, k: Tensor, options: dict[str, Any]) -> None:
        layers.append(diagnose_layer(q, k, settings, options))

    def keep(module: nn.Module, args: Any, output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        layers[-1].hidden = hidden[0, kept.to(hidden.device)].float().cpu().numpy()

    with_attention = [x for x in getattr(model, SETTINGS_ATTRIBUTE).layers if x is not None]
    hooks = [module.register_forward_hook(keep) for module in _layer_modules(model)]
    for settings in with_attention:
        settings.observer = partial(observe, settings)
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for settings in with_attention:
            settings.observer = None


@torch.inference_mode()
def diagnose(
    model: Any,
    tokens: Tensor,
    *,
    train_length: int,
    n_global: int = 16,
    window: int | None = None,
    max_distance: int | None = None,
) -> Diagnosis:
    """All three factors over one text, read in one forward an arm.

    Args:
        model: an unpatched causal LM in eval mode; it is unpatched again on return.
        tokens: int64 [n], n >= 64; twice the training length shows what lies beyond it.
        train_length: tokens the model was trained on at once.
        n_global, window, max_distance: of the LM-Infinite arm, as for `patch_model`.

    Raises ValueError when the text is too short, and what `patch_model` raises.
    """
    n = len(tokens)
    if n < 64:
        raise ValueError(f"the text has {n} tokens; give one of at least 64")
    positions = hidden_positions(n)
    arms: dict[str, dict[str, Any]] = {
        VANILLA: {"n_global": 0, "window": n},
        LM_INFINITE: {"n_global": n_global, "window": window, "max_distance": max_distance},
    }
    result = Diagnosis(train_length, n, positions, {}, {})
    for name, arguments in arms.items():
        patch_model(model, **arguments)
        try:
            resolved = getattr(model, SETTINGS_ATTRIBUTE)
            layers: list[LayerDiagnosis] = []
            with _observed(model, torch.from_numpy(positions), layers):
                model(input_ids=tokens[None].to(model.device), use_cache=False, logits_to_keep=1)
        finally:
            unpatch_model(model)
        result.arms[name] = layers
    names = ("n_global", "window", "max_distance")
    result.settings = {key: getattr(resolved, key) for key in names}
    return result


@dataclass(frozen=True)
class LayerNumbers:
    """What a layer's curves come to; the columns of diagnosis.csv.

    Attributes:
        logit_within, logit_beyond: the largest logit at distances up to the training length, and
            beyond it (nan where none is seen).
        entropy_at_training, entropy_at_end: nats.
        first_share, first_token_share: see LayerDiagnosis.
        first_apart: how far the first token's hidden state is from the mean of the later ones
            within the training length, in units of their spread.
        drift: the same of the mean beyond the training length.
    """

    arm: str
    layer: int
    logit_within: float
    logit_beyond: float
    entropy_at_training: float
    entropy_at_end: float
    first_share: float
    first_token_share: float
    first_apart: float
    drift: float


def _largest(values: np.ndarray) -> float:
    return float(np.nanmax(values)) if np.isfinite(values).any() else float("nan")


def layer_numbers(diagnosis: Diagnosis) -> list[LayerNumbers]:
    """One entry for each layer of each arm."""
    rows = []
    positions, train = diagnosis.positions, diagnosis.train_length
    for arm, layers in diagnosis.arms.items():
        for index, layer in enumerate(layers):
            within = layer.distances <= train
            hidden = layer.hidden.astype(np.float64)
            later = hidden[(positions >= FIRST_TOKENS) & (positions < train)]
            beyond = hidden[positions >= train]
            center = later.mean(0)
            spread = float(np.sqrt(((later - center) ** 2).sum(1).mean()))
            apart = float(np.linalg.norm(hidden[0] - center)) / spread
            drift = float(np.linalg.norm(beyond.mean(0) - center)) / spread if len(beyond) else 0.0
            at_training = float(
                np.interp(min(train, layer.lengths[-1]), layer.lengths, layer.entropy)
            )
            rows.append(
                LayerNumbers(
                    arm,
                    index,
                    _largest(layer.logit_max[within]),
                    _largest(layer.logit_max[~within]),
                    at_training,
                    float(layer.entropy[-1]),
                    layer.first_share,
                    layer.first_token_share,
                    apart,
                    drift,
                )
            )
    return rows


def findings(diagnosis: Diagnosis, rows: Sequence[LayerNumbers]) -> list[str]:
    """A sentence for each factor, with this run's numbers."""
    ours = [row for row in rows if row.arm == LM_INFINITE]
    vanilla = [row for row in rows if row.arm == VANILLA]
    train, n = diagnosis.train_length, diagnosis.n_tokens
    if n <= train:
        return [f"the text ends within the training length of {train:,} tokens: give a longer one"]
    grown = [row for row in vanilla if row.logit_beyond > row.logit_within]
    steepest = max(vanilla, key=lambda row: row.logit_beyond - row.logit_within)
    mean = {
        (arm, name): float(np.mean([getattr(row, name) for row in of]))
        for arm, of in (("vanilla", vanilla), ("ours", ours))
        for name in ("entropy_at_training", "entropy_at_end", "first_share", "drift")
    }
    apart = max(vanilla, key=lambda row: row.first_apart)
    n_first_apart = sum(row.first_apart > 3 for row in vanilla)
    return [
        f"1. distances: with vanilla attention the largest logit is larger beyond the training "
        f"length than within it in {len(grown)} of {len(vanilla)} layers (most in layer "
        f"{steepest.layer}: {steepest.logit_within:.1f} to {steepest.logit_beyond:.1f}); "
        f"LM-Infinite sees no distance above {diagnosis.settings['max_distance']:,}",
        f"2. number of tokens: from {train:,} to {n:,} tokens the mean entropy of attention goes "
        f"from {mean['vanilla', 'entropy_at_training']:.2f} to "
        f"{mean['vanilla', 'entropy_at_end']:.2f} nats with vanilla attention, from "
        f"{mean['ours', 'entropy_at_training']:.2f} to {mean['ours', 'entropy_at_end']:.2f} with "
        "LM-Infinite",
        f"3. first tokens: the first one's hidden state stands more than 3 spreads apart in "
        f"{n_first_apart} of {len(vanilla)} layers (most in layer {apart.layer}: "
        f"{apart.first_apart:.1f}), and with LM-Infinite {mean['ours', 'first_share']:.0%} of the "
        f"attention is on the first {FIRST_TOKENS}; beyond the training length the mean hidden "
        f"state drifts by {mean['vanilla', 'drift']:.2f} spreads with vanilla attention, by "
        f"{mean['ours', 'drift']:.2f} with LM-Infinite",
    ]


def _plain(values: np.ndarray) -> list[float | None]:
    return [round(float(x), 5) if np.isfinite(x) else None for x in values]


def write_results(
    diagnosis: Diagnosis, rows: Sequence[LayerNumbers], settings: dict[str, Any], folder: Path
) -> None:
    """Write diagnosis.csv (a line a layer) and diagnosis.json (settings, numbers and curves)."""
    lines = [
        {key: round(x, 5) if isinstance(x, float) else x for key, x in vars(row).items()}
        for row in rows
    ]
    curves = {
        arm: [
            {
                "distances": _plain(layer.distances),
                "logit_mean": _plain(layer.logit_mean),
                "logit_max": _plain(layer.logit_max),
                "lengths": layer.lengths.tolist(),
                "entropy": _plain(layer.entropy),
            }
            for layer in layers
        ]
        for arm, layers in diagnosis.arms.items()
    }
    facts = {"settings": settings, "findings": findings(diagnosis, rows), "curves": curves}
    write_records(folder, "diagnosis", lines, facts)
