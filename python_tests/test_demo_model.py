"""The shipped model: it is small, it knows its text, and LM-Infinite carries it past its length."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lminf_cuda.cli.loading import DEMO_MODEL, HELD_OUT
from lminf_cuda.evaluation.findings import findings
from lminf_cuda.evaluation.losses import CUT, LM_INFINITE, VANILLA, Evaluation, evaluate
from lminf_cuda.models.rope import training_length
from lminf_cuda.text.reading import read_text, tokenize

LENGTHS = [256, 512, 1024, 2048, 4096]
MAX_BYTES = 12 * 2**20  # what the package may weigh with it
MIN_HELD_OUT_BYTES = 200_000


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(DEMO_MODEL)


@pytest.fixture(scope="module")
def result(tokenizer) -> Evaluation:
    model = AutoModelForCausalLM.from_pretrained(
        DEMO_MODEL, dtype=torch.float32, attn_implementation="sdpa"
    ).eval()
    text = tokenize(tokenizer, read_text(HELD_OUT))
    length = training_length(model.config)
    return evaluate(model, text, LENGTHS, train_length=length, baseline_stride=64)


def test_it_is_small_and_its_held_out_text_is_long():
    assert sum(path.stat().st_size for path in DEMO_MODEL.iterdir()) <= MAX_BYTES
    assert HELD_OUT.stat().st_size >= MIN_HELD_OUT_BYTES


def test_its_card_says_how_it_was_made():
    facts = json.loads((DEMO_MODEL / "training.json").read_text())
    for name in (
        "parameters",
        "training_length_tokens",
        "steps",
        "held_out_nats_per_byte",
        "machine",
    ):
        assert name in facts
        assert name.replace("_", " ") in (DEMO_MODEL / "README.md").read_text()


def test_a_token_is_a_byte(tokenizer):
    text = "And God said, Let there be light: — “é”\n"
    tokens = tokenizer(text).input_ids
    assert bytes(tokens) == text.encode()
    assert tokenizer.decode(tokens) == text


def test_it_reads_its_text_as_well_as_the_card_says(result):
    """Within 0.15 nats: the card's loss is a mean over all of the text, this one over its start."""
    facts = json.loads((DEMO_MODEL / "training.json").read_text())
    cut = [result.row(CUT, length).nats_per_token for length in LENGTHS]
    assert sum(cut) / len(cut) == pytest.approx(facts["held_out_nats_per_byte"], abs=0.15)


def test_lm_infinite_stays_fluent_where_vanilla_does_not(result):
    for length in LENGTHS[1:]:
        ours, cut = (result.row(m, length).nats_per_token for m in (LM_INFINITE, CUT))
        assert ours <= cut + 0.03
    assert result.row(VANILLA, 4096).nats_per_token > result.row(VANILLA, 256).nats_per_token + 0.5
    assert all(sentence.startswith("Shown: ") for sentence in findings(result)[:1])
