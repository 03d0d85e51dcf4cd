"""patch_model on T5 and what is built like it: the decoder's self-attention alone is replaced."""

from __future__ import annotations

import copy
from types import MethodType
from typing import Any

import pytest
import torch
import transformers
from test_patches import _LargestTensor
from tiny_models import VOCAB, tokens
from torch import Tensor
from transformers import AutoConfig, DynamicCache, EncoderDecoderCache

from lminf_cuda import LambdaCache, patch_model, unpatch_model
from lminf_cuda.models.families import ENCODER_DECODERS

N_GLOBAL, WINDOW = 3, 12
TOLERANCE = 1e-5  # float32 through two layers, logits of order 1
CLASSES = {
    "longt5": "LongT5ForConditionalGeneration",
    "mt5": "MT5ForConditionalGeneration",
    "pop2piano": "Pop2PianoForConditionalGeneration",
    "switch_transformers": "SwitchTransformersForConditionalGeneration",
    "t5": "T5ForConditionalGeneration",
    "udop": "UdopForConditionalGeneration",
    "umt5": "UMT5ForConditionalGeneration",
}
TYPES = sorted(CLASSES)
# Text in, text out, and generate() without more.
TEXT_TYPES = sorted(CLASSES.keys() - {"pop2piano", "udop"})


pytestmark = pytest.mark.usefixtures("single_threaded", "without_gradients")


def tiny_t5(model_type: str = "t5", implementation: str = "eager", **overrides: Any) -> Any:
    """A random model in float32, whose logits hang on its decoder's self-attention."""
    config = AutoConfig.for_model(
        model_type,
        **{
            "vocab_size": VOCAB,
            "d_model": 32,
            "d_kv": 8,
            "d_ff": 48,
            "num_layers": 2,
            "num_decoder_layers": 2,
            "num_heads": 4,
            "num_experts": 4,
            "relative_attention_num_buckets": 32,
            "relative_attention_max_distance": 45,
            "decoder_start_token_id": 0,
            "pad_token_id": 0,
            "eos_token_id": None,
        }
        | overrides,
    )
    config._attn_implementation = implementation
    torch.manual_seed(0)
    model = getattr(transformers, CLASSES[model_type])(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "relative_attention_bias" in name:
                parameter.normal_(0.0, 2.0)
            elif parameter.ndim > 1:
                parameter.normal_(0.0, parameter.shape[-1] ** -0.5)
    return model.eval().requires_grad_(False)


def source(model: Any, batch: int = 1, length: int = 9) -> dict[str, Tensor]:
    """What the encoder reads; the second row begins with padding."""
    ids = tokens(batch, length, seed=7)
    mask = torch.ones_like(ids)
    mask[1:2, :4] = 0
    if model.config.model_type == "pop2piano":
        return {"inputs_embeds": model.shared(ids), "attention_mask": mask}
    if model.config.model_type == "udop":
        boxes = torch.linspace(0, 1, batch * length * 4).view(batch, length, 4)
        return {"input_ids": ids, "attention_mask": mask, "bbox": boxes}
    return {"input_ids": ids, "attention_mask": mask}


def logits(model: Any, ids: Tensor, **arguments: Any) -> Tensor:
    out: Tensor = model(**source(model, len(ids)), decoder_input_ids=ids, **arguments).logits
    return out


def max_difference(a: Tensor, b: Tensor) -> float:
    assert a.shape == b.shape and a.isfinite().all() and b.isfinite().all()
    return float((a.double() - b.double()).abs().max())


def defined(model: Any, n_global: int, window: int, max_distance: int) -> Any:
    """A copy of an unpatched model whose decoder attends to itself as the definition says."""
    model = copy.deepcopy(model)

    def forward(
        module: Any, hidden: Tensor, *_: Any, position_bias: Tensor | None = None, **__: Any
    ) -> tuple[Any, ...]:
        batch, length, _hidden = hidden.shape
        q, k, v = (
            project(hidden).view(batch, length, module.n_heads, -1).transpose(1, 2).double()
            for project in (module.q, module.k, module.v)
        )
        if position_bias is None:
            # The last query's biases, from distance 0 on; T5 hands the first layer's to all.
            bias = torch.zeros(module.n_heads, length, dtype=torch.float64)
            if module.has_relative_attention_bias:
                bias += module.compute_bias(length, length)[0, :, -1].flip(-1)
            position_bias = torch.cat([bias, bias[:, -1:].expand(-1, max_distance)], dim=-1)
        index = torch.arange(length)
        distance = index[:, None] - index
        visible = (distance >= 0) & ((distance < window) | (index < n_global))
        s = q @ k.mT + position_bias[:, distance.clamp(0, max_distance)]
        out = s.masked_fill(~visible, -torch.inf).softmax(-1) @ v
        out = module.o(out.transpose(1, 2).flatten(2).to(hidden.dtype))
        kept = {} if module.umt5 else {"bias": position_bias}
        return (out, *kept.values(), *([None] * module.n_unused))

    for block in model.decoder.block:
        module = block.layer[0].SelfAttention
        with torch.no_grad():
            n_outputs = len(module(torch.zeros(1, 1, model.config.d_model)))
        module.umt5 = model.config.model_type == "umt5"
        module.n_unused = n_outputs - (1 if module.umt5 else 2)
        module.forward = MethodType(forward, module)
    return model


def patched(model_type: str = "t5", **settings: Any) -> Any:
    return patch_model(tiny_t5(model_type), **{"n_global": N_GLOBAL, "window": WINDOW, **settings})


def test_every_type_is_here() -> None:
    assert set(CLASSES) == set(ENCODER_DECODERS)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("model_type", TYPES)
def test_equals_unpatched_while_text_fits_window(model_type: str, implementation: str) -> None:
    model = tiny_t5(model_type)
    if implementation == "sdpa" and not model._supports_sdpa:
        pytest.skip("this transformers has no sdpa for the type")
    model = tiny_t5(model_type, implementation)
    ids = tokens(2, 40)
    expected = logits(model, ids)
    patch_model(model, n_global=N_GLOBAL, window=40)
    assert max_difference(logits(model, ids, use_cache=False), expected) < TOLERANCE
    assert max_difference(logits(model, ids), expected) < TOLERANCE  # fills a cache


@pytest.mark.parametrize("max_distance", [WINDOW, 20])
@pytest.mark.parametrize("model_type", TYPES)
def test_equals_definition_beyond_window(model_type: str, max_distance: int) -> None:
    model = tiny_t5(model_type)
    ids = tokens(2, 4 * WINDOW + 1)
    expected = logits(defined(model, N_GLOBAL, WINDOW, max_distance), ids, use_cache=False)
    vanilla = logits(model, ids)
    patch_model(model, n_global=N_GLOBAL, window=WINDOW, max_distance=max_distance)
    got = logits(model, ids, use_cache=False)
    assert max_difference(got, expected) < TOLERANCE
    # and the tolerance can tell it from the unpatched model
    assert max_difference(got, vanilla) > 1000 * TOLERANCE


@pytest.mark.parametrize("chunks", [[1] * 50, [7, 1, 1, 20, 21], [49, 1], [12, 38]], ids=str)
@pytest.mark.parametrize("model_type", TYPES)
def test_cached_equals_uncached(model_type: str, chunks: list[int]) -> None:
    model = patched(model_type, max_distance=20)
    ids = tokens(2, 50)
    expected = logits(model, ids, use_cache=False)
    encoded = model.encoder(**source(model, 2))
    cache, parts = None, []
    for part in ids.split(chunks, dim=1):
        out = model(
            encoder_outputs=encoded,
            attention_mask=source(model, 2)["attention_mask"],
            decoder_input_ids=part,
            past_key_values=cache,
            use_cache=True,
        )
        cache = out.past_key_values
        parts.append(out.logits)
    assert isinstance(cache, EncoderDecoderCache)
    assert isinstance(cache.self_attention_cache, LambdaCache)
    assert cache.get_seq_length() == 50
    assert max_difference(torch.cat(parts, dim=1), expected) < TOLERANCE


def uncached_greedy(model: Any, n_new: int) -> Tensor:
    ids = torch.zeros(2, 1, dtype=torch.int64)
    for _ in range(n_new):
        ids = torch.cat([ids, logits(model, ids, use_cache=False)[:, -1:].argmax(-1)], dim=1)
    return ids


@pytest.mark.parametrize("model_type", TEXT_TYPES)
def test_greedy_equals_uncached(model_type: str) -> None:
    model = patched(model_type)
    got = model.generate(**source(model, 2), max_new_tokens=40, do_sample=False)
    assert torch.equal(got, uncached_greedy(model, 40))


@pytest.mark.parametrize("model_type", ["t5", "umt5"])
def test_beam_search_and_sampling_equal_uncached(model_type: str) -> None:
    model = patched(model_type)
    for arguments in ({"num_beams": 3, "do_sample": False}, {"do_sample": True}):
        results = []
        for use_cache in (True, False):
            torch.manual_seed(0)
            results.append(
                model.generate(
                    **source(model, 2), max_new_tokens=30, use_cache=use_cache, **arguments
                )
            )
        assert torch.equal(*results)


def test_drafts_are_taken_back() -> None:
    model = patched()
    one = source(model) | {"max_new_tokens": 40, "do_sample": False, "eos_token_id": 1}
    expected = model.generate(**one)
    for drafts in ({"prompt_lookup_num_tokens": 4}, {"assistant_model": tiny_t5()}):
        assert torch.equal(model.generate(**one, **drafts), expected)
    with pytest.raises(ValueError, match="would read them again, also where it is an assistant"):
        model.generate(**one, assistant_model=patched("t5", window=5))


def test_a_cache_of_the_callers() -> None:
    """It is filled, and goes on token by token; generate() takes it only while it is empty."""
    model = patched()
    cache = EncoderDecoderCache(LambdaCache(model), DynamicCache())
    ids = tokens(1, 30)
    first = model(**source(model), decoder_input_ids=ids[:, :20], past_key_values=cache)
    assert first.past_key_values is cache
    memory = cache.self_attention_cache.memory_bytes()
    parts = [first.logits]
    for token in ids[:, 20:].split(1, dim=1):
        parts.append(logits(model, token, past_key_values=cache))
    expected = logits(model, ids, use_cache=False)
    assert max_difference(torch.cat(parts, dim=1), expected) < TOLERANCE
    assert cache.self_attention_cache.memory_bytes() == memory > 0

    arguments = {**source(model), "max_new_tokens": 10, "do_sample": False}
    with pytest.raises(ValueError, match=r"past_key_values holds 30 tokens already"):
        model.generate(**arguments, decoder_input_ids=ids, past_key_values=cache)
    cache = EncoderDecoderCache(LambdaCache(model), DynamicCache())
    again = model.generate(**arguments, decoder_input_ids=ids, past_key_values=cache)
    assert torch.equal(again, model.generate(**arguments, decoder_input_ids=ids, use_cache=False))


def test_left_padded_rows_equal_single_rows() -> None:
    model = patched()
    ids = tokens(2, 30)
    mask = torch.ones_like(ids)
    mask[1, :11] = 0
    got = logits(model, ids, decoder_attention_mask=mask)
    encoded = source(model, 2)
    alone = model(
        **{name: x[1:] for name, x in encoded.items()}, decoder_input_ids=ids[1:, 11:]
    ).logits
    assert max_difference(got[1:, 11:], alone) < TOLERANCE


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("cast_first", [False, True])
def test_low_precision_stays_near_float32(dtype: torch.dtype, cast_first: bool) -> None:
    expected = logits(patched(), tokens(1, 40))
    model = tiny_t5().to(dtype) if cast_first else tiny_t5()
    model = patch_model(model, n_global=N_GLOBAL, window=WINDOW).to(dtype)
    got = logits(model, tokens(1, 40))
    assert got.dtype == dtype
    assert max_difference(got, expected) < 100 * torch.finfo(dtype).eps
    ids = model.generate(**source(model), max_new_tokens=20, do_sample=False)
    assert ids.shape == (1, 21)


def test_biases_are_the_weights_of_the_day() -> None:
    """Weights loaded after patching count."""
    model, other = patched(), tiny_t5()
    weight = other.decoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight
    with torch.no_grad():
        weight.neg_()
    model.load_state_dict(other.state_dict())
    patch_model(other, n_global=N_GLOBAL, window=WINDOW)
    ids = tokens(1, 40)
    assert torch.equal(logits(model, ids), logits(other, ids))
    assert max_difference(logits(model, ids), logits(patched(), ids)) > 1000 * TOLERANCE


@pytest.mark.parametrize("model_type", TYPES)
def test_unpatch_restores_logits_bit_for_bit(model_type: str, tmp_path: Any) -> None:
    model = tiny_t5(model_type)
    ids = tokens(2, 40)
    expected, encoded = logits(model, ids), model.encoder(**source(model, 2))[0]
    patch_model(model, n_global=N_GLOBAL, window=WINDOW)
    assert torch.equal(model.encoder(**source(model, 2))[0], encoded)
    copied = copy.deepcopy(model)
    model.save_pretrained(tmp_path)
    assert unpatch_model(model) is model
    assert torch.equal(logits(model, ids), expected)
    saved = type(model).from_pretrained(tmp_path, attn_implementation="eager").eval()
    assert torch.equal(logits(saved, ids), expected)
    beyond = logits(copied, ids)
    assert max_difference(beyond, expected) > 1000 * TOLERANCE
    assert patch_model(copied, n_global=N_GLOBAL, window=WINDOW) is copied
    patch_model(model, n_global=N_GLOBAL, window=WINDOW)
    assert torch.equal(logits(model, ids), beyond)


def test_no_square_mask() -> None:
    model, length = patched(), 600
    with _LargestTensor() as largest:
        logits(model, tokens(1, length))
    assert 0 < largest.numel < length * length // 4


@pytest.mark.parametrize("model_type", ["t5", pytest.param("umt5", marks=pytest.mark.slow)])
def test_compiled_decoder(model_type: str) -> None:
    """One graph for a text read at once, and steps of a cache as they are without."""
    model = patched(model_type)
    ids = tokens(1, 30)
    encoded = model.encoder(**source(model))[0]
    whole = {"input_ids": ids, "encoder_hidden_states": encoded, "use_cache": False}
    expected = model.decoder(**whole)[0]
    arguments = {**source(model), "max_new_tokens": 20, "do_sample": False}
    written = model.generate(**arguments)
    torch._dynamo.reset()
    assert torch.equal(
        torch.compile(model.decoder, backend="eager", fullgraph=True)(**whole)[0], expected
    )
    torch._dynamo.reset()
    model.decoder.compile(backend="eager")
    assert torch.equal(model.generate(**arguments), written)


@pytest.mark.parametrize("model_type", TEXT_TYPES)
@pytest.mark.parametrize("how", ["checkpointing", "dispatched", "offloaded", "offloaded before"])
def test_wrapped_models(model_type: str, how: str) -> None:
    model, plain = tiny_t5(model_type), patched(model_type)
    if how == "offloaded before":
        pytest.importorskip("accelerate").cpu_offload(model, execution_device=torch.device("cpu"))
    patch_model(model, n_global=N_GLOBAL, window=WINDOW)
    if how == "checkpointing":
        model.gradient_checkpointing_enable()
    elif how == "dispatched":
        accelerate = pytest.importorskip("accelerate")
        accelerate.dispatch_model(model, device_map={"": "cpu"}, force_hooks=True)
    elif how == "offloaded":
        pytest.importorskip("accelerate").cpu_offload(model, execution_device=torch.device("cpu"))
    ids = tokens(1, 40)
    assert torch.equal(logits(model, ids), logits(plain, ids))
    arguments = {**source(plain), "max_new_tokens": 3, "do_sample": False}
    assert torch.equal(model.generate(**arguments), plain.generate(**arguments))


def test_middle_tokens() -> None:
    """They are met at one distance and take its bias: cached equals uncached, and both differ."""
    model = patched(middle_top_k=4, middle_from_layer=1)
    ids = tokens(1, 50)
    whole = logits(model, ids, use_cache=False)[:, -1]
    cache = EncoderDecoderCache(LambdaCache(model), DynamicCache())
    for part in ids.split([30, 19, 1], dim=1):
        got = logits(model, part, past_key_values=cache)
    assert max_difference(got[:, -1], whole) < TOLERANCE
    assert max_difference(whole, logits(patched(), ids)[:, -1]) > 1000 * TOLERANCE


def test_default_window_is_the_training_length() -> None:
    model = patch_model(tiny_t5(n_positions=24))
    layer = LambdaCache(model).layers[0].settings
    assert (layer.n_global, layer.window, layer.max_distance) == (16, 24, 24)
    with pytest.raises(ValueError, match=r"t5 config has no .*; pass window=<tokens>"):
        patch_model(tiny_t5())


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"past_key_values": "lambda"}, TypeError, "is a LambdaCache; .* EncoderDecoderCache aro"),
        ({"past_key_values": "dynamic"}, TypeError, "is a EncoderDecoderCache; a patched model t"),
        ({"output_attentions": True}, ValueError, "output_attentions=True"),
        ({"decoder_attention_mask": torch.ones(1, 1, 9, 9)}, ValueError, "attention_mask is 4-D"),
    ],
)
def test_bad_calls(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    model = patched()
    caches = {
        "lambda": LambdaCache(model),
        "dynamic": EncoderDecoderCache(DynamicCache(), DynamicCache()),
    }
    if "past_key_values" in arguments:
        arguments = {"past_key_values": caches[arguments["past_key_values"]]}
    with pytest.raises(error, match=message):
        logits(model, tokens(1, 9), **arguments)


def test_an_encoder_alone_is_refused() -> None:
    config = tiny_t5().config
    with pytest.raises(ValueError, match="T5EncoderModel calls itself 't5' but is not built like"):
        patch_model(transformers.T5EncoderModel(config), window=WINDOW)


def test_attention_dropout_is_refused() -> None:
    model = patched().train()
    with pytest.raises(ValueError, match=r"attention dropout is 0\.1 in T5Attention"):
        logits(model, tokens(1, 9))
