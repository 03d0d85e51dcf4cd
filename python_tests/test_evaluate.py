"""lminf_cuda.evaluate, generate, plots and bench against naive versions, on tiny random models."""

import json
import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from rich.console import Console
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch.nn.functional import cross_entropy
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lminf_cuda import LambdaCache, patch_model, unpatch_model
from lminf_cuda.evaluation import losses
from lminf_cuda.evaluation.findings import findings
from lminf_cuda.evaluation.lengths import (
    baseline_windows,
    check_lengths,
    chunk_bounds,
    default_lengths,
)
from lminf_cuda.evaluation.losses import (
    CUT,
    LM_INFINITE,
    VANILLA,
    Evaluation,
    Row,
    above_cut,
    evaluate,
    rows_of,
    write_results,
)
from lminf_cuda.evaluation.machine import machine
from lminf_cuda.evaluation.plots import bucket_means, memory_ticks, plot_evaluation
from lminf_cuda.evaluation.speed import (
    OURS,
    SDPA_MASK,
    Shape,
    attention_rows,
    visible_pairs,
    write_rows,
)
from lminf_cuda.evaluation.tables import evaluation_table
from lminf_cuda.evaluation.traces import Trace, recompute, spread_order, stream
from lminf_cuda.text.generating import TextStream, generate
from lminf_cuda.text.reading import Text, read_text, tokenize

TRAIN_LENGTH = 16


def tiny_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=TRAIN_LENGTH,
        bos_token_id=None,
        eos_token_id=None,
    )
    return LlamaForCausalLM(config).eval()


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Token id n is the n-th character of GPT-2's byte alphabet: one token a byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {character: n for n, character in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False)


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return tiny_model()


@pytest.fixture(scope="module")
def tokens() -> torch.Tensor:
    return torch.randint(256, (101,), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def one_shot_nats(model: LlamaForCausalLM, tokens: torch.Tensor) -> np.ndarray:
    """Loss of tokens[1:] from a single forward over everything."""
    logits = model(input_ids=tokens[None, :-1], use_cache=False).logits[0]
    return cross_entropy(logits, tokens[1:], reduction="none").numpy()


# Windows, chunks and lengths


@pytest.mark.parametrize("n_tokens", [1, 2, 15, 16, 17, 18, 40, 101])
@pytest.mark.parametrize("stride", [1, 3, 8, 16])
def test_baseline_windows_score_every_token_once_from_enough_context(n_tokens, stride):
    windows = baseline_windows(n_tokens, TRAIN_LENGTH, stride)
    scored = [t for _, first, end in windows for t in range(first, end)]
    assert scored == list(range(1, n_tokens))
    for start, first, end in windows:
        assert 0 <= start < first < end <= n_tokens
        for t in range(first, end):
            context = t - start
            assert context <= TRAIN_LENGTH
            assert context >= min(t, TRAIN_LENGTH - stride + 1)
            if stride == 1:
                assert context == min(t, TRAIN_LENGTH)


@pytest.mark.parametrize("stride", [0, TRAIN_LENGTH + 1])
def test_baseline_windows_refuse_a_stride_that_leaves_no_context(stride):
    with pytest.raises(ValueError, match=f"stride must be 1 to its context of 16 .*, got {stride}"):
        baseline_windows(100, TRAIN_LENGTH, stride)


@pytest.mark.parametrize("chunk", [1, 7, 16, 1000])
def test_chunks_tile_the_inputs_and_end_at_every_length(chunk):
    lengths = [2, 16, 33, 100]
    bounds = chunk_bounds(lengths, chunk)
    assert [t for start, end in bounds for t in range(start, end)] == list(range(99))
    assert all(end - start <= chunk for start, end in bounds)
    assert {length - 1 for length in lengths} <= {end for _, end in bounds}


@pytest.mark.parametrize(
    ("train_length", "n_tokens", "expected"),
    [
        (256, 240_000, [256 << n for n in range(9)]),
        (256, 1_000, [256, 512]),
        (4096, 10**6, [4096, 8192, 16384, 32768, 65536]),
        (65_536, 10**6, [65_536, 131_072, 262_144]),
    ],
)
def test_default_lengths_double_from_the_training_length(train_length, n_tokens, expected):
    assert default_lengths(train_length, n_tokens) == expected


@pytest.mark.parametrize(
    ("lengths", "n_tokens", "message"),
    [
        ([], 10, "must increase"),
        ([1, 4], 10, "start at 2"),
        ([4, 4], 10, "must increase"),
        ([8, 4], 10, "must increase"),
        ([16, 32], 10, "10 tokens, fewer than the shortest length 16"),
        ([4, 32], 10, "10 tokens, fewer than the longest length 32"),
    ],
)
def test_lengths_that_do_not_fit_are_named(lengths, n_tokens, message):
    with pytest.raises(ValueError, match=message):
        check_lengths(lengths, n_tokens)


# Text


def test_byte_ends_count_bytes_of_multibyte_text():
    text = "aé€😀z"
    tokenized = tokenize(byte_tokenizer(), text)
    assert len(tokenized) == len(text.encode())
    assert tokenized.byte_ends[-1] == len(text.encode())
    assert tokenized.byte_ends[0] == 1
    assert tokenized.bytes_between(1, len(tokenized)) == len(text.encode()) - 1


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "no such text file"), (b"", "is empty"), (b" \n", "is empty"), (b"\xff\xfe", "UTF-8")],
)
def test_unreadable_texts_are_named(tmp_path, content, message):
    path = tmp_path / "text.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
        read_text(path)
    assert "text.txt" in str(error.value)


# Losses


@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_streamed_vanilla_equals_one_forward(model, tokens, chunk):
    bounds = chunk_bounds([16, 50, 101], chunk)
    trace = stream(model, tokens, DynamicCache(config=model.config), bounds)
    np.testing.assert_allclose(trace.nats, one_shot_nats(model, tokens), atol=2e-5)
    assert trace.ends[-1] == 101
    # keys and values, 2 layers, 2 heads of 8 float32 numbers, 100 tokens
    assert trace.cache_bytes[-1] == 2 * 2 * 2 * 8 * 4 * 100


@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_streamed_lm_infinite_equals_one_forward_and_its_cache_keeps_its_size(tokens, chunk):
    model = patch_model(tiny_model(), n_global=3, window=16)
    trace = stream(model, tokens, LambdaCache(model), chunk_bounds([16, 50, 101], chunk))
    np.testing.assert_allclose(trace.nats, one_shot_nats(model, tokens), atol=2e-5)
    assert len(set(trace.cache_bytes)) == 1
    assert trace.cache_bytes[0] > 0


@pytest.mark.parametrize("stride", [1, 5, 16])
def test_cut_baseline_equals_a_forward_per_token(model, tokens, stride):
    trace = recompute(model, tokens, TRAIN_LENGTH, stride)
    naive = [
        one_shot_nats(model, tokens[start : t + 1])[-1]
        for start, first, end in baseline_windows(len(tokens), TRAIN_LENGTH, stride)
        for t in range(first, end)
    ]
    np.testing.assert_allclose(trace.nats, naive, atol=2e-5)
    assert trace.ends[-1] == len(tokens)


def test_cut_windows_begin_with_the_text_s_first_special_token(model, tokens):
    bos = int(tokens[0])
    trace = recompute(model, tokens, TRAIN_LENGTH, 1, bos_token_id=bos)
    last = torch.cat([tokens[:1], tokens[-TRAIN_LENGTH:]])  # the first of 16 is replaced
    assert trace.nats[-1] == pytest.approx(one_shot_nats(model, last)[-1], abs=2e-5)


def test_every_beginning_of_the_order_is_spread_over_each_row():
    windows = baseline_windows(4097, 16, 4)
    lengths = [64, 512, 4097]
    order = spread_order(windows, lengths)
    assert sorted(order) == windows
    for n in (6, 12, 60):
        for first, length in pairwise([1, *lengths]):
            ends = sorted(end for _, _, end in order[:n] if first < end <= length)
            gaps = np.diff([first, *ends, length])
            assert max(gaps) <= 2 * (length - first) * 3 / n + 40


def test_a_cut_baseline_short_of_time_scores_samples_as_it_scores_all(model, tokens):
    tokens = torch.cat([tokens] * 40)
    lengths = [16, 200, len(tokens)]
    whole = recompute(model, tokens, TRAIN_LENGTH, 4)
    part = recompute(model, tokens, TRAIN_LENGTH, 4, lengths=lengths, seconds=0)
    assert whole.sampled == "" and whole.scored == len(tokens) - 1
    chosen = np.isfinite(part.nats)
    assert 0 < chosen.sum() == part.scored < whole.scored
    assert f"{part.scored:,} of {len(tokens) - 1:,} tokens scored" in part.sampled
    np.testing.assert_allclose(part.nats[chosen], whole.nats[chosen], atol=2e-5)


def test_rows_of_samples_say_how_many_and_compare_the_same_tokens():
    text = Text(torch.zeros(10, dtype=torch.int64), np.arange(2, 22, 2))
    ours = Trace(np.arange(9, dtype=np.float32), [10], [1.0], [8])
    cut_nats = np.full(9, np.nan, np.float32)
    cut_nats[[1, 5]] = 0.5, 4.0  # tokens 2 and 6, of which ours has 1 and 5
    cut = Trace(cut_nats, [3, 7], [1.0, 2.0], [0, 0], sampled="2 of 9 tokens scored")
    rows = rows_of(CUT, cut, text, [4, 8, 10])
    assert [(row.nats_per_token, row.scored) for row in rows] == [(0.5, 1), (4.0, 1), (None, None)]
    assert rows[0].bits_per_byte == pytest.approx(0.5 / math.log(2) / 2)
    assert rows[2].note == "2 of 9 tokens scored"
    assert above_cut(ours, cut, [4, 8, 10]) == [0.5, 1.0, None]


def test_rows_are_means_and_rates_between_lengths():
    nats = np.arange(1, 10, dtype=np.float32)  # tokens 1..9
    trace = Trace(nats, ends=[4, 10], seconds=[1.0, 4.0], cache_bytes=[30, 90])
    text = Text(torch.zeros(10, dtype=torch.int64), np.arange(2, 22, 2))  # two bytes a token
    first, second = rows_of("vanilla", trace, text, [4, 10])
    assert first == Row("vanilla", 4, 3, 2.0, pytest.approx(6 / math.log(2) / 6), 3.0, 30)
    assert (second.nats_per_token, second.tokens_per_second, second.cache_bytes) == (6.5, 2.0, 90)


def test_rows_past_a_stop_say_so():
    trace = Trace(np.ones(5, np.float32), [6], [1.0], [10], stopped="no memory")
    text = Text(torch.zeros(10, dtype=torch.int64), None)
    reached, missed = rows_of("vanilla", trace, text, [6, 10])
    assert reached.nats_per_token == 1.0
    assert reached.bits_per_byte is None  # no byte offsets
    assert missed.nats_per_token is None
    assert missed.note == "stopped at 6 tokens: no memory"


def run(model, tokens, **options) -> Evaluation:
    text = Text(tokens, np.arange(1, len(tokens) + 1))
    options = {"n_global": 3, "chunk": 10, "baseline_stride": 4} | options
    return evaluate(model, text, [16, 32, 101], train_length=TRAIN_LENGTH, **options)


def test_evaluate_scores_all_three_and_leaves_the_model_as_it_was(tokens):
    model = tiny_model()
    before = one_shot_nats(model, tokens)
    result = run(model, tokens)
    assert np.array_equal(one_shot_nats(model, tokens), before)
    # up to the window's size all three compute the same thing
    losses = [result.row(m, 16).nats_per_token for m in (VANILLA, LM_INFINITE, CUT)]
    assert losses == pytest.approx([losses[0]] * 3, abs=1e-5)
    assert result.row(VANILLA, 101).nats_per_token == pytest.approx(before[31:].mean(), abs=1e-5)
    assert result.settings["window"] == TRAIN_LENGTH
    assert all(row.tokens_per_second > 0 for row in result.rows)
    assert all(trace.peak_rss_bytes > 0 for trace in result.traces.values())


def test_the_cut_baseline_reads_as_much_as_the_window_unless_told(tokens):
    model = tiny_model()
    assert run(model, tokens, window=8).settings["cut_length"] == 8
    assert run(model, tokens, window=40).settings["cut_length"] == TRAIN_LENGTH
    result = run(model, tokens, window=8, cut_length=12)
    naive = recompute(model, tokens, 12, 4)
    np.testing.assert_allclose(result.traces[CUT].nats, naive.nats, atol=2e-5)
    ours = result.row(LM_INFINITE, 101)
    difference = result.traces[LM_INFINITE].nats[31:] - naive.nats[31:]
    assert ours.above_cut == pytest.approx(difference.mean(), abs=1e-5)


def test_evaluate_without_the_cut_baseline(tokens, tmp_path):
    result = run(tiny_model(), tokens, cut=False)
    assert set(result.traces) == {VANILLA, LM_INFINITE}
    assert result.row(CUT, 32).nats_per_token is None
    assert "recomputed" not in findings(result)[0]
    plot_evaluation(result, tmp_path / "plot.png")
    table = Console(width=120)
    with table.capture() as shown:
        table.print(evaluation_table(result))
    assert "cut: recomputed" not in shown.get()


def test_time_is_told_before_the_work(model, tokens):
    said: list[str] = []
    run(model, tokens, cut_seconds=1e-9, vanilla_seconds=7, say=said.append)
    assert "101 tokens: LM-Infinite about" in said[0]
    assert "of which it takes samples" in said[0]
    assert "vanilla at most about 7 s" in said[0]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(3, "3 s"), (119, "119 s"), (600, "10 minutes"), (9000, "2 hours"), (2e5, "2 days")],
)
def test_durations(seconds, text):
    assert losses.duration(seconds) == text


def test_a_run_that_was_broken_off_goes_on(tokens, tmp_path, monkeypatch):
    model, kept = tiny_model(), losses.Kept(tmp_path / "traces", {"of": "this run"})
    whole = run(model, tokens)
    written: list[set[str]] = []

    def no_time(*_args, **_options):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(losses, "recompute", no_time)
        with pytest.raises(KeyboardInterrupt):
            run(model, tokens, kept=kept, after_each=lambda e: written.append(set(e.traces)))
    assert written == [{LM_INFINITE}]

    with monkeypatch.context() as patch:
        patch.setattr(losses, "stream", no_time)  # another run does not take its traces
        with pytest.raises(KeyboardInterrupt):
            run(model, tokens, kept=losses.Kept(tmp_path / "traces", {"of": "another run"}))

    said: list[str] = []
    streamed = []
    real_stream = losses.stream
    monkeypatch.setattr(
        losses,
        "stream",
        lambda *a, **o: streamed.append(o["label"]) or real_stream(*a, **o),
    )
    result = run(model, tokens, kept=kept, say=said.append)
    assert streamed == [VANILLA]
    assert any("broken off" in line for line in said)
    for method in (VANILLA, LM_INFINITE, CUT):
        np.testing.assert_allclose(result.traces[method].nats, whole.traces[method].nats, atol=2e-5)
    assert not (tmp_path / "traces").exists()


def test_vanilla_stops_when_its_time_is_up(model, tokens):
    result = run(model, tokens, vanilla_seconds=0)
    row = result.row(VANILLA, 101)
    assert row.nats_per_token is None
    assert "its time of 0 s was up" in row.note
    assert result.row(LM_INFINITE, 101).nats_per_token is not None


def test_vanilla_stops_when_memory_would_not_do(model, tokens, monkeypatch):
    monkeypatch.setattr(losses, "available_memory", lambda device: 40_000)
    result = run(model, tokens)
    assert result.row(VANILLA, 32).nats_per_token is not None
    assert "101 tokens need" in result.row(VANILLA, 101).note


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"chunk": 0}, "chunk"),
        ({"vanilla_seconds": -1}, "vanilla_seconds"),
        ({"cut_seconds": -1}, "cut_seconds"),
    ],
)
def test_evaluate_refuses_options_out_of_range(model, tokens, options, name):
    with pytest.raises(ValueError, match=name):
        run(model, tokens, **options)


def test_evaluate_unpatches_after_an_error(tokens):
    model = tiny_model()
    with pytest.raises(IndexError):
        run(model, tokens + 1000)
    with pytest.raises(ValueError, match="not patched"):
        unpatch_model(model)


# What is said about the numbers


def evaluation(vanilla, ours, cut, *, ours_cache=(8, 8, 8), seconds=(9.0, 1.0, 8.0)):
    """An evaluation with the given losses at 16, 32 and 64 tokens."""
    lengths = [16, 32, 64]
    methods = (VANILLA, LM_INFINITE, CUT)
    losses = dict(zip(methods, (vanilla, ours, cut), strict=True))
    caches = {VANILLA: (16, 32, 64), LM_INFINITE: ours_cache, CUT: (0, 0, 0)}
    rows = [
        Row(m, length, 16, losses[m][n], None, 1.0, caches[m][n])
        for m in methods
        for n, length in enumerate(lengths)
    ]
    traces = {
        m: Trace(np.ones(63, np.float32), [64], [s], [caches[m][-1]])
        for m, s in zip(methods, seconds, strict=True)
    }
    settings = {
        "baseline_stride": 4,
        "cut_length": 16,
        "n_global": 3,
        "window": 16,
        "dtype": "float32",
    }
    return Evaluation(lengths, 16, settings, traces, rows)


FLAT, GROWING = (1.0, 1.0, 1.0), (1.0, 2.0, 3.0)


def test_findings_say_what_holds_with_its_numbers():
    fluent, cost = findings(evaluation(GROWING, (1.0, 1.01, 1.02), FLAT))
    assert fluent.startswith("Shown: ")
    assert "1.00 nats per token at 16 to 3.00 at 64" in fluent
    assert "at worst 0.020 nats above" in fluent
    assert cost.startswith("Shown: ")
    assert "a ratio of 8.0" in cost


@pytest.mark.parametrize(
    ("changes", "which", "reason"),
    [
        ({"vanilla": FLAT}, 0, "vanilla's loss does not grow"),
        ({"ours": (1.0, 1.0, 1.04)}, 0, "more than 0.03 nats above"),
        ({"seconds": (1.0, 9.0, 8.0)}, 1, "not faster"),
        ({"ours_cache": (8, 8, 9)}, 1, "cache changes"),
    ],
)
def test_findings_say_what_does_not_hold(changes, which, reason):
    losses = {"vanilla": GROWING, "ours": FLAT, "cut": FLAT}
    sentence = findings(evaluation(**(losses | changes)))[which]
    assert sentence.startswith("NOT shown (")
    assert reason in sentence


def test_findings_without_a_row_past_training_claim_nothing():
    (sentence,) = findings(evaluation((1.0, None, None), FLAT, FLAT))
    assert sentence.startswith("NOT shown")


def test_results_and_plot_are_written(tmp_path):
    result = evaluation(GROWING, FLAT, FLAT)
    write_results(result, tmp_path / "new")
    lines = (tmp_path / "new" / "evaluation.csv").read_text().splitlines()
    assert lines[0].startswith("method,length,tokens,nats_per_token")
    assert len(lines) == 1 + 9
    facts = json.loads((tmp_path / "new" / "evaluation.json").read_text())
    assert facts["rows"][2]["nats_per_token"] == 3.0
    plot_evaluation(result, tmp_path / "evaluation.png")
    assert (tmp_path / "evaluation.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("low", "high", "least"),
    [(0.004, 0.25, 4), (0.8, 130, 4), (91, 560, 3), (45, 46, 2), (1, 9e5, 4)],
)
def test_the_axis_of_memory_has_labels_at_every_scale(low, high, least):
    ticks = memory_ticks(low, high)
    assert ticks == sorted(ticks) and ticks[0] <= low and ticks[-1] >= high
    assert least <= len(ticks) <= 16


def test_bucket_means_leave_out_what_was_not_scored():
    values = np.array([1.0, np.nan, 3.0, np.nan, np.nan])
    positions, means = bucket_means(values, per_octave=1)
    np.testing.assert_allclose(means, [1.0, 3.0])  # positions 1, and 2 to 3; none in 4 to 7
    assert len(positions) == 2


@pytest.mark.parametrize("n", [0, 1, 2, 5, 100, 1000])
def test_bucket_means_weigh_every_value_once(n):
    values = np.random.default_rng(0).normal(size=n)
    positions, means = bucket_means(values, per_octave=4)
    assert np.all(np.diff(positions) > 0)
    if n:
        edges = [p for p in range(1, n + 1) if any(p == math.ceil(2 ** (i / 4)) for i in range(44))]
        naive = [
            np.mean(values[a - 1 : b - 1]) for a, b in zip(edges, [*edges[1:], n + 1], strict=True)
        ]
        np.testing.assert_allclose(means, naive)


# Generation


@pytest.mark.parametrize("text", ["plain words", "naïve — 世界 😀", "é"])
def test_stream_writes_whole_characters_and_all_of_them(text):
    tokenizer = byte_tokenizer()
    pieces: list[str] = []
    stream = TextStream(tokenizer, pieces.append)
    stream.put(torch.tensor([[1, 2, 3]]))  # the prompt
    for token in tokenizer(text).input_ids:
        stream.put(torch.tensor([token]))
    stream.end()
    assert "".join(pieces) == text
    assert len(pieces) == len(text)


def test_stream_does_not_wait_for_ever_on_bytes_that_are_no_text():
    tokenizer = byte_tokenizer()
    lead = tokenizer("€").input_ids[0]
    pieces: list[str] = []
    stream = TextStream(tokenizer, pieces.append)
    stream.put(torch.tensor([[1]]))
    for _ in range(9):
        stream.put(torch.tensor([lead]))
    assert len(pieces) >= 2
    stream.put(torch.tensor(tokenizer("ok").input_ids))
    stream.end()
    assert "".join(pieces).endswith("ok")


@pytest.mark.parametrize("chunk", [1, 7, 1000])
def test_greedy_generation_equals_the_forward_without_a_cache(chunk):
    model = patch_model(tiny_model(), n_global=3, window=16)
    tokenizer = byte_tokenizer()
    prompt = "In the beginning God created the heaven and the earth. " * 2
    new = generate(
        model, tokenizer, prompt, lambda _: None, max_new_tokens=12, greedy=True, chunk=chunk
    )
    tokens = tokenizer(prompt, return_tensors="pt").input_ids
    with torch.no_grad():
        for _ in range(12):
            logits = model(input_ids=tokens, use_cache=False).logits
            tokens = torch.cat([tokens, logits[:, -1:].argmax(-1)], dim=1)
    assert new.tolist() == tokens[0, -12:].tolist()


def test_a_seed_repeats_a_sample():
    model = patch_model(tiny_model(), n_global=3, window=16)
    options = {"max_new_tokens": 8, "temperature": 1.5, "top_p": 0.9}
    runs = [
        generate(model, byte_tokenizer(), "abc", lambda _: None, seed=seed, **options).tolist()
        for seed in (1, 1, 2)
    ]
    assert runs[0] == runs[1] != runs[2]


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        ("", {}, "prompt is empty"),
        ("a", {"max_new_tokens": 0}, "max_new_tokens must be 1 or more, got 0"),
        ("a", {"temperature": 0.0}, "temperature must be above 0"),
        ("a", {"top_p": 1.5}, "top_p must be above 0 and at most 1, got 1.5"),
        ("a", {"chunk": 0}, "chunk must be 1 or more"),
    ],
)
def test_generate_refuses_what_it_cannot_do(prompt, options, message):
    model = patch_model(tiny_model())
    with pytest.raises(ValueError, match=message):
        generate(model, byte_tokenizer(), prompt, lambda _: None, **options)


# Benchmark arithmetic


@pytest.mark.parametrize("length", [1, 5, 16, 17, 40])
@pytest.mark.parametrize("window", [1, 5, 16, 100])
@pytest.mark.parametrize("n_global", [0, 1, 4, 100])
def test_visible_pairs_equal_a_count(length, window, n_global):
    i, j = np.mgrid[:length, :length]
    visible = (i >= j) & ((i - j < window) | (j < n_global))
    assert visible_pairs(length, window, n_global) == visible.sum()


def test_attention_rows_hold_peers_that_agree(tmp_path):
    shape = Shape(1, 4, 2, 96, 16, 24, 3)
    rows = attention_rows(
        shape,
        torch.float32,
        device=torch.device("cpu"),
        peers=("sdpa-mask", "sdpa-causal"),
        rounds=1,
    )
    by_name = {row.name: row for row in rows}
    assert by_name[OURS].times_ours == 1.0
    assert by_name[SDPA_MASK].max_difference < 1e-5
    pairs = visible_pairs(96, 24, 3)
    ours = by_name[OURS]
    assert ours.gflops_per_second * ours.seconds == pytest.approx(4 * 16 * pairs * 4 / 1e9)
    facts = machine(torch.device("cpu"))
    json_path, csv_path = write_rows(rows, shape, facts, tmp_path, "small")
    assert json.loads(json_path.read_text())["machine"]["torch"] == torch.__version__
    assert len(csv_path.read_text().splitlines()) == 1 + len(rows)
