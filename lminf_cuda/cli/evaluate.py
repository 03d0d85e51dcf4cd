"""lminf evaluate: the loss by position over a long text, read in three ways."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from lminf_cuda.cli import options
from lminf_cuda.cli.loading import HELD_OUT, Loaded, check_patch, load
from lminf_cuda.cli.reports import make_folder, report
from lminf_cuda.evaluation import losses
from lminf_cuda.evaluation.findings import findings
from lminf_cuda.evaluation.lengths import baseline_windows, check_lengths, default_lengths
from lminf_cuda.evaluation.tables import console
from lminf_cuda.models.rope import training_length
from lminf_cuda.text.reading import Text, read_text, tokenize


def run_evaluation(
    loaded: Loaded, text: Text, lengths: Sequence[int], **options: Any
) -> losses.Evaluation:
    """Evaluate and note in the settings which model it was."""
    console().print(
        f"{loaded.name}: {loaded.model.num_parameters() / 1e6:.1f}M parameters, "
        f"{str(loaded.model.dtype).removeprefix('torch.')} on {loaded.model.device}, "
        f"{torch.get_num_threads()} threads, training length "
        f"{training_length(loaded.model.config):,} tokens",
        highlight=False,
    )
    result = losses.evaluate(
        loaded.model,
        text,
        lengths,
        train_length=training_length(loaded.model.config),
        bos_token_id=loaded.tokenizer.bos_token_id,
        **options,
    )
    result.settings["model"] = loaded.name
    return result


def evaluate(
    model: options.ModelArgument = None,
    text: Annotated[
        Path,
        typer.Option(
            help="A long UTF-8 text file.", show_default="the shipped model's held-out text"
        ),
    ] = HELD_OUT,
    lengths: Annotated[
        str | None,
        typer.Option(
            help="Increasing token counts, such as 256,512,...,65536; default: the training length "
            "and its doublings, as far as the text goes."
        ),
    ] = None,
    n_global: options.NGlobalOption = 16,
    window: options.WindowOption = None,
    max_distance: options.MaxDistanceOption = None,
    dtype: options.DtypeOption = options.Dtype.auto,
    device: options.DeviceOption = options.Device.cpu,
    chunk: options.ChunkOption = 1024,
    out: options.OutOption = Path("lminf_out"),
    baseline_stride: Annotated[
        int,
        typer.Option(min=1, help="Tokens scored per window of the cut baseline; 1 is exact, slow."),
    ] = 32,
    vanilla_seconds: Annotated[
        float, typer.Option(min=0, help="Vanilla stops after this many seconds.")
    ] = 120.0,
) -> None:
    """Loss by position over a long text: vanilla, LM-Infinite, and vanilla on a cut context."""
    wanted = None
    with options.blamed("--lengths"):
        if lengths is not None:
            wanted = options.parse_lengths(lengths)
            check_lengths(wanted, max(wanted))
    with options.blamed("--text"):
        content = read_text(text)
    loaded = load(model, dtype, device)
    check_patch(loaded.model, n_global, window, max_distance)
    train_length = training_length(loaded.model.config)
    with options.blamed("--baseline-stride"):
        baseline_windows(2, train_length, baseline_stride)
    tokens = tokenize(loaded.tokenizer, content)
    wanted = wanted or default_lengths(train_length, len(tokens))
    with options.blamed("--text / --lengths"):
        check_lengths(wanted, len(tokens))
    make_folder(out)
    result = run_evaluation(
        loaded,
        tokens,
        wanted,
        n_global=n_global,
        window=window,
        max_distance=max_distance,
        chunk=chunk,
        baseline_stride=baseline_stride,
        vanilla_seconds=vanilla_seconds,
    )
    report(result, out)
    for sentence in findings(result):
        console().print(sentence, highlight=False)
