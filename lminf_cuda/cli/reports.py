"""Where results go: tables on the terminal, files and plots into a folder."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lminf_cuda.cli.options import blamed
from lminf_cuda.evaluation import diagnosis, documents, model_speed, tasks, tuning
from lminf_cuda.evaluation.findings import mebibytes
from lminf_cuda.evaluation.losses import Evaluation, write_results
from lminf_cuda.evaluation.passkey import Cell
from lminf_cuda.evaluation.passkey import write_results as write_passkeys
from lminf_cuda.evaluation.records import write_records
from lminf_cuda.evaluation.tables import (
    console,
    diagnosis_table,
    documents_table,
    evaluation_table,
    passkey_table,
    speed_table,
    tasks_table,
    tuning_table,
)


class CannotWriteError(Exception):
    """Results that do not go into their folder; says why, and the way out."""


@contextmanager
def writing(out: Path) -> Iterator[None]:
    """Turn an error about writing results into a CannotWriteError that names the folder."""
    try:
        yield
    except OSError as error:
        raise CannotWriteError(
            f"the results cannot be written to {out}: {error.strerror or error}; make room there, "
            "or give another --out"
        ) from error


def make_folder(out: Path) -> None:
    """Usage error when the results could not be written there, before they are worked out."""
    with blamed("--out"):
        try:
            out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"{error}; give a folder that can be written to") from error
        if not os.access(out, os.W_OK):
            raise ValueError(f"{out} cannot be written to; give another folder")


def report(result: Evaluation, out: Path) -> None:
    """Write CSV, JSON and PNG to the folder and print the table and where they are.

    Whatever becomes of the one, the other is tried: the results are not worked out a second time.
    """
    from lminf_cuda.evaluation.plots import plot_evaluation  # matplotlib takes a second to import

    screen = console()
    try:
        with writing(out):
            write_results(result, out)
            plot_evaluation(result, out / "evaluation.png")
    finally:
        screen.print(evaluation_table(result))
        peaks = ", ".join(
            f"{name} {mebibytes(trace.peak_rss_bytes)}" for name, trace in result.traces.items()
        )
        screen.print(f"peak resident memory of the process during: {peaks}", highlight=False)
    screen.print(f"table: {out / 'evaluation.csv'}", highlight=False, soft_wrap=True)
    screen.print(f"plot:  {out / 'evaluation.png'}", highlight=False, soft_wrap=True)


def report_passkeys(
    results: dict[str, list[Cell]], settings: dict[str, Any], title: str, out: Path
) -> None:
    """As `report`, of passkeys."""
    from lminf_cuda.evaluation.plots import plot_passkey

    screen = console()
    try:
        with writing(out):
            write_passkeys(results, settings, out)
            plot_passkey(results, title, out / "passkey.png")
    finally:
        for method, cells in results.items():
            screen.print(passkey_table(method, cells))
    screen.print(f"table: {out / 'passkey.csv'}", highlight=False, soft_wrap=True)
    screen.print(f"plot:  {out / 'passkey.png'}", highlight=False, soft_wrap=True)


def report_diagnosis(result: diagnosis.Diagnosis, settings: dict[str, Any], out: Path) -> None:
    """As `report`, of a diagnosis."""
    from lminf_cuda.evaluation.plot_diagnosis import plot_diagnosis

    screen = console()
    rows = diagnosis.layer_numbers(result)
    title = (
        f"{settings['model']} over {result.n_tokens:,} tokens, {settings['dtype']}; LM-Infinite: "
        f"n_global {settings['n_global']}, window {settings['window']:,}"
    )
    try:
        with writing(out):
            diagnosis.write_results(result, rows, settings, out)
            plot_diagnosis(result, title, out / "diagnosis.png")
    finally:
        screen.print(diagnosis_table(rows))
        for sentence in diagnosis.findings(result, rows):
            screen.print(sentence, highlight=False)
    screen.print(f"table: {out / 'diagnosis.csv'}", highlight=False, soft_wrap=True)
    screen.print(f"plot:  {out / 'diagnosis.png'}", highlight=False, soft_wrap=True)


def report_tuning(result: tuning.Tuning, settings: dict[str, Any], out: Path) -> None:
    """As `report`, of a search for the shape."""
    from lminf_cuda.evaluation.plot_tuning import plot_tuning

    screen = console()
    title = f"{settings['model']} over {settings['length']:,} tokens, {settings['dtype']}"
    try:
        with writing(out):
            tuning.write_results(result, settings, out)
            plot_tuning(result, title, out / "tuning.png")
    finally:
        screen.print(tuning_table(result))
        screen.print(
            f"read {result.tokens_read:,} tokens in {result.seconds:,.0f} s; a grid reads "
            f"{result.grid_tokens:,}",
            highlight=False,
        )
        arguments = result.best.shape.arguments(settings["layers"])
        line = ", ".join(f"{name}={value}" for name, value in arguments.items())
        screen.print(f"take: patch_model(model, {line})", highlight=False, soft_wrap=True)
    screen.print(f"table: {out / 'tuning.csv'}", highlight=False, soft_wrap=True)
    screen.print(f"plot:  {out / 'tuning.png'}", highlight=False, soft_wrap=True)


def report_speed(rows: list[model_speed.SpeedRow], settings: dict[str, Any], out: Path) -> None:
    """As `report`, of the speed of a model, without a plot."""
    screen = console()
    try:
        with writing(out):
            model_speed.write_results(rows, settings, out)
    finally:
        screen.print(speed_table(rows))
    screen.print(f"table: {out / 'speed.csv'}", highlight=False, soft_wrap=True)


def report_tasks(results: list[tasks.Result], settings: dict[str, Any], out: Path) -> None:
    """As `report`, of tasks, without a plot."""
    screen = console()
    try:
        with writing(out):
            tasks.write_results(results, settings, out)
    finally:
        screen.print(tasks_table([asdict(result) for result in results], ("region", "prompts")))
    screen.print(f"table: {out / 'tasks.csv'}", highlight=False, soft_wrap=True)


def report_harness(scores: list[dict[str, Any]], settings: dict[str, Any], out: Path) -> None:
    """As `report`, of the tasks of lm-evaluation-harness, without a plot."""
    screen = console()
    try:
        with writing(out):
            write_records(out, "harness", scores, {"settings": settings, "scores": scores})
    finally:
        screen.print(tasks_table(scores, ("metric",)))
    screen.print(f"table: {out / 'harness.csv'}", highlight=False, soft_wrap=True)


def report_documents(rows: list[documents.LengthRow], settings: dict[str, Any], out: Path) -> None:
    """As `report`, of a folder of documents, without a plot."""
    screen = console()
    try:
        with writing(out):
            documents.write_results(rows, settings, out)
    finally:
        screen.print(documents_table(rows))
    screen.print(f"table: {out / 'documents.csv'}", highlight=False, soft_wrap=True)
