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
python_tests/test_patches.py and python_tests/family_sweep.py, whose table over all causal LMs of
transformers is docs/families.md.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import transformers
from torch import Tensor, nn

from .cache_layer import recurrent_layers_are_known
from .own_forwards import (
    asks_interface,
    bloom_forward,
    bloom_slopes,
    codegen_forward,
    diffllama_forward,
    falcon_forward,
    falcon_slopes,
    gpt_neox_japanese_forward,
    gptj_forward,
    gptj_rope,
    mpt_forward,
    mpt_slopes,
    t5_forward,
)
from .rope import Rope, is_rotary, snapshot_rope

__all__ = ["ENCODER_DECODERS", "FAMILIES", "WRAPPERS", "Family", "find_decoder"]


@dataclass(frozen=True)
class Family:
    """Where a model type differs from Llama.

    Attributes:
        layers: the path from the decoder to its layers.
        attention: the paths from a layer to its attention modules, mostly one.
        modules: of a decoder: its attention modules in the order of their layers in a cache, where
            these two do not tell.
        interleaved: rotary pairs are (2t, 2t+1) instead of (t, t + R/2).
        backwards: rotates by minus the position.
        rotates_last: the last R dims of a head rotate instead of the first ones.
        uses_rope: of an attention module: whether the layer rotates at all.
        rotary: of a decoder and a layer's index: the rotary module that serves the layer.
        rope: of an attention module: its rotation, where no rotary module tells it.
        alibi_slopes: of an attention module: its slopes, float32 [Hq], or None.
        forward: stands for the attention module's forward where that does not ask the
            AttentionInterface.
        query_scale: of an attention module: what its queries are multiplied by at their positions,
            int64 [B, S] -> float32 [B, S]; None where the model's own code does it from
            position_ids, or nothing does.
        switched_off: attributes of the attention modules that are False while they are patched.
        cross_attends: an encoder-decoder, of which the decoder's self-attention alone is replaced.
        cross_attention: a layer's attribute that holds its attention to an image, in layers that
            have that instead of self-attention and stay as they are.
        passes_kwargs: keywords given to the decoder reach the attention modules.
        reads_positions: position_ids are used for something besides rotation.
        needs_mask: the decoder's forward wants a padding mask that is a tensor.
        is_recurrent: has layers besides attention that keep a state over the tokens.
        reads_once: transformers' own code of these starts from nothing whenever it reads several
            tokens, whatever the cache holds.
        plain_methods: methods of the causal LM that are replaced by GenerationMixin's own while it
            is patched.
    """

    layers: str = "layers"
    attention: tuple[str, ...] = ("self_attn",)
    modules: Callable[[Any], list[Any]] | None = None
    interleaved: bool = False
    backwards: bool = False
    rotates_last: bool = False
    uses_rope: Callable[[Any], bool] = lambda attention: True
    rotary: Callable[[Any, int], Any] = lambda decoder, index: decoder.rotary_emb
    rope: Callable[[Any], Rope] | None = None
    alibi_slopes: Callable[[Any], Tensor | None] = lambda attention: None
    query_scale: Callable[[Any], Callable[[Tensor], Tensor] | None] = lambda attention: None
    switched_off: tuple[str, ...] = ()
    forward: Callable[..., Any] | None = None
    cross_attends: bool = False
    cross_attention: str | None = None
    passes_kwargs: bool = True
    reads_positions: bool = False
    needs_mask: bool = False
    is_recurrent: bool = False
    reads_once: bool = False
    plain_methods: tuple[str, ...] = ()

    def __deepcopy__(self, memo: dict[int, Any]) -> Family:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        """By its name, since the functions here have none of their own that pickle could store."""
        names = [name for name, family in _all_families().items() if family is self]
        if not names:
            raise TypeError("a Family that no model type has cannot be pickled")
        return _family_of, (names[0],)

    def attention_modules(self, decoder: Any) -> list[Any]:
        """The attention modules of a decoder, in the order of their layers in a cache.

        None stands for a layer without self-attention.
        """
        if self.modules is not None:
            return self.modules(decoder)
        return [
            None
            if layer_type(decoder.config, index) in _WITHOUT_ATTENTION
            or (self.cross_attention is not None and hasattr(layer, self.cross_attention))
            else _descendant(layer, path)
            for index, layer in enumerate(_descendant(decoder, self.layers))
            for path in self.attention
        ]

    def cross_attention_modules(self, decoder: Any) -> dict[int, Any]:
        """By the layer's index the modules that attend to an image and stay as they are."""
        if self.cross_attention is None:
            return {}
        modules = [getattr(layer, self.cross_attention, None) for layer in decoder.layers]
        return {index: module for index, module in enumerate(modules) if module is not None}

    def recurrent_states(self, decoder: Any) -> list[int]:
        """Of every layer the number of states that it keeps beside attention; or an empty list."""
        if not self.is_recurrent:
            return []
        config = decoder.config
        n_states = getattr(config, "number_of_conv_states", 1)
        states = [
            n_states if layer_type(config, index) in _RECURRENT else 0
            for index in range(len(_descendant(decoder, self.layers)))
        ]
        return states if any(states) else []

    def keys_of(self, decoder: Any) -> list[int | None]:
        """Of every layer the earlier one whose keys it attends with, None for its own."""
        config, n_layers = decoder.config, len(self.attention_modules(decoder))
        modes = getattr(config, "kv_sharing_modes", None)
        if modes is None and getattr(config, "num_kv_shared_layers", None):
            raise ValueError(
                f"this {type(decoder).__name__} has layers that share keys in a way of "
                f"transformers {transformers.__version__} that a patch cannot follow; use a "
                "newer transformers"
            )
        modes = modes or [None] * n_layers
        storing = {
            layer_type(config, index): index for index, mode in enumerate(modes) if mode == "store"
        }
        return [
            storing[layer_type(config, index)] if mode == "reuse" else None
            for index, mode in enumerate(modes)
        ]

    def layer_rope(self, decoder: Any, index: int) -> Rope | None:
        """How layer `index` rotates its queries and keys; None if it does not."""
        attention = self.attention_modules(decoder)[index]
        if not self.uses_rope(attention):
            return None
        if self.rope is not None:
            return self.rope(attention)
        rope = snapshot_rope(
            self.rotary(decoder, index),
            layer_type=layer_type(decoder.config, index),
            interleaved=self.interleaved,
            rotates_last=self.rotates_last,
        )
        return replace(rope, inv_freq=-rope.inv_freq) if self.backwards else rope

    def fits(self, decoder: Any) -> bool:
        """Whether a module has the attributes that this family's decoder has."""
        layers = _descendant(decoder, self.layers)
        if not isinstance(layers, nn.ModuleList) or len(layers) == 0:
            return False
        if not hasattr(decoder, "config"):
            return False
        if self.cross_attends and not getattr(decoder, "is_decoder", False):
            return False
        with_attention = self.attention_modules(decoder)
        modules = [module for module in with_attention if module is not None]
        if len(modules) < len(with_attention) and not (self.is_recurrent or self.cross_attention):
            return False
        if not modules or not all(map(_is_transformers_attention, modules)):
            return False
        if self.forward is not None:
            return True
        has_rotary = any(is_rotary(module) for module in decoder.modules())
        rotates = any(map(self.uses_rope, modules))
        return (has_rotary or not rotates) and all(map(asks_interface, modules))


# What a config calls layers that keep a state, and those among its layers that have no attention.
_RECURRENT = ("linear_attention", "conv", "hybrid", "hybrid_sliding")
_WITHOUT_ATTENTION = ("linear_attention", "conv", "mlp", "moe")


def _descendant(module: Any, path: str) -> Any:
    """The attribute at a dotted path, or None."""
    for name in path.split("."):
        module = getattr(module, name, None)
    return module


def layer_type(config: Any, index: int) -> str | None:
    """The config's word for layer `index`, as in "sliding_attention", or None."""
    types = getattr(config, "layer_types", None)
    return types[index] if types else None


def _is_transformers_attention(module: Any) -> bool:
    return hasattr(module, "layer_idx") and any(
        cls.__module__.startswith("transformers.models.") for cls in type(module).__mro__
    )


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
    *("apertus", "arcee", "aria_text", "bitnet", "cwm", "flex_olmo", "gemma", "gemma2"),
    *("gemma3_text", "gemma3n_text", "gemma4_text", "gemma4_unified_text", "glm4_moe"),
    *("gpt_oss", "granite", "granite_docling_text", "granitemoe", "granitemoeshared"),
    *("hunyuan_v1_dense", "hunyuan_v1_moe", "hy_v3", "hyperclovax", "internlm3", "iquestcoder"),
    *("jais2", "laguna", "llama", "mellum", "mimo_v2_flash", "minimax_m2", "ministral"),
    *("emu3_text_model", "mistral", "mixtral", "olmo", "olmo2", "olmo3", "olmoe"),
    *("persimmon", "phi", "phimoe", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "seed_oss"),
    *("solar_open", "starcoder2", "vaultgemma", "dots1"),
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
_LATENT = ("axk1", "deepseek_v3", "glm4_moe_lite", "minicpm3", "youtu")

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
    **dict.fromkeys(
        ("granite_swa", "granitemoe_swa"), Family(rotary=_rotary_of_theta, uses_rope=_has_theta)
    ),
    "bailing_hybrid": Family(rotates_last=True, is_recurrent=True),
    "beam": Family(uses_rope=_slides, reads_positions=True),
    "bloom": Family(
        layers="h",
        attention=("self_attention",),
        uses_rope=lambda attention: False,
        alibi_slopes=bloom_slopes,
        forward=bloom_forward,
        passes_kwargs=False,
    ),
    "cohere2": Family(interleaved=True, uses_rope=_slides),
    "cohere2_moe": Family(
        interleaved=True,
        uses_rope=lambda attention: _slides(attention) or attention.force_rope,
    ),
    "deepseek_v2": Family(rotates_last=True, interleaved=True),
    "codegen": Family(
        layers="h",
        attention=("attn",),
        rope=gptj_rope,
        forward=codegen_forward,
        passes_kwargs=False,
    ),
    "cohere_compass_text": Family(uses_rope=_type_has_rope),
    "dbrx": Family(layers="blocks", attention=("norm_attn_norm.attn",)),
    "diffllama": Family(forward=diffllama_forward, passes_kwargs=False),
    "falcon": Family(
        layers="h",
        attention=("self_attention",),
        uses_rope=lambda attention: not attention.config.alibi,
        alibi_slopes=falcon_slopes,
        forward=falcon_forward,
        passes_kwargs=False,
    ),
    "gpt_neox": Family(attention=("attention",)),
    "gpt_neox_japanese": Family(
        attention=("attention",), forward=gpt_neox_japanese_forward, passes_kwargs=False
    ),
    "gptj": Family(
        layers="h",
        attention=("attn",),
        rope=gptj_rope,
        forward=gptj_forward,
        passes_kwargs=False,
    ),
    "hrm_text": Family(layers="L_module.layers", modules=_hrm_modules),
    "jamba": Family(uses_rope=lambda attention: False, is_recurrent=True, reads_once=True),
    "jetmoe": Family(attention=("self_attention",)),
    "llama4_text": Family(
        interleaved=True,
        uses_rope=lambda attention: bool(attention.use_rope),
        query_scale=_llama4_scale,
        switched_off=("attn_temperature_tuning",),
    ),
    "longcat_flash": Family(attention=("self_attn.0", "self_attn.1"), rotates_last=True),
    "ministral3": Family(reads_positions=True),
    "mistral4": Family(rotates_last=True, reads_positions=True),
    "mllama_text_model": Family(cross_attention="cross_attn"),
    "modernbert-decoder": Family(attention=("attn",)),
    "mpt": Family(
        layers="blocks",
        attention=("attn",),
        uses_rope=lambda attention: False,
        alibi_slopes=mpt_slopes,
        forward=mpt_forward,
        passes_kwargs=False,
        needs_mask=True,
    ),
    "lfm2_moe": Family(rotary=lambda decoder, index: decoder.pos_emb, is_recurrent=True),
    "nemotron_h": Family(
        attention=("mixer",),
        uses_rope=lambda attention: False,
        is_recurrent=True,
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
    "moshi": Family(rotary=lambda decoder, index: decoder.layers[index].self_attn.rotary_emb),
    "smollm3": Family(uses_rope=lambda attention: bool(attention.use_rope)),
    **dict.fromkeys(("nemotron", "stablelm"), Family(passes_kwargs=False)),
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
        forward=t5_forward,
        cross_attends=True,
        passes_kwargs=False,
    ),
)


# Models around a language model of FAMILIES, which also see or hear.
WRAPPERS: tuple[str, ...] = (
    *("aria", "aya_vision", "cohere2_vision", "deepseek_vl", "deepseek_vl_hybrid", "exaone4_5"),
    *("cohere_compass", "cosmos3_edge", "cosmos3_omni", "emu3", "gemma3n", "glm46v", "glm_ocr"),
    *("glmga", "granite_docling", "janus", "llama4", "mllama", "paddleocr_vl"),
    *("qwen2_5_omni_thinker", "qwen3_omni_moe_thinker"),
    *("fuyu", "gemma3", "gemma4", "gemma4_unified", "glm4v", "glm4v_moe", "glmasr"),
    *("got_ocr2", "granite_speech", "granite_speech_plus", "hyperclovax_vision_v2", "idefics2"),
    *("idefics3", "internvl", "kimi_k25", "lfm2_vl", "lighton_ocr", "llava", "llava_next"),
    *("llava_next_video", "llava_onevision", "minicpm_ocr", "minicpmv4_6", "minicpmv4_7"),
    *("mistral3", "moss_transcribe_diarize", "pp_chart2table", "qianfan_ocr"),
    *("qwen2_5_vl", "qwen2_audio", "qwen2_vl"),
    *("qwen3_5", "qwen3_5_moe", "qwen3_vl", "qwen3_vl_moe", "shieldgemma2", "smolvlm"),
    *("video_llama_3", "video_llava", "vipllava", "voxtral"),
)


def _all_families() -> dict[str, Family]:
    return FAMILIES | ENCODER_DECODERS


def _family_of(model_type: str) -> Family:
    """What a pickled Family becomes."""
    return _all_families()[model_type]


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
    families = _all_families()
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
        if family.fits(module) and getattr(module.config, "model_type", None) == model_type
    ]
    if len(decoders) != 1:
        raise ValueError(
            f"this {type(model).__name__} calls itself {model_type!r} but is not built like "
            f"transformers' own (one decoder with {family.layers}[i].{family.attention[0]}); "
            f"{supported}"
        )
    config: Any = decoders[0].config
    if not getattr(config, "is_causal", True):
        raise ValueError("config.is_causal is False; Λ attention is causal: use a causal LM")
    known = {"full_attention", "sliding_attention", "chunked_attention"}
    if family.is_recurrent:
        known |= {*_RECURRENT, *_WITHOUT_ATTENTION}
    unknown = set(getattr(config, "layer_types", None) or ()) - known
    if unknown:
        raise ValueError(
            f"config.layer_types of this {type(model).__name__} names {sorted(unknown)}; a patch "
            f"takes layers of {sorted(known)}"
        )
    return decoders[0], family
