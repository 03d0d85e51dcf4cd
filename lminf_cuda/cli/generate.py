"""lminf generate: writes on where a text of any length ends."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from lminf_cuda.cli import options
from lminf_cuda.cli.loading import check_patch, load
from lminf_cuda.models.patch import patch_model
from lminf_cuda.text.generating import Pace, check_sampling, pinned_tokens, render
from lminf_cuda.text.generating import generate as generate_text
from lminf_cuda.text.reading import read_text


def write(piece: str) -> None:
    """To stdout, at once."""
    print(piece, end="", flush=True)


def read_prompt(path: Path) -> str:
    """The text of a file, or of standard input where the path is "-"."""
    if str(path) != "-":
        return read_text(path)
    prompt = sys.stdin.read()
    if not prompt.strip():
        raise ValueError("standard input is empty; give some text to continue")
    return prompt


def generate(
    prompt_file: Annotated[
        Path,
        typer.Option(help="A UTF-8 text file of any length to continue; -: standard input."),
    ],
    model: options.ModelArgument = None,
    as_chat: Annotated[
        bool, typer.Option("--chat", help="The text is a user's turn; answer it.")
    ] = False,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 256,
    greedy: Annotated[bool, typer.Option("--greedy", help="Take the likeliest token.")] = False,
    temperature: options.TemperatureOption = 0.8,
    top_p: Annotated[float, typer.Option(help="Above 0, at most 1.")] = 0.95,
    seed: options.SeedOption = None,
    n_global: options.NGlobalOption = 16,
    n_global_text: Annotated[
        str | None,
        typer.Option(
            help="Keeps the prompt's beginning visible, up to the end of these words in it, "
            "instead of --n-global tokens."
        ),
    ] = None,
    window: options.WindowOption = None,
    max_distance: options.MaxDistanceOption = None,
    middle_top_k: options.MiddleTopKOption = 0,
    middle_from_layer: options.MiddleFromLayerOption = 4,
    dtype: options.DtypeOption = options.Dtype.auto,
    device: options.DeviceOption = options.Device.cpu,
    chunk: options.ChunkOption = 1024,
) -> None:
    """Continue a text of any length with a cache of fixed size, printing tokens as they come."""
    with options.blamed("--temperature / --top-p"):
        check_sampling(temperature, top_p)
    with options.blamed("--prompt-file"):
        prompt = read_prompt(prompt_file)
    loaded = load(model, dtype, device)
    with options.blamed("--chat"):
        render(loaded.tokenizer, prompt, as_chat)
    if n_global_text is not None:
        with options.blamed("--n-global-text"):
            n_global = pinned_tokens(loaded.tokenizer, prompt, n_global_text, as_chat)
    patch = options.patch_arguments(n_global, window, max_distance, middle_top_k, middle_from_layer)
    check_patch(loaded.model, patch)
    patch_model(loaded.model, **patch)
    paces: list[Pace] = []
    generate_text(
        loaded.model,
        loaded.tokenizer,
        prompt,
        write,
        as_chat=as_chat,
        max_new_tokens=max_new_tokens,
        greedy=greedy,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
        chunk=chunk,
        tell=paces.append,
    )
    print()
    if sys.stderr is not None:  # apart from the text, which may go into a file
        print(paces[0], file=sys.stderr)
