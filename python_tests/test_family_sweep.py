"""Every family that patch_model serves, as family_sweep.py checks it, and the table it wrote."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import transformers
from family_sweep import (
    NEWEST,
    NOT_IN_OLDEST,
    OLDEST,
    RAISES_UNPATCHED,
    all_types,
    all_wrappers,
    by_kind,
    check,
    filled,
    readme_count,
    verdict,
)

from lminf_cuda.models import families
from lminf_cuda.models.families import ENCODER_DECODERS, FAMILIES, WRAPPERS
from lminf_cuda.models.family import Family

ROOT = Path(__file__).parents[1]


pytestmark = pytest.mark.usefixtures("single_threaded", "without_gradients")


# One type for each way in which a family is served, and some that hold a language model.
BY_FAMILY = {repr(family): name for name, family in sorted(FAMILIES.items())}
QUICK = {*BY_FAMILY.values(), *sorted(WRAPPERS)[::10]}
MODEL_TYPES = [
    name if name in QUICK else pytest.param(name, marks=pytest.mark.slow)
    for name in [*sorted(FAMILIES), *sorted(WRAPPERS)]
]


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_family(model_type: str) -> None:
    if model_type not in [*all_types(), *all_wrappers()]:
        pytest.skip("this transformers does not have the type")
    if transformers.__version__ == OLDEST and model_type in NOT_IN_OLDEST:
        if model_type in FAMILIES:
            assert verdict(model_type)[0] in ("refused", "not built")
        pytest.skip("not with this transformers")
    found, note = verdict(model_type, verbose=True)
    if found == "not built" and model_type in RAISES_UNPATCHED:
        pytest.skip(note)
    assert found == "worked", note


def test_the_check_sees_a_wrong_family(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = {
        "glm": Family(),  # pairs (t, t + R/2) instead of neighbours
        "llama": Family(backwards=True),
        "smollm3": Family(),  # rotates layers that do not
        "hunyuan_v1_dense": Family(),  # a norm after the rotation
    }
    monkeypatch.setattr(families, "FAMILIES", FAMILIES)
    for model_type, family in wrong.items():
        monkeypatch.setitem(FAMILIES, model_type, family)
        assert "from the unpatched model" in check(model_type)


def test_a_model_that_fails_by_itself_is_not_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    def forward(*_: object, **__: object) -> None:
        raise AttributeError("of its own")

    monkeypatch.setattr(transformers.LlamaForCausalLM, "forward", forward)
    found, note = verdict("llama")
    assert found == "not built"
    assert note == "unpatched, transformers' own forward raises AttributeError('of its own')"


def listed(page: str, heading: str) -> list[str]:
    """The types below a heading of docs/families.md."""
    found = re.search(rf"^## {heading}\n\n(.*)\n", page, re.M)
    assert found is not None
    return found[1].split(", ")


def test_the_page_and_the_readme_name_the_families() -> None:
    page = (ROOT / "docs" / "families.md").read_text()
    plain = listed(page, "Causal language models")
    recurrent = listed(page, "With recurrent or convolution layers")
    around = listed(page, "Around a language model")
    types = {*plain, *recurrent}
    assert types <= set(FAMILIES), "run family_sweep.py"
    # The others exist inside of models in WRAPPERS alone.
    assert not (set(FAMILIES) - types) & set(all_types())
    assert set(WRAPPERS) - set(around) <= set(RAISES_UNPATCHED)
    assert set(around) <= set(WRAPPERS)
    assert by_kind([*plain, *recurrent, *around]) == (plain, recurrent, around)
    assert listed(page, "Encoder-decoders") == sorted(ENCODER_DECODERS)
    assert ", 0 wrong" in page
    readme = (ROOT / "README.md").read_text()
    assert readme_count([*types, *around]) in readme, "run family_sweep.py"


def test_the_page_is_filled_with_what_was_found() -> None:
    page = (ROOT / "docs" / "families.md").read_text()
    headings = ("Causal language models", "With recurrent or convolution layers")
    worked = [name for h in (*headings, "Around a language model") for name in listed(page, h)]
    rows = dict.fromkeys(worked, ("worked", ""))
    for reason, names in re.findall(r"^\| (.*) \| (.*) \|$", page[page.index("| --- |") :], re.M):
        found = "not built" if reason.startswith("unpatched") else "refused"
        rows |= {name: (found, reason) for name in names.split(", ") if name != "---"}
    version = f"transformers {NEWEST}, "
    again = filled(page, rows).replace(f"transformers {transformers.__version__}, ", version, 1)
    assert again == page
    changed = filled(page, rows | {"llama": ("wrong", "off by 1")})
    assert ", llama, " not in changed and "| off by 1 | llama |" in changed
    with pytest.raises(ValueError, match="has no place like"):
        filled(page.replace("## Encoder-decoders", "## Others"), rows)
