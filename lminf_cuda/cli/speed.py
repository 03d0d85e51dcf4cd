"""lminf speed: a model's reading and writing beside vanilla attention."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lminf_cuda.cli import options
from lminf_cuda.cli.loading import HELD_OUT, check_patch, load, run_facts
from lminf_cuda.cli.reports import make_folder, report_speed
from lminf_cuda.evaluation import model_speed
from lminf_cuda.evaluation.lengths import check_lengths
from lminf_cuda.text.reading import read_text, tokenize


def speed(
    model: options.ModelArgument = None,
    text: options.TextOption = HELD_OUT,
    lengths: Annotated[
        str, typer.Option(help="Tokens read, such as 4096,8192,...,32768.")
    ] = "4096,16384",
    n_global: options.NGlobalOption = 16,
    window: options.WindowOption = None,
    max_distance: options.MaxDistanceOption = None,
    dtype: options.DtypeOption = options.Dtype.auto,
    device: options.DeviceOption = options.Device.cpu,
    chunk: options.ChunkOption = 1024,
    out: options.OutOption = Path("lminf_out"),
) -> None:
    """Time to read a text and to write on, and the cache: LM-Infinite beside vanilla attention."""
    with options.blamed("--lengths"):
        wanted = options.parse_lengths(lengths)
        check_lengths(wanted, max(wanted))
    with options.blamed("--text"):
        content = read_text(text)
    loaded = load(model, dtype, device)
    patch = options.patch_arguments(n_global, window, max_distance)
    resolved = check_patch(loaded.model, patch)
    tokens = tokenize(loaded.tokenizer, content)
    with options.blamed("--text / --lengths"):
        check_lengths(wanted, len(tokens))
    make_folder(out)
    rows = model_speed.speeds(loaded.model, tokens.tokens, wanted, patch, chunk)
    report_speed(rows, run_facts(loaded, text) | resolved | {"chunk": chunk}, out)
