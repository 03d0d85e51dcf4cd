"""The command `lminf`: info, evaluate, generate, passkey, chat, demo, bench."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import torch
import transformers
import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer

import lminf_cuda
from lminf_cuda import bench as benchmarks
from lminf_cuda import evaluate as evaluation
from lminf_cuda import ops
from lminf_cuda import passkey as retrieval
from lminf_cuda.chat import Chat
from lminf_cuda.evaluate import CUT, LM_INFINITE, VANILLA, Evaluation
from lminf_cuda.generate import generate as generate_text
from lminf_cuda.patches import patch_model, unpatch_model
from lminf_cuda.rope import training_length

DEMO_MODEL = Path(__file__).parent / "demo_model"
HELD_OUT = DEMO_MODEL / "held_out.txt"
DEMO_PROMPT = 4096  # characters, and tokens of the shipped model
TABLE_WIDTH = 118  # columns where the output is not a terminal
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


class Dtype(str, Enum):
    """Choices of --dtype."""

    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


DTYPES = {
    Dtype.float32: torch.float32,
    Dtype.bfloat16: torch.bfloat16,
    Dtype.float16: torch.float16,
}


class Device(str, Enum):
    """Choices of --device."""

    cpu = "cpu"
    cuda = "cuda"


ModelArgument = Annotated[
    str | None,
    typer.Argument(metavar="MODEL", help="A local folder or a hub name; default: the shipped one."),
]
NGlobalOption = Annotated[int, typer.Option(min=0, help="First tokens that stay visible.")]
WindowOption = Annotated[
    int | None, typer.Option(min=1, help="Last tokens that are visible; default: training length.")
]
MaxDistanceOption = Annotated[
    int | None, typer.Option(min=1, help="Largest distance attention sees; default: the window.")
]
DtypeOption = Annotated[
    Dtype,
    typer.Option(help="auto: bfloat16 on a GPU or a CPU with AMX, else float32."),
]
DeviceOption = Annotated[Device, typer.Option(help="Where the model runs.")]
ChunkOption = Annotated[int, typer.Option(min=1, help="Tokens of the text per forward.")]
OutOption = Annotated[Path, typer.Option(help="Folder for the CSV, JSON and PNG.")]


@contextmanager
def blamed(argument: str) -> Iterator[None]:
    """Turn an error about a value into a usage error that names the argument (exit code 2)."""
    try:
        yield
    except (ValueError, TypeError, OSError) as error:
        raise typer.BadParameter(str(error), param_hint=argument) from error


def console() -> Console:
    """The terminal, or a page of TABLE_WIDTH columns where the output goes elsewhere."""
    wide = Console()
    return wide if wide.is_terminal else Console(width=TABLE_WIDTH)


def pick_dtype(dtype: Dtype, device: Device) -> torch.dtype:
    """The dtype asked for; auto is bfloat16 only where its matrix products are quick."""
    if dtype is not Dtype.auto:
        return DTYPES[dtype]
    quick = device is Device.cuda or "amx_bf16" in benchmarks.cpu_flags()
    return torch.bfloat16 if quick else torch.float32


def check_device(device: Device) -> None:
    """Usage error when the device is not there."""
    if device is Device.cuda and not torch.cuda.is_available():
        raise typer.BadParameter(
            "this PyTorch sees no CUDA device; use --device cpu", param_hint="--device"
        )


def _is_hub_name(name: str) -> bool:
    return not name.startswith((".", "/", "~")) and name.count("/") <= 1


@dataclass(frozen=True)
class Loaded:
    """A model ready to run, its tokenizer, and what to call it."""

    model: Any
    tokenizer: Any
    name: str


def load(name: str | None, dtype: Dtype, device: Device) -> Loaded:
    """The model, in eval mode on the device, and its tokenizer; usage errors name MODEL."""
    check_device(device)
    source = str(DEMO_MODEL) if name is None else name
    if not Path(source).is_dir() and (name is None or not _is_hub_name(source)):
        raise typer.BadParameter(
            f"no such folder: {source}; give a folder with a saved model or a hub name",
            param_hint="MODEL",
        )
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()  # going past the training length is the point
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
        model = AutoModelForCausalLM.from_pretrained(
            source, dtype=pick_dtype(dtype, device), attn_implementation="sdpa"
        )
    except (OSError, ValueError) as error:
        first_line = str(error).strip().splitlines()[0]
        raise typer.BadParameter(
            f"{source} does not load: {first_line} Give a folder or hub name of a causal language "
            "model with its tokenizer",
            param_hint="MODEL",
        ) from error
    name = "the shipped model" if name is None else Path(source).name
    return Loaded(model.eval().to(device.value), tokenizer, name)


def check_patch(model: Any, n_global: int, window: int | None, max_distance: int | None) -> None:
    """Usage error when `patch_model` refuses the model or the settings."""
    with blamed("MODEL / --n-global / --window / --max-distance"):
        patch_model(model, n_global=n_global, window=window, max_distance=max_distance)
    unpatch_model(model)


def parse_lengths(text: str) -> list[int]:
    """Lengths from "256,512,1024"; "..." between two of them stands for doubling.

    Raises ValueError when a part is no number or doubling does not arrive at what follows it.
    """
    example = "give numbers such as 256,512,1024 or 256,512,...,65536"
    lengths: list[int] = []
    doubling = False
    for part in (piece.strip() for piece in text.split(",")):
        if part in ("...", "…") and lengths:
            doubling = True
            continue
        try:
            value = int(part)
        except ValueError:
            raise ValueError(f"{part!r} is not a length; {example}") from None
        while doubling and 0 < lengths[-1] * 2 < value:
            lengths.append(lengths[-1] * 2)
        if doubling and lengths[-1] * 2 != value:
            raise ValueError(f"doubling {lengths[-1]} does not arrive at {value}; {example}")
        lengths.append(value)
        doubling = False
    if doubling:
        raise ValueError(f"nothing follows the dots; {example}")
    return lengths


def _mark(row: evaluation.Row, value: float | None, form: str) -> str:
    return ("stopped" if row.note else "") if value is None else format(value, form)


def evaluation_table(result: Evaluation) -> Table:
    """One line a length: losses, the difference that matters, rates and the caches' sizes."""
    stride = result.settings["baseline_stride"]
    least = result.train_length - stride + 1
    if stride == 1:
        context = (
            f"the last {result.train_length} tokens for each token, one window a token (exact)"
        )
    else:
        context = (
            f"the last {least} to {result.train_length} tokens, one window every {stride} tokens "
            "(--baseline-stride 1 is the exact token-by-token version)"
        )
    notes = [
        f"{name} {trace.stopped_text}" for name, trace in result.traces.items() if trace.stopped
    ]
    table = Table(
        title=f"Loss after the previous length (nats per token), speed, size of the cache "
        f"({result.settings['dtype']})",
        caption="\n".join([f"cut: recomputed from {context}", *notes]),
        caption_justify="left",
        box=SIMPLE_HEAD,
        collapse_padding=True,
    )
    names = ("vanilla", "LM-Inf.", "cut")
    for heading in (
        "tokens\nup to",
        *(f"{name}\nnats" for name in names),
        "LM-Inf.\n- cut",
        *(f"{name}\ntokens/s" for name in names),
        *(f"{name}\nMiB" for name in names[:2]),
    ):
        table.add_column(heading, justify="right")
    for length in result.lengths:
        vanilla, ours, cut = (result.row(m, length) for m in (VANILLA, LM_INFINITE, CUT))
        table.add_row(
            f"{length:,}",
            *(_mark(row, row.nats_per_token, ".3f") for row in (vanilla, ours, cut)),
            f"{(ours.nats_per_token or 0) - (cut.nats_per_token or 0):+.3f}",
            *(_mark(row, row.tokens_per_second, ",.0f") for row in (vanilla, ours, cut)),
            *(
                _mark(row, None if row.cache_bytes is None else row.cache_bytes / 2**20, ",.2f")
                for row in (vanilla, ours)
            ),
        )
    return table


def report(result: Evaluation, out: Path) -> None:
    """Write CSV, JSON and PNG to the folder and print the table and where they are."""
    from lminf_cuda.plots import plot_evaluation  # matplotlib takes a second to import

    evaluation.write_results(result, out)
    plot_evaluation(result, out / "evaluation.png")
    screen = console()
    screen.print(evaluation_table(result))
    peaks = ", ".join(
        f"{name} {evaluation.mebibytes(trace.peak_rss_bytes)}"
        for name, trace in result.traces.items()
    )
    screen.print(f"peak resident memory of the process during: {peaks}", highlight=False)
    screen.print(f"table: {out / 'evaluation.csv'}", highlight=False, soft_wrap=True)
    screen.print(f"plot:  {out / 'evaluation.png'}", highlight=False, soft_wrap=True)


def run_evaluation(
    loaded: Loaded, text: evaluation.Text, lengths: Sequence[int], **options: Any
) -> Evaluation:
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
    temperature: Annotated[float, typer.Option(help="Above 0.")] = 0.8,
    top_p: Annotated[float, typer.Option(help="Above 0, at most 1.")] = 0.95,
    seed: Annotated[int | None, typer.Option(help="Makes sampling repeatable.")] = None,
    n_global: NGlobalOption = 16,
    window: WindowOption = None,
    max_distance: MaxDistanceOption = None,
    dtype: DtypeOption = Dtype.auto,
    device: DeviceOption = Device.cpu,
    chunk: ChunkOption = 1024,
) -> None:
    """Continue a text of any length with a cache of fixed size, printing tokens as they come."""
    if temperature <= 0:
        raise typer.BadParameter(
            f"must be above 0, got {temperature}; --greedy takes the likeliest token",
            param_hint="--temperature",
        )
    if not 0 < top_p <= 1:
        raise typer.BadParameter(
            f"must be above 0 and at most 1, got {top_p}", param_hint="--top-p"
        )
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


def parse_depths(text: str) -> list[float]:
    """Depths from "0,0.5,1", or from a count such as "5": so many, evenly from 0 to 1.

    Raises ValueError when a part is no number.
    """
    parts = [piece.strip() for piece in text.split(",")]
    try:
        if len(parts) == 1 and parts[0].isdigit() and int(parts[0]) > 1:
            count = int(parts[0])
            return [n / (count - 1) for n in range(count)]
        return [float(part) for part in parts]
    except ValueError:
        raise ValueError(
            f"{text!r} is no list of depths; give numbers such as 0,0.25,0.5 or a count such as 5"
        ) from None


def passkey_table(method: str, cells: Sequence[retrieval.Cell]) -> Table:
    """One line a depth, one column a length."""
    table = Table(title=f"{method}: keys found", box=SIMPLE_HEAD)
    lengths = sorted({cell.length for cell in cells})
    table.add_column("depth", justify="right")
    for length in lengths:
        table.add_column(f"{length:,} tokens", justify="right")
    for depth in sorted({cell.depth for cell in cells}):
        row = {cell.length: cell.accuracy for cell in cells if cell.depth == depth}
        table.add_row(f"{depth:.0%}", *(f"{row[length]:.0%}" for length in lengths))
    total = sum(cell.found for cell in cells) / sum(cell.trials for cell in cells)
    table.caption = f"all together {total:.0%}"
    return table


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
    from lminf_cuda.plots import plot_passkey  # matplotlib takes a second to import

    settings = patch | {
        "model": loaded.name,
        "trials": trials,
        "seed": seed,
        "dtype": str(loaded.model.dtype).removeprefix("torch."),
    }
    retrieval.write_results(results, settings, out)
    title = f"{loaded.name}: passkeys found, {trials} keys per field"
    plot_passkey(results, title, out / "passkey.png")
    screen = console()
    for method, cells in results.items():
        screen.print(passkey_table(method, cells))
    screen.print(f"table: {out / 'passkey.csv'}", highlight=False, soft_wrap=True)
    screen.print(f"plot:  {out / 'passkey.png'}", highlight=False, soft_wrap=True)


@app.command()
def chat(
    model: ModelArgument = None,
    system: Annotated[
        str | None, typer.Option(help="An instruction ahead of the first turn.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Of an answer.")] = 512,
    greedy: Annotated[bool, typer.Option("--greedy", help="Take the likeliest token.")] = False,
    temperature: Annotated[float, typer.Option(help="Above 0.")] = 0.8,
    top_p: Annotated[float, typer.Option(help="Above 0, at most 1.")] = 0.95,
    seed: Annotated[int | None, typer.Option(help="Makes sampling repeatable.")] = None,
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
    lengths = evaluation.default_lengths(train_length, longest)
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


def print_bench(
    rows: Sequence[benchmarks.BenchRow], shape: benchmarks.Shape, facts: dict[str, Any]
) -> None:
    """Print the rows of a benchmark as one table under the machine they were measured on."""
    table = Table(title=f"forward, {shape.name.replace('_', ' ')}")
    for heading in ("dtype", "what", "ms", "GFLOP/s", "time / ours", "of ceiling", "max diff"):
        table.add_column(heading, justify="left" if heading in ("dtype", "what") else "right")
    for row in rows:
        table.add_row(
            row.dtype,
            row.name,
            f"{row.seconds * 1e3:,.2f}",
            f"{row.gflops_per_second:,.0f}",
            "" if row.times_ours is None else f"{row.times_ours:.2f}",
            "" if row.ceiling_share is None else f"{row.ceiling_share:.0%}",
            "" if row.max_difference is None else f"{row.max_difference:.1e}",
        )
    screen = console()
    screen.print(json.dumps(facts), highlight=False, soft_wrap=True)
    screen.print(table)


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
            print_plans(shape, capability, multiprocessors)
        return
    table = Table(show_header=False)
    table.add_column("fact")
    table.add_column("value", overflow="fold")
    for fact, value in _facts().items():
        table.add_row(fact, value)
    screen = console()
    screen.print(table)
    if "cuda" not in ops.backends():
        screen.print(NO_CUDA_KERNELS, highlight=False, soft_wrap=True)


@dataclass(frozen=True)
class PlanShape:
    """What `lminf info --plan` is asked about."""

    dtype: torch.dtype
    device: str
    batch: int
    heads: int
    kv_heads: int
    head_dim: int
    length: int
    queries: int
    window: int
    n_global: int
    max_distance: int | None
    rope: bool

    def tensor(self, heads: int, rows: int) -> torch.Tensor:
        """[B, heads, rows, D], all rows in the same memory: plans look at no value."""
        row = torch.empty(self.head_dim, dtype=self.dtype, device=self.device)
        return row.expand(self.batch, heads, rows, -1)

    def cache(self, slots: int) -> torch.Tensor:
        """[B, kv_heads, slots, D], which the op would write to, so every row has its own memory."""
        shape = (self.batch, self.kv_heads, slots, self.head_dim)
        return torch.empty(shape, dtype=self.dtype, device=self.device)


def print_plans(shape: PlanShape, capability: int | None, multiprocessors: int) -> None:
    """The table of `lminf info --plan`: the prefill and a decoding step of one shape."""
    target: dict[str, Any] = dict(device_capability=capability, multiprocessors=multiprocessors)
    options: dict[str, Any] = dict(max_distance=shape.max_distance)
    if shape.rope:
        options["inv_freq"] = torch.ones(shape.head_dim // 2, device=shape.device)
    keys = shape.tensor(shape.kv_heads, shape.length)
    ring, few = shape.cache(shape.window), shape.cache(shape.n_global)
    one = shape.tensor(shape.kv_heads, 1)
    plans = {
        "lambda_attn": lminf_cuda.kernel_plan(
            shape.tensor(shape.heads, shape.queries), keys, keys, shape.n_global, shape.window,
            **target, **options,
        ),
        "lambda_decode": lminf_cuda.decode_plan(
            shape.tensor(shape.heads, 1), one, one, ring, ring, few, few,
            torch.zeros(shape.batch, dtype=torch.int64, device=shape.device), shape.window,
            **target, **options,
        ),
    }  # fmt: skip
    where = shape.device if capability is None else f"CUDA, capability {capability}"
    table = Table(title=f"{where}, {str(shape.dtype).removeprefix('torch.')}", box=SIMPLE_HEAD)
    table.add_column("op")
    facts = [field.name for field in fields(lminf_cuda.KernelPlan)]
    for name in facts:
        table.add_column(name.replace("_", " "), justify="right", overflow="fold")
    for op, plan in plans.items():
        values = (getattr(plan, name) for name in facts)
        table.add_row(op, *(f"{x:,}" if isinstance(x, int) else x for x in values))
    console().print(table)


def _facts() -> dict[str, str]:
    return {
        "lminf_cuda": lminf_cuda.__version__,
        "kernels built for": ", ".join(ops.backends()),
        "CPU instruction set": ops.cpu_isa(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "threads": str(torch.get_num_threads()),
        "shipped model": str(DEMO_MODEL),
    }


def main() -> None:
    """Entry point of the command."""
    app()


if __name__ == "__main__":
    main()
