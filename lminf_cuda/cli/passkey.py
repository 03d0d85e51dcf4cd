"""lminf passkey: a number hidden in a long text."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from lminf_cuda.cli import options
from lminf_cuda.cli.loading import load
from lminf_cuda.cli.reports import make_folder, report_passkeys
from lminf_cuda.evaluation import passkey as retrieval
from lminf_cuda.models.patch import patch_model, unpatch_model
from lminf_cuda.models.rope import training_length


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
    middle_top_k: Annotated[
        int, typer.Option(min=0, help="Middle tokens per head (the paper: 5); 0: none.")
    ] = 0,
    middle_from_layer: Annotated[int, typer.Option(min=0, help="First layer with them.")] = 4,
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
    patch: dict[str, Any] = {"n_global": n_global, "window": window, "max_distance": max_distance}
    if middle_top_k:
        patch |= {"middle_top_k": middle_top_k, "middle_from_layer": middle_from_layer}
    with options.blamed("MODEL / --n-global / --window / --max-distance / --middle-from-layer"):
        patch_model(loaded.model, **patch)
        unpatch_model(loaded.model)
    with options.blamed("--lengths / --depths"):
        prompts = retrieval.Prompts(loaded.tokenizer)
        wanted = wanted or prompts.default_lengths(training_length(loaded.model.config))
        retrieval.check_grid(prompts, wanted, places)
    make_folder(out)
    results = retrieval.compare(
        loaded.model,
        loaded.tokenizer,
        wanted,
        places,
        vanilla=vanilla,
        patch=patch,
        trials=trials,
        chunk=chunk,
        seed=seed,
    )
    settings = patch | {
        "model": loaded.name,
        "trials": trials,
        "seed": seed,
        "dtype": str(loaded.model.dtype).removeprefix("torch."),
    }
    title = f"{loaded.name}: passkeys found, {trials} keys per field"
    report_passkeys(results, settings, title, out)
