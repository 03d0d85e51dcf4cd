"""The command: what it writes, and that bad input names the argument and the way out."""

import contextlib
import functools
import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

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
from lminf_cuda.cli import loading
from lminf_cuda.cli.loading import load
from lminf_cuda.cli.options import Device, Dtype, parse_lengths
from lminf_cuda.evaluation import speed
from lminf_cuda.models import compat
from lminf_cuda.text import progress

TEXT = "In the beginning God created the heaven and the earth. " * 8


def save_tokenizer(folder) -> None:
    vocab = {
        character: n for n, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))
    }
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)


def llama_config(vocab_size: int) -> LlamaConfig:
    """Of a tiny model, trained on 32 tokens at a time."""
    return LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=32,
        bos_token_id=None,
        eos_token_id=None,
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny Llama of training length 32 in `llama`, a GPT-2 in `gpt2`, and texts."""
    folder = tmp_path_factory.mktemp("cli")
    torch.manual_seed(0)
    LlamaForCausalLM(llama_config(256)).save_pretrained(folder / "llama")
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


def lminf(*arguments, given: str | None = None) -> tuple[int, str]:
    """Exit code and output, with boxes and line breaks taken out of it; `given` on stdin."""
    result = CliRunner().invoke(cli.app, [str(argument) for argument in arguments], input=given)
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
    (code, first), (_, second) = (lminf(*arguments, *options) for _ in range(2))
    assert code == 0
    assert first.partition("prompt:")[0] == second.partition("prompt:")[0]
    assert re.search(r"prompt: 440 tokens in .*written: 12 tokens, [\d.]+ tokens/s", first)
    assert lminf(*arguments, "--greedy", "--max-new-tokens", 12)[0] == 0


def test_generate_reads_standard_input_and_keeps_a_beginning_visible(folder):
    command = ("generate", folder / "llama", "--prompt-file", "-", "--max-new-tokens", 2)
    run = functools.partial(lminf, *command, given=TEXT)
    assert "prompt: 440 tokens" in run()[1]
    assert "prompt: 440 tokens" in run("--n-global-text", "God created")[1]
    code, output = run("--n-global-text", "the seventh day")
    assert code == 2 and "does not stand in the prompt" in output
    code, output = lminf(*command, given=" ")
    assert code == 2 and "standard input is empty" in output
    code, output = run("--chat")
    assert code == 2 and "no chat template" in output


def test_middle_tokens_are_options_of_all_that_read(folder, tmp_path):
    middle = ("--middle-top-k", 2, "--middle-from-layer", 1, "--window", 16)
    text = folder / "text.txt"
    code, output = lminf(
        "generate", folder / "llama", "--prompt-file", text, "--max-new-tokens", 2, *middle
    )
    assert code == 0 and "cache" in output
    code, _ = lminf(
        *("evaluate", folder / "llama", "--text", text, "--out", tmp_path, "--lengths", "32,64"),
        *("--no-cut", "--chunk", 1, *middle),
    )
    assert code == 0
    settings = json.loads((tmp_path / "evaluation.json").read_text())["settings"]
    assert (settings["middle_top_k"], settings["middle_from_layer"]) == (2, 1)
    code, output = lminf("chat", folder / "llama", *middle, given="hello\n/exit\n")
    assert code == 0 and "tokens so far" in output


def test_evaluate_notes_what_it_read_and_where(folder, tmp_path):
    text = folder / "text.txt"
    code, output = lminf(
        *("evaluate", folder / "llama", "--text", text, "--out", tmp_path, "--lengths", "32,128"),
        *("--window", 16, "--train-length", 24, "--no-cut", "--vanilla-seconds", 5),
    )
    assert code == 0
    facts = json.loads((tmp_path / "evaluation.json").read_text())
    assert facts["train_length"] == 24
    settings = facts["settings"]
    assert settings["text"] == "text.txt"
    assert settings["text_sha256"] == hashlib.sha256(text.read_bytes()).hexdigest()
    assert (settings["window"], settings["max_distance"], settings["cut_length"]) == (16, 16, 16)
    for name in ("torch", "threads", "cpu"):
        assert settings["machine"][name]
    assert settings["transformers"] and settings["chunk"] == 1024
    assert {row["method"] for row in facts["rows"]} == {"vanilla", "LM-Infinite"}
    assert "128 tokens: LM-Infinite about" in output
    assert not (tmp_path / "traces").exists()


def test_bench_prints_ours_beside_the_peers():
    code, output = lminf(
        *("bench", "--length", 64, "--heads", 2, "--head-dim", 16, "--window", 16),
        *("--n-global", 2, "--peers", "sdpa-mask,sdpa-causal", "--rounds", 1),
    )
    assert code == 0
    for name in ("lambda_attn", "sdpa, same mask", "sdpa, causal"):
        assert name in output


def test_bench_writes_what_it_prints(tmp_path):
    code, output = lminf(
        *("bench", "--length", 64, "--heads", 2, "--head-dim", 16, "--window", 16, "--peers", ""),
        *("--rounds", 1, "--dtype", "float32", "--dtype", "bfloat16", "--out", tmp_path / "new"),
    )
    assert code == 0
    results = sorted((tmp_path / "new").iterdir())
    assert [path.suffix for path in results] == [".csv", ".json"]
    assert all(path.name in output.replace("\n", "") for path in results)
    assert all(path.stem.endswith("_b1_h2_kv2_s64_d16_w16_g16") for path in results)
    facts = json.loads(results[1].read_text())
    assert {row["dtype"] for row in facts["rows"]} == {"float32", "bfloat16"}
    assert facts["machine"]["threads"] == torch.get_num_threads()


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
        (evaluate_with(baseline_stride="33"), "--baseline-stride", "1 to its context of 32 tokens"),
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


def test_info_shows_the_tested_versions_and_warns_outside(monkeypatch):
    monkeypatch.setattr(compat, "TESTED", ("5.4.0", "999.0"))
    code, output = lminf("info")
    assert code == 0
    assert f"{compat.transformers.__version__} (tested: 5.4.0 to 999.0)" in output
    assert "warning" not in output
    monkeypatch.setattr(compat, "TESTED", ("1.0", "1.2"))
    code, output = lminf("info")
    assert code == 0
    assert f"warning: {compat.version_note()}" in output


# What cannot be written: stdout on a full disk, a reader that has gone, a full folder.

needs_dev_full = pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")

WRITES = {
    "info": ["info"],
    "plan": ["info", "--plan"],
    "help": ["--help"],
    "bench": ["bench", "--length", "64", "--peers", "sdpa-mask", "--rounds", "1"],
    "generate": ["generate", "llama", "--prompt-file", "text.txt", "--max-new-tokens", "9"],
    "chat": ["chat", "llama", "--max-new-tokens", "4"],
    "evaluate": ["evaluate", "llama", "--text", "text.txt", "--lengths", "32,64"],
    "passkey": ["passkey", "llama", "--lengths", "512", "--depths", "0.5", "--trials", "1"],
}


def run_main(monkeypatch, command, stdout) -> int:
    """The exit code of the entry point; the command's stdin is one line."""
    monkeypatch.setattr(sys, "argv", ["lminf", *command])
    monkeypatch.setattr(sys, "stdout", stdout)
    monkeypatch.setattr(sys, "stdin", io.StringIO("In the beginning\n"))
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return ended.value.code


@needs_dev_full
@pytest.mark.parametrize("name", WRITES)
def test_a_full_disk_behind_stdout_is_told_in_a_line(folder, monkeypatch, capsys, tmp_path, name):
    monkeypatch.chdir(folder)
    out = ["--out", str(tmp_path)] if name in ("evaluate", "passkey") else []
    with open("/dev/full", "w") as full:
        assert run_main(monkeypatch, [*WRITES[name], *out], full) == 1
    told = capsys.readouterr().err
    assert told == "lminf: the output cannot be written: No space left on device\n"


@pytest.mark.parametrize("name", ["info", "generate", "chat", "end"])
def test_a_reader_that_has_gone_ends_it_quietly(folder, monkeypatch, capsys, name):
    monkeypatch.chdir(folder)
    reader, writer = os.pipe()
    os.close(reader)
    gone = os.fdopen(writer, "w")
    if name == "end":  # what is written when the command is done
        monkeypatch.setattr(cli, "app", lambda: print("x"))
    assert run_main(monkeypatch, WRITES.get(name, []), gone) == 1
    with contextlib.suppress(BrokenPipeError):
        gone.close()
    assert capsys.readouterr().err == ""


@needs_dev_full
@pytest.mark.parametrize("last", ["csv", "json", "png"])
@pytest.mark.parametrize("name", ["evaluate", "passkey"])
def test_a_full_folder_is_named_and_the_results_are_shown(
    folder, monkeypatch, capsys, tmp_path, name, last
):
    monkeypatch.chdir(folder)
    file = {"evaluate": "evaluation", "passkey": "passkey"}[name]
    (tmp_path / f"{file}.{last}").symlink_to("/dev/full")
    shown = io.StringIO()
    assert run_main(monkeypatch, [*WRITES[name], "--out", str(tmp_path)], shown) == 1
    told = capsys.readouterr().err
    assert told == (
        f"lminf: the results cannot be written to {tmp_path}: No space left on device; make room "
        "there, or give another --out\n"
    )
    assert {"evaluate": "vanilla", "passkey": "depth"}[name] in shown.getvalue()


@needs_dev_full
@pytest.mark.parametrize("end", ["> /dev/full", "| head -c 1 > /dev/null"])
def test_the_process_ends_without_a_traceback(folder, end):
    """What the interpreter still has in its buffer when it ends is not tried again."""
    command = f"{sys.executable} -m lminf_cuda {' '.join(WRITES['generate'])} {end}"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    environment.pop("PYTHONUNBUFFERED", None)
    ran = subprocess.run(
        ["bash", "-o", "pipefail", "-c", command],
        cwd=folder, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert ran.returncode == 1, ran.stderr
    lines = [line for line in ran.stderr.splitlines() if not line.startswith("[transformers]")]
    expected = ["lminf: the output cannot be written: No space left on device"]
    assert lines == (expected if end == "> /dev/full" else [])


def test_characters_that_stdout_does_not_have(monkeypatch):
    page = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(cli, "app", lambda: print("Λ"))
    monkeypatch.setattr(sys, "stdout", page)
    cli.main()
    assert page.buffer.getvalue() == b"?\n"


# What does not load says why, in full.


@pytest.fixture
def saved(folder, tmp_path):
    return Path(shutil.copytree(folder / "llama", tmp_path / "saved"))


def generate_from(model, folder) -> str:
    code, output = lminf(
        "generate", model, "--prompt-file", folder / "text.txt", "--max-new-tokens", 2
    )
    assert code == 2
    assert "MODEL" in output and "Traceback" not in output
    return output


def test_a_missing_tokenizer_is_told_with_the_way_out(folder, saved):
    (saved / "tokenizer.json").unlink()
    output = generate_from(saved, folder)
    assert "pip install sentencepiece tiktoken protobuf" in output
    if "Couldn't instantiate the backend tokenizer" in output:
        assert "(3) an equivalent slow tokenizer class" in output
        assert "You need to have sentencepiece or tiktoken installed" in output
    else:
        assert "requires the protobuf library" in output


@pytest.mark.parametrize(
    ("file", "content", "said"),
    [
        ("model.safetensors", "x" * 100, "SafetensorError: .*header"),
        ("tokenizer.json", "{}", "(KeyError|Exception|ValueError)"),
        ("config.json", "{", "not a valid JSON file"),
        ("config.json", '{"model_type": "unheard_of"}', "unheard_of.*pip install --upgrade"),
        ("config.json", '{"model_type": "t5"}', r"T5Config.*AfmoeConfig.* \.\.\. Give a folder"),
    ],
)
def test_broken_files_are_usage_errors(folder, saved, file, content, said):
    (saved / file).write_text(content)
    assert re.search(said, generate_from(saved, folder))


def test_a_package_that_is_missing_is_named(folder, saved, monkeypatch):
    def from_pretrained(*args, **kwargs):
        raise ImportError("first line\nLoading this needs fancy: pip install fancy")

    monkeypatch.setattr(loading.AutoModelForCausalLM, "from_pretrained", from_pretrained)
    assert "first line Loading this needs fancy: pip install fancy" in generate_from(saved, folder)


def test_weights_that_are_missing_are_reported(saved, caplog, monkeypatch):
    """They are random then, which must not pass in silence."""
    config = (saved / "config.json").read_text()
    (saved / "config.json").write_text(
        config.replace('"num_hidden_layers": 2', '"num_hidden_layers": 3')
    )
    logger = compat.transformers.utils.logging
    monkeypatch.setattr(logger.get_logger("transformers"), "propagate", True)
    before = logger.get_verbosity()
    logger.set_verbosity_warning()  # as a process begins
    try:
        load(str(saved), Dtype.float32, Device.cpu)
    finally:
        logger.set_verbosity(before)
    assert re.search(r"layers\.2\.mlp\.up_proj\.weight\s*\| MISSING", caplog.text)


# A .gguf file.


def write_gguf(path, model, tokenizer) -> None:
    """A Llama as llama.cpp keeps it: halves of rotary pairs interleaved, in float32."""
    gguf = pytest.importorskip("gguf")
    config = model.config
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_name("tiny")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    vocabulary = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(vocabulary)
    writer.add_token_types([1] * len(vocabulary))
    writer.add_token_merges(["t h", "h e"])
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, weight in model.state_dict().items():
        for projection in ("q_proj", "k_proj"):
            if projection in name:
                halves = weight.unflatten(0, (-1, 2, config.head_dim // 2))
                weight = halves.transpose(1, 2).reshape(weight.shape)
        module, _, kind = name.rpartition(".")
        writer.add_tensor(f"{names.get_name(module)}.{kind}", weight.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="module")
def gguf_file(folder, tmp_path_factory):
    """The Llama of `folder`, with a token for "th" and one for "he", and what it is made of."""
    folder = tmp_path_factory.mktemp("gguf")
    vocabulary = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "th", "he"]
    numbers = {token: n for n, token in enumerate(vocabulary)}
    tokenizer = Tokenizer(models.BPE(numbers, [("t", "h"), ("h", "e")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    torch.manual_seed(1)
    model = LlamaForCausalLM(llama_config(len(vocabulary))).eval()
    write_gguf(folder / "tiny.gguf", model, fast)
    return folder / "tiny.gguf", model, fast


@torch.no_grad()
def test_a_gguf_file_loads(gguf_file):
    file, model, tokenizer = gguf_file
    loaded = load(str(file), Dtype.float32, Device.cpu)
    ids = tokenizer(TEXT, return_tensors="pt").input_ids
    assert torch.equal(loaded.tokenizer(TEXT, return_tensors="pt").input_ids, ids)
    # the rotary base has been float32 in the file
    torch.testing.assert_close(loaded.model(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-5)
    assert load(str(file), Dtype.bfloat16, Device.cpu).model.dtype == torch.bfloat16


@pytest.mark.parametrize("name", ["generate", "chat", "evaluate", "passkey"])
def test_every_command_takes_a_gguf_file(gguf_file, folder, monkeypatch, tmp_path, name):
    monkeypatch.chdir(folder)
    command = [str(gguf_file[0]) if word == "llama" else word for word in WRITES[name]]
    out = ["--out", str(tmp_path)] if name in ("evaluate", "passkey") else []
    assert run_main(monkeypatch, [*command, *out, "--dtype", "float32"], io.StringIO()) == 0


def test_files_that_are_no_model_are_named(folder, monkeypatch):
    output = generate_from(folder / "llama" / "config.json", folder)
    assert "config.json is a file; give the folder" in output
    assert "no such folder" in generate_from("absent.gguf", folder)
    (folder / "some.gguf").write_bytes(b"GGUF")
    monkeypatch.setattr(loading, "find_spec", lambda name: None)
    assert "pip install gguf" in generate_from(folder / "some.gguf", folder)
    monkeypatch.undo()
    pytest.importorskip("gguf")
    assert "some.gguf does not load: " in generate_from(folder / "some.gguf", folder)


# Nothing is silent for long.


def test_progress_is_told_where_stderr_is_no_terminal(monkeypatch, capsys):
    monkeypatch.setattr(progress, "PATIENCE", 0.05)
    with progress.progress(8, "reading", "tok") as bar:
        bar.update(2)
        time.sleep(0.3)
    with progress.waiting("loading"):
        time.sleep(0.3)
    told = capsys.readouterr().err
    assert re.search(r"^reading:  25%.* 2.00/8.00 ", told)
    assert re.search(r"^loading: \d+ s so far$", told, re.M)
    monkeypatch.setattr(progress, "PATIENCE", 10)
    with progress.progress(8, "reading", "tok") as bar, progress.waiting("loading"):
        bar.update(8)
    assert capsys.readouterr().err == ""


class Slow:
    """Stands for a step of a command: takes a while, the first time."""

    def __init__(self, step, seconds=0.3):
        self.step, self.seconds = step, seconds

    def __call__(self, *args, **kwargs):
        seconds, self.seconds = self.seconds, 0
        time.sleep(seconds)
        return self.step(*args, **kwargs)


STEPS = {
    "loading": (loading.AutoTokenizer, "from_pretrained", "generate", "loading llama"),
    "prompt": (LlamaForCausalLM, "forward", "generate", "prompt"),
    "turn": (LlamaForCausalLM, "forward", "chat", "reading"),
    "evaluation": (LlamaForCausalLM, "forward", "evaluate", "estimating the time"),
    "passkeys": (LlamaForCausalLM, "forward", "passkey", "LM-Infinite"),
    "first calls": (speed, "lambda_attention", "bench", "the first call of each peer.*"),
    "tokens": (PreTrainedTokenizerFast, "__call__", "generate", "tokenizing 440 characters"),
}


@pytest.mark.parametrize("step", STEPS)
def test_a_slow_step_is_not_silent(folder, monkeypatch, capsys, tmp_path, step):
    monkeypatch.chdir(folder)
    owner, method, name, said = STEPS[step]
    slow = Slow(getattr(owner, method))
    whole = functools.wraps(slow.step)(lambda *args, **kwargs: slow(*args, **kwargs))
    monkeypatch.setattr(owner, method, whole)
    monkeypatch.setattr(progress, "PATIENCE", 0.05)
    out = ["--out", str(tmp_path)] if name in ("evaluate", "passkey") else []
    assert run_main(monkeypatch, [*WRITES[name], *out], io.StringIO()) == 0
    assert re.search(rf"^{said}: ", capsys.readouterr().err, re.M)
