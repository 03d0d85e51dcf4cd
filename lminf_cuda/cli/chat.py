"""lminf chat: a conversation of any length."""

from __future__ import annotations

from typing import Annotated

import torch
import typer

from lminf_cuda.cli import options
from lminf_cuda.cli.generate import write
from lminf_cuda.cli.loading import check_patch, load
from lminf_cuda.evaluation.findings import mebibytes
from lminf_cuda.evaluation.tables import console
from lminf_cuda.models.patch import patch_model
from lminf_cuda.text.chatting import Chat


def chat(
    model: options.ModelArgument = None,
    system: Annotated[
        str | None, typer.Option(help="An instruction ahead of the first turn.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Of an answer.")] = 512,
    greedy: Annotated[bool, typer.Option("--greedy", help="Take the likeliest token.")] = False,
    temperature: options.TemperatureOption = 0.8,
    top_p: Annotated[float, typer.Option(help="Above 0, at most 1.")] = 0.95,
    seed: options.SeedOption = None,
    n_global: options.NGlobalOption = 16,
    window: options.WindowOption = None,
    max_distance: options.MaxDistanceOption = None,
    middle_top_k: options.MiddleTopKOption = 0,
    middle_from_layer: options.MiddleFromLayerOption = 4,
    dtype: options.DtypeOption = options.Dtype.auto,
    device: options.DeviceOption = options.Device.cpu,
    chunk: options.ChunkOption = 1024,
) -> None:
    """Talk with a model for as long as you like: the memory stays what it is. One turn a line."""
    loaded = load(model, dtype, device)
    patch = options.patch_arguments(n_global, window, max_distance, middle_top_k, middle_from_layer)
    check_patch(loaded.model, patch)
    patch_model(loaded.model, **patch)
    with options.blamed("--system / --temperature / --top-p"):
        talk = Chat(
            loaded.model,
            loaded.tokenizer,
            system=system,
            max_new_tokens=max_new_tokens,
            greedy=greedy,
            temperature=temperature,
            top_p=top_p,
            chunk=chunk,
        )
    if seed is not None:
        torch.manual_seed(seed)
    screen = console()
    screen.print("/reset forgets the conversation, /exit (or the end of input) ends it")
    while True:
        try:
            text = input("> ")
        except EOFError:
            break
        if text.strip() == "/exit":
            break
        if text.strip() == "/reset":
            talk.reset()
            continue
        if not text.strip():
            continue
        talk.say(text, write)
        print()
        screen.print(
            f"({talk.tokens:,} tokens so far, cache {mebibytes(talk.cache.memory_bytes())})",
            highlight=False,
            style="dim",
        )
