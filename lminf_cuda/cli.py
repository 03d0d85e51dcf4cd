"""The command `lminf`: info, evaluate, generate, passkey, chat, demo, bench.

One function a command. What their arguments stand for is in arguments.py, what they print as a
table in tables.py.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, NoReturn

import torch
import transformers
import typer
from rich.table import Table

import lminf_cuda
from lminf_cuda import bench as benchmarks
from lminf_cuda import evaluate as evaluation
from lminf_cuda import ops
from lminf_cuda import passkey as retrieval
from lminf_cuda.arguments import (
    DEMO_MODEL,
    CannotWriteError,
    ChunkOption,
    Device,
    DeviceOption,
    Dtype,
    DtypeOption,
    Loaded,
    MaxDistanceOption,
    ModelArgument,
    NGlobalOption,
    OutOption,
    SeedOption,
    TemperatureOption,
    WindowOption,
    blamed,
    check_device,
    check_patch,
    load,
    make_folder,
    parse_depths,
    parse_lengths,
    pick_dtype,
)
from lminf_cuda.chat import Chat
from lminf_cuda.generate import check_sampling
from lminf_cuda.generate import generate as generate_text
from lminf_cuda.models import compat
from lminf_cuda.models.patch import patch_model, unpatch_model
from lminf_cuda.models.rope import training_length
from lminf_cuda.tables import (
    PlanShape,
    console,
    plans_table,
    print_bench,
    report,
    report_passkeys,
)

HELD_OUT = DEMO_MODEL / "held_out.txt"
DEMO_PROMPT = 4096  # characters, and tokens of the shipped model
NO_CUDA_KERNELS = (
    "no CUDA kernels in this build: install where nvcc is on the PATH (or set CUDA_HOME), then "
    "'pip install --force-reinstall --no-deps .' in the source tree"
)

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="LM-Infinite: pretrained language models on texts far longer than they were trained on.",
)


def run_evaluation(
    loaded: Loaded, text: evaluation.Text, lengths: Sequence[int], **options: Any
) -> evaluation.Evaluation:
    """Evaluate and note in the settings which model it was."""
    console().print(
        f"{loaded.name}: {loaded.model.num_parameters() / 1e6:.1f}M parameters, "
        f"{str(loaded.model.dtype).removeprefix('torch.')} on {loaded.model.device}, "
        f"{torch.get_num_threads()} threads, training length "
        f"{training_length(loaded.model.config):,} tokens",
        highlight=False,
    )
    result = evaluation.evaluate(
        loaded.model,
        text,
        lengths,
        train_length=training_length(loaded.model.config),
        bos_token_id=loaded.tokenizer.bos_token_id,
        **options,
    )
    result.settings["model"] = loaded.name
    return result


@app.command()
def evaluate(
    model: ModelArgument = None,
    text: Annotated[
        Path,
        typer.Option(
            help="A long UTF-8 text file.", show_default="the shipped model's held-out text"
        ),
    ] = HELD_OUT,
    lengths: Annotated[
        str | None,
        typer.Option(
            help="Increasing token counts, such as 256,512,...,65536; default: the training length "
            "and its doublings, as far as the text goes."
        ),
    ] = None,
    n_global: NGlobalOption = 16,
    window: WindowOption = None,
    max_distance: MaxDistanceOption = None,
    dtype: DtypeOption = Dtype.auto,
    device: DeviceOption = Device.cpu,
    chunk: ChunkOption = 1024,
    out: OutOption = Path("lminf_out"),
    baseline_stride: Annotated[
        int,
        typer.Option(min=1, help="Tokens scored per window of the cut baseline; 1 is exact, slow."),
    ] = 32,
    vanilla_seconds: Annotated[
        float, typer.Option(min=0, help="Vanilla stops after this many seconds.")
    ] = 120.0,
) -> None:
    """Loss by position over a long text: vanilla, LM-Infinite, and vanilla on a cut context."""
    wanted = None
    with blamed("--lengths"):
        if lengths is not None:
            wanted = parse_lengths(lengths)
            evaluation.check_lengths(wanted, max(wanted))
    with blamed("--text"):
        content = evaluation.read_text(text)
    loaded = load(model, dtype, device)
    check_patch(loaded.model, n_global, window, max_distance)
    train_length = training_length(loaded.model.config)
    with blamed("--baseline-stride"):
        evaluation.baseline_windows(2, train_length, baseline_stride)
    tokens = evaluation.tokenize(loaded.tokenizer, content)
    wanted = wanted or evaluation.default_lengths(train_length, len(tokens))
    with blamed("--text / --lengths"):
        evaluation.check_lengths(wanted, len(tokens))
    make_folder(out)
    result = run_evaluation(
        loaded,
        tokens,
        wanted,
        n_global=n_global,
        window=window,
        max_distance=max_distance,
        chunk=chunk,
        baseline_stride=baseline_stride,
        vanilla_seconds=vanilla_seconds,
    )
    report(result, out)
    for sentence in evaluation.findings(result):
        console().print(sentence, highlight=False)


def _write(piece: str) -> None:
    print(piece, end="", flush=True)


@app.command()
def generate(
    prompt_file: Annotated[Path, typer.Option(help="A UTF-8 text file of any length to continue.")],
    model: ModelArgument = None,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 256,
    greedy: Annotated[bool, typer.Option("--greedy", help="Take the likeliest token.")] = False,
    temperature: TemperatureOption = 0.8,
    top_p: Annotated[float, typer.Option(help="Above 0, at most 1.")] = 0.95,
    seed: SeedOption = None,
    n_global: NGlobalOption = 16,
    window: WindowOption = None,
    max_distance: MaxDistanceOption = None,
    dtype: DtypeOption = Dtype.auto,
    device: DeviceOption = Device.cpu,
    chunk: ChunkOption = 1024,
) -> None:
    """Continue a text of any length with a cache of fixed size, printing tokens as they come."""
    with blamed("--temperature / --top-p"):
        check_sampling(temperature, top_p)
    with blamed("--prompt-file"):
        prompt = evaluation.read_text(prompt_file)
    loaded = load(model, dtype, device)
    with blamed("MODEL / --n-global / --window / --max-distance"):
        patch_model(loaded.model, n_global=n_global, window=window, max_distance=max_distance)
    generate_text(
        loaded.model,
        loaded.tokenizer,
        prompt,
        _write,
        max_new_tokens=max_new_tokens,
        greedy=greedy,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
        chunk=chunk,
    )
    print()


@app.command()
def passkey(
    model: ModelArgument = None,
    lengths: Annotated[
        str | None,
        typer.Option(
            help="Tokens of the prompts, such as 512,1024,...,16384; default: the training length "
            "and two doublings."
        ),
    ] = None,
    depths: Annotated[
        str, typer.Option(help="Where the key stands: 0,0.25,0.5 or a count of even steps.")
    ] = "5",
    trials: Annotated[int, typer.Option(min=1, help="Keys per length and depth.")] = 5,
    seed: Annotated[int, typer.Option(help="Of the keys.")] = 0,
    vanilla: Annotated[
        bool, typer.Option("--vanilla", help="Ask the unpatched model, too.")
    ] = False,
    middle_top_k: Annotated[
        int, typer.Option(min=0, help="Middle tokens per head (the paper: 5); 0: none.")
    ] = 0,
    middle_from_layer: Annotated[int, typer.Option(min=0, help="First layer with them.")] = 4,
    n_global: NGlobalOption = 16,
    window: WindowOption = None,
    max_distance: MaxDistanceOption = None,
    dtype: DtypeOption = Dtype.auto,
    device: DeviceOption = Device.cpu,
    chunk: ChunkOption = 1024,
    out: OutOption = Path("lminf_out"),
) -> None:
    """Find a number hidden in a long text: accuracy by length and depth, as table and heat map."""
    wanted = None
    with blamed("--lengths"):
        if lengths is not None:
            wanted = parse_lengths(lengths)
    with blamed("--depths"):
        places = parse_depths(depths)
    loaded = load(model, dtype, device)
    patch: dict[str, Any] = {"n_global": n_global, "window": window, "max_distance": max_distance}
    if middle_top_k:
        patch |= {"middle_top_k": middle_top_k, "middle_from_layer": middle_from_layer}
    with blamed("MODEL / --n-global / --window / --max-distance / --middle-from-layer"):
        patch_model(loaded.model, **patch)
        unpatch_model(loaded.model)
    with blamed("--lengths / --depths"):
        prompts = retrieval.Prompts(loaded.tokenizer)
        wanted = wanted or prompts.default_lengths(training_length(loaded.model.config))
        retrieval.check_grid(prompts, wanted, places)
    make_folder(out)
    results = retrieval.compare(
        loaded.model,
        loaded.tokenizer,
        wanted,
        places,
        vanilla=vanilla,
        patch=patch,
        trials=trials,
        chunk=chunk,
        seed=seed,
    )
    settings = patch | {
        "model": loaded.name,
        "trials": trials,
        "seed": seed,
        "dtype": str(loaded.model.dtype).removeprefix("torch."),
    }
    title = f"{loaded.name}: passkeys found, {trials} keys per field"
    report_passkeys(results, settings, title, out)


@app.command()
def chat(
    model: ModelArgument = None,
    system: Annotated[
        str | None, typer.Option(help="An instruction ahead of the first turn.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Of an answer.")] = 512,
    greedy: Annotated[bool, typer.Option("--greedy", help="Take the likeliest token.")] = False,
    temperature: TemperatureOption = 0.8,
    top_p: Annotated[float, typer.Option(help="Above 0, at most 1.")] = 0.95,
    seed: SeedOption = None,
    n_global: NGlobalOption = 16,
    window: WindowOption = None,
    max_distance: MaxDistanceOption = None,
    dtype: DtypeOption = Dtype.auto,
    device: DeviceOption = Device.cpu,
    chunk: ChunkOption = 1024,
) -> None:
    """Talk with a model for as long as you like: the memory stays what it is. One turn a line."""
    loaded = load(model, dtype, device)
    with blamed("MODEL / --n-global / --window / --max-distance"):
        patch_model(loaded.model, n_global=n_global, window=window, max_distance=max_distance)
    with blamed("--system / --temperature / --top-p"):
        talk = Chat(
            loaded.model,
            loaded.tokenizer,
            system=system,
            max_new_tokens=max_new_tokens,
            greedy=greedy,
            temperature=temperature,
            top_p=top_p,
            chunk=chunk,
        )
    if seed is not None:
        torch.manual_seed(seed)
    screen = console()
    screen.print("/reset forgets the conversation, /exit (or the end of input) ends it")
    while True:
        try:
            text = input("> ")
        except EOFError:
            break
        if text.strip() == "/exit":
            break
        if text.strip() == "/reset":
            talk.reset()
            continue
        if not text.strip():
            continue
        talk.say(text, _write)
        print()
        screen.print(
            f"({talk.tokens:,} tokens so far, cache "
            f"{evaluation.mebibytes(talk.cache.memory_bytes())})",
            highlight=False,
            style="dim",
        )


@app.command()
def demo(
    out: OutOption = Path("lminf_out"),
    longest: Annotated[int, typer.Option(min=512, help="Longest length, in tokens.")] = 65_536,
    vanilla_seconds: Annotated[
        float, typer.Option(min=0, help="Vanilla stops after this many seconds.")
    ] = 20.0,
) -> None:
    """Evaluate the shipped model on its held-out text, then write on past its training length."""
    began = time.perf_counter()
    screen = console()
    loaded = load(None, Dtype.auto, Device.cpu)
    content = evaluation.read_text(HELD_OUT)
    text = evaluation.tokenize(loaded.tokenizer, content)
    train_length = training_length(loaded.model.config)
    with blamed("--longest"):
        evaluation.check_lengths([train_length, longest], len(text))
    make_folder(out)
    lengths = evaluation.default_lengths(train_length, longest)
    screen.print(
        f"reading {longest:,} tokens in three ways (65,536 take one to two minutes on two cores; "
        "--longest sets how many)",
        highlight=False,
    )
    result = run_evaluation(loaded, text, lengths, vanilla_seconds=vanilla_seconds)

    prompt = content[:DEMO_PROMPT]
    screen.print(
        f"\nafter a prompt of {len(prompt):,} characters, {DEMO_PROMPT // train_length} times the "
        "training length, LM-Infinite writes on from where >>> stands:\n",
        highlight=False,
    )
    patch_model(loaded.model)
    _write(f"...{prompt[-120:]}>>>")
    generate_text(
        loaded.model, loaded.tokenizer, prompt, _write, temperature=0.7, top_p=0.95, seed=0
    )
    print("\n")
    report(result, out)
    for sentence in evaluation.findings(result):
        screen.print(sentence, highlight=False)
    screen.print(f"(all of it took {time.perf_counter() - began:.0f} s)", highlight=False)


@app.command()
def bench(
    batch: Annotated[int, typer.Option(min=1)] = 1,
    heads: Annotated[int, typer.Option(min=1, help="Query heads.")] = 8,
    kv_heads: Annotated[int | None, typer.Option(min=1, help="Default: as many as heads.")] = None,
    length: Annotated[int, typer.Option(min=1, help="Queries, and as many keys.")] = 8192,
    head_dim: Annotated[int, typer.Option(min=2)] = 128,
    window: Annotated[int, typer.Option(min=1)] = 1024,
    n_global: NGlobalOption = 16,
    dtype: DtypeOption = Dtype.float32,
    device: DeviceOption = Device.cpu,
    peers: Annotated[
        str, typer.Option(help=f"Comma-separated, among {', '.join(benchmarks.PEERS)}.")
    ] = ",".join(benchmarks.PEERS),
    rounds: Annotated[int, typer.Option(min=1, help="Timed rounds; medians are shown.")] = 5,
) -> None:
    """Time the attention kernel beside FlexAttention, SDPA and a matrix product, in one run."""
    check_device(device)
    kv_heads = kv_heads or heads
    if heads % kv_heads:
        raise typer.BadParameter(
            f"must divide --heads {heads}, got {kv_heads}", param_hint="--kv-heads"
        )
    if head_dim % 2:
        raise typer.BadParameter(f"must be even, got {head_dim}", param_hint="--head-dim")
    shape = benchmarks.Shape(batch, heads, kv_heads, length, head_dim, window, n_global)
    torch_device = torch.device(device.value)
    with blamed("--peers"):
        chosen = benchmarks.parse_peers(peers)
    rows = benchmarks.attention_rows(
        shape, pick_dtype(dtype, device), device=torch_device, peers=chosen, rounds=rounds
    )
    print_bench(rows, shape, benchmarks.machine(torch_device))


@app.command()
def info(
    plan: Annotated[
        bool, typer.Option("--plan", help="Which kernels serve a shape instead, and how.")
    ] = False,
    capability: Annotated[
        int | None,
        typer.Option(min=80, help="Plan for a GPU of this compute capability, as in 80 or 90."),
    ] = None,
    multiprocessors: Annotated[int, typer.Option(min=1, help="Of that GPU.")] = 132,
    dtype: DtypeOption = Dtype.bfloat16,
    device: DeviceOption = Device.cpu,
    batch: Annotated[int, typer.Option(min=1, help="Rows.")] = 1,
    heads: Annotated[int, typer.Option(min=1, help="Query heads.")] = 32,
    kv_heads: Annotated[int, typer.Option(min=1, help="Key heads; they divide --heads.")] = 8,
    head_dim: Annotated[int, typer.Option(min=2, help="Elements of a head.")] = 128,
    length: Annotated[int, typer.Option(min=1, help="Keys of a prefill.")] = 32768,
    queries: Annotated[
        int | None, typer.Option(min=1, help="Queries of it, the last ones; default: all.")
    ] = None,
    window: Annotated[int, typer.Option(min=1, help="Last tokens that are visible.")] = 4096,
    n_global: NGlobalOption = 16,
    max_distance: MaxDistanceOption = None,
    rope: Annotated[bool, typer.Option(help="Whether keys are rotated.")] = True,
) -> None:
    """Versions, the kernels that are built and the instruction set in use."""
    if plan:
        check_device(device)
        shape = PlanShape(
            pick_dtype(dtype, device), device.value, batch, heads, kv_heads, head_dim, length,
            queries or length, window, n_global, max_distance, rope,
        )  # fmt: skip
        with blamed("--plan"):
            try:
                plans = plans_table(shape, capability, multiprocessors)
            except RuntimeError as error:
                reason = str(error).splitlines()[0]
                raise ValueError(
                    f"no plan for this shape ({reason}); take a smaller one"
                ) from error
        console().print(plans)
        return
    table = Table(show_header=False)
    table.add_column("fact")
    table.add_column("value", overflow="fold")
    for fact, value in _facts().items():
        table.add_row(fact, value)
    screen = console()
    screen.print(table)
    note = compat.version_note()
    if note is not None:
        screen.print(f"warning: {note}", highlight=False, soft_wrap=True, style="yellow")
    if "cuda" not in ops.backends():
        screen.print(NO_CUDA_KERNELS, highlight=False, soft_wrap=True)


def _facts() -> dict[str, str]:
    oldest, newest = compat.TESTED
    return {
        "lminf_cuda": lminf_cuda.__version__,
        "kernels built for": ", ".join(ops.backends()),
        "CPU instruction set": ops.cpu_isa(),
        "torch": torch.__version__,
        "transformers": f"{transformers.__version__} (tested: {oldest} to {newest})",
        "threads": str(torch.get_num_threads()),
        "shipped model": str(DEMO_MODEL),
    }


def main() -> None:
    """Entry point of the command: what cannot be written ends it with one line on stderr."""
    if sys.stdout is not None and hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # a terminal that has no such character
    try:
        try:
            app()
        finally:
            if sys.stdout is not None:
                sys.stdout.flush()  # what fails when the interpreter ends is told by a traceback
    except BrokenPipeError:  # the reader has seen enough, as in `lminf generate | head`
        _fail(None)
    except CannotWriteError as error:
        _fail(str(error))
    except OSError as error:
        reason = error.strerror or str(error)
        _fail(f"{error.filename or 'the output cannot be written'}: {reason}")


def _fail(message: str | None) -> NoReturn:
    """Exit with 1, without another try to write what stdout still holds."""
    with suppress(OSError, ValueError, AttributeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    if message is not None and sys.stderr is not None:
        with suppress(OSError):
            print(f"lminf: {message}", file=sys.stderr, flush=True)
    sys.exit(1)


if __name__ == "__main__":
    main()
