"""lminf generate: writes on where a text of any length ends."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lminf_cuda.cli import options
from lminf_cuda.cli.loading import load
from lminf_cuda.models.patch import patch_model
from lminf_cuda.text.generating import check_sampling
from lminf_cuda.text.generating import generate as generate_text
from lminf_cuda.text.reading import read_text


def write(piece: str) -> None:
    """To stdout, at once."""
    print(piece, end="", flush=True)


def generate(
    prompt_file: Annotated[Path, typer.Option(help="A UTF-8 text file of any length to continue.")],
    model: options.ModelArgument = None,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 256,
    greedy: Annotated[bool, typer.Option("--greedy", help="Take the likeliest token.")] = False,
    temperature: options.TemperatureOption = 0.8,
    top_p: Annotated[float, typer.Option(help="Above 0, at most 1.")] = 0.95,
    seed: options.SeedOption = None,
    n_global: options.NGlobalOption = 16,
    window: options.WindowOption = None,
    max_distance: options.MaxDistanceOption = None,
    dtype: options.DtypeOption = options.Dtype.auto,
    device: options.DeviceOption = options.Device.cpu,
    chunk: options.ChunkOption = 1024,
) -> None:
    """Continue a text of any length with a cache of fixed size, printing tokens as they come."""
    with options.blamed("--temperature / --top-p"):
        check_sampling(temperature, top_p)
    with options.blamed("--prompt-file"):
        prompt = read_text(prompt_file)
    loaded = load(model, dtype, device)
    with options.blamed("MODEL / --n-global / --window / --max-distance"):
        patch_model(loaded.model, n_global=n_global, window=window, max_distance=max_distance)
    generate_text(
        loaded.model,
        loaded.tokenizer,
        prompt,
        write,
        max_new_tokens=max_new_tokens,
        greedy=greedy,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
        chunk=chunk,
    )
    print()
