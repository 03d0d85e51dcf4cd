"""Tiny random models of every supported family, and the definition run inside one of them."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from types import MethodType
from typing import Any

import pytest
import torch
from huggingface_hub.errors import StrictDataclassFieldValidationError
from torch import Tensor, nn
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoConfig,
    AutoModelForCausalLM,
)

from lminf_cuda import reference
from lminf_cuda.models.description import describe
from lminf_cuda.models.families import find_decoder
from lminf_cuda.models.rope import is_rotary

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
_ALTERNATING = ["sliding_attention", "full_attention"]
_PARTIAL = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25}
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
    "bloom": ("bloom", {"n_layer": 2, "n_head": 4}),
    "bloom_6_heads": ("bloom", {"n_layer": 2, "num_attention_heads": 6, "hidden_size": 48}),
    "codegen": ("codegen", {"n_layer": 2, "n_head": 4, "n_embd": 32, "rotary_dim": 4}),
    "cohere": ("cohere", {}),
    "cohere2": ("cohere2", {"sliding_window": 8, "layer_types": _ALTERNATING}),
    "dbrx": (
        "dbrx",
        {
            "d_model": 32,
            "n_heads": 4,
            "n_layers": 2,
            "max_seq_len": TRAINED,
            "attn_config": {"kv_n_heads": 2, "clip_qkv": 2.0, "rope_theta": 10000.0},
            "ffn_config": {"hidden_size": 32, "ffn_hidden_size": 32, "moe_top_k": 2},
        },
    ),
    "diffllama": ("diffllama", {"head_dim": 8}),
    "exaone4": (
        "exaone4",
        {"sliding_window": 8, "sliding_window_pattern": 2, "layer_types": _ALTERNATING},
    ),
    "falcon": ("falcon", {}),
    "falcon_alibi": ("falcon", {"alibi": True}),
    "falcon_groups": ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}),
    "falcon_mha": ("falcon", {"multi_query": False}),
    "gemma2": (
        "gemma2",
        {
            "head_dim": 16,
            "query_pre_attn_scalar": 8,
            "attn_logit_softcapping": 3.0,
            "sliding_window": 8,
            "layer_types": _ALTERNATING,
        },
    ),
    "gemma3_text": (
        "gemma3_text",
        {
            "head_dim": 16,
            "query_pre_attn_scalar": 8,
            "sliding_window": 8,
            "layer_types": _ALTERNATING,
        },
    ),
    "glm": ("glm", {"head_dim": 8}),
    "glm4": ("glm4", {"head_dim": 8}),
    "gpt_neox": ("gpt_neox", {"rope_parameters": _PARTIAL}),
    "gpt_neox_japanese": ("gpt_neox_japanese", {"intermediate_multiple_size": 2}),
    "gpt_oss": (
        "gpt_oss",
        {
            "head_dim": 8,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "sliding_window": 8,
            "layer_types": _ALTERNATING,
        },
    ),
    "gptj": ("gptj", {"n_layer": 2, "n_head": 4, "n_embd": 32, "rotary_dim": 4}),
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
    # one layer that rotates, in chunks, and one that scales its queries by their position
    "llama4_text": (
        "llama4_text",
        {
            "head_dim": 8,
            "intermediate_size_mlp": 48,
            "num_local_experts": 4,
            "no_rope_layers": [1, 0],
            "attention_chunk_size": 40,
            "floor_scale": 8,
            "attn_scale": 0.5,
        },
    ),
    "ministral3": (
        "ministral3",
        {
            "head_dim": 8,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 10000.0,
                "factor": 4.0,
                "original_max_position_embeddings": 16,
                "llama_4_scaling_beta": 0.3,
            },
        },
    ),
    "mistral": ("mistral", {"sliding_window": None}),
    "mistral_sliding": ("mistral", {"sliding_window": 16}),
    "mixtral": ("mixtral", {"num_local_experts": 4, "sliding_window": None}),
    "mpt": ("mpt", {"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": TRAINED}),
    "mpt_6_heads": (
        "mpt",
        {"hidden_size": 48, "num_attention_heads": 6, "n_layers": 2, "max_seq_len": TRAINED},
    ),
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
    "phi": ("phi", {}),
    "qwen2": ("qwen2", {}),
    "qwen2_sliding": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
    ),
    "qwen2_moe": ("qwen2_moe", _MOE | {"shared_expert_intermediate_size": 24}),
    "qwen3": ("qwen3", {"head_dim": 16}),
    "qwen3_moe": ("qwen3_moe", _MOE | {"head_dim": 8}),
    "smollm3": ("smollm3", {"no_rope_layers": [1, 0]}),
    "stablelm": ("stablelm", {}),
    "starcoder2": ("starcoder2", {"sliding_window": None}),
}


def tiny_model(name: str = "llama", **overrides: Any) -> Any:
    """A random model in float32, the same on every call, whose logits hang on its attention."""
    model_type, extra = MODELS[name]
    try:
        config = AutoConfig.for_model(model_type, **(_LLAMA | copy.deepcopy(extra) | overrides))
    except StrictDataclassFieldValidationError:
        try:
            AutoConfig.for_model(model_type)
        except StrictDataclassFieldValidationError as error:
            pytest.skip(f"this transformers refuses the type's own default config: {error}")
        raise
    torch.manual_seed(0)
    # Falcon's eager attention adds its ALiBi twice: once more with the mask.
    implementation = "sdpa" if name == "falcon_alibi" else "eager"
    return randomize(AutoModelForCausalLM.from_config(config, attn_implementation=implementation))


def randomize(model: Any, attention_gain: float = 2.0) -> Any:
    """Weights far from uniform attention, with logits of order 1; no gradients, no dropout.

    Norms' weights and biases of attention modules are not all 1 or all 0, as they begin; those of
    recurrent layers, whose states would round more, are.
    """
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            is_attention = "attn" in parameter_name or "attention" in parameter_name
            if parameter.ndim > 1:
                gain = attention_gain if is_attention else 1.0
                parameter.normal_(0.0, gain * parameter.shape[-1] ** -0.5)
            elif is_attention and parameter.ndim == 1 and "linear_attn" not in parameter_name:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.eval().requires_grad_(False)


def tokens(batch: int, length: int, seed: int = 0) -> Tensor:
    """Random ids [batch, length], none of them the padding's."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(2, VOCAB, (batch, length), generator=generator, device="cpu")


@contextmanager
def one_thread() -> Iterator[None]:
    """Tiny tensors are not worth a second thread, least of all on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


class _Dense:
    """Λ attention as its definition reads, over rows of a batch that differ in positions only.

    Row 0 stands at the true positions, row 1 at position 0, row 2 at max_distance, so that the
    model's own rotation gives R(i) q, R(j) k, R(0) k and R(max_distance) q.
    """

    def __init__(self, layers: Sequence[Any]) -> None:
        self.layers = layers

    def __call__(
        self,
        module: nn.Module,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Any = None,
        scaling: float | None = None,
        softcap: float | None = None,
        s_aux: Tensor | None = None,
        slopes: Tensor | None = None,
        **_: Any,
    ) -> tuple[Tensor, None]:
        # A module that serves several layers, which are alike, has no index or -1.
        layers = [layer for layer in self.layers if layer is not None]
        index: Any = module.layer_idx
        layer = layers[0] if index in (None, -1) else self.layers[index]
        group = q.shape[1] // k.shape[1]
        q, k, v = q.double(), *(x.double().repeat_interleave(group, 1) for x in (k, v))
        # A model may scale its queries by their position, which remains the true one.
        q = q * (q[:1].norm(dim=-1, keepdim=True) / q.norm(dim=-1, keepdim=True).clamp(min=1e-30))
        index = torch.arange(q.shape[2])
        distance = index[:, None] - index
        far = distance >= layer.max_distance
        s = torch.where(far, q[2] @ k[1].mT, q[0] @ k[0].mT)  # [Hq, S, S]
        s = s * (q.shape[3] ** -0.5 if scaling is None else scaling)
        if slopes is not None:
            s = s - slopes.double()[:, None, None] * distance.clamp(max=layer.max_distance)
        if softcap:
            s = softcap * (s / softcap).tanh()
        visible = (distance >= 0) & ((distance < layer.window) | (index < layer.n_global))
        s = s.masked_fill(~visible, -torch.inf)
        if s_aux is not None:
            sink = s_aux.double()[:, None, None].expand(*s.shape[:2], 1)
            s = torch.cat([s, sink], dim=-1)
        out = s.softmax(-1)[..., : len(index)] @ v[0]  # [Hq, S, D]
        return out.transpose(0, 1).to(next(module.parameters()).dtype).repeat(3, 1, 1, 1), None


@contextmanager
def definition(model: Any, layers: Sequence[Any]) -> Iterator[Callable[[Tensor], Tensor]]:
    """A copy of an unpatched model that attends by the definition, in float64, in its own code.

    Args:
        model: unpatched.
        layers: of each layer an object with n_global, window and max_distance, or None.

    Yields:
        ids [1, S] -> logits [1, S, vocabulary]; its attribute `model` is the copy.
    """
    model = copy.deepcopy(model)
    decoder, family = find_decoder(model)
    description = describe(decoder, family)
    dense = _Dense(layers)
    AttentionInterface.register("definition", dense)  # type: ignore[arg-type]
    AttentionMaskInterface.register("definition", lambda *_, **__: torch.ones(1, 1, 1, 1))
    decoder.config._attn_implementation = "definition"
    for module in decoder.modules():
        if is_rotary(module):  # without the wrapper that changes frequencies as positions grow
            module.forward = MethodType(inspect.unwrap(type(module).forward), module)

    limit = max(layer.max_distance for layer in layers if layer is not None)

    def positions_of(n_tokens: int) -> Tensor:
        index = torch.arange(n_tokens)
        return torch.stack([index, 0 * index, 0 * index + limit])

    def attend(module: Any, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        layer = description.layers[module.layer_idx]
        rope = layer.rope
        if rope is not None:
            q, k = (
                reference.clamped_rope(
                    x,
                    positions_of(x.shape[2]),
                    rope.inv_freq,
                    scaling=rope.scaling,
                    interleaved=rope.interleaved,
                )
                for x in (q.double(), k.double())
            )
        return dense(module, q, k, v, scaling=scale, slopes=layer.slopes)[0].flatten(2)

    if family.forward is not None:
        for layer in description.attention:
            forward = partial(family.forward, attend)
            layer.attention.forward = MethodType(forward, layer.attention)

    def logits(ids: Tensor) -> Tensor:
        positions = positions_of(ids.shape[1])
        return model(ids.expand(3, -1), position_ids=positions, use_cache=False).logits[:1]

    logits.model = model  # type: ignore[attr-defined]
    yield logits
