"""lminf evaluate: the loss by position over a long text, read in three ways."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from lminf_cuda.cli import options
from lminf_cuda.cli.loading import (
    HELD_OUT,
    Loaded,
    check_patch,
    load,
    run_facts,
    trained_length,
)
from lminf_cuda.cli.reports import make_folder, report
from lminf_cuda.evaluation import losses
from lminf_cuda.evaluation.findings import findings
from lminf_cuda.evaluation.lengths import baseline_windows, check_lengths, default_lengths
from lminf_cuda.evaluation.tables import console
from lminf_cuda.text.reading import Text, read_text, tokenize


def run_evaluation(
    loaded: Loaded,
    text: Text,
    lengths: Sequence[int],
    *,
    source: Path,
    train_length: int,
    out: Path,
    **asked: Any,
) -> losses.Evaluation:
    """Evaluate, write what there is after each method, and note in the settings what it was."""
    screen = console()
    screen.print(
        f"{loaded.name}: {loaded.model.num_parameters() / 1e6:.1f}M parameters, "
        f"{str(loaded.model.dtype).removeprefix('torch.')} on {loaded.model.device}, "
        f"{torch.get_num_threads()} threads, training length {train_length:,} tokens",
        highlight=False,
    )
    facts = run_facts(loaded, source)
    of_run = facts | {"lengths": list(lengths), "train_length": train_length, "options": asked}

    def write(result: losses.Evaluation) -> None:
        result.settings |= facts
        with suppress(OSError):  # at the end it is tried once more, and said
            losses.write_results(result, out)

    return losses.evaluate(
        loaded.model,
        text,
        lengths,
        train_length=train_length,
        bos_token_id=loaded.tokenizer.bos_token_id,
        kept=losses.Kept(out / "traces", of_run),
        after_each=write,
        say=lambda line: screen.print(line, highlight=False),
        **asked,
    )


def evaluate(
    model: options.ModelArgument = None,
    text: options.TextOption = HELD_OUT,
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
    middle_top_k: options.MiddleTopKOption = 0,
    middle_from_layer: options.MiddleFromLayerOption = 4,
    train_length: options.TrainLengthOption = None,
    dtype: options.DtypeOption = options.Dtype.auto,
    device: options.DeviceOption = options.Device.cpu,
    chunk: options.ChunkOption = 1024,
    out: options.OutOption = Path("lminf_out"),
    cut: Annotated[bool, typer.Option(help="Whether the cut baseline runs.")] = True,
    cut_length: Annotated[
        int | None,
        typer.Option(min=1, help="Context of the cut baseline; default: the window."),
    ] = None,
    cut_seconds: Annotated[
        float,
        typer.Option(
            min=0, help="The cut baseline scores evenly spread samples for so many seconds."
        ),
    ] = 120.0,
    baseline_stride: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Tokens scored per window of the cut baseline; 1 is exact, slow; default: 32, or "
            "its context where that is shorter.",
        ),
    ] = None,
    vanilla_seconds: Annotated[
        float, typer.Option(min=0, help="Vanilla stops after this many seconds.")
    ] = 120.0,
) -> None:
    """Loss by position over a long text: vanilla, LM-Infinite, and vanilla on a cut context.

    A run that was broken off goes on where it was when it is started again with the same arguments.
    """
    wanted = None
    with options.blamed("--lengths"):
        if lengths is not None:
            wanted = options.parse_lengths(lengths)
            check_lengths(wanted, max(wanted))
    with options.blamed("--text"):
        content = read_text(text)
    loaded = load(model, dtype, device)
    trained = trained_length(loaded.model, train_length)
    if window is None and train_length is not None:
        window = train_length
    patch = options.patch_arguments(n_global, window, max_distance, middle_top_k, middle_from_layer)
    resolved = check_patch(loaded.model, patch)
    with options.blamed("--baseline-stride"):
        context = cut_length or min(resolved["window"], trained)
        baseline_windows(2, context, baseline_stride or 1)
    tokens = tokenize(loaded.tokenizer, content)
    wanted = wanted or default_lengths(trained, len(tokens))
    with options.blamed("--text / --lengths"):
        check_lengths(wanted, len(tokens))
    make_folder(out)
    result = run_evaluation(
        loaded,
        tokens,
        wanted,
        source=text,
        train_length=trained,
        out=out,
        n_global=n_global,
        window=window,
        max_distance=max_distance,
        middle={name: x for name, x in patch.items() if name.startswith("middle_")},
        chunk=chunk,
        cut=cut,
        cut_length=cut_length,
        cut_seconds=cut_seconds,
        baseline_stride=baseline_stride,
        vanilla_seconds=vanilla_seconds,
    )
    report(result, out)
    for sentence in findings(result):
        console().print(sentence, highlight=False)
