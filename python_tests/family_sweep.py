"""Every causal LM of the installed transformers, patched: worked, refused, or wrong.

    python python_tests/family_sweep.py                 # writes docs/families.md
    python python_tests/family_sweep.py llama gpt_oss   # prints the rows of these types

A type that patch_model takes is built with a tiny config and random weights, and has worked when
its logits equal

- the unpatched model's while the text fits the window, layers that slide among them;
- a dense rewrite at four times the window (`tiny_models.definition`, run in the model's own code);
- and its own logits with a LambdaCache, read in chunks and then token by token, and by generate().

Anything else that patch_model takes is wrong. What it does not take is refused by name.
"""

from __future__ import annotations

import sys
import traceback
from typing import Any

import torch
import transformers
from tiny_models import VOCAB, definition, one_thread, randomize, tokens
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from lminf_cuda import LambdaCache, patch_model
from lminf_cuda.families import FAMILIES

N_GLOBAL, WINDOW = 3, 12
TOLERANCE = 1e-5

# What a config calls its sizes, in all its dialects.
_TINY: dict[str, Any] = {
    "vocab_size": VOCAB,
    "num_local_experts": 4,
    "num_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_k": 2,
    "n_group": 1,
    "topk_group": 1,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    "v_head_dim": 8,
    "head_dim": 8,
    "sliding_window": 8,
    "rotary_dim": 4,
    "num_kv_heads": 2,
    "num_key_value_heads": 2,
}
_TINY |= dict.fromkeys(("hidden_size", "d_model", "n_embd"), 32)
_TINY |= dict.fromkeys(("intermediate_size", "ffn_hidden_size", "n_inner"), 48)
_TINY |= dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 24)
_TINY |= dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers"), 4)
_TINY |= dict.fromkeys(("num_attention_heads", "n_head", "n_heads"), 4)
_TINY |= dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len"), 64)

_TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}

# Where a tiny config needs more than that; None leaves the config's own value.
_LATENT = (*("axk1", "deepseek_v2", "deepseek_v3", "glm4_moe_lite", "minicpm3", "youtu"),)
_ALTERNATING = {"layer_types": ["sliding_attention", "full_attention"] * 2}
_SPECIAL: dict[str, dict[str, Any]] = {
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "falcon": {"head_dim": None},
    "gemma3_text": _ALTERNATING,
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8},
    "kolibri1": _ALTERNATING,
    "ministral": {"head_dim": 8} | _ALTERNATING,
    "mistral": {"sliding_window": None},
    "nemotron": {"head_dim": 8, "num_key_value_heads": 2},
}
for _name in _LATENT:
    _SPECIAL[_name] = {"head_dim": None, "num_key_value_heads": 4, "num_experts_per_tok": 2}


def tiny_config(model_type: str) -> Any:
    """A config of a few thousand parameters; sliding layers slide over 8 tokens."""
    default = AutoConfig.for_model(model_type)
    sizes = {}
    for name, value in _TINY.items():
        try:
            old = getattr(default, name, None)
        except Exception:  # an attribute that differs from layer to layer
            old = None
        if old is not None:
            sizes[name] = value
    special = _SPECIAL.get(model_type, {})
    sizes = {
        name: value
        for name, value in (sizes | _TOKENS | special).items()
        if value is not None or name in _TOKENS
    }
    return AutoConfig.for_model(model_type, **sizes)


def tiny(model_type: str) -> Any:
    """A random model of the type, in float32."""
    config = tiny_config(model_type)
    with torch.device("meta"):
        shape = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    size = sum(parameter.numel() for parameter in shape.parameters())
    if size > 3_000_000:
        raise ValueError(f"the tiny config has {size} parameters; name its sizes in _SPECIAL")
    torch.manual_seed(0)
    return randomize(AutoModelForCausalLM.from_config(config, attn_implementation="eager"), 1.0)


def difference(got: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference; infinite where either is not finite."""
    gap = (got.double() - expected.double()).abs().max()
    return float(gap.nan_to_num(nan=float("inf")))


def check(model_type: str) -> str:
    """ "" when a patched tiny model of the type is right, else what is wrong with it."""
    model = tiny(model_type)
    ids, long_ids = tokens(2, 30), tokens(1, 4 * WINDOW + 1)
    vanilla = model(ids).logits
    fits = patch_model(tiny(model_type), n_global=N_GLOBAL, window=30)
    got = fits(ids, use_cache=False).logits
    if (error := difference(got, vanilla)) > TOLERANCE:
        return f"off by {error:.1g} from the unpatched model within the window"
    patched = patch_model(tiny(model_type), n_global=N_GLOBAL, window=WINDOW, max_distance=20)
    layers = [layer.settings for layer in LambdaCache(patched).layers]
    with definition(model, layers) as dense:
        expected = dense(long_ids)
    if difference(expected, model(long_ids[:, :60]).logits) < 100 * TOLERANCE:
        return "the check cannot tell Λ attention from full attention"
    if (error := difference(patched(long_ids, use_cache=False).logits, expected)) > TOLERANCE:
        return f"off by {error:.1g} from the definition at four times the window"
    cache = LambdaCache(patched)
    pieces = [long_ids[:, :20], long_ids[:, 20:31], *long_ids[:, 31:].split(1, dim=1)]
    got = torch.cat([patched(piece, past_key_values=cache).logits for piece in pieces], dim=1)
    if (error := difference(got, expected)) > TOLERANCE:
        return f"off by {error:.1g} with the cache"
    written = patched.generate(long_ids, max_new_tokens=4, do_sample=False)
    logits = patched(written, use_cache=False).logits
    if not torch.equal(logits[:, -5:-1].argmax(-1), written[:, -4:]):
        return "generate() writes other tokens than without a cache"
    return ""


def sweep(model_types: list[str]) -> dict[str, tuple[str, str]]:
    """For each type its verdict, and what there is to say."""
    rows = {}
    for model_type in model_types:
        if model_type not in FAMILIES:
            rows[model_type] = ("refused", "")
            continue
        try:
            problem = check(model_type)
        except Exception as error:
            problem = traceback.format_exc().strip() if "-v" in sys.argv else f"{error!r}"[:300]
        rows[model_type] = ("wrong", problem) if problem else ("worked", "")
        print(model_type, *rows[model_type], flush=True)
    return rows


def all_types() -> list[str]:
    """The model types of AutoModelForCausalLM."""
    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def main() -> None:
    asked = [word for word in sys.argv[1:] if not word.startswith("-")]
    transformers.logging.set_verbosity_error()
    with one_thread(), torch.no_grad():
        sweep(asked or all_types())


if __name__ == "__main__":
    main()
