"""Train the byte-level Llama that the package ships for `lminf demo`.

The text is the King James Bible as Debian's `bible-kjv` package prints it (public domain); its
last HELD_OUT_BYTES bytes are never trained on and are written beside the model. The model never
sees more than TRAIN_LENGTH tokens at once, so everything past that length is new to it.

    apt-get install bible-kjv && python tools/train_demo_model.py --out lminf_cuda/demo_model
"""

from __future__ import annotations

import argparse
import json
import math
import re
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch.nn.functional import cross_entropy
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lminf_cuda.evaluation.machine import machine

TRAIN_LENGTH = 256  # tokens (bytes) the model sees at once while it trains
HELD_OUT_BYTES = 240_000


def read_text() -> bytes:
    """The whole book, one verse a line, without the verse references."""
    printed = subprocess.run(
        ["bible", "-f", "Gen1:1-Rev22:21"], check=True, capture_output=True, text=True
    ).stdout
    verses = [re.sub(r"^\S+\d+:\d+ ", "", line) for line in printed.splitlines()]
    return ("\n".join(verses) + "\n").encode()


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """256 tokens, one a byte, with token id = byte value."""
    # GPT-2's byte alphabet: printable Latin-1 bytes stand for themselves, the others for U+0100 on.
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in printable]
    byte_to_char = {b: chr(b) for b in printable} | {b: chr(256 + n) for n, b in enumerate(others)}
    tokenizer = Tokenizer(models.BPE(vocab={byte_to_char[b]: b for b in range(256)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        clean_up_tokenization_spaces=False,
        model_max_length=TRAIN_LENGTH,
    )


def build_model() -> LlamaForCausalLM:
    """A Llama of 4.8M parameters with random weights."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=256,
            hidden_size=256,
            intermediate_size=768,
            num_hidden_layers=6,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=TRAIN_LENGTH,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=None,
            pad_token_id=None,
        )
    )


def batches(
    data: torch.Tensor, batch_size: int, generator: torch.Generator
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Endless batches of random crops, TRAIN_LENGTH inputs and the next byte of each."""
    while True:
        starts = torch.randint(len(data) - TRAIN_LENGTH - 1, (batch_size, 1), generator=generator)
        crop = data[starts + torch.arange(TRAIN_LENGTH + 1)].long()
        yield crop[:, :-1], crop[:, 1:]


def loss_of(model: LlamaForCausalLM, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Mean nats per byte of targets [B, S] given inputs [B, S], under bfloat16 autocast."""
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(input_ids=inputs, use_cache=False).logits
    return cross_entropy(logits.float().flatten(0, 1), targets.flatten())


@torch.no_grad()
def held_out_loss(model: LlamaForCausalLM, held_out: torch.Tensor, batch_size: int) -> float:
    """Mean nats per byte over the held-out text in separate windows of TRAIN_LENGTH."""
    windows = held_out[: (len(held_out) - 1) // TRAIN_LENGTH * TRAIN_LENGTH + 1].long()
    inputs, targets = windows[:-1].view(-1, TRAIN_LENGTH), windows[1:].view(-1, TRAIN_LENGTH)
    losses = [
        loss_of(model, i, t) * len(i)
        for i, t in zip(inputs.split(batch_size), targets.split(batch_size), strict=True)
    ]
    return float(sum(losses) / len(inputs))


def learning_rate(step: int, steps: int, peak: float, warmup: int = 100) -> float:
    """Linear warm-up, then a cosine down to a twentieth of the peak."""
    if step < warmup:
        return peak * (step + 1) / warmup
    cosine = 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))
    return peak * (0.05 + 0.95 * cosine)


def write_card(out: Path, facts: dict[str, object]) -> None:
    """Writes the facts beside the model, for people (README.md) and for programs."""
    (out / "training.json").write_text(json.dumps(facts, indent=2) + "\n")
    rows = "\n".join(f"| {name.replace('_', ' ')} | {value} |" for name, value in facts.items())
    (out / "README.md").write_text(
        "# The demo model\n\n"
        "A byte-level Llama trained from scratch by `tools/train_demo_model.py` on the King James\n"
        "Bible (public domain, the text of Debian's `bible-kjv`). It exists to show length\n"
        "extrapolation on any machine; it knows nothing but this one book. `held_out.txt` is the\n"
        "end of the same text, never trained on.\n\n"
        f"| fact | value |\n| --- | --- |\n{rows}\n"
    )


def main() -> None:
    """Reads the command line, trains, and writes the model, its tokenizer, text and card."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    text = read_text()
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "held_out.txt").write_bytes(text[-HELD_OUT_BYTES:])
    data = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    train, held_out = data[:-HELD_OUT_BYTES], data[-HELD_OUT_BYTES:]

    model = build_model()
    decay = [p for p in model.parameters() if p.ndim > 1]
    no_decay = [p for p in model.parameters() if p.ndim == 1]
    optimizer = torch.optim.AdamW(
        [{"params": decay, "weight_decay": 0.1}, {"params": no_decay, "weight_decay": 0.0}],
        betas=(0.9, 0.95),
    )
    step_fn = torch.compile(loss_of)
    source = batches(train, args.batch_size, torch.Generator().manual_seed(args.seed))
    began = time.time()
    progress = tqdm(range(args.steps), mininterval=10)
    for step in progress:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, args.steps, args.lr)
        loss = step_fn(model, *next(source))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        progress.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
        if (step + 1) % 500 == 0 or step + 1 == args.steps:
            progress.write(
                f"step {step + 1}: held-out {held_out_loss(model, held_out, args.batch_size):.4f}"
            )

    model.to(torch.bfloat16).save_pretrained(args.out)
    byte_tokenizer().save_pretrained(args.out)
    write_card(
        args.out,
        {
            "parameters": sum(p.numel() for p in model.parameters()),
            "training_length_tokens": TRAIN_LENGTH,
            "training_bytes": len(train),
            "held_out_bytes": len(held_out),
            "steps": args.steps,
            "tokens_seen": args.steps * args.batch_size * TRAIN_LENGTH,
            "peak_learning_rate": args.lr,
            "held_out_nats_per_byte": round(held_out_loss(model, held_out, args.batch_size), 4),
            "minutes": round((time.time() - began) / 60, 1),
            "machine": f"{machine(torch.device('cpu'))['cpu']}, {torch.get_num_threads()} threads",
            "torch": torch.__version__,
        },
    )


if __name__ == "__main__":
    main()
