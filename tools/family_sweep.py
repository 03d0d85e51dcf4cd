"""Every causal LM of the installed transformers, patched: worked, refused, or wrong.

    python tools/family_sweep.py    # writes docs/families.md and the README's count of
                                           # them, with the newest tested transformers
    python tools/family_sweep.py llama gpt_oss   # prints the rows of these types

A type that patch_model takes is built with a tiny config and random weights, and has worked when
its logits equal

- the unpatched model's while the text fits the window, layers that slide among them;
- a dense rewrite at four times the window (`tiny_models.definition`, run in the model's own code);
- its own logits with a LambdaCache at three times the training length;
- and its own logits with a LambdaCache, read in chunks and then token by token, by generate(), and
  in a row that begins with padding;

and when unpatch_model gives the unpatched model's logits back, bit for bit.

Anything else that patch_model takes is wrong. What it does not take is refused by name.
"""

from __future__ import annotations

import copy
import functools
import re
import sys
import textwrap
import traceback
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassFieldValidationError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
)

sys.path.insert(0, str(Path(__file__).parents[1] / "python_tests"))
from tiny_models import VOCAB, definition, one_thread, randomize, tokens

from lminf_cuda import LambdaCache, patch_model, unpatch_model
from lminf_cuda.models.compat import TESTED, cache_keyword, recurrent_layers_are_known
from lminf_cuda.models.families import ENCODER_DECODERS, FAMILIES, WRAPPERS, find_decoder

N_GLOBAL, WINDOW, TRAINED = 3, 12, 64
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
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
_TINY |= dict.fromkeys(("hidden_size", "d_model", "n_embd"), 32)
_TINY |= dict.fromkeys(
    ("intermediate_size", "intermediate_size_mlp", "ffn_hidden_size", "n_inner"), 48
)
_TINY |= dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 24)
_TINY |= dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers"), 4)
_TINY |= dict.fromkeys(("num_attention_heads", "n_head", "n_heads"), 4)
_TINY |= dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len"), TRAINED)

# What the configs of towers, for images and sounds, call theirs.
_TINY_TOWER = dict.fromkeys(("hidden_size", "d_model", "embed_dim", "out_hidden_size"), 32)
_TINY_TOWER |= dict.fromkeys(("intermediate_size", "encoder_ffn_dim", "projection_dim"), 48)
_TINY_TOWER |= dict.fromkeys(("num_hidden_layers", "encoder_layers", "num_layers", "depth"), 2)
_TINY_TOWER |= dict.fromkeys(("num_attention_heads", "num_heads", "encoder_attention_heads"), 4)
_TINY_TOWER |= {"image_size": 32, "patch_size": 8}
_TINY_TOWER |= dict.fromkeys(("projector_input_dim", "projector_output_dim"), 32)
_TINY_TOWER |= {"vision_output_dim": 32, "base_channels": 32}

_TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}

# Where a tiny config needs more than that; None leaves the config's own value.
_LATENT = (
    *("axk1", "deepseek_v2", "deepseek_v3", "glm4_moe_lite", "longcat_flash", "minicpm3"),
    *("mistral4", "sarvam_mla", "youtu"),
)
_ALTERNATING = {"layer_types": ["sliding_attention", "full_attention"] * 2}
_RECURRENT = {"layer_types": ["linear_attention", "full_attention"] * 2}
_SHARING = {"num_hidden_layers": 6, "num_kv_shared_layers": 3} | {
    "layer_types": ["sliding_attention", "full_attention"] * 3,
    "vocab_size_per_layer_input": VOCAB,
    "hidden_size_per_layer_input": 8,
}
# Their scores are far apart, and their own float32 logits from their float64 ones, too.
_SHARP = ("gemma4", "gemma4_text", "gemma4_unified", "gemma4_unified_text", "minicpm3")
_MROPE = {
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 1e4,
        "mrope_section": [2, 1, 1],
    }
}
_MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1}
_SPECIAL: dict[str, dict[str, Any]] = {
    "bailing_hybrid": _RECURRENT
    | {"num_key_value_heads": 4, "head_dim": None, "mlp_layer_types": ["dense", "sparse"] * 2},
    "beam": _ALTERNATING,
    "cohere_compass_text": _ALTERNATING
    | {
        "rope_parameters": {
            "sliding_attention": {
                "rope_type": "default",
                "rope_theta": 1e4,
                "mrope_section": [2, 1, 1],
            },
            "full_attention": None,
        }
    },
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 1.0, "rope_theta": 1e4},
        "ffn_config": {"hidden_size": 32, "ffn_hidden_size": 32, "moe_top_k": 2},
    },
    "granite_speech_encoder": {"hidden_dim": 32, "num_heads": 4, "dim_head": 8},
    "jamba": {"attn_layer_offset": 1, "attn_layer_period": 2},
    "lfm3": {"layer_types": ["conv", "full_attention"] * 2},
    # scales its queries within the text
    "llama4_text": {"attention_chunk_size": 32, "floor_scale": 8, "attn_scale": 0.5},
    "mllama_vision_model": {"intermediate_layers_indices": [0], "vision_output_dim": 64},
    "mllama_text_model": {"cross_attention_layers": [1]},
    "moshi": {"sliding_window": None},
    "nemotron_h": {"head_dim": 8, "time_step_min": 1e-9},
    "phi4_multimodal": {
        "vision_config": _TINY_TOWER | {"num_hidden_layers": 2},
        "audio_config": _TINY_TOWER
        | {"num_blocks": 2, "nemo_conv_channels": 8, "ext_pw_out_channel": 32, "input_size": 16},
    },
    "step3p5": _ALTERNATING | {"sliding_window": 8, "num_sliding_attention_heads": 8},
    "ernie4_5_vl_moe_text": {"head_dim": 16, "moe_intermediate_size": [24, 16]}
    | {"rope_parameters": _MROPE["rope_parameters"] | {"mrope_section": [3, 3, 2]}},
    "molmo2_adapter": {"vision_feature_layer": [1, 0], "text_hidden_size": 32, "head_dim": 8},
    "molmo2_text": {
        "rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4},
        "rope_scaling_layers": [1, 2],
    },
    "deepseek_ocr2_text": {
        "mlp_layer_types": ["dense", "sparse"] * 2,
        "num_key_value_heads": None,
        "num_experts_per_tok": 2,
    },
    "muse_spark_audio": {"num_hidden_layers": 4, "hidden_sizes": [8] * 4, "patch_sizes": [2] * 4},
    "muse_spark_text": {"moe_hidden_size": 32, "qk_scale_factor": 1.0},
    "ovis2_vision": {"vocab_size": 64},
    "vibevoice_acoustic_tokenizer_encoder": {"num_filters": 2, "depths": [1] * 7},
    "zamba": {"layers_block_type": ["mamba", "mamba", "hybrid", "hybrid"]}
    | {"attention_head_dim": 16, "num_key_value_heads": 4},
    "zamba2": {"layers_block_type": ["mamba", "hybrid"] * 2, "use_mem_rope": True}
    | {"time_step_min": 1e-9},
    "zaya": {
        "num_experts_per_tok": 1,
        "layer_types": ["hybrid", "hybrid_sliding"] * 2,
        "sliding_window": 8,
    },
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "falcon": {"head_dim": None},
    "gemma3_text": _ALTERNATING,
    "hunyuan_v1_dense": {"head_dim": 8},
    "kolibri1": _ALTERNATING,
    "kimi_linear": _RECURRENT
    | {"linear_head_dim": 8, "linear_num_heads": 4, "num_experts_per_token": 2}
    | {"head_dim": 12, "num_key_value_heads": 4, "num_expert_group": 1},
    "gemma3n_text": _SHARING,
    "gemma3n_audio": {"conf_num_hidden_layers": 1},
    "gemma4_text": _SHARING | {"head_dim": 8, "global_head_dim": 16},
    "gemma4_unified_text": _SHARING | {"head_dim": 8, "global_head_dim": 16},
    "lara_mini": {
        "layer_types": ["linear_attention", "sliding_attention", "full_attention"] * 2,
        "num_hidden_layers": 6,
    },
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2, "num_dense_layers": 2},
    "olmo_hybrid": _RECURRENT | {"rope_parameters": None},
    "qwen3_5_moe_text": _RECURRENT,
    "qwen3_5_text": _RECURRENT,
    "qwen3_next": _RECURRENT,
    "bamba": _MAMBA | {"attn_layer_indices": [1, 3]},
    "falcon_h1": _MAMBA | {"mamba_d_ssm": 64},
    "granitemoehybrid": _MAMBA | _RECURRENT | {"position_embedding_type": "rope"},
    "ministral": {"head_dim": 8} | _ALTERNATING,
    "mistral": {"sliding_window": None},
    "nemotron": {"head_dim": 8, "num_key_value_heads": 2},
}
_SPECIAL |= dict.fromkeys(
    (
        *("cosmos3_edge_text", "glm4v_text", "glm_ocr_text", "paddleocr_vl_text"),
        *("qwen2_5_omni_text", "qwen2_5_vl_text", "qwen2_vl_text", "qwen3_omni_moe_text"),
        *("qwen3_vl_moe_text", "qwen3_vl_text"),
    ),
    _MROPE | {"head_dim": 8},
)
_SPECIAL["glm4v_moe_text"] = _MROPE | {"head_dim": 16}
for _name in _LATENT:
    _SPECIAL[_name] = {"head_dim": None, "num_key_value_heads": 4, "num_experts_per_tok": 2}
_SPECIAL["longcat_flash"] |= {"head_dim": 4, "num_layers": 2, "expert_ffn_hidden_size": 24}
_SPECIAL["longcat_flash"] |= {"zero_expert_num": 2, "moe_topk": 2}
# They scale their queries within the text.
for _name in ("ministral3", "mistral4"):
    _SPECIAL.setdefault(_name, {})["rope_parameters"] = {
        "rope_type": "yarn",
        "rope_theta": 1e4,
        "factor": 4.0,
        "original_max_position_embeddings": 16,
        "llama_4_scaling_beta": 0.3,
    }

# The same for models around a language model, whose parts are merged with what they are otherwise.
_AROUND: dict[str, dict[str, Any]] = {
    "apertus1p5": {
        "vision_config": {"codebook_size": 8},
        "audio_config": {"codebook_size": 8, "codebook_dim": 32},
        "image_token_offset": VOCAB - 16,
        "audio_token_offset": VOCAB - 8,
    },
    "chameleon": {"vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48}
    | {"num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2}
    | {"max_position_embeddings": 64, "vocabulary_map": {"<image>": VOCAB - 1}},
    "emu3": {"vocabulary_map": {"<image>": VOCAB - 1}},
    "fun_asr_nano": {"adaptor_config": {"intermediate_size": 8}},
    "fuyu": {"patch_size": 2},
    "granite4_vision": {"vision_config": {"hidden_size": 64}, "deepstack_layer_map": [[1, 1]]}
    | {"downsample_rate": "1/2"},
    "muse_glimmer": {"out_hidden_size": 32, "projector_hidden_size": 32},
    "muse_spark": {"out_hidden_size": 32, "projector_hidden_size": 32},
    "nemotron_h_omni": {"projector_hidden_size": 32, "vision_hidden_size": 32},
    "ovis2": {"hidden_size": 32, "vocab_size": VOCAB},
    "perception_lm": {"vision_config": {"model_args": {"embed_dim": 32}}},
    "qwen2_5_omni_thinker": {"vision_start_token_id": VOCAB - 1},
    "qwen3_asr": {"eos_token_id": VOCAB},
    "qwen3_omni_moe_thinker": {"vision_start_token_id": VOCAB - 1},
}

OLDEST, NEWEST = TESTED
NOT_IN_OLDEST = {
    *("aya_vision", "bamba", "chameleon", "cohere2", "cohere2_vision", "ernie4_5", "ernie4_5_moe"),
    *("ernie4_5_vl_moe", "falcon_h1", "gemma3n", "gemma3n_text", "granitemoehybrid", "jamba"),
    *("lfm2", "lfm2_moe", "lfm2_vl", "moshi", "nemotron", "nemotron_h", "olmo", "olmo2", "olmo3"),
    *("olmo_hybrid", "olmoe", "paddleocr_vl", "phimoe", "qwen3_5", "qwen3_5_moe"),
    *("qwen3_5_moe_text", "qwen3_5_text", "qwen3_next", "zamba", "zamba2"),
}

# Those whose own forward raises an error with some transformers, for any text; see _UPSTREAM.
RAISES_UNPATCHED = {"llama4"}

# Why the others are refused.
_REFUSED = {
    "absolute positions, learned or of sines": (
        *("bart", "bert", "bert-generation", "big_bird", "bigbird_pegasus", "biogpt"),
        *("blenderbot", "blenderbot-small", "camembert", "ctrl", "data2vec-text", "electra"),
        *("ernie", "git", "gpt-sw3", "gpt2", "gpt_bigcode", "gpt_neo", "marian", "mbart"),
        *("megatron-bert", "musicgen", "musicgen_melody", "mvp", "openai-gpt", "opt", "pegasus"),
        *("plbart", "prophetnet", "rembert", "roberta", "roberta-prelayernorm", "roc_bert"),
        *("trocr", "whisper", "xglm", "xlm", "xlm-roberta", "xlm-roberta-xl", "xmod"),
    ),
    "no attention": ("falcon_mamba", "mamba", "mamba2", "rwkv", "xlstm"),
    "keys chosen by an indexer": (
        *("axk2", "deepseek_v32", "dots3_note", "dots3_note_text", "glm_moe_dsa", "hy_v4"),
        *("minimax_m3_vl_text", "qwen4_exp", "qwen4_exp_text"),
    ),
    "keys that stand for many tokens each": ("deepseek_v4",),
    "keys chosen by hashes": ("reformer",),
    "keys of another model": ("gemma4_assistant", "gemma4_unified_assistant"),
    "scores with a bias that depends on the query": (
        *("inkling2_loop_text", "inkling2_text", "inkling_text", "xlnet"),
    ),
    "norms with weights after the rotation, so that a score depends on more than the distance": (
        *("hunyuan_v1_dense", "hunyuan_v1_moe"),
    ),
    "layers that run in loops, over which a cache may be shared": ("dory",),
    "a mask computed from the values": ("doge",),
    "tokens that see what follows them, and biases that differ by segment": ("cpmant",),
    "slides already in all layers, with keys kept in the layers themselves": ("recurrent_gemma",),
    "linear attention that wants a cache class of its own": ("minimax",),
    "rotates by a table that ends, in attention code of its own": ("roformer",),
    "several decoders, over bytes and over groups of them": ("blt",),
}
_REASONS = {name: reason for reason, names in _REFUSED.items() for name in names}


def tiny_config(model_type: str, build: Any = None) -> Any:
    """A config of a few thousand parameters; sliding layers slide over 8 tokens.

    `build` makes it where AutoConfig does not know the type.
    """
    build = build or functools.partial(AutoConfig.for_model, model_type)
    default = build()
    sizes = {}
    for name, value in _TINY.items():
        try:
            old = getattr(default, name, None)
        except Exception:  # an attribute that differs from layer to layer
            old = None
        if old is not None:
            sizes[name] = value
    special = copy.deepcopy(_SPECIAL.get(model_type, {}))  # configs complete what they are given
    sizes = {
        name: value
        for name, value in (sizes | _TOKENS | special).items()
        if value is not None or name in _TOKENS
    }
    return build(**sizes)


def _tiny_tower(part: Any) -> dict[str, Any]:
    """The entries of a tiny config of an encoder of images or sounds, and of what is in it."""
    numbers = [size for size in _TINY_TOWER if isinstance(getattr(part, size, None), int)]
    sizes = {size: _TINY_TOWER[size] for size in numbers}
    if getattr(part, "layer_types", None):
        sizes["layer_types"] = part.layer_types[: sizes["num_hidden_layers"]]
    inner = {
        name: _tiny_tower(getattr(part, name))
        for name in part.sub_configs
        if getattr(part, name, None) is not None
    }
    return part.to_diff_dict() | sizes | inner | _SPECIAL.get(part.model_type, {})


def tiny_wrapper_config(model_type: str) -> Any:
    """A config of a model that also sees or hears, with a tiny language model in it."""
    default = AutoConfig.for_model(model_type)
    text = default.get_text_config(decoder=True)
    parts = {}
    for name in default.sub_configs:
        part = getattr(default, name, None)
        if part is None:
            continue
        is_text = part is text
        parts[name] = (
            tiny_config(part.model_type, type(part)).to_dict() if is_text else _tiny_tower(part)
        )
    around = copy.deepcopy(_AROUND.get(model_type, {}))
    parts = {name: part | around.pop(name, {}) for name, part in parts.items()}
    config = AutoConfig.for_model(model_type, **parts, **(_TOKENS | around))
    vision = getattr(config, "vision_config", None)
    if hasattr(vision, "model_args"):  # of a package that nothing else here needs
        tower = AutoConfig.for_model("siglip_vision_model", **_TINY_TOWER, num_channels=3)
        names = ("vocab_size", "vocab_offset", "rms_norm_eps", "model_args")
        vars(tower).update({name: getattr(vision, name) for name in names if hasattr(vision, name)})
        vars(config)["vision_config"] = tower
    return config


# Causal LMs that no Auto class builds: the language models of some in WRAPPERS.
_WITHOUT_AUTO = {"mistral4": "Mistral4ForCausalLM"}


class TooLargeError(ValueError):
    """A tiny config is not tiny, as some are with an old transformers."""


def tiny(model_type: str) -> Any:
    """A random model of the type, in float32."""
    build: Any
    config: Any
    if model_type in WRAPPERS:
        seen = model_type in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
        build = AutoModelForImageTextToText if seen else AutoModelForMultimodalLM
        config = tiny_wrapper_config(model_type)
    else:
        build, config = AutoModelForCausalLM, tiny_config(model_type)
    from_config = build.from_config
    if model_type in _WITHOUT_AUTO:
        from_config = getattr(transformers, _WITHOUT_AUTO[model_type])._from_config
    with torch.device("meta"):
        shape = from_config(config, attn_implementation="eager")
    size = sum(parameter.numel() for parameter in shape.parameters())
    if size > 10_000_000:
        raise TooLargeError(f"the tiny config has {size} parameters; name its sizes in _SPECIAL")
    torch.manual_seed(0)
    return randomize(from_config(config, attn_implementation="eager"), 1.0)


def difference(got: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference; infinite where either is not finite."""
    gap = (got.double() - expected.double()).abs().max()
    return float(gap.nan_to_num(nan=float("inf")))


def in_pieces(model: Any, ids: torch.Tensor, cache: Any, mask: Any = None) -> torch.Tensor:
    """Logits of `ids` read with a cache, the model's own by default: two pieces, then by token.

    One piece where the model does not take a second one.
    """
    logits, seen = [], 0
    pieces = [ids[:, :37]] if find_decoder(model)[1].reads_once else [ids[:, :20], ids[:, 20:37]]
    for piece in [*pieces, *ids[:, 37:].split(1, dim=1)]:
        seen += piece.shape[1]
        piece_mask = None if mask is None else mask[:, :seen]
        output = model(piece, attention_mask=piece_mask, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        logits.append(output.logits)
    return torch.cat(logits, dim=1)


def check(model_type: str) -> str:
    """ "" when a patched tiny model of the type is right, else what is wrong with it."""
    model = tiny(model_type)
    ids, long_ids = tokens(2, 30), tokens(1, 4 * WINDOW + 1)
    vanilla = model(ids).logits
    tolerance = TOLERANCE
    if model_type in _SHARP:
        tolerance += 2 * difference(vanilla, tiny(model_type).double()(ids).logits)
    if is_recurrent := find_decoder(model)[1].is_recurrent:  # whose states round by the step
        tolerance = 20 * TOLERANCE
    if tolerance > 20 * TOLERANCE:
        return f"the tiny model rounds too much to be checked: {tolerance:.1g}"
    fits = patch_model(tiny(model_type), n_global=N_GLOBAL, window=30)
    got = fits(ids, use_cache=False).logits
    if (error := difference(got, vanilla)) > tolerance:
        return f"off by {error:.1g} from the unpatched model within the window"
    patched = patch_model(tiny(model_type), n_global=N_GLOBAL, window=WINDOW, max_distance=20)
    with definition(model, LambdaCache(patched).settings.layers) as dense:
        expected = dense(long_ids)
    if difference(expected, model(long_ids[:, :60]).logits) < 10 * tolerance:
        return "the check cannot tell Λ attention from full attention"
    if (error := difference(patched(long_ids, use_cache=False).logits, expected)) > tolerance:
        return f"off by {error:.1g} from the definition at four times the window"
    if is_recurrent and not LambdaCache(patched).settings.recurrent_states:
        return "the tiny config has no recurrent layer"
    got = in_pieces(patched, long_ids, LambdaCache(patched))
    if (error := difference(got, expected)) > tolerance:
        return f"off by {error:.1g} with the cache"
    far = tokens(1, 3 * TRAINED + 8)  # where a table of positions would have ended
    cache = cache_keyword(patched, LambdaCache(patched))
    pieces = far.split(
        [len(far[0]) - 1, 1] if find_decoder(model)[1].reads_once else 3 * TRAINED, 1
    )
    got = torch.cat([patched(piece, **cache).logits for piece in pieces], dim=1)
    if (error := difference(got, patched(far, use_cache=False).logits)) > tolerance:
        return f"off by {error:.1g} with the cache at three times the training length"
    written = patched.generate(long_ids, max_new_tokens=4, do_sample=False)
    logits = patched(written, use_cache=False).logits
    if not torch.equal(logits[:, -5:-1].argmax(-1), written[:, -4:]):
        return "generate() writes other tokens than without a cache"
    mask = torch.ones(2, long_ids.shape[1], dtype=torch.int64)
    mask[1, : -WINDOW - 5] = 0
    alone = patched(long_ids[:, -WINDOW - 5 :], use_cache=False).logits
    both = long_ids.expand(2, -1)
    padded = [
        patched(both, attention_mask=mask, use_cache=False).logits,
        patched(both, attention_mask=mask, use_cache=True).logits,
    ]
    if model_type not in WRAPPERS:  # some of which count a piece's positions from its whole mask
        padded.append(in_pieces(patched, both, LambdaCache(patched), mask))
    for rows in padded:
        error = max(difference(rows[:1], expected), difference(rows[1:, -WINDOW - 5 :], alone))
        if error > tolerance:
            return f"off by {error:.1g} in a padded batch"
    if not torch.equal(unpatch_model(fits)(ids).logits, vanilla):
        return "unpatched, its logits are not what they were"
    return ""


def verdict(model_type: str, verbose: bool = False) -> tuple[str, str]:
    """ "worked", "refused", "wrong" or "not built", and what there is to say."""
    if model_type not in FAMILIES and model_type not in WRAPPERS:
        return "refused", _REASONS.get(model_type, "not looked into")
    if (
        model_type in FAMILIES
        and FAMILIES[model_type].is_recurrent
        and not recurrent_layers_are_known()
    ):
        return "refused", "recurrent layers, which this transformers' caches do not know"
    try:
        model = tiny(model_type)
    except StrictDataclassFieldValidationError:
        return "not built", "this transformers refuses the type's own default config"
    except TooLargeError as error:
        return "not built", str(error)
    try:
        model(tokens(2, 30))
    except Exception as error:
        return "not built", f"unpatched, transformers' own forward raises {error!r}"
    try:
        patch_model(model, window=WINDOW)
    except ValueError as error:
        return "refused", str(error).partition(";")[0]
    try:
        problem = check(model_type)
    except Exception as error:
        problem = traceback.format_exc() if verbose else repr(error)
    return ("wrong", problem) if problem else ("worked", "")


def all_wrappers() -> list[str]:
    """The model types that this transformers builds from text and something else."""
    return sorted(
        {*MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES, *MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES}
    )


def all_types() -> list[str]:
    """The model types of AutoModelForCausalLM, and those that it leaves out."""
    left_out = (name for name, cls in _WITHOUT_AUTO.items() if hasattr(transformers, cls))
    return sorted({*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *left_out})


_UPSTREAM = """\
## What transformers itself gets wrong

- falcon with `alibi=True` and eager attention: its bias is in the mask and added to the scores
  again, so that it counts twice (5.23). sdpa counts it once, and so does a patch.
- jamba, zamba: a text read in several pieces of several tokens with transformers' own cache gives
  other logits than read at once (5.23), since the recurrent layers start again. A patch refuses the
  second piece; single tokens may follow.
- nemotron_h, zamba2: a forward of several tokens bounds the time step from below by
  `time_step_min`, one of a single token does not (5.23), so that the two differ where it falls
  below. A patch leaves recurrent layers as they are.
- llama4: the forward around the language model ends in an AttributeError (5.24: its output has no
  `image_outputs`), with images and without. The language model alone, llama4_text, works.
- moshi: slides over `sliding_window` with transformers' own cache, and not without one (5.23). A
  patch always does.
- longcat_flash, llama4_text: with the offloading of accelerate 1.15 the first gives other logits
  and the second an error, unpatched, too.
- codegen, gptj, mpt: unpatched, a text beyond `n_positions` or `max_seq_len` raises an error in a
  table look-up or an addition of two shapes. Patched, neither table is read.
- 5.4 with a new huggingface_hub: the default configs of cohere2, ernie4_5, ernie4_5_moe,
  ernie4_5_vl_moe, olmo, olmo2, olmo3, olmoe and phimoe are refused
  (StrictDataclassFieldValidationError: a bool where an int is declared).
"""


def table(rows: dict[str, tuple[str, str]]) -> str:
    """docs/families.md."""
    names = {
        kind: [name for name, (found, _) in rows.items() if found == kind]
        for kind in ("worked", "refused", "wrong", "not built")
    }
    counts = ", ".join(f"{len(kind_names)} {kind}" for kind, kind_names in names.items())
    reasons: dict[str, list[str]] = {}
    for name in names["refused"] + names["not built"] + names["wrong"]:
        reasons.setdefault(rows[name][1], []).append(name)
    plain, recurrent, around = by_kind(names["worked"])
    lines = [
        "# Model types that `patch_model` serves",
        "",
        "Written by `python tools/family_sweep.py`, which builds a tiny random model of",
        "each type and compares it, patched, with the unpatched one and with a dense rewrite; its",
        "first lines say how. The encoder-decoders are compared by",
        "`python_tests/test_encoder_decoder.py`.",
        "",
        f"transformers {transformers.__version__}, {len(rows)} model types: {counts}.",
        f"Of those that it has, transformers {OLDEST} refuses or cannot serve, or they cannot be",
        "checked with it:",
        f"{', '.join(sorted(NOT_IN_OLDEST))}.",
        "",
        "## Causal language models",
        "",
        ", ".join(plain),
        "",
        "## With recurrent or convolution layers",
        "",
        ", ".join(recurrent),
        "",
        "These layers stay as they are; those with attention are patched.",
        "",
        "## Around a language model",
        "",
        ", ".join(around),
        "",
        "Models that see or hear, whose language model is patched. What they put into the text may",
        "be part of the context, with two exceptions, refused by name: tokens of an image that see",
        "what follows them (gemma3, gemma4, molmo2), and images at positions in three dims",
        "(qwen2_vl and its kind, glm4v, ernie4_5_vl_moe).",
        "",
        "## Encoder-decoders",
        "",
        ", ".join(sorted(ENCODER_DECODERS)),
        "",
        "The decoder's self-attention is patched, its learned bias clamped like every distance.",
        "The encoder is not causal and stays as it is, and so does the cross-attention.",
        "",
        "## Refused",
        "",
        "By name, before anything of the model is changed.",
        "",
        "| because | types |",
        "| --- | --- |",
        *(f"| {reason} | {', '.join(found)} |" for reason, found in sorted(reasons.items())),
        "",
        _UPSTREAM,
    ]
    return "\n".join(lines)


_BEGIN, _END = "<!-- written by family_sweep.py -->", "<!-- until here -->"


def by_kind(worked: list[str]) -> tuple[list[str], list[str], list[str]]:
    """Types that worked: of causal LMs, of those with recurrent layers, and around one of them."""
    around = [name for name in worked if name in WRAPPERS]
    inside = [name for name in worked if name not in WRAPPERS]
    recurrent = [name for name in inside if FAMILIES[name].is_recurrent]
    return [name for name in inside if name not in recurrent], recurrent, around


def readme_count(worked: list[str]) -> str:
    """The README's sentence on the model types that worked, between its markers."""
    plain, recurrent, around = by_kind(worked)
    sentence = (
        f"`patch_model` serves {len(worked) + len(ENCODER_DECODERS)} model types of transformers: "
        f"{len(plain)} causal language models, {len(recurrent)} with recurrent or convolution "
        f"layers besides attention, the language model inside {len(around)} that also see or hear, "
        f"and {len(ENCODER_DECODERS)} encoder-decoders. [docs/families.md](docs/families.md) names "
        "them, and those that are refused with the reason for each."
    )
    return "\n".join([_BEGIN, textwrap.fill(sentence, 100, break_on_hyphens=False), _END])


def write(rows: dict[str, tuple[str, str]]) -> None:
    """Writes docs/families.md and the README's count of model types."""
    root = Path(__file__).parents[1]
    (root / "docs" / "families.md").write_text(table(rows))
    written = readme_count([name for name, (found, _) in rows.items() if found == "worked"])
    readme = root / "README.md"
    text = readme.read_text()
    between = re.compile(f"{re.escape(_BEGIN)}.*{re.escape(_END)}", flags=re.S)
    readme.write_text(between.sub(lambda _: written, text))


def main() -> None:
    """The command of this file's docstring; -v prints where a wrong type failed."""
    asked = [word for word in sys.argv[1:] if word != "-v"]
    transformers.logging.set_verbosity_error()
    rows = {}
    with one_thread(), torch.no_grad():
        wrappers = set(WRAPPERS) & set(all_wrappers())
        for model_type in asked or [*all_types(), *sorted(wrappers - set(all_types()))]:
            rows[model_type] = verdict(model_type, verbose="-v" in sys.argv)
            print(model_type, *rows[model_type], flush=True)
    if not asked and transformers.__version__ == NEWEST:
        write(rows)
    if any(found == "wrong" for found, _ in rows.values()):
        sys.exit(1)


if __name__ == "__main__":
    main()
