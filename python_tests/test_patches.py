"""patch_model: the unpatched model while a text fits the window, the definition beyond, errors."""

from __future__ import annotations

import copy
import re
import sys
from functools import partial
from types import ModuleType
from typing import Any

import pytest
import torch
from tiny_models import MODELS, TRAINED, definition, tiny_model, tokens
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    DynamicCache,
    T5ForConditionalGeneration,
)

from lminf_cuda import LambdaCache, patch_model, unpatch_model
from lminf_cuda.models.rope import keeps_rotation, let_unrotated_pass
from lminf_cuda.models.settings import LayerSettings

N_GLOBAL, WINDOW = 3, 12
ALTERNATING = ("cohere2", "exaone4", "gemma2", "gemma3_text", "gpt_oss")  # a layer slides over 8
# float32 through two layers (attention in float64 on one side), logits of order 1
TOLERANCE = 1e-5


pytestmark = pytest.mark.usefixtures("single_threaded")


def settings_of(model: Any) -> list[tuple[int, int, int]]:
    return [
        (layer.settings.n_global, layer.settings.window, layer.settings.max_distance)
        for layer in LambdaCache(model).layers
    ]


def max_difference(a: Tensor, b: Tensor) -> float:
    assert a.shape == b.shape and a.isfinite().all() and b.isfinite().all()
    return float((a.double() - b.double()).abs().max())


@pytest.mark.parametrize("name", MODELS)
def test_equals_unpatched_while_text_fits_window(name: str) -> None:
    model = tiny_model(name)
    length = 30 if name == "phi3_longrope" else 40  # beyond 32 longrope changes its factors
    ids = tokens(2, length)
    expected = model(ids).logits
    patch_model(model, n_global=N_GLOBAL, window=length)
    assert max_difference(model(ids, use_cache=False).logits, expected) < TOLERANCE
    assert max_difference(model(ids, use_cache=True).logits, expected) < TOLERANCE


@pytest.mark.parametrize("max_distance", [WINDOW, 20])
@pytest.mark.parametrize("name", MODELS)
def test_equals_definition_beyond_window(name: str, max_distance: int) -> None:
    model = tiny_model(name)
    full = (N_GLOBAL, WINDOW, max_distance)
    slides = {"qwen2_sliding": 1} | dict.fromkeys(ALTERNATING, 0)
    layers = [(0, 8, 8) if index == slides.get(name) else full for index in range(2)]
    ids = tokens(1, 4 * WINDOW + 1)
    with definition(model, [LayerSettings(*lengths, None) for lengths in layers]) as dense:
        expected = dense(ids)
    vanilla = model(ids).logits
    patch_model(model, n_global=N_GLOBAL, window=WINDOW, max_distance=max_distance)
    assert settings_of(model) == layers
    got = model(ids, use_cache=False).logits
    assert max_difference(got, expected) < TOLERANCE
    # and the tolerance can tell it from the unpatched model
    assert max_difference(got, vanilla) > 1000 * TOLERANCE


@pytest.mark.parametrize("n_global", [0, 1, 20])
@pytest.mark.parametrize("window", [1, 2, 300])
def test_equals_definition_at_odd_settings(n_global: int, window: int) -> None:
    model = tiny_model()
    ids = tokens(1, 45)
    layers = [LayerSettings(n_global, window, window, None)] * 2
    with definition(model, layers) as dense:
        expected = dense(ids)
    patch_model(model, n_global=n_global, window=window)
    assert max_difference(model(ids, use_cache=False).logits, expected) < TOLERANCE


@pytest.mark.parametrize("name", MODELS)
def test_unpatch_restores_logits_bit_for_bit(name: str) -> None:
    model = tiny_model(name)
    # beyond their training length the unpatched gptj and mpt find no entry in their tables
    has_table = name.startswith(("codegen", "gptj", "mpt"))
    ids, long_ids = tokens(2, 20), tokens(1, TRAINED - 1 if has_table else TRAINED + 20)
    expected, expected_long = model(ids).logits, model(long_ids).logits
    expected_after = model(ids).logits
    before = {key: value.clone() for key, value in model.named_buffers()}
    implementation = model.config._attn_implementation
    patch_model(model, n_global=2, window=8)
    model(long_ids)  # would rewrite the frequencies of a dynamic embedding
    model.generate(ids, max_new_tokens=2, do_sample=False)
    assert unpatch_model(model) is model
    assert model.config._attn_implementation == implementation
    for key, value in model.named_buffers():
        assert torch.equal(value, before[key])
    assert "_prepare_cache_for_generation" not in model.__dict__
    assert torch.equal(model(ids).logits, expected_after)
    assert torch.equal(model(long_ids).logits, expected_long)
    if "dynamic" not in name:
        assert torch.equal(expected, expected_after)


def test_scaled_rope_is_read_as_built_not_as_rewritten() -> None:
    for name in ("llama_dynamic", "phi3_longrope"):
        fresh, used = tiny_model(name), tiny_model(name)
        used(tokens(1, TRAINED + 20))  # rewrites inv_freq
        ids = tokens(1, 50)
        logits = [patch_model(model, window=WINDOW)(ids).logits for model in (fresh, used)]
        assert torch.equal(*logits)


@pytest.mark.parametrize(
    ("name", "window"),
    [
        ("llama", TRAINED),
        ("llama_yarn", 16),
        ("llama_llama3", 32),
        ("llama_linear", TRAINED),
        ("phi3_longrope", 32),
        ("mistral_sliding", 16),
        ("qwen2_sliding", TRAINED),
        ("llama4_text", 40),
    ],
)
def test_default_window_is_training_length(name: str, window: int) -> None:
    model = patch_model(tiny_model(name))
    assert settings_of(model)[0] == (16, window, window)


def test_window_beyond_a_chunk_is_refused() -> None:
    model = tiny_model("llama4_text")
    ids = tokens(1, 60)
    expected = model(ids).logits
    with pytest.raises(ValueError, match=r"window is 41, but layers.*chunks of 40.*window=40"):
        patch_model(model, window=41)
    assert torch.equal(model(ids).logits, expected)
    # nothing is in chunks where no layer is
    model = tiny_model("llama4_text", layer_types=["full_attention"] * 2)
    expected = model(ids).logits
    patch_model(model, window=60)
    assert max_difference(model(ids, use_cache=False).logits, expected) < TOLERANCE


def test_sliding_layers_keep_their_window() -> None:
    # window below, at and above the model's own 16
    for window, expected in ((4, (2, 4, 4)), (16, (2, 16, 16)), (40, (0, 16, 16))):
        model = patch_model(tiny_model("mistral_sliding"), n_global=2, window=window)
        assert settings_of(model) == [expected] * 2
    ids = tokens(1, 40)
    expected_logits = tiny_model("mistral_sliding")(ids).logits
    assert max_difference(model(ids, use_cache=False).logits, expected_logits) < TOLERANCE


@pytest.mark.parametrize(
    "name",
    [
        *("llama", "gpt_oss", "gemma3_text", "stablelm", "falcon_alibi", "gptj", "bloom", "mpt"),
        *("diffllama", "llama4_text", "ministral3"),
    ],
)
def test_left_padded_rows_equal_single_rows(name: str) -> None:
    model = patch_model(tiny_model(name), n_global=N_GLOBAL, window=WINDOW)
    lengths = [1, 2, 3, 12, 13, 29, 40]
    ids = tokens(len(lengths), 40)
    mask = torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        mask[row, 40 - length :] = 1
    for position_ids in (None, (mask.cumsum(-1) - 1).clamp(min=0)):
        for use_cache in (False, True):
            logits = model(
                ids, attention_mask=mask, position_ids=position_ids, use_cache=use_cache
            ).logits
            for row, length in enumerate(lengths):
                alone = model(ids[row : row + 1, 40 - length :], use_cache=False).logits
                assert max_difference(logits[row : row + 1, 40 - length :], alone) < TOLERANCE


def test_right_padding_leaves_tokens_alone() -> None:
    model = patch_model(tiny_model(), n_global=N_GLOBAL, window=WINDOW)
    ids = tokens(2, 30)
    mask = torch.ones_like(ids)
    mask[0, 17:] = 0
    alone = model(ids[:1, :17], use_cache=False).logits
    for use_cache in (False, True):
        output = model(ids, attention_mask=mask, use_cache=use_cache)
        assert max_difference(output.logits[:1, :17], alone) < TOLERANCE
    with pytest.raises(RuntimeError, match="pad on the left"):
        model(ids[:, :1], past_key_values=output.past_key_values)


def test_nan_in_padding_reaches_no_token() -> None:
    model = patch_model(tiny_model(), n_global=N_GLOBAL, window=WINDOW)
    ids = tokens(2, 30)
    mask = torch.ones_like(ids)
    mask[1, :9] = 0
    embeds = model.get_input_embeddings()(ids)
    clean = model(inputs_embeds=embeds, attention_mask=mask, use_cache=False).logits
    embeds[1, :9] = torch.nan
    output = model(inputs_embeds=embeds, attention_mask=mask, use_cache=True)
    assert torch.equal(output.logits[mask.bool()], clean[mask.bool()])
    step = model(ids[:, :1], past_key_values=output.past_key_values).logits
    assert step.isfinite().all()


class _LargestTensor(TorchDispatchMode):
    """The number of entries of the largest tensor that any operator returned."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for value in out if isinstance(out, tuple | list) else (out,):
            if isinstance(value, Tensor):
                self.numel = max(self.numel, value.untyped_storage().size() // value.element_size())
        return out


@pytest.mark.parametrize("padded", [False, True])
def test_no_square_mask(padded: bool) -> None:
    model = patch_model(tiny_model(), n_global=N_GLOBAL, window=WINDOW)
    length = 600
    ids = tokens(1, length)
    mask = torch.ones_like(ids)
    mask[0, : 5 * padded] = 0
    with _LargestTensor() as largest:
        model(ids, attention_mask=mask)
    assert 0 < largest.numel < length * length // 4


class _Negations(TorchDispatchMode):
    """How many tensors were negated, as halves of a head are by a rotation."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten.neg.default
        return func(*args, **(kwargs or {}))


def test_a_patched_model_spares_the_rotation_and_an_unpatched_one_keeps_it() -> None:
    plain, patched = tiny_model(), patch_model(tiny_model(), n_global=N_GLOBAL, window=WINDOW)
    if keeps_rotation(plain.model.layers[0].self_attn):
        pytest.skip("this transformers' attention modules keep the function they rotate by")
    ids = tokens(1, WINDOW)
    with _Negations() as rotations:
        before = plain(ids).logits
    assert rotations.count == 2 * plain.config.num_hidden_layers
    with _Negations() as rotations:
        patched(ids)
    assert rotations.count == 0
    assert torch.equal(plain(ids).logits, before)


ATTENTION = """
def rotary(q, k, cos, sin):
    return q * cos + q.flip(-1) * sin, k * cos + k.flip(-1) * sin

class Attention:
    def forward(self, q, k, cos, sin):
        return rotary(q, k, cos, sin)
"""


@pytest.mark.parametrize(
    ("old", "new", "spared"),
    [
        ("", "", True),
        ("return q * cos", "return 2 * q * cos", False),  # more than a rotation
        ("return rotary(q, k, cos, sin)", "return q, k", False),  # none
        ("cos, sin):", "sin, cos):", False),  # unknown arguments
    ],
)
def test_only_a_plain_rotation_is_spared(
    old: str, new: str, spared: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    module: Any = ModuleType("a_model_of_this_test")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    exec(ATTENTION.replace(old, new) if old else ATTENTION, module.__dict__)
    rotate = module.rotary
    ones, zeros, empty = torch.ones(1, 1, 4), torch.zeros(1, 1, 4), torch.empty(1, 1, 0)
    assert not let_unrotated_pass([module.Attention], (ones.expand(3, 1, 4),) * 2)
    assert module.rotary is rotate
    assert let_unrotated_pass([module.Attention], (ones, zeros)) == spared
    q, k = torch.randn(2, 1, 1, 1, 4)
    if spared:
        assert module.rotary(q, k, empty, empty) == (q, k)
        assert torch.equal(module.rotary(q, k, zeros, ones)[0], q.flip(-1))
    else:
        assert module.rotary is rotate


def test_two_patched_models_do_not_meet() -> None:
    config = tiny_model().config
    torch.manual_seed(0)
    first = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    second = copy.deepcopy(first)
    first.requires_grad_(False), second.requires_grad_(False)
    second.config = second.model.config = first.config  # one config object for both
    for layer in second.model.layers:
        layer.self_attn.config = first.config
    ids = tokens(1, 40)
    vanilla = first(ids).logits
    patch_model(first, n_global=0, window=5)
    assert torch.equal(second(ids).logits, vanilla)
    alone = first(ids).logits
    patch_model(second, n_global=4, window=20)
    both = second(ids).logits
    assert torch.equal(first(ids).logits, alone)
    assert max_difference(alone, both) > TOLERANCE
    unpatch_model(second)
    assert torch.equal(first(ids).logits, alone)
    assert torch.equal(second(ids).logits, vanilla)


def test_deepcopy_of_a_patched_model_stands_alone() -> None:
    model = patch_model(tiny_model(), n_global=2, window=6)
    ids = tokens(1, 30)
    expected = model(ids).logits
    generated = model.generate(ids, max_new_tokens=4, do_sample=False)
    twin = copy.deepcopy(model)
    unpatch_model(model)
    assert torch.equal(twin(ids).logits, expected)
    assert torch.equal(twin.generate(ids, max_new_tokens=4, do_sample=False), generated)
    unpatch_model(twin)
    assert torch.equal(twin(ids).logits, model(ids).logits)


def test_save_pretrained_saves_the_plain_model(tmp_path: Any) -> None:
    model = tiny_model()
    ids = tokens(1, 30)
    expected = model(ids).logits
    patch_model(model, n_global=2, window=6)
    model.save_pretrained(tmp_path)
    assert "lminf" not in (tmp_path / "config.json").read_text()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager").eval()
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, expected)


def test_patched_in_bfloat16_stays_near_float32() -> None:
    model = patch_model(tiny_model(), n_global=N_GLOBAL, window=WINDOW)
    ids = tokens(2, 40)
    expected = model(ids).logits
    model.to(torch.bfloat16)
    got = model(ids).logits
    assert got.dtype == torch.bfloat16
    assert max_difference(got, expected) < 0.25  # two layers at 8 bits of mantissa


@pytest.mark.parametrize("name", ["llama", "gpt_oss", "bloom"])
def test_under_autocast_as_near_to_float32_as_unpatched(name: str) -> None:
    model = tiny_model(name)
    ids = tokens(2, 20)
    expected = model(ids).logits
    with torch.autocast("cpu", torch.bfloat16):
        unpatched = model(ids, use_cache=False).logits
    patch_model(model, n_global=2, window=30)
    cache = LambdaCache(model)
    with torch.autocast("cpu", torch.bfloat16):
        got = [model(part, past_key_values=cache).logits for part in ids.split([12, 7, 1], dim=1)]
    allowed = 2.5 * max_difference(unpatched, expected)
    assert 0 < max_difference(torch.cat(got, dim=1), expected) < allowed


def test_base_model_and_positional_arguments() -> None:
    model = patch_model(tiny_model(), n_global=2, window=6)
    ids = tokens(2, 30)
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    keywords = model.model(input_ids=ids, attention_mask=mask).last_hidden_state
    assert torch.equal(model.model(ids, mask).last_hidden_state, keywords)


def test_patching_again() -> None:
    model = tiny_model()
    assert patch_model(model, n_global=2, window=6) is model
    assert patch_model(model, n_global=2, window=6, max_distance=6) is model
    assert patch_model(model.model, n_global=2, window=6) is model.model
    with pytest.raises(ValueError, match=r"n_global=2, window=6.*unpatch_model"):
        patch_model(model, n_global=2, window=7)
    unpatch_model(model)
    with pytest.raises(ValueError, match="not patched"):
        unpatch_model(model)
    patch_model(model, n_global=2, window=7)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"window": 0}, ValueError, "window is 0"),
        ({"window": 2.5}, TypeError, "window is 2.5"),
        ({"n_global": -1}, ValueError, "n_global is -1"),
        ({"n_global": None}, TypeError, "n_global is None"),
        ({"n_global": True}, TypeError, "n_global is True"),
        ({"window": 8, "max_distance": 7}, ValueError, "max_distance is 7; it must be at least 8"),
        ({"max_distance": "far"}, TypeError, "max_distance is 'far'"),
    ],
)
def test_bad_settings(settings: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        patch_model(tiny_model(), **settings)


def test_unsupported_models_are_refused_by_name() -> None:
    config = AutoConfig.for_model("gpt2", n_layer=1, n_embd=8, n_head=2, vocab_size=5)
    with pytest.raises(ValueError, match=r"'gpt2' is not supported.*llama.*qwen3"):
        patch_model(AutoModelForCausalLM.from_config(config))
    with pytest.raises(ValueError, match="Linear without a transformers config"):
        patch_model(torch.nn.Linear(2, 2))
    disguised = AutoModelForCausalLM.from_config(config)
    disguised.config.model_type = "llama"
    with pytest.raises(ValueError, match="is not built like"):
        patch_model(disguised)


def _t5() -> Any:
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
    config = AutoConfig.for_model("t5", vocab_size=64, n_positions=32, **sizes)
    return T5ForConditionalGeneration(config)


@pytest.mark.parametrize("name", ["llama", "gpt_oss", "bloom", "falcon", "gptj", "mpt", "t5"])
def test_a_model_without_values_is_refused(name: str) -> None:
    """On the meta device, wholly or in one weight: at patch time, whatever a family reads there."""
    build = _t5 if name == "t5" else partial(tiny_model, name)
    model = build()
    weights = list(dict(model.named_parameters()))
    wholly = copy.deepcopy(model).to("meta")
    with pytest.raises(ValueError, match=rf"on the meta device \({weights[0]} and \d+ more\)"):
        patch_model(wholly)
    module, _, weight = weights[-1].rpartition(".")
    setattr(
        model.get_submodule(module),
        weight,
        torch.nn.Parameter(torch.empty(model.get_parameter(weights[-1]).shape, device="meta")),
    )
    with pytest.raises(ValueError, match=rf"{weights[-1]}\).*load the weights first"):
        patch_model(model)
    assert not any("_lminf" in key for module in model.modules() for key in vars(module))


def test_weights_and_buffers_that_accelerate_offloads_are_taken() -> None:
    """Of test_model_wrappers.py's models it offloads the weights alone."""
    accelerate = pytest.importorskip("accelerate")
    model, plain = tiny_model("llama"), tiny_model("llama")
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"), offload_buffers=True)
    assert model.lm_head.weight.is_meta
    ids = tokens(1, 40)
    expected = patch_model(plain, window=WINDOW)(ids).logits
    assert torch.equal(patch_model(model, window=WINDOW)(ids).logits, expected)

    rotary = unpatch_model(model).model.rotary_emb
    rotary.inv_freq = rotary.inv_freq.to("meta")
    with pytest.raises(ValueError, match=r"on the meta device \(model\.rotary_emb\.inv_freq\)"):
        patch_model(model)


def _bad_calls() -> dict[str, tuple[dict[str, Any], type[Exception], str]]:
    ids = tokens(2, 10)
    hole = torch.ones_like(ids)
    hole[1, 4] = 0
    packed = torch.cat([torch.arange(6), torch.arange(4)])[None].expand(2, -1)
    left = torch.ones_like(ids)
    left[0, :3] = 0
    return {
        "output_attentions": (
            {"output_attentions": True},
            ValueError,
            "output_attentions=True",
        ),
        "hole": ({"attention_mask": hole}, ValueError, "row 1 has padding in the middle"),
        "4-D mask": (
            {"attention_mask": torch.zeros(2, 1, 10, 10)},
            ValueError,
            "attention_mask is 4-D",
        ),
        "dict of masks": (
            {"attention_mask": {"full_attention": None}},
            ValueError,
            "attention_mask is not a tensor",
        ),
        "short mask": (
            {"attention_mask": torch.ones(2, 9)},
            ValueError,
            "attention_mask has 9 columns; it must have 10",
        ),
        "mask of more rows": (
            {"attention_mask": torch.ones(3, 10)},
            ValueError,
            "attention_mask has 3 rows; it must have 2",
        ),
        "packed": ({"position_ids": packed}, ValueError, "packed into a row"),
        "gap": ({"position_ids": 2 * torch.arange(10)[None]}, ValueError, "position_ids of row 0"),
        "positions against mask": (
            {"attention_mask": left, "position_ids": torch.arange(10)[None] - 1},
            ValueError,
            "position_ids of row 0",
        ),
        "positions in an image": (
            {"position_ids": torch.arange(10) // torch.tensor([1, 2, 2])[:, None, None]},
            ValueError,
            "position_ids has 3 dims that differ",
        ),
        "4-D positions": (
            {"position_ids": torch.zeros(1, 3, 2, 10, dtype=torch.int64)},
            ValueError,
            "position_ids has 4 dims",
        ),
        "head mask": ({"head_mask": torch.ones(2, 4)}, ValueError, "head_mask is given"),
        "packed by lengths": (
            {"cu_seq_lens_q": torch.tensor([0, 6, 10], dtype=torch.int32)},
            ValueError,
            "must be [n + 1] and end with the number of tokens of the one row",
        ),
        "not causal": ({"is_causal": False}, ValueError, "is_causal is False"),
        "other cache": ({"past_key_values": DynamicCache()}, TypeError, "is a DynamicCache"),
    }


@pytest.mark.parametrize("case", _bad_calls())
def test_bad_calls(case: str) -> None:
    arguments, error, message = _bad_calls()[case]
    model = patch_model(tiny_model(), n_global=2, window=6)
    with pytest.raises(error, match=re.escape(message)):
        model(tokens(2, 10), **arguments)
    model(tokens(2, 10))  # and the model still works


def test_attention_dropout_is_refused() -> None:
    model = patch_model(tiny_model(attention_dropout=0.5), n_global=2, window=6)
    model(tokens(1, 10))
    with pytest.raises(ValueError, match=r"dropout is 0.5.*model.eval\(\)"):
        model.train()(tokens(1, 10))


def test_lminf_without_patch_is_refused() -> None:
    model = tiny_model()
    model.config._attn_implementation = "lminf"
    with pytest.raises(RuntimeError, match="patch_model"):
        model(tokens(1, 10))


@pytest.mark.parametrize("by_method", [False, True])
def test_changing_the_attention_of_a_patched_model_is_refused(by_method: bool) -> None:
    model = patch_model(tiny_model(), n_global=2, window=6)
    if by_method:
        model.set_attn_implementation("sdpa")
    else:
        model.config._attn_implementation = "eager"
    with pytest.raises(RuntimeError, match=r"unpatch_model\(model\) before"):
        model(tokens(1, 10))


def test_rope_stays_float32_in_a_model_made_small() -> None:
    model = patch_model(tiny_model(), n_global=2, window=6)
    expected = [layer.rope.inv_freq.clone() for layer in model._lminf_settings.layers]
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        model.to(dtype)
        model(tokens(1, 30))
        for layer, inv_freq in zip(model._lminf_settings.layers, expected, strict=True):
            assert layer.options(torch.device("cpu"))["inv_freq"].dtype == torch.float32
            assert torch.equal(layer.rope.inv_freq, inv_freq)


def test_logits_to_keep() -> None:
    model = patch_model(tiny_model(), n_global=2, window=6)
    ids = tokens(2, 30)
    expected = model(ids, use_cache=False).logits
    for keep in (1, 5):
        got = model(ids, logits_to_keep=keep).logits
        assert max_difference(got, expected[:, -keep:]) < TOLERANCE
