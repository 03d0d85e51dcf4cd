"""Where results go: tables on the terminal, files and plots into a folder."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lminf_cuda.cli.options import blamed
from lminf_cuda.evaluation.findings import mebibytes
from lminf_cuda.evaluation.losses import Evaluation, write_results
from lminf_cuda.evaluation.passkey import Cell
from lminf_cuda.evaluation.passkey import write_results as write_passkeys
from lminf_cuda.evaluation.tables import console, evaluation_table, passkey_table


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
