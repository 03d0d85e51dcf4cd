"""Trains a one-layer Llama to recall facts, the task that shows middle tokens at work.

    python tools/train_recall_model.py    trains (10 s), and prints how often a fact is found by its
                                          place in a long text, with and without middle tokens

A text is a row of facts and questions, one token each. A fact says which value a key has in this
text; a question names a key that was told before, and asks for its value. Every text gives its keys
values anew, so the weights cannot know them: the answer is read off the fact, wherever it stands.
The model sees texts of TRAINED tokens only.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from lminf_cuda import patch_model, unpatch_model

TRAINED = 64  # tokens
KEYS = VALUES = 16
QUESTION = (
    KEYS * VALUES
)  # token of the question for key 0; a fact is the token key * VALUES + value
PLACES = (0.0, 0.1, 0.3, 0.5, 0.7, 0.9, 0.98)


def recall_model(seed: int = 0) -> Any:
    """An untrained model."""
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=KEYS * VALUES + KEYS,
            hidden_size=64,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=2,
            max_position_embeddings=TRAINED,
            tie_word_embeddings=False,
            bos_token_id=None,
            eos_token_id=None,
        )
    )


def training_texts(batch: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Token ids, the values of their keys, and whether the token asks for one told before.

    All are [batch, TRAINED].
    """
    book = torch.randint(VALUES, (batch, KEYS), generator=generator)
    keys = torch.randint(KEYS, (batch, TRAINED), generator=generator)
    asks = torch.rand((batch, TRAINED), generator=generator) < 0.5
    values = book.gather(1, keys)
    ids = torch.where(asks, QUESTION + keys, keys * VALUES + values)
    told = (keys[:, :, None] == keys[:, None, :]) & ~asks[:, None, :]
    return ids, values, asks & told.tril(-1).any(-1)


def train(model: Any, steps: int = 150, batch: int = 64, seed: int = 0) -> float:
    """Trains in place; returns the share of questions answered in the last step."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=steps)
    model.train()
    found = 0.0
    for _ in range(steps):
        ids, values, asked = training_texts(batch, generator)
        logits = model(ids, use_cache=False).logits[asked][:, :VALUES]
        loss = torch.nn.functional.cross_entropy(logits, values[asked])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        found = float((logits.argmax(-1) == values[asked]).float().mean())
    model.eval().requires_grad_(False)
    return found


def long_texts(
    batch: int, n_facts: int, place: float, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Texts with one fact about key 0, others about the other keys, and the question at the end.

    Args:
        place: of the fact among the n_facts, 0 at the beginning and 1 at the end.

    Returns:
        ids int64 [batch, n_facts + 1], and the answers int64 [batch].
    """
    book = torch.randint(VALUES, (batch, KEYS), generator=generator)
    keys = torch.randint(1, KEYS, (batch, n_facts), generator=generator)
    keys[:, round(place * (n_facts - 1))] = 0
    facts = keys * VALUES + book.gather(1, keys)
    return torch.cat([facts, torch.full((batch, 1), QUESTION)], 1), book[:, 0]


def share_found(
    model: Any, place: float, *, n_facts: int = 512, batch: int = 100, seed: int = 1, **middle: Any
) -> float:
    """How often a patched model answers the question after n_facts facts.

    Args:
        place: see long_texts.
        middle: arguments of patch_model for middle tokens.
    """
    ids, answers = long_texts(batch, n_facts, place, torch.Generator().manual_seed(seed))
    patch_model(model, n_global=4, window=TRAINED // 2, **middle)
    try:
        with torch.inference_mode():
            logits = model(ids, use_cache=False, logits_to_keep=1).logits[:, -1, :VALUES]
    finally:
        unpatch_model(model)
    return float((logits.argmax(-1) == answers).float().mean())


def main() -> None:
    """Trains and prints a table."""
    began = time.perf_counter()
    model = recall_model()
    found = train(model)
    print(f"trained in {time.perf_counter() - began:.0f} s; answered in training: {found:.0%}")
    for place in PLACES:
        alone = share_found(model, place)
        middle = share_found(model, place, middle_top_k=5, middle_from_layer=0)
        print(f"fact at {place:4.0%} of 512 tokens: Λ alone {alone:4.0%}, middle {middle:4.0%}")


if __name__ == "__main__":
    main()
