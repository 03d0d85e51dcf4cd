"""Tokens per second of a whole model on a CPU: LM-Infinite at 4k and 16k tokens, vanilla at 16k.

    python -m benchmarks.cpu --only model

Two models: the one that ships with the package, and a Llama with the layer shapes of about 1B
parameters, two layers deep and with random weights. Both read one text once, in chunks through
their caches, as `lminf evaluate` does. A rate at a length counts the tokens read up to there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig, LlamaForCausalLM

from lminf_cuda import LambdaCache, patch_model, unpatch_model
from lminf_cuda.cli.loading import DEMO_MODEL
from lminf_cuda.evaluation.lengths import chunk_bounds
from lminf_cuda.evaluation.traces import stream

SHORT, LONG = 4096, 16_384
CHUNK = 1024


@dataclass(frozen=True)
class ModelSpeed:
    """Tokens per second of one model."""

    model: str
    lm_infinite_short: float
    lm_infinite_long: float
    vanilla_long: float

    @property
    def times_vanilla(self) -> float:
        """How many times as fast as vanilla attention, over LONG tokens."""
        return self.lm_infinite_long / self.vanilla_long

    @property
    def long_over_short(self) -> float:
        """How much of its own speed at SHORT tokens is left at LONG tokens."""
        return self.lm_infinite_long / self.lm_infinite_short


def llama_1b_layers() -> Any:
    """Two layers of the shape of a Llama of about 1B parameters, random weights, bfloat16.

    Its vocabulary is small: the text is random and the head's cost is not the attention's.
    """
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=4096,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=2,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=64,
        max_position_embeddings=2048,
        rope_theta=500_000.0,
        attn_implementation="sdpa",
    )
    return LlamaForCausalLM(config).to(torch.bfloat16).eval()


def shipped_model() -> Any:
    """The small model that `lminf demo` runs."""
    return AutoModelForCausalLM.from_pretrained(DEMO_MODEL).eval()


def rate(model: Any, tokens: torch.Tensor, cache: Any) -> float:
    """Tokens per second over all of `tokens`, int64 [n]."""
    bounds = chunk_bounds([len(tokens)], CHUNK)
    return stream(model, tokens, cache, bounds).tokens_per_second


def model_speed(name: str, model: Any) -> ModelSpeed:
    """All three rates of one model, on random tokens."""
    tokens = torch.randint(model.config.vocab_size, (LONG,))
    patch_model(model)
    try:
        # In turns, and the better of each, so that a busy moment spoils no ratio.
        rounds = [
            [rate(model, tokens[:n], LambdaCache(model)) for n in (SHORT, LONG)] for _ in range(2)
        ]
        short, long = map(max, zip(*rounds, strict=True))
    finally:
        unpatch_model(model)
    return ModelSpeed(name, short, long, rate(model, tokens, DynamicCache(config=model.config)))


def model_speeds() -> list[ModelSpeed]:
    """Both models."""
    return [
        model_speed("shipped model", shipped_model()),
        model_speed("Llama, 2 layers of 1B's shape", llama_1b_layers()),
    ]
