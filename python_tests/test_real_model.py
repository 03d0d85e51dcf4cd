"""tools/real_model.py: what it does without a network, and that its commands are commands."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import pytest
import typer
from test_cli import folder, lminf  # noqa: F401  (a fixture)

from lminf_cuda import cli

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))
import real_model
import real_summary


def test_the_cache_folder_can_be_moved(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("LMINF_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert real_model.cache_folder() == tmp_path / "lminf_cuda"
    monkeypatch.setenv("LMINF_CACHE", str(tmp_path / "other"))
    assert real_model.cache_folder() == tmp_path / "other"


def test_weights_that_are_not_those_expected_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "weights"
    path.write_bytes(b"x")
    with pytest.raises(RuntimeError, match=r"sha256 2d711642b726.*expected 00"):
        real_model.check_sha256(path, "00")


def test_plain_text_of_a_page() -> None:
    page = (
        "<html><head><title>no</title></head><body><h1>A &amp; B</h1>\n<p>one\n two<br>three"
        "</p><script>no()</script><p>f&uuml;nf <b>six</b></p></body></html>"
    )
    assert real_model.plain_text(page) == "A & B\n\none two\n\nthree\n\nfünf six"


def test_without_debian_packages_the_held_out_text_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))  # no apt-get, no dpkg
    said: list[str] = []
    texts = real_model.fetch_texts(tmp_path, said.append)
    assert {path.name for path in texts.values()} == {"held_out.txt"}
    assert len(said) == 2 and "held-out text instead" in said[0]


@pytest.mark.parametrize("part", real_model.PARTS, ids=lambda part: part.name)
def test_every_part_is_a_command(part: real_model.Part, tmp_path: Path) -> None:
    texts = {"book": tmp_path / "book.txt", "bible": tmp_path / "bible.txt"}
    command = part.command(tmp_path, texts, tmp_path / "out")
    assert command[1:3] == ["-m", "lminf_cuda"]
    group = typer.main.get_command(cli.app)
    name, *arguments = command[3:]
    context = group.commands[name].make_context(name, arguments)  # type: ignore[attr-defined]
    assert context.params["out"] == tmp_path / "out" / part.name


def a_part(name: str, arguments: str) -> real_model.Part:
    return real_model.part(name, name, 0.1, arguments, "book")


@pytest.fixture
def two_parts(
    folder: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Path:
    parts = (a_part("one", "speed --lengths 32,64"), a_part("two", "speed --lengths 64"))
    monkeypatch.setattr(real_model, "PARTS", parts)
    monkeypatch.setattr(real_model, "fetch_model", lambda cache, say: folder / "llama")
    monkeypatch.setattr(real_model, "fetch_texts", lambda cache, say: {"book": folder / "text.txt"})
    monkeypatch.syspath_prepend(str(Path(real_model.__file__).parent))
    return tmp_path / "out"


def test_a_run_goes_on_where_it_was_broken_off(
    two_parts: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = ["--out", str(two_parts)]
    real_model.main([*out, "--only", "one"])
    assert (two_parts / "one" / "speed.csv").is_file()
    assert json.loads((two_parts / "one" / "done.json").read_text())["seconds"] >= 0
    capfd.readouterr()
    real_model.main(out)
    said = capfd.readouterr().out
    assert "1 of 2, one: done before" in said
    assert (two_parts / "two" / "done.json").is_file()
    assert "two: " in (two_parts / "log.txt").read_text()


def test_it_ends_when_its_time_is_up(two_parts: Path, capfd: pytest.CaptureFixture[str]) -> None:
    began = time.monotonic()
    real_model.main(["--out", str(two_parts), "--seconds", "0.2"])
    assert time.monotonic() - began < 30
    assert "0.2 s are up; run it again" in capfd.readouterr().out
    assert not (two_parts / "one" / "done.json").exists()
    assert not (two_parts / "summary.md").exists()


def test_what_fails_is_said_with_its_log(two_parts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(real_model, "PARTS", (a_part("bad", "speed --lengths 1"),))
    with pytest.raises(RuntimeError, match=r"(?s)bad failed; the end of .*lengths must increase"):
        real_model.main(["--out", str(two_parts)])


def test_it_says_beforehand_how_long_it_takes(capsys: pytest.CaptureFixture[str]) -> None:
    real_model.main(["--list"])
    said = capsys.readouterr().out
    assert all(part.name in said for part in real_model.PARTS)
    assert sum(part.minutes for part in real_model.PARTS) < 38


def test_the_readme_s_tables_are_those_of_the_run(two_parts: Path, tmp_path: Path) -> None:
    """Between the marks, and nothing else changes."""
    rows = [
        *("vanilla,16384,10,4.5,,,754974720,,,", "LM-Infinite,16384,10,3.25,,,188743680,,,0.0125"),
        *(
            "vanilla,32768,10,,,,,stopped at 20 tokens: x,,",
            "LM-Infinite,32768,10,3.5,,,188743680,,,",
        ),
    ]
    (two_parts / "lengths").mkdir(parents=True)
    (two_parts / "lengths" / "evaluation.csv").write_text(
        "method,length,tokens,nats_per_token,bits_per_byte,tokens_per_second,cache_bytes,note,"
        "scored,above_cut\n" + "\n".join(rows) + "\n"
    )
    (two_parts / "lengths" / "evaluation.json").write_text(
        json.dumps({"settings": {"model": "a model", "window": 8192}})
    )
    page = tmp_path / "README.md"
    page.write_text(f"above\n{real_summary.BEGIN}\nold\n{real_summary.END}\nbelow\n")
    for _ in range(2):
        real_summary.write_readme(page, two_parts)
    text = page.read_text()
    assert text.startswith("above\n") and text.endswith("\nbelow\n") and "old" not in text
    assert "| 16,384 | **4.500** | 3.250 | +0.013 | 720 | 180 |" in text
    assert "| 32,768 | stopped | 3.500 |  |  | 180 |" in text
    assert "stopped at 20 tokens: x." in text
    page.write_text("no marks")
    with pytest.raises(ValueError, match="put them where the tables belong"):
        real_summary.write_readme(page, two_parts)


def test_the_summary_says_what_the_files_say(tmp_path: Path) -> None:
    for name in ("speed", "passkey", "first_tokens"):
        (tmp_path / name).mkdir()
    (tmp_path / "speed" / "speed.csv").write_text(
        "method,length,encode_seconds,decode_ms,cache_bytes\n"
        "LM-Infinite,16384,10.0,5.0,1048576\nvanilla,16384,25.0,20.0,8388608\n"
    )
    (tmp_path / "passkey" / "passkey.csv").write_text(
        "method,length,depth,trials,found,cache_bytes,accuracy\nvanilla,512,0.5,4,1,2097152,0.25\n"
    )
    (tmp_path / "first_tokens" / "tuning.csv").write_text(
        "n_global,max_distance,nats_per_token\n0,512,3.5\n0,8192,3.6\n16,512,2.5\n16,8192,2.6\n"
    )
    text = real_summary.summarize(tmp_path)
    assert "| 16,384 | 25.0 / 10.0 | 2.50 | 20.0 / 5.0 | 4.00 | 8 / 1 | 8.00 |" in text
    assert "| vanilla | 25% | 2 |" in text
    assert "| 0 | 3.500 | 3.600 |" in text and "| 16 | 2.500 | 2.600 |" in text
