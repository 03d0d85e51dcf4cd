"""lminf eval: a model on tasks over long prompts and on folders of documents."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from lminf_cuda.cli import options
from lminf_cuda.cli.loading import check_patch, load, run_facts, trained_length
from lminf_cuda.cli.reports import make_folder, report_documents, report_harness, report_tasks
from lminf_cuda.evaluation import documents, harness, tasks
from lminf_cuda.evaluation.lengths import check_lengths
from lminf_cuda.evaluation.synthetic import TASKS


def evaluate_tasks(
    model: options.ModelArgument = None,
    names: Annotated[
        str,
        typer.Option(
            "--tasks",
            help=f"With commas: {', '.join(TASKS)}, made here; others are lm-evaluation-harness's.",
        ),
    ] = "",
    questions: Annotated[
        Path | None,
        typer.Option(help="JSON lines of document, question, answer (or answers); scored by F1."),
    ] = None,
    folder: Annotated[
        Path | None,
        typer.Option("--documents", help="A folder of .txt files: loss by length, with intervals."),
    ] = None,
    lengths: Annotated[
        str | None,
        typer.Option(help="Tokens of the prompts or texts; default: twice the training length."),
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="Prompts of a task and length.")] = 5,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Prompts of a task of lm-evaluation-harness.")
    ] = None,
    include: Annotated[
        str | None, typer.Option(help="A folder with tasks of your own for lm-evaluation-harness.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the prompts made here.")] = 0,
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
) -> None:
    """Tasks over long prompts: LM-Infinite beside vanilla and a truncated prompt, in one table."""
    wanted = [name.strip() for name in names.split(",") if name.strip()]
    own = [name for name in wanted if name in TASKS]
    others = [name for name in wanted if name not in TASKS]
    with options.blamed("--tasks / --questions / --documents"):
        if not wanted and questions is None and folder is None:
            raise ValueError("there is nothing to do; give at least one of them")
        if others:
            harness.check_installed()
    with options.blamed("--questions"):
        asked = tasks.question_prompts(questions) if questions is not None else []
    with options.blamed("--documents"):
        paths = documents.find_documents(folder) if folder is not None else []
    loaded = load(model, dtype, device)
    trained = trained_length(loaded.model, train_length)
    with options.blamed("--lengths"):
        sizes = options.parse_lengths(lengths) if lengths is not None else [2 * trained]
        check_lengths(sizes, max(sizes))
    patch = options.patch_arguments(n_global, window, max_distance, middle_top_k, middle_from_layer)
    resolved = check_patch(loaded.model, patch)
    with options.blamed("--tasks / --lengths"):
        prompts = [
            prompt
            for name in own
            for length in sizes
            for prompt in tasks.synthetic_prompts(loaded.tokenizer, name, length, samples, seed)
        ]
    make_folder(out)
    facts: dict[str, Any] = run_facts(loaded) | resolved
    facts |= {"lengths": sizes, "samples": samples, "seed": seed, "chunk": chunk}
    prompts += asked
    if prompts:
        found = tasks.run(loaded.model, loaded.tokenizer, prompts, patch=patch, chunk=chunk)
        report_tasks(found, facts, out)
    if paths:
        with options.blamed("--documents / --lengths"):
            rows = documents.evaluate_documents(
                loaded.model, loaded.tokenizer, paths, sizes, patch=patch, chunk=chunk
            )
        report_documents(rows, facts | {"documents": len(paths)}, out)
    if others:
        with options.blamed("MODEL / --tasks"):
            scores = harness.run(
                loaded.model,
                loaded.tokenizer,
                others,
                patch=patch,
                max_length=max(sizes),
                train_length=trained,
                chunk=chunk,
                limit=limit,
                include=include,
            )
        report_harness([asdict(score) for score in scores], facts, out)
