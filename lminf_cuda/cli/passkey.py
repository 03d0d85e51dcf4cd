"""lminf passkey: a number hidden in a long text."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Annotated

import typer

from lminf_cuda.cli import options
from lminf_cuda.cli.loading import check_patch, load, run_facts, trained_length
from lminf_cuda.cli.reports import make_folder, report_passkeys
from lminf_cuda.evaluation import passkey as retrieval
from lminf_cuda.evaluation.tables import console


def passkey(
    model: options.ModelArgument = None,
    lengths: Annotated[
        str | None,
        typer.Option(
            help="Tokens of the prompts, such as 512,1024,...,16384; default: the training length "
            "and two doublings."
        ),
    ] = None,
    depths: Annotated[
        str, typer.Option(help="Where the key stands: 0,0.25,0.5 or a count of even steps.")
    ] = "5",
    trials: Annotated[int, typer.Option(min=1, help="Keys per length and depth.")] = 5,
    seed: Annotated[int, typer.Option(help="Of the keys.")] = 0,
    vanilla: Annotated[
        bool, typer.Option("--vanilla", help="Ask the unpatched model, too.")
    ] = False,
    middle_top_k: options.MiddleTopKOption = 0,
    middle_from_layer: options.MiddleFromLayerOption = 4,
    full_layers: Annotated[
        list[str],
        typer.Option(
            help="Ask once more with the attention of these layers full, such as 0,15,29; may be "
            "given several times."
        ),
    ] = [],  # noqa: B006 (typer copies it)
    n_global: options.NGlobalOption = 16,
    window: options.WindowOption = None,
    max_distance: options.MaxDistanceOption = None,
    dtype: options.DtypeOption = options.Dtype.auto,
    device: options.DeviceOption = options.Device.cpu,
    chunk: options.ChunkOption = 1024,
    out: options.OutOption = Path("lminf_out"),
) -> None:
    """Find a number hidden in a long text: accuracy by length and depth, as table and heat map."""
    wanted = None
    with options.blamed("--lengths"):
        if lengths is not None:
            wanted = options.parse_lengths(lengths)
    with options.blamed("--depths"):
        places = options.parse_depths(depths)
    loaded = load(model, dtype, device)
    patch = options.patch_arguments(n_global, window, max_distance, middle_top_k, middle_from_layer)
    resolved = check_patch(loaded.model, patch)
    with options.blamed("--lengths / --depths"):
        prompts = retrieval.Prompts(loaded.tokenizer)
        wanted = wanted or prompts.default_lengths(trained_length(loaded.model, None))
        retrieval.check_grid(prompts, wanted, places)
    with options.blamed("--full-layers"):
        hybrids = [options.parse_layers(layers) for layers in full_layers]
        for layers in hybrids:
            retrieval.with_full_layers(loaded.model, {}, layers)
    make_folder(out)
    settings = run_facts(loaded) | resolved
    settings |= {
        "trials": trials,
        "seed": seed,
        "chunk": chunk,
        "vanilla": vanilla,
        "full_layers": hybrids,
        "lengths": wanted,
        "depths": places,
    }
    known = retrieval.read_unfinished(settings, out)
    if known:
        console().print("goes on with the run that was broken off", highlight=False)

    def write(results: dict[str, list[retrieval.Cell]]) -> None:
        with suppress(OSError):  # at the end it is tried once more, and said
            retrieval.write_results(results, settings, out, finished=False)

    results = retrieval.compare(
        loaded.model,
        loaded.tokenizer,
        wanted,
        places,
        vanilla=vanilla,
        patch=patch,
        full_layers=hybrids,
        known=known,
        after_each=write,
        trials=trials,
        chunk=chunk,
        seed=seed,
    )
    title = f"{loaded.name}: passkeys found, {trials} keys per field"
    report_passkeys(results, settings, title, out)
