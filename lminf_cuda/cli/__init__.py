"""The command `lminf`: evaluate, generate, passkey, diagnose, tune and others; a file each.

options.py says what their arguments stand for, loading.py brings the model, reports.py writes what
came of it.
"""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from typing import NoReturn

import typer

from lminf_cuda.cli import (
    bench,
    chat,
    demo,
    diagnose,
    eval,
    evaluate,
    generate,
    info,
    passkey,
    speed,
    tune,
)
from lminf_cuda.cli.reports import CannotWriteError

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="LM-Infinite: pretrained language models on texts far longer than they were trained on.",
)
for command in (
    evaluate.evaluate,
    generate.generate,
    passkey.passkey,
    diagnose.diagnose,
    tune.tune,
    speed.speed,
    chat.chat,
    demo.demo,
    bench.bench,
    info.info,
):
    app.command()(command)
app.command("eval")(eval.evaluate_tasks)


def main() -> None:
    """Entry point of the command: what cannot be written ends it with one line on stderr."""
    if sys.stdout is not None and hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # a terminal that has no such character
    try:
        try:
            app()
        finally:
            if sys.stdout is not None:
                sys.stdout.flush()  # what fails when the interpreter ends is told by a traceback
    except BrokenPipeError:  # the reader has seen enough, as in `lminf generate | head`
        _fail(None)
    except CannotWriteError as error:
        _fail(str(error))
    except OSError as error:
        reason = error.strerror or str(error)
        _fail(f"{error.filename or 'the output cannot be written'}: {reason}")


def _fail(message: str | None) -> NoReturn:
    """Exit with 1, without another try to write what stdout still holds."""
    with suppress(OSError, ValueError, AttributeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    if message is not None and sys.stderr is not None:
        with suppress(OSError):
            print(f"lminf: {message}", file=sys.stderr, flush=True)
    sys.exit(1)
