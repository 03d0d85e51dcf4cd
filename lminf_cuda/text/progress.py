"""What the command says on stderr while something takes its time: nothing is silent for long."""

from __future__ import annotations

import math
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from tqdm import tqdm

PATIENCE = 10.0  # seconds of silence


@contextmanager
def progress(total: int, label: str, unit: str) -> Iterator[Any]:
    """A tqdm over `total` units: a bar on a terminal, elsewhere a line every PATIENCE seconds."""
    on_terminal = _on_terminal()
    bar = tqdm(
        total=total,
        desc=label,
        unit=unit,
        unit_scale=unit == "tok",
        leave=False,
        disable=sys.stderr is None,
        delay=0 if on_terminal else math.inf,
        ncols=None if on_terminal else 80,
    )
    # A bar whose next step is far off goes on counting the seconds.
    with bar, _meanwhile(bar.refresh if on_terminal else lambda: _say(str(bar))):
        yield bar


@contextmanager
def waiting(what: str) -> Iterator[None]:
    """For a step of unknown length: says every PATIENCE seconds that it goes on."""
    began = time.monotonic()
    with _meanwhile(lambda: _say(f"{what}: {time.monotonic() - began:.0f} s so far")):
        yield


def _on_terminal() -> bool:
    return sys.stderr is not None and sys.stderr.isatty()


def _say(line: str) -> None:
    write = tqdm.write if _on_terminal() else print  # the first spares the bars that are drawn
    with suppress(OSError, AttributeError):  # stderr is full or closed
        write(line, file=sys.stderr)


@contextmanager
def _meanwhile(action: Callable[[], object]) -> Iterator[None]:
    """Does it every PATIENCE seconds."""
    done = threading.Event()

    def act() -> None:
        while not done.wait(PATIENCE):
            action()

    thread = threading.Thread(target=act, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
