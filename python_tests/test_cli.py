"""The command: what it writes, and that bad input names the argument and the way out."""

import re

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)
from typer.testing import CliRunner

import lminf_cuda
from lminf_cuda import cli
from lminf_cuda.arguments import parse_lengths

TEXT = "In the beginning God created the heaven and the earth. " * 8


def save_tokenizer(folder) -> None:
    vocab = {
        character: n for n, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))
    }
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny Llama of training length 32 in `llama`, a GPT-2 in `gpt2`, and texts."""
    folder = tmp_path_factory.mktemp("cli")
    torch.manual_seed(0)
    llama = LlamaConfig(
        vocab_size=256,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=32,
        bos_token_id=None,
        eos_token_id=None,
    )
    LlamaForCausalLM(llama).save_pretrained(folder / "llama")
    save_tokenizer(folder / "llama")
    GPT2LMHeadModel(GPT2Config(vocab_size=256, n_embd=16, n_layer=1, n_head=2)).save_pretrained(
        folder / "gpt2"
    )
    save_tokenizer(folder / "gpt2")
    (folder / "empty_folder").mkdir()
    (folder / "text.txt").write_text(TEXT)
    (folder / "short.txt").write_text("In the beginning")
    (folder / "empty.txt").write_text("")
    return folder


def lminf(*arguments) -> tuple[int, str]:
    """Exit code and output, with boxes and line breaks taken out of it."""
    result = CliRunner().invoke(cli.app, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, re.sub(r"[\s│─╭╮╰╯]+", " ", result.output)


def test_info_names_versions_kernels_and_instruction_set():
    code, output = lminf("info")
    assert code == 0
    assert lminf_cuda.__version__ in output
    assert torch.__version__ in output
    assert lminf_cuda.ops.cpu_isa() in output
    built = lminf_cuda.ops.backends()
    assert ", ".join(built) in output
    assert ("no CUDA kernels in this build" in output) == ("cuda" not in built)


def test_info_plan_shows_which_kernels_serve_a_shape():
    shape = ("--length", 500, "--window", 64, "--heads", 4, "--kv-heads", 2, "--head-dim", 64)
    code, output = lminf("info", "--plan", *shape)
    assert code == 0
    assert re.search(rf"lambda_attn {lminf_cuda.ops.cpu_isa()} .*lambda_decode", output)
    code, output = lminf("info", "--plan", "--capability", 80, "--no-rope", *shape)
    assert code == 0
    assert re.search(r"lambda_attn sm80 128 64 1 no 16 128 49,792 0 lambda_decode sm80 16", output)
    code, output = lminf("info", "--plan", "--capability", 90, "--window", 4096)
    assert code == 0
    assert re.search(r"lambda_attn \w+ .* lambda_decode sm80 16 16 33 yes 264 128", output)
    code, output = lminf("info", "--plan", "--capability", 90, *shape)
    q, k = (torch.empty(1, heads, 500, 64, dtype=torch.bfloat16) for heads in (4, 2))
    rope = {"inv_freq": torch.ones(32)}
    real = lminf_cuda.kernel_plan(q, k, k, 16, 64, device_capability=90, **rope)
    assert code == 0
    assert real.kernel == "sm90"
    tiles = rf"{real.block_m} {real.block_n} 1 \w+ {real.blocks}"
    assert re.search(rf"lambda_attn sm90 {tiles} ", output)
    code, output = lminf("info", "--plan", "--heads", 7)
    assert code == 2 and "q has 7 heads and k has 8" in output


def test_evaluate_writes_table_plot_and_two_sentences(folder, tmp_path):
    out = tmp_path / "out"
    code, output = lminf(
        *("evaluate", folder / "llama", "--text", folder / "text.txt", "--out", out),
        *("--lengths", "32,64,...,256", "--n-global", 4, "--chunk", 50, "--baseline-stride", 8),
        *("--dtype", "float32"),
    )
    assert code == 0
    for name in ("evaluation.csv", "evaluation.json", "evaluation.png"):
        assert (out / name).stat().st_size > 0
    assert len((out / "evaluation.csv").read_text().splitlines()) == 1 + 3 * 4
    assert "the last 25 to 32 tokens, one window every 8 tokens" in output
    assert "float32 on cpu" in output
    assert len(re.findall(r"(?:NOT shown \(|Shown: )", output)) == 2


def test_evaluate_says_where_vanilla_stopped(folder, tmp_path):
    code, output = lminf(
        *("evaluate", folder / "llama", "--text", folder / "text.txt", "--out", tmp_path),
        *("--lengths", "32,256", "--vanilla-seconds", 0, "--chunk", 16, "--baseline-stride", 1),
    )
    assert code == 0
    assert re.search(r"vanilla stopped at \d+ tokens: its time of 0 s was up", output)
    assert "one window a token (exact)" in output


def test_generate_streams_a_repeatable_text(folder):
    arguments = ("generate", folder / "llama", "--prompt-file", folder / "text.txt")
    options = ("--max-new-tokens", 12, "--seed", 3, "--dtype", "float32")
    first, second = (lminf(*arguments, *options) for _ in range(2))
    assert first == second
    assert first[0] == 0
    assert lminf(*arguments, "--greedy", "--max-new-tokens", 12)[0] == 0


def test_bench_prints_ours_beside_the_peers():
    code, output = lminf(
        *("bench", "--length", 64, "--heads", 2, "--head-dim", 16, "--window", 16),
        *("--n-global", 2, "--peers", "sdpa-mask,sdpa-causal", "--rounds", 1),
    )
    assert code == 0
    for name in ("lambda_attn", "sdpa, same mask", "sdpa, causal"):
        assert name in output


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("256", [256]),
        ("256, 512", [256, 512]),
        ("256,512,...,2048", [256, 512, 1024, 2048]),
        ("100,...,200", [100, 200]),
        ("3,5,...,20,21", [3, 5, 10, 20, 21]),
    ],
)
def test_lengths_and_dots(text, expected):
    assert parse_lengths(text) == expected


def at_least(minimum: int) -> str:
    """What typer says of a number that is too small; newer versions say it in words."""
    return f"(>=|greater than or equal to ){minimum}"


def evaluate_with(**changes):
    """Arguments of a small evaluation with some replaced; None leaves one out."""
    options = {"text": "text.txt", "lengths": "32,64"} | changes
    model = options.pop("model", "llama")
    return ("evaluate", model, options)


def generate_with(**changes):
    options = {"prompt_file": "text.txt"} | changes
    model = options.pop("model", "llama")
    return ("generate", model, options)


@pytest.mark.parametrize(
    ("command", "argument", "way_out"),
    [
        (evaluate_with(text="absent.txt"), "--text", "give the path of a UTF-8 text file"),
        (evaluate_with(text="empty.txt"), "--text", "give a text file with something to read"),
        (evaluate_with(text="short.txt"), "--text", "16 tokens, fewer than the shortest length 32"),
        (evaluate_with(lengths="32,4096"), "--lengths", "give a longer text or leave that length"),
        (evaluate_with(text="short.txt", lengths=None), "--text", "give a longer text"),
        (evaluate_with(lengths="64,32"), "--lengths", "must increase"),
        (evaluate_with(lengths="0,32"), "--lengths", "start at 2 or more"),
        (
            evaluate_with(lengths="many"),
            "--lengths",
            "'many' is not a length; give numbers such as",
        ),
        (evaluate_with(lengths="..."), "--lengths", "is not a length"),
        (evaluate_with(lengths="3,...,10"), "--lengths", "does not arrive at 10"),
        (evaluate_with(lengths="32,..."), "--lengths", "nothing follows the dots"),
        (evaluate_with(dtype="float8"), "--dtype", "'float32'"),
        (evaluate_with(device="tpu"), "--device", "'cpu'"),
        (
            evaluate_with(model="./absent"),
            "MODEL",
            "give a folder with a saved model or a hub name",
        ),
        (evaluate_with(model="empty_folder"), "MODEL", "Give a folder or hub name of a causal"),
        (evaluate_with(model="gpt2"), "MODEL", "supported model types: "),
        (evaluate_with(n_global="-1"), "--n-global", at_least(0)),
        (evaluate_with(window="0"), "--window", at_least(1)),
        (evaluate_with(window="16", max_distance="8"), "--max-distance", "at least 16"),
        (evaluate_with(chunk="0"), "--chunk", at_least(1)),
        (evaluate_with(baseline_stride="33"), "--baseline-stride", "1 to the training length 32"),
        (evaluate_with(vanilla_seconds="-1"), "--vanilla-seconds", at_least(0)),
        (generate_with(prompt_file="absent.txt"), "--prompt-file", "no such text file"),
        (generate_with(prompt_file="empty.txt"), "--prompt-file", "is empty"),
        (generate_with(prompt_file=None), "--prompt-file", "Missing option"),
        (generate_with(temperature="0"), "--temperature", "use greedy for the likeliest"),
        (generate_with(temperature="nan"), "--temperature", "use greedy for the likeliest"),
        (generate_with(temperature="1e-45"), "--temperature", "use greedy for the likeliest"),
        (generate_with(seed=str(2**64)), "--seed", "[<≤]|less than or equal to"),
        (evaluate_with(out="text.txt"), "--out", "give a folder that can be written to"),
        (evaluate_with(out="text.txt/deeper"), "--out", "give a folder that can be written to"),
        (generate_with(top_p="2"), "--top-p", "above 0 and at most 1"),
        (generate_with(max_new_tokens="0"), "--max-new-tokens", at_least(1)),
        (generate_with(model="gpt2"), "MODEL", "supported model types: "),
        (("bench", None, {"peers": "nobody"}), "--peers", "must be among flex, sdpa-mask"),
        (("bench", None, {"kv_heads": "3"}), "--kv-heads", "must divide --heads 8"),
        (("bench", None, {"head_dim": "15"}), "--head-dim", "must be even"),
        (("demo", None, {"longest": "1000000"}), "--longest", "give a longer text"),
    ],
)
def test_bad_input_names_the_argument_and_the_way_out(
    folder, monkeypatch, command, argument, way_out
):
    monkeypatch.chdir(folder)
    name, model, options = command
    flags = [
        part
        for option, value in options.items()
        if value is not None
        for part in ("--" + option.replace("_", "-"), value)
    ]
    code, output = lminf(name, *([model] if model else []), *flags)
    assert code == 2
    assert argument in output
    assert re.search(way_out, output)
    assert "Traceback" not in output


def test_a_shape_without_a_plan_is_named():
    code, output = lminf("info", "--plan", "--head-dim", "10000000")
    assert code == 2
    assert "--plan" in output and "take a smaller one" in output


def test_a_missing_cuda_device_is_named(folder):
    if torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    text = folder / "text.txt"
    code, output = lminf("generate", folder / "llama", "--prompt-file", text, "--device", "cuda")
    assert code == 2
    assert "use --device cpu" in output
