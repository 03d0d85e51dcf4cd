"""The model families that `patch_model` serves: where each differs from Llama.

Two kinds:

- attention modules that ask transformers' AttentionInterface. Nothing of the model is replaced but
  its rotary modules; a line in FAMILIES says which rotation the layers use.
  Layers that are not attention (recurrent and convolution layers, experts) stay as they are.
- older ones that compute attention in their own forward (falcon, gptj, mpt, bloom). Their line
  names a short forward of the attention module (own_forwards.py). So does T5's, whose decoder adds
  a learned bias for every distance.

Some scale a query by its own position besides (llama4, ministral3, beam). That is nothing that
Λ attention is about, and stays as it is: each row counts its own tokens.

Every family is compared with its unpatched model and with the definition, by
python_tests/test_patches.py and tools/family_sweep.py, whose table over all causal LMs of
transformers is docs/families.md.
"""

from __future__ import annotations

import copyreg
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from . import own_forwards as own
from .compat import recurrent_layers_are_known, versions
from .description import fits
from .family import RECURRENT, WITHOUT_ATTENTION, Family
from .rope import Rope


def _slides(module: Any) -> bool:
    return module.sliding_window is not None


def _slides_or_all_full(module: Any) -> bool:
    return module.sliding_window is None or module.is_sliding


def _rotary_of_theta(decoder: Any, index: int) -> Any:
    """Granite's modules, one for each base."""
    theta = decoder.config.layer_rope_theta[index]
    return next(
        rotary
        for rotary in decoder.rotary_embs
        if rotary.config.rope_parameters["rope_theta"] == theta
    )


def _rotary_of_layer(decoder: Any, index: int) -> Any:
    """Molmo 2's modules, with scaled frequencies and with plain ones."""
    is_scaled = decoder.rope_types[index] == "scaled"
    return decoder.rotary_emb if is_scaled else decoder.rotary_emb_unscaled


def _ernie_vl_rope(module: Any) -> Rope:
    """ERNIE 4.5 VL's, whose module keeps its frequencies in the order of the dims of an image."""
    parameters = module.config.rope_parameters
    if parameters["rope_type"] != "default":
        raise ValueError(
            f"rope_type of this {type(module).__name__} is {parameters['rope_type']!r}; a patch "
            "knows the frequencies of 'default' only"
        )
    exponents = torch.arange(0, module.head_dim, 2, dtype=torch.float32) / module.head_dim
    return Rope(1.0 / parameters["rope_theta"] ** exponents, interleaved=True)


def _llama4_scale(module: Any) -> Callable[[Tensor], Tensor] | None:
    """Of layers that do not rotate, where temperature tuning is on."""
    if module.use_rope or not module.config.attn_temperature_tuning:
        return None
    return partial(_temperature, floor_scale=module.floor_scale, attn_scale=module.attn_scale)


def _temperature(positions: Tensor, *, floor_scale: float, attn_scale: float) -> Tensor:
    """Llama 4's: grows with the logarithm of the number of tokens so far, in steps."""
    return 1.0 + attn_scale * ((positions + 1).float() / floor_scale).floor().log1p()


def _type_has_rope(module: Any) -> bool:
    """Where each type of layer has its own rotary parameters, or none."""
    config = module.config
    return config.rope_parameters[config.layer_types[module.layer_idx]] is not None


def _hrm_modules(decoder: Any) -> list[Any]:
    """A low stack that runs several times, then a high one, and that several times."""
    cycle = [decoder.L_module] * decoder.config.L_cycles + [decoder.H_module]
    stacks = cycle * decoder.config.H_cycles
    return [layer.self_attn for stack in stacks for layer in stack.layers]


def _has_theta(module: Any) -> bool:
    return bool(module.config.layer_rope_theta[module.layer_idx])


_PLAIN = (
    *("apertus", "apertus1p5_text", "arcee", "aria_text", "bitnet", "chameleon", "cwm"),
    *("deepseek_ocr2_text", "dots1", "emu3_text_model", "exaone", "flex_olmo", "gemma", "gemma2"),
    *("gemma3_text", "gemma3n_text", "gemma4_text", "gemma4_unified_text", "glm4_moe", "gpt_oss"),
    *("granite", "granite4_vision_text", "granite_docling_text", "granitemoe", "granitemoeshared"),
    *("hy_v3", "hyperclovax", "internlm3", "iquestcoder", "jais2", "laguna", "llama", "mellum"),
    *("mimo_v2_flash", "minimax_m2", "ministral", "mistral", "mixtral", "nemotron", "olmo"),
    *("olmo2", "olmo3", "olmoe", "persimmon", "phi", "phimoe", "qwen2", "qwen2_moe", "qwen3"),
    *("qwen3_moe", "sarvam_moe", "seed_oss", "solar_open", "stablelm", "starcoder2", "step3p5"),
    "vaultgemma",
)
# Language models in WRAPPERS that place images in three dims, and texts like any other.
_MROPE = (
    *("cosmos3_edge_text", "glm4v_moe_text", "paddleocr_vl_text", "qwen2_5_omni_text"),
    *("qwen2_5_vl_text", "qwen2_vl_text", "qwen3_omni_moe_text", "qwen3_vl_moe_text"),
    "qwen3_vl_text",
)
_INTERLEAVED = (
    "cohere",
    "ernie4_5",
    "ernie4_5_moe",
    "glm",
    "glm4",
    "glm4v_text",
    "glm_ocr_text",
    "helium",
)
# Multi-head latent attention: a head is what latent vectors give, then what rotates.
_LATENT = ("axk1", "deepseek_v3", "glm4_moe_lite", "minicpm3", "sarvam_mla", "youtu")

_RECURRENT_PLAIN = (
    *("bamba", "falcon_h1", "lfm2", "lfm3", "qwen3_5_moe_text", "qwen3_5_text", "qwen3_next"),
    "zaya",
)

FAMILIES: dict[str, Family] = {
    **dict.fromkeys(_PLAIN, Family()),
    **dict.fromkeys(_MROPE, Family()),
    **dict.fromkeys(_INTERLEAVED, Family(interleaved=True)),
    **dict.fromkeys(_LATENT, Family(rotates_last=True)),
    **dict.fromkeys(("exaone4", "exaone_moe", "kolibri1"), Family(uses_rope=_slides_or_all_full)),
    **dict.fromkeys(("afmoe", "flint"), Family(uses_rope=_slides)),
    **dict.fromkeys(("muse_glimmer_text", "muse_spark_text"), Family(uses_rope=_has_theta)),
    "ernie4_5_vl_moe_text": Family(rope=_ernie_vl_rope),
    **dict.fromkeys(
        ("granite_swa", "granitemoe_swa"), Family(rotary=_rotary_of_theta, uses_rope=_has_theta)
    ),
    "bailing_hybrid": Family(rotates_last=True, is_recurrent=True),
    "beam": Family(uses_rope=_slides, reads_positions=True),
    "bloom": Family(
        layers="h",
        attention=("self_attention",),
        uses_rope=lambda attention: False,
        slopes=own.bloom_slopes,
        forward=own.bloom_forward,
    ),
    "cohere2": Family(interleaved=True, uses_rope=_slides),
    "cohere2_moe": Family(
        interleaved=True, uses_rope=lambda attention: _slides(attention) or attention.force_rope
    ),
    "deepseek_v2": Family(rotates_last=True, interleaved=True),
    "codegen": Family(
        layers="h", attention=("attn",), rope=own.gptj_rope, forward=own.codegen_forward
    ),
    "cohere_compass_text": Family(uses_rope=_type_has_rope),
    "dbrx": Family(layers="blocks", attention=("norm_attn_norm.attn",)),
    "diffllama": Family(forward=own.diffllama_forward),
    "falcon": Family(
        layers="h",
        attention=("self_attention",),
        uses_rope=lambda attention: not attention.config.alibi,
        slopes=own.falcon_slopes,
        forward=own.falcon_forward,
    ),
    "gpt_neox": Family(attention=("attention",)),
    "gpt_neox_japanese": Family(attention=("attention",), forward=own.gpt_neox_japanese_forward),
    "gptj": Family(layers="h", attention=("attn",), rope=own.gptj_rope, forward=own.gptj_forward),
    "hrm_text": Family(layers="L_module.layers", modules=_hrm_modules),
    "jamba": Family(uses_rope=lambda attention: False, is_recurrent=True, reads_once=True),
    "jetmoe": Family(attention=("self_attention",)),
    "llama4_text": Family(
        interleaved=True,
        uses_rope=lambda attention: bool(attention.use_rope),
        query_scale=_llama4_scale,
        switched_off=("attn_temperature_tuning",),
    ),
    "lara_mini": Family(uses_rope=_slides, is_recurrent=True),
    "longcat_flash": Family(attention=("self_attn.0", "self_attn.1"), rotates_last=True),
    "ministral3": Family(reads_positions=True),
    "mistral4": Family(rotates_last=True, reads_positions=True),
    "mllama_text_model": Family(cross_attention="cross_attn"),
    "modernbert-decoder": Family(attention=("attn",)),
    "mpt": Family(
        layers="blocks",
        attention=("attn",),
        uses_rope=lambda attention: False,
        slopes=own.mpt_slopes,
        forward=own.mpt_forward,
        needs_mask=True,
    ),
    "lfm2_moe": Family(rotary=lambda decoder, index: decoder.pos_emb, is_recurrent=True),
    "nemotron_h": Family(
        attention=("mixer",), uses_rope=lambda attention: False, is_recurrent=True
    ),
    "nanochat": Family(backwards=True),
    # Phi-3 drops the cache where longrope would change its factors, which a patch keeps fixed.
    **dict.fromkeys(
        ("phi3", "phi4_multimodal"), Family(plain_methods=("prepare_inputs_for_generation",))
    ),
    **dict.fromkeys(_RECURRENT_PLAIN, Family(is_recurrent=True)),
    "granitemoehybrid": Family(
        uses_rope=lambda attention: attention.config.position_embedding_type == "rope",
        is_recurrent=True,
    ),
    "kimi_linear": Family(uses_rope=lambda attention: False, is_recurrent=True),
    "olmo_hybrid": Family(
        uses_rope=lambda attention: bool(
            (attention.config.rope_parameters or {}).get("rope_theta")
        ),
        is_recurrent=True,
    ),
    "molmo2_text": Family(rotary=_rotary_of_layer),
    "moshi": Family(rotary=lambda decoder, index: decoder.layers[index].self_attn.rotary_emb),
    "smollm3": Family(uses_rope=lambda attention: bool(attention.use_rope)),
    # A few attention modules, each of which serves several layers.
    "zamba": Family(
        attention=("shared_transf.self_attn",),
        uses_rope=lambda attention: False,
        is_recurrent=True,
        reads_once=True,
    ),
    "zamba2": Family(
        attention=("shared_transformer.self_attn",),
        uses_rope=lambda attention: bool(attention.config.use_mem_rope),
        is_recurrent=True,
    ),
}

# Of these only the decoder's self-attention is replaced: the encoder is not causal.
ENCODER_DECODERS: dict[str, Family] = dict.fromkeys(
    ("longt5", "mt5", "pop2piano", "switch_transformers", "t5", "udop", "umt5"),
    Family(
        layers="block",
        attention=("layer.0.SelfAttention",),
        uses_rope=lambda attention: False,
        forward=own.t5_forward,
        cross_attends=True,
    ),
)


# Models around a language model of FAMILIES, which also see or hear.
WRAPPERS: tuple[str, ...] = (
    *("apertus1p5", "aria", "aya_vision", "chameleon", "cohere2_vision", "cohere_compass"),
    *("cosmos3_edge", "cosmos3_omni", "deepseek_ocr2", "deepseek_vl", "deepseek_vl_hybrid", "emu3"),
    *("ernie4_5_vl_moe", "exaone4_5", "fast_vlm", "fun_asr_nano", "fuyu", "gemma3", "gemma3n"),
    *("gemma4", "gemma4_unified", "glm46v", "glm4v", "glm4v_moe", "glm_ocr", "glmasr", "glmga"),
    *("got_ocr2", "granite4_vision", "granite_docling", "granite_speech", "granite_speech_plus"),
    *("hyperclovax_vision_v2", "idefics2", "idefics3", "internvl", "janus", "kimi_k25", "lfm2_vl"),
    *("lfm3_vl", "lighton_ocr", "llama4", "llava", "llava_next", "llava_next_video"),
    *("llava_onevision", "minicpm_ocr", "minicpmv4_6", "minicpmv4_7", "mistral3", "mllama"),
    *("molmo2", "moss_transcribe_diarize", "muse_glimmer", "muse_spark", "nemotron_h_omni"),
    *("omniasr", "ovis2", "paddleocr_vl", "perception_lm", "pp_chart2table", "qianfan_ocr"),
    *("qwen2_5_omni_thinker", "qwen2_5_vl", "qwen2_audio", "qwen2_vl", "qwen3_5", "qwen3_5_moe"),
    *("qwen3_asr", "qwen3_omni_moe_thinker", "qwen3_vl", "qwen3_vl_moe", "shieldgemma2", "smolvlm"),
    *("step3p7", "vibevoice_asr", "video_llama_3", "video_llava", "vipllava", "voxtral"),
)


def _family_of(model_type: str) -> Family:
    """What a pickled Family becomes."""
    return (FAMILIES | ENCODER_DECODERS)[model_type]


def _by_name(family: Family) -> tuple[Callable[[str], Family], tuple[str]]:
    """For pickle: the functions in a Family have no names of their own that it could store."""
    for name, known in (FAMILIES | ENCODER_DECODERS).items():
        if known is family:
            return _family_of, (name,)
    raise TypeError("a Family that no model type has cannot be pickled")


copyreg.pickle(Family, _by_name)  # type: ignore[arg-type]


def _text_type(model: nn.Module, model_type: str) -> str:
    """The type of the language model in one of WRAPPERS, else the model's own."""
    if model_type not in WRAPPERS:
        return model_type
    config: Any = model.config
    text_type: str = config.get_text_config(decoder=True).model_type
    return text_type


def find_decoder(model: nn.Module) -> tuple[Any, Family]:
    """The module that owns the decoder layers, and its family.

    Raises:
        ValueError: none, or more than one, of a supported type.
    """
    families = FAMILIES | ENCODER_DECODERS
    supported = f"supported model types: {', '.join(sorted({*families, *WRAPPERS}))}"
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    if model_type is None:
        raise ValueError(
            f"model is a {type(model).__name__} without a transformers config; {supported}"
        )
    model_type = _text_type(model, model_type)
    if model_type not in families:
        raise ValueError(f"model type {model_type!r} is not supported; {supported}")
    family = families[model_type]
    if family.is_recurrent and not recurrent_layers_are_known():
        raise ValueError(
            f"model type {model_type!r} has recurrent layers, for whose states transformers "
            f"{transformers.__version__} has no cache layers; use a newer transformers"
        )
    decoders = [
        module
        for module in model.modules()
        if fits(module, family) and getattr(module.config, "model_type", None) == model_type
    ]
    if len(decoders) != 1:
        raise ValueError(
            f"this {type(model).__name__} calls itself {model_type!r} but is not built like "
            f"transformers' own (one decoder with {family.layers}[i].{family.attention[0]}, whose "
            f"attention asks the AttentionInterface or is known here); {versions()}"
        )
    config: Any = decoders[0].config
    if not getattr(config, "is_causal", True):
        raise ValueError("config.is_causal is False; Λ attention is causal: use a causal LM")
    known = {"full_attention", "sliding_attention", "chunked_attention"}
    if family.is_recurrent:
        known |= {*RECURRENT, *WITHOUT_ATTENTION}
    unknown = set(getattr(config, "layer_types", None) or ()) - known
    if unknown:
        raise ValueError(
            f"config.layer_types of this {type(model).__name__} names {sorted(unknown)}; a patch "
            f"takes layers of {sorted(known)}"
        )
    return decoders[0], family
