"""lminf demo: the shipped model, on a text longer than it was trained on."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from lminf_cuda.cli import options
from lminf_cuda.cli.evaluate import run_evaluation
from lminf_cuda.cli.generate import write
from lminf_cuda.cli.loading import HELD_OUT, load
from lminf_cuda.cli.reports import make_folder, report
from lminf_cuda.evaluation.findings import findings
from lminf_cuda.evaluation.lengths import check_lengths, default_lengths
from lminf_cuda.evaluation.tables import console
from lminf_cuda.models.patch import patch_model
from lminf_cuda.models.rope import training_length
from lminf_cuda.text.generating import generate as generate_text
from lminf_cuda.text.reading import read_text, tokenize

DEMO_PROMPT = 4096  # characters, and tokens of the shipped model


def demo(
    out: options.OutOption = Path("lminf_out"),
    longest: Annotated[int, typer.Option(min=512, help="Longest length, in tokens.")] = 65_536,
    vanilla_seconds: Annotated[
        float, typer.Option(min=0, help="Vanilla stops after this many seconds.")
    ] = 20.0,
) -> None:
    """Evaluate the shipped model on its held-out text, then write on past its training length."""
    began = time.perf_counter()
    screen = console()
    loaded = load(None, options.Dtype.auto, options.Device.cpu)
    content = read_text(HELD_OUT)
    text = tokenize(loaded.tokenizer, content)
    train_length = training_length(loaded.model.config)
    with options.blamed("--longest"):
        check_lengths([train_length, longest], len(text))
    make_folder(out)
    lengths = default_lengths(train_length, longest)
    screen.print(
        f"reading {longest:,} tokens in three ways (65,536 take one to two minutes on two cores; "
        "--longest sets how many)",
        highlight=False,
    )
    result = run_evaluation(
        loaded,
        text,
        lengths,
        source=HELD_OUT,
        train_length=train_length,
        out=out,
        vanilla_seconds=vanilla_seconds,
    )

    prompt = content[:DEMO_PROMPT]
    screen.print(
        f"\nafter a prompt of {len(prompt):,} characters, {DEMO_PROMPT // train_length} times the "
        "training length, LM-Infinite writes on from where >>> stands:\n",
        highlight=False,
    )
    patch_model(loaded.model)
    write(f"...{prompt[-120:]}>>>")
    generate_text(
        loaded.model, loaded.tokenizer, prompt, write, temperature=0.7, top_p=0.95, seed=0
    )
    print("\n")
    report(result, out)
    for sentence in findings(result):
        screen.print(sentence, highlight=False)
    screen.print(f"(all of it took {time.perf_counter() - began:.0f} s)", highlight=False)
