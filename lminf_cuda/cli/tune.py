"""lminf tune: the Λ shape for a model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lminf_cuda.cli import options
from lminf_cuda.cli.loading import HELD_OUT, load, run_facts, trained_length
from lminf_cuda.cli.reports import make_folder, report_tuning
from lminf_cuda.evaluation import tuning
from lminf_cuda.evaluation.tables import console
from lminf_cuda.text.reading import read_text, tokenize

PARTS = 20  # the text is by default so many of the largest windows


def tune(
    model: options.ModelArgument = None,
    text: options.TextOption = HELD_OUT,
    n_globals: Annotated[
        str, typer.Option("--n-global", help="First tokens that stay visible, to be tried.")
    ] = "0,1,4,16,64",
    windows: Annotated[
        str | None,
        typer.Option(
            "--window",
            help="To be tried; default: an eighth of the training length and its doublings.",
        ),
    ] = None,
    max_distances: Annotated[
        str | None,
        typer.Option(
            "--max-distance", help="Default: the window and the training length, for each window."
        ),
    ] = None,
    full_layers: Annotated[
        list[str],
        typer.Option(
            help="Try each shape with the attention of these layers full, too, such as 0,15,29; "
            "may be given several times."
        ),
    ] = [],  # noqa: B006 (typer copies it)
    length: Annotated[
        int | None,
        typer.Option(min=2, help="Tokens of the text; default: 20 of the largest windows."),
    ] = None,
    max_mebibytes: Annotated[
        float | None, typer.Option(min=0, help="Budget: of the cache.")
    ] = None,
    max_ms: Annotated[
        float | None, typer.Option(min=0, help="Budget: milliseconds to write a token.")
    ] = None,
    grid: Annotated[
        bool, typer.Option("--grid", help="Read all of the text with every shape.")
    ] = False,
    train_length: options.TrainLengthOption = None,
    dtype: options.DtypeOption = options.Dtype.auto,
    device: options.DeviceOption = options.Device.cpu,
    chunk: options.ChunkOption = 1024,
    out: options.OutOption = Path("lminf_out"),
) -> None:
    """The shape of attention for a model: the lowest loss within a budget, by successive halving.

    Writes a table, the plot of loss against memory, and the line to paste into a program.
    """
    with options.blamed("--text"):
        content = read_text(text)
    with options.blamed("--n-global / --window / --max-distance"):
        counts = options.parse_lengths(n_globals)
        sizes = options.parse_lengths(windows) if windows is not None else None
        distances = options.parse_lengths(max_distances) if max_distances is not None else None
    loaded = load(model, dtype, device)
    trained = trained_length(loaded.model, train_length)
    n_layers = loaded.model.config.num_hidden_layers
    with options.blamed("--full-layers"):
        hybrids = [(), *(tuple(options.parse_layers(layers)) for layers in full_layers)]
        for layers in hybrids:
            if any(not 0 <= layer < n_layers for layer in layers):
                raise ValueError(f"{layers} are no layers; the model's are 0 to {n_layers - 1}")
    windows_tried = sizes or tuning.default_windows(trained)
    with options.blamed("--n-global / --window / --max-distance"):
        shapes = tuning.shapes(counts, windows_tried, distances, trained, hybrids)
        if not shapes:
            raise ValueError("no max_distance is as large as its window; give larger ones")
    largest = max(shape.window for shape in shapes)
    tokens = tokenize(loaded.tokenizer, content)
    wanted = length or min(PARTS * largest, len(tokens))
    with options.blamed("--text / --length"):
        if len(tokens) < wanted:
            raise ValueError(f"the text has {len(tokens)} tokens, fewer than the {wanted} wanted")
        planned = tuning.planned_tokens(len(shapes), largest, wanted)
    make_folder(out)
    whole = len(shapes) * wanted
    console().print(
        f"{loaded.name}: {len(shapes)} shapes over {wanted:,} tokens; reads "
        f"{whole if grid else planned:,} tokens, a grid {whole:,}",
        highlight=False,
    )
    with options.blamed("--max-mebibytes / --max-ms / --n-global / --window / --max-distance"):
        result = tuning.tune(
            loaded.model,
            tokens.head(wanted).tokens,
            shapes,
            max_bytes=None if max_mebibytes is None else int(max_mebibytes * 2**20),
            max_seconds_per_token=None if max_ms is None else max_ms / 1e3,
            grid=grid,
            chunk=chunk,
        )
    settings = run_facts(loaded, text) | {
        "layers": n_layers,
        "length": wanted,
        "train_length": trained,
        "max_mebibytes": max_mebibytes,
        "max_ms": max_ms,
        "grid": grid,
        "chunk": chunk,
    }
    report_tuning(result, settings, out)
