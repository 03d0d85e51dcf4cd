"""Puts the tables of a run of real_model.py together, in Markdown."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

VANILLA, OURS, CUT = "vanilla", "LM-Infinite", "cut"
Row = dict[str, str]


def rows(path: Path) -> list[Row]:
    """The lines of a CSV file; none where there is no file."""
    if not path.is_file():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def table(headings: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A Markdown table, numbers on the right."""
    head = [f"| {' | '.join(headings)} |", f"| {' | '.join('---:' for _ in headings)} |"]
    return "\n".join(head + [f"| {' | '.join(line)} |" for line in lines])


def number(text: str, form: str) -> str:
    """A field of a CSV file as people read it; "" where it is empty."""
    return format(float(text), form) if text else ""


def _by_length(folder: Path) -> dict[int, dict[str, Row]]:
    found: dict[int, dict[str, Row]] = {}
    for row in rows(folder / "evaluation.csv"):
        found.setdefault(int(row["length"]), {})[row["method"]] = row
    return found


def lengths(out: Path) -> Iterator[str]:
    """Loss by length, for both windows."""
    whole, short = _by_length(out / "lengths"), _by_length(out / "lengths_2048")
    if not all({VANILLA, OURS} <= set(methods) for methods in whole.values()) or not whole:
        return  # broken off before all methods were done
    settings = json.loads((out / "lengths" / "evaluation.json").read_text())["settings"]
    window = settings["window"]
    headings = [
        "tokens up to",
        "vanilla, nats",
        f"LM-Infinite, window {window:,}",
        "above cut",
        "vanilla cache, MiB",
        "LM-Infinite cache, MiB",
    ]
    if short:
        headings[4:4] = ["LM-Infinite, window 2,048", "above cut"]
    lines = []
    for length, methods in whole.items():
        ours, vanilla = methods[OURS], methods[VANILLA]
        bold = vanilla["nats_per_token"] and length > 8192
        loss = number(vanilla["nats_per_token"], ".3f")
        cells = [
            f"{length:,}",
            f"**{loss}**" if bold else loss or "stopped",
            number(ours["nats_per_token"], ".3f"),
            number(ours["above_cut"], "+.3f"),
        ]
        if short:
            other = short.get(length, {}).get(OURS, {})
            cells += [
                number(other.get("nats_per_token", ""), ".3f"),
                number(other.get("above_cut") or "", "+.3f"),
            ]
        for row in (vanilla, ours):
            size = row["cache_bytes"]
            cells.append(f"{int(size) / 2**20:,.0f}" if size else "")
        lines.append(cells)
    yield table(headings, lines)
    notes = {row["note"] for methods in whole.values() for row in methods.values() if row["note"]}
    yield "\n".join(sorted(f"{note}." for note in notes if note.startswith("stopped")))


def first_tokens(out: Path) -> Iterator[str]:
    """Loss by n_global, for both clamps."""
    found = rows(out / "first_tokens" / "tuning.csv")
    if not found:
        return
    distances = sorted({int(row["max_distance"]) for row in found})
    lines = []
    for n_global in sorted({int(row["n_global"]) for row in found}):
        of = {int(r["max_distance"]): r for r in found if int(r["n_global"]) == n_global}
        lines.append([str(n_global), *(number(of[d]["nats_per_token"], ".3f") for d in distances)])
    yield table(["n_global", *(f"max_distance {d:,}, nats" for d in distances)], lines)


def speed(out: Path) -> Iterator[str]:
    """Reading, writing and memory beside vanilla."""
    found = rows(out / "speed" / "speed.csv")
    if not found:
        return
    lines = []
    for length in sorted({int(row["length"]) for row in found}):
        of = {row["method"]: row for row in found if int(row["length"]) == length}
        cells = [f"{length:,}"]
        for name, form, unit in (
            ("encode_seconds", ",.1f", 1),
            ("decode_ms", ",.1f", 1),
            ("cache_bytes", ",.0f", 2**20),
        ):
            vanilla, ours = (float(of[m][name]) / unit for m in (VANILLA, OURS))
            cells += [
                f"{format(vanilla, form)} / {format(ours, form)}",
                f"{vanilla / ours:.2f}",
            ]
        lines.append(cells)
    headings = ["tokens", "read, s", "times", "write a token, ms", "times", "cache, MiB", "times"]
    yield table(headings, lines)


def passkey(out: Path) -> Iterator[str]:
    """Keys found by method, length and depth."""
    found = rows(out / "passkey" / "passkey.csv")
    if not found:
        return
    places = sorted({(int(r["length"]), float(r["depth"])) for r in found})
    lines = []
    for method in dict.fromkeys(row["method"] for row in found):
        of = {(int(r["length"]), float(r["depth"])): r for r in found if r["method"] == method}
        sizes = {n: row["cache_bytes"] for (n, _), row in of.items()}
        memory = " / ".join(f"{int(x) / 2**20:,.0f}" for x in sizes.values() if x)
        found_there = (f"{float(of[p]['accuracy']):.0%}" if p in of else "" for p in places)
        lines.append([method, *found_there, memory])
    headings = ["method", *(f"{n:,} at {d:.0%}" for n, d in places), "cache, MiB"]
    yield table(headings, lines)


def tune(out: Path) -> Iterator[str]:
    """The shapes that no other beats in loss and memory both."""
    path = out / "tune" / "tuning.json"
    if not path.is_file():
        return
    facts: dict[str, Any] = json.loads(path.read_text())
    best = ", ".join(f"{name}={value}" for name, value in facts["best"].items())
    lines = [
        [
            str(row["n_global"]),
            f"{row['window']:,}",
            f"{row['max_distance']:,}",
            f"{row['nats_per_token']:.3f}",
            f"{row['cache_bytes'] / 2**20:,.1f}",
        ]
        for row in sorted(facts["shapes"], key=lambda row: row["cache_bytes"])
        if row["on_front"]
    ]
    yield table(["n_global", "window", "max_distance", "nats", "MiB"], lines)
    share = facts["tokens_read"] / facts["tokens_of_a_grid"]
    yield (
        f"`patch_model(model, {best})`: chosen among {len(facts['shapes'])} shapes with "
        f"{share:.0%} of the tokens that a grid reads."
    )


def diagnose(out: Path) -> Iterator[str]:
    """The sentences about the three factors."""
    path = out / "diagnose" / "diagnosis.json"
    if path.is_file():
        yield "\n".join(json.loads(path.read_text())["findings"])


SECTIONS = {
    "Loss by length": lengths,
    "First tokens (window 512)": first_tokens,
    "Speed and memory, vanilla / LM-Infinite (window 2,048)": speed,
    "Passkeys found (window 512)": passkey,
    "What leads out of distribution": diagnose,
    "The shape": tune,
}
BEGIN, END = "<!-- written by real_model.py -->", "<!-- until here, by real_model.py -->"
FOLDER = "benchmarks/results/real"


def machine_of(out: Path) -> str:
    """The machine and the versions of a run."""
    for path in sorted(out.glob("*/*.json")):
        settings = json.loads(path.read_text()).get("settings", {})
        if "machine" in settings:
            machine = settings["machine"]
            return (
                f"{machine['cpu']}, {machine['threads']} threads, {machine['instruction_set']}, "
                f"torch {machine['torch']}, {settings['dtype']}"
            )
    return ""


def minutes_of(out: Path) -> str:
    """How long the parts took, where that is known."""
    seconds = [json.loads(path.read_text())["seconds"] for path in out.glob("*/done.json")]
    return f"{len(seconds)} parts in {sum(seconds) / 60:.0f} minutes" if seconds else ""


def summarize(out: Path) -> str:
    """All tables that are there, and the machine that they were made on."""
    facts = ", ".join(filter(None, (machine_of(out), minutes_of(out))))
    texts = ["# SmolLM2-135M-Instruct: what `make real` found", f"{facts}."]
    for title, section in SECTIONS.items():
        found = [text for text in section(out) if text]
        if found:
            texts += [f"## {title}", *found]
    return "\n\n".join(texts) + "\n"


def _under(words: str, section: Iterator[str]) -> list[str]:
    """The words and what they introduce, or nothing."""
    found = list(section)
    return [words, *found] if found else []


def headline(out: Path) -> str:
    """What stands first in the project's README: a picture, the losses, the first tokens, speed."""
    settings = json.loads((out / "lengths" / "evaluation.json").read_text())["settings"]
    texts = [
        f"![Loss by position and memory of {settings['model']}]({FOLDER}/lengths/evaluation.png)",
        f"SmolLM2-135M-Instruct, trained by others on 8,192 tokens at a time, reads a book "
        f"(`make real`; {machine_of(out)}). A row is the mean loss over the tokens after the "
        "previous length; *above cut* compares with the unchanged model recomputed from scratch on "
        "a context cut to the same window, on samples of the same tokens. "
        f"[All tables]({FOLDER}/summary.md).",
        *lengths(out),
        *_under(
            "What the first tokens are worth, with a window of 512 (the paper's table 4):",
            first_tokens(out),
        ),
        *_under(
            "Time and memory, vanilla / LM-Infinite with a window of 2,048. The paper has 3.16 "
            "times for reading and 2.72 times for writing at 32k on a GPU, and 7.5 times the "
            "memory:",
            speed(out),
        ),
    ]
    return "\n\n".join(text for text in texts if text)


def write_readme(path: Path, out: Path) -> None:
    """Puts the headline between the marks in the README.

    Raises ValueError when the marks are not there.
    """
    text = path.read_text(encoding="utf-8")
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{path} has no {BEGIN} before {END}; put them where the tables belong")
    path.write_text(f"{before}{BEGIN}\n{headline(out)}\n{END}{after}", encoding="utf-8")
