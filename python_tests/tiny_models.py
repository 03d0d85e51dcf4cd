"""Tiny random models of every supported family, and the definition run inside one of them."""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from huggingface_hub.errors import StrictDataclassFieldValidationError
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from lminf_cuda import reference

VOCAB = 61
TRAINED = 64  # max_position_embeddings

_LLAMA = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": TRAINED,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
_MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
_LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0, 1.5],
    "long_factor": [2.0, 8.0],
    "original_max_position_embeddings": 32,
}


def _rope(rope_type: str, **parameters: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": rope_type, "rope_theta": 10000.0, **parameters}}


# name: (model type, what its config has beyond _LLAMA)
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "arcee": ("arcee", {}),
    "gemma": ("gemma", {"head_dim": 16}),
    "granite": ("granite", {"attention_multiplier": 0.4, "logits_scaling": 2.0}),
    "llama": ("llama", {}),
    "llama_mha": ("llama", {"num_key_value_heads": 4}),
    "llama_linear": ("llama", _rope("linear", factor=4.0)),
    "llama_dynamic": ("llama", _rope("dynamic", factor=2.0)),
    "llama_yarn": (
        "llama",
        _rope("yarn", factor=4.0, original_max_position_embeddings=16),
    ),
    "llama_llama3": (
        "llama",
        _rope(
            "llama3",
            factor=8.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=32,
        ),
    ),
    "mistral": ("mistral", {"sliding_window": None}),
    "mistral_sliding": ("mistral", {"sliding_window": 16}),
    "mixtral": ("mixtral", {"num_local_experts": 4, "sliding_window": None}),
    "olmo": ("olmo", {"clip_qkv": 2.0}),
    "olmo2": ("olmo2", {}),
    "phi3": ("phi3", {"sliding_window": None}),
    "phi3_partial": ("phi3", {"sliding_window": None, "partial_rotary_factor": 0.5}),
    "phi3_longrope": (
        "phi3",
        {
            "sliding_window": None,
            "original_max_position_embeddings": 32,
            "rope_parameters": _LONGROPE | {"partial_rotary_factor": 0.5},
            "partial_rotary_factor": 0.5,
        },
    ),
    "qwen2": ("qwen2", {}),
    "qwen2_sliding": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
    ),
    "qwen2_moe": ("qwen2_moe", _MOE | {"shared_expert_intermediate_size": 24}),
    "qwen3": ("qwen3", {"head_dim": 16}),
    "qwen3_moe": ("qwen3_moe", _MOE | {"head_dim": 8}),
    "smollm3": ("smollm3", {"no_rope_layers": [1, 0]}),
    "starcoder2": ("starcoder2", {"sliding_window": None}),
}


def tiny_model(name: str = "llama", **overrides: Any) -> Any:
    """A random model in float32, the same on every call, whose logits hang on its attention."""
    model_type, extra = MODELS[name]
    try:
        config = AutoConfig.for_model(model_type, **(_LLAMA | copy.deepcopy(extra) | overrides))
    except StrictDataclassFieldValidationError as error:
        if not model_type.startswith("olmo"):
            raise
        pytest.skip(f"this transformers refuses OLMo's own config: {error}")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter.ndim > 1:  # far from uniform attention, logits of order 1
                gain = 2.0 if "self_attn" in parameter_name else 1.0
                parameter.normal_(0.0, gain * parameter.shape[-1] ** -0.5)
    return model.requires_grad_(False)


def tokens(batch: int, length: int, seed: int = 0) -> Tensor:
    """Random ids [batch, length], none of them the padding's."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(2, VOCAB, (batch, length), generator=generator)


@contextmanager
def one_thread() -> Iterator[None]:
    """Tiny tensors are not worth a second thread, least of all on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@contextmanager
def definition(
    model: Any, layers: list[tuple[int, int, int]], uses_rope: list[bool] | None = None
) -> Iterator[Any]:
    """A copy of an unpatched model that attends by reference.lambda_attention in float64.

    Args:
        model: unpatched, with eager attention.
        layers: n_global, window and max_distance of each layer.
        uses_rope: of each layer; all by default.
    """
    model = copy.deepcopy(model)
    decoder = model.model
    rotary = type(decoder.rotary_emb)(decoder.config)
    modeling: Any = sys.modules[type(decoder.layers[0].self_attn).__module__]

    def attention(
        module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Any, scaling: float, **_: Any
    ) -> tuple[Tensor, None]:
        n_global, window, max_distance = layers[module.layer_idx]
        rotates = uses_rope is None or uses_rope[module.layer_idx]
        out = reference.lambda_attention(
            q.double(),
            k.double(),
            v.double(),
            n_global=n_global,
            window=window,
            max_distance=max_distance,
            inv_freq=rotary.inv_freq if rotates else None,
            rope_scaling=rotary.attention_scaling if rotates else 1.0,
            scale=scaling,
        )
        return out.to(q.dtype).transpose(1, 2), None

    kept = modeling.apply_rotary_pos_emb, modeling.eager_attention_forward
    modeling.apply_rotary_pos_emb = lambda q, k, cos, sin, *_, **__: (q, k)
    modeling.eager_attention_forward = attention
    try:
        yield model
    finally:
        modeling.apply_rotary_pos_emb, modeling.eager_attention_forward = kept
