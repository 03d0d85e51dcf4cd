"""lminf diagnose: what takes a model out of the distribution it was trained on."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lminf_cuda.cli import options
from lminf_cuda.cli.loading import HELD_OUT, check_patch, load, run_facts, trained_length
from lminf_cuda.cli.reports import make_folder, report_diagnosis
from lminf_cuda.evaluation import diagnosis
from lminf_cuda.evaluation.tables import console
from lminf_cuda.text.progress import waiting
from lminf_cuda.text.reading import read_text, tokenize


def diagnose(
    model: options.ModelArgument = None,
    text: options.TextOption = HELD_OUT,
    length: Annotated[
        int | None,
        typer.Option(
            min=64, help="Tokens of the text, read at once; default: twice the training length."
        ),
    ] = None,
    n_global: options.NGlobalOption = 16,
    window: options.WindowOption = None,
    max_distance: options.MaxDistanceOption = None,
    train_length: options.TrainLengthOption = None,
    dtype: options.DtypeOption = options.Dtype.auto,
    device: options.DeviceOption = options.Device.cpu,
    out: options.OutOption = Path("lminf_out"),
) -> None:
    """The paper's three factors by layer: logits by distance, entropy, hidden states by position.

    Each with vanilla attention and with LM-Infinite, as table and plot.
    """
    with options.blamed("--text"):
        content = read_text(text)
    loaded = load(model, dtype, device)
    trained = trained_length(loaded.model, train_length)
    if window is None and train_length is not None:
        window = train_length
    resolved = check_patch(loaded.model, options.patch_arguments(n_global, window, max_distance))
    wanted = length or 2 * trained
    tokens = tokenize(loaded.tokenizer, content)
    with options.blamed("--text / --length"):
        if len(tokens) < wanted:
            raise ValueError(f"the text has {len(tokens)} tokens, fewer than the {wanted} wanted")
    make_folder(out)
    console().print(f"{loaded.name}: reading {wanted:,} tokens twice, each time in one forward")
    with waiting("reading"):
        result = diagnosis.diagnose(
            loaded.model,
            tokens.head(wanted).tokens,
            train_length=trained,
            n_global=n_global,
            window=window,
            max_distance=max_distance,
        )
    settings = run_facts(loaded, text) | resolved | {"length": wanted, "train_length": trained}
    report_diagnosis(result, settings, out)
