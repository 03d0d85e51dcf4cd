"""The package's modules import one way up, and no file is longer than one can read."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "lminf_cuda"
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in PACKAGE.rglob("*.py")
}
# docs/design.md section 4: nothing imports from a later line.
LAYERS = ("reference", "ops", "models", "text", "evaluation", "cli", "__main__")
LONGEST = 700  # lines


def imported(name: str, known: dict[str, Path]) -> Iterator[str]:
    """The package's modules that a module imports, wherever in it that stands."""
    package = name.split(".") if known[name].name == "__init__.py" else name.split(".")[:-1]
    for node in ast.walk(ast.parse(known[name].read_text())):
        if isinstance(node, ast.Import):
            found = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] if node.level else []
            source = ".".join([*base, *([node.module] if node.module else [])])
            found = [f"{source}.{alias.name}" for alias in node.names]
            found = [module if module in known else source for module in found]
        else:
            continue
        yield from (module for module in found if module in known and module != name)


def cycle(imports: dict[str, set[str]]) -> list[str]:
    """Modules that import each other in a ring; empty where there are none."""
    done: set[str] = set()

    def visit(name: str, path: list[str]) -> list[str]:
        if name in path:
            return [*path[path.index(name) :], name]
        if name not in done:
            for other in sorted(imports[name]):
                if ring := visit(other, [*path, name]):
                    return ring
            done.add(name)
        return []

    return next((ring for name in sorted(imports) if (ring := visit(name, []))), [])


def test_modules_import_no_ring() -> None:
    # But for the package itself, which names what stands below and comes with every import.
    imports = {name: set(imported(name, MODULES)) - {"lminf_cuda"} for name in MODULES}
    assert cycle(imports) == []


def test_a_ring_is_seen(tmp_path: Path) -> None:
    sources = {"a": "from .b import c\n", "b": "def f():\n    from p import c\n", "c": "import p.a"}
    known = {f"p.{name}": tmp_path / f"{name}.py" for name in sources}
    for name, source in sources.items():
        (tmp_path / f"{name}.py").write_text(source)
    imports = {name: set(imported(name, known)) for name in known}
    assert imports == {"p.a": {"p.b"}, "p.b": {"p.c"}, "p.c": {"p.a"}}
    assert cycle(imports) == ["p.a", "p.b", "p.c", "p.a"]


@pytest.mark.parametrize("name", [name for name in MODULES if name != "lminf_cuda"])
def test_modules_import_from_below(name: str) -> None:
    layer = LAYERS.index(name.split(".")[1])
    above = [
        other
        for other in imported(name, MODULES)
        if other != "lminf_cuda" and LAYERS.index(other.split(".")[1]) > layer
    ]
    assert above == []
    if LAYERS[layer] == "reference":
        assert list(imported(name, MODULES)) == []


@pytest.mark.parametrize("folder", ["csrc", "lminf_cuda", "tools", "benchmarks", "python_tests"])
def test_no_file_is_too_long(folder: str) -> None:
    endings = (".py", ".h", ".cpp", ".cuh", ".cu", ".sh")
    lengths = {
        str(path.relative_to(ROOT)): len(path.read_text().splitlines())
        for path in (ROOT / folder).rglob("*")
        if path.suffix in endings
    }
    assert {path: n for path, n in lengths.items() if n > LONGEST} == {}
