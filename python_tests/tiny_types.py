"""A tiny random model of every model type, from its own config class."""

from __future__ import annotations

import copy
import functools
from typing import Any

import torch
import transformers
from tiny_models import TRAINED, VOCAB, randomize
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from lminf_cuda.models.families import WRAPPERS, find_decoder

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
WITHOUT_AUTO = {"mistral4": "Mistral4ForCausalLM"}


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
    if model_type in WITHOUT_AUTO:
        from_config = getattr(transformers, WITHOUT_AUTO[model_type])._from_config
    with torch.device("meta"):
        shape = from_config(config, attn_implementation="eager")
    size = sum(parameter.numel() for parameter in shape.parameters())
    if size > 10_000_000:
        raise TooLargeError(f"the tiny config has {size} parameters; name its sizes in _SPECIAL")
    torch.manual_seed(0)
    return randomize(from_config(config, attn_implementation="eager"), 1.0)


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
