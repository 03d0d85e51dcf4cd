"""What the patches rely on beyond transformers' documented interface: does it still hold, and is
it noticed where it does not? A renamed argument is adapted to or refused, never ignored."""

import functools
import importlib
from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
import transformers
from tiny_models import tiny_model, tokens
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import Cache
from transformers.models.llama import modeling_llama
from transformers.models.mpt import modeling_mpt

from lminf_cuda import LambdaCache, patch_model, unpatch_model
from lminf_cuda.models import compat
from lminf_cuda.models.compat import cache_argument, cache_keyword, move_cache
from lminf_cuda.models.description import attention_modules
from lminf_cuda.models.families import find_decoder
from lminf_cuda.models.forward_state import running

SPELLINGS = ("cache", "past_key_values")


def patched(name: str = "llama", **settings: int) -> Any:
    return patch_model(tiny_model(name), **({"n_global": 2, "window": 12} | settings))


def with_cache(model: Any, ids: Tensor, cache: Any = None, **kwargs: Any) -> Tensor:
    """Logits of `ids` read as 20 tokens, 9 tokens, and then one by one."""
    cache = LambdaCache(model) if cache is None else cache
    pieces = [ids[:, :20], ids[:, 20:29], *ids[:, 29:].split(1, dim=1)]
    return torch.cat(
        [model(piece, **cache_keyword(model, cache), **kwargs).logits for piece in pieces], dim=1
    )


# The name, where it is, and the first release that has it.
ALWAYS = (0,)
PRIVATE_NAMES: list[tuple[str, str, tuple[int, ...]]] = [
    ("generation", f"GenerationMixin.{compat.MAKES_CACHE}", ALWAYS),
    ("generation", f"GenerationMixin.{compat.MAKES_MASK}", ALWAYS),
    ("generation", f"GenerationMixin.{compat.DRAFTS_BY}", ALWAYS),
    ("generation", "GenerationMixin.generate_batch", ALWAYS),
    ("generation", "GenerationMixin.init_continuous_batching", ALWAYS),
    ("generation", "GenerationMixin.continuous_batching_context_manager", ALWAYS),
    ("cache_utils", "CacheLayerMixin.lazy_initialization", ALWAYS),
    ("cache_utils", "CacheLayerMixin.update", ALWAYS),
    ("cache_utils", "DynamicLayer.reorder_cache", ALWAYS),
    ("cache_utils", "EncoderDecoderCache.check_dynamic_cache", ALWAYS),
    ("cache_utils", "LinearAttentionLayer.reorder_cache", (5, 5)),
    ("cache_utils", "DummyLayer", (5, 23)),
    ("modeling_utils", "PreTrainedModel.get_correct_attn_implementation", ALWAYS),
]


@pytest.mark.parametrize(("module", "path", "since"), PRIVATE_NAMES)
def test_private_names_of_this_version(module: str, path: str, since: tuple[int, ...]) -> None:
    value: Any = importlib.import_module(f"transformers.{module}")
    for name in path.split("."):
        value = getattr(value, name, None)
    is_there = compat._release(transformers.__version__) >= since
    assert (value is not None) == is_there, f"{module}.{path} in {transformers.__version__}"


# What the forwards of own_forwards.py ask their modules for.
MODULE_ATTRIBUTES = {
    "bloom": ("query_key_value", "_reshape", "inv_norm_factor", "dense", "num_heads"),
    "codegen": ("qkv_proj", "num_attention_heads", "head_dim", "resid_dropout", "out_proj"),
    "diffllama": ("q_proj", "head_dim", "lambda_q1", "lambda_k2", "lambda_init", "groupnorm"),
    "falcon": (
        *("query_key_value", "_split_heads", "new_decoder_architecture", "num_heads"),
        *("num_kv_heads", "inv_norm_factor", "dense"),
    ),
    "gpt_neox_japanese": ("query_key_value", "num_attention_heads", "head_size", "dense_bias"),
    "gptj": ("q_proj", "num_attention_heads", "head_dim", "resid_dropout", "rotary_dim"),
    "mpt": ("Wqkv", "clip_qkv", "n_heads", "head_dim", "out_proj", "softmax_scale"),
}


@pytest.mark.parametrize("name", MODULE_ATTRIBUTES)
def test_attributes_of_attention_modules(name: str) -> None:
    model = tiny_model(name)
    decoder, family = find_decoder(model)
    module = attention_modules(decoder, family)[0]
    missing = [
        word for word in (*MODULE_ATTRIBUTES[name], "layer_idx") if not hasattr(module, word)
    ]
    assert not missing, f"{type(module).__name__} of transformers {transformers.__version__}"
    assert hasattr(decoder.config, "_attn_implementation")


@pytest.mark.parametrize("name", ["gptj", "codegen"])
def test_a_table_of_positions_does_not_end_the_text(name: str) -> None:
    """Where it is the decoder's rotary module that looks them up, and where the attention does."""
    model, ids = patched(name), tokens(1, 150)
    decoder, _ = find_decoder(model)
    buffers = [buffer for buffer, _ in decoder.named_buffers()]
    assert any(buffer.endswith(f".{compat.ROTARY_TABLE}") for buffer in buffers)
    expected = model(ids, use_cache=False).logits
    torch.testing.assert_close(with_cache(model, ids[:, :60]), expected[:, :60])
    cache = cache_keyword(model, LambdaCache(model))
    got = torch.cat([model(piece, **cache).logits for piece in ids.split(50, dim=1)], dim=1)
    torch.testing.assert_close(got, expected)
    plain = tiny_model(name)(ids[:, :30]).logits
    assert torch.equal(unpatch_model(model)(ids[:, :30]).logits, plain)


def test_the_versions_that_are_tested(monkeypatch: pytest.MonkeyPatch) -> None:
    oldest, newest = compat.TESTED
    for version, is_inside in (
        (oldest, True),
        (newest, True),
        ("5.9.0", True),
        (newest + ".dev0", True),
        ("5.3.9", False),
        ("5.100.0", False),
        ("6.0.0rc1", False),
    ):
        monkeypatch.setattr(compat.transformers, "__version__", version)
        note = compat.version_note()
        assert (note is None) == is_inside, version
        if note is not None:
            assert version in note and oldest in note and newest in note


def test_the_cache_argument_is_found_by_its_annotation() -> None:
    def renamed(self: Any, x: Tensor, kv: Cache | None = None, use_cache: bool = True) -> None: ...
    def quoted(self: Any, x: Tensor, kv: "Cache | None" = None) -> None: ...
    def bare(self: Any, x: Any, past_key_values: Any = None) -> None: ...
    def two(self: Any, cache: Cache, padding: Cache | None = None) -> None: ...
    def none(self: Any, x: Tensor, use_cache: bool = True, **kwargs: Any) -> None: ...
    def unknown(self: Any, x: Tensor, kv: Any = None) -> None: ...

    @functools.wraps(renamed)
    def wrapped(*args: Any, **kwargs: Any) -> None: ...

    found = [cache_argument(f) for f in (renamed, quoted, bare, two, none, unknown, wrapped)]
    assert found == ["kv", "kv", "past_key_values", "cache", None, None, "kv"]


def test_caches_are_moved_to_the_name_of_the_forward() -> None:
    for given in ({"cache": 1}, {"past_key_values": 1}, {"kv": 1}, {"cache": 1, "kv": None}):
        arguments = {"x": 0} | given
        assert move_cache(arguments, "kv") == 1
        assert arguments == {"x": 0, "kv": 1}
    assert move_cache({}, "kv") is None
    with pytest.raises(ValueError, match="two caches are given, under the names kv and cache"):
        move_cache({"kv": 1, "cache": 2}, "kv")


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("name", ["llama", "bloom", "gpt_neox", "mpt", "gptj", "gemma2"])
def test_callers_may_use_both_spellings(name: str, spelling: str) -> None:
    model, ids = patched(name), tokens(2, 33)
    expected = with_cache(model, ids)
    cache = LambdaCache(model)
    got = [model(piece, **{spelling: cache}).logits for piece in ids.split([20, 9, 4], dim=1)]
    torch.testing.assert_close(torch.cat(got, dim=1), expected)
    assert cache.get_seq_length() == 33
    # the decoder by itself, and generate() in one go or going on
    decoder = model.get_decoder()
    inner = decoder(ids, **{spelling: LambdaCache(model)}).last_hidden_state
    torch.testing.assert_close(inner, decoder(ids, use_cache=False).last_hidden_state)
    if name == "mpt" and compat._release(transformers.__version__) < (5, 5):
        return  # its generate() reads again what a cache that it is given holds, which is refused
    asked = dict(max_new_tokens=5, do_sample=False, pad_token_id=0)
    plain = model.generate(ids, **asked)
    assert torch.equal(model.generate(ids, **{spelling: LambdaCache(model)}, **asked), plain)
    going_on = torch.cat([ids, plain[:, 33:34]], dim=1)
    assert torch.equal(model.generate(going_on, **{spelling: cache}, **asked)[:, :38], plain)


def test_two_different_caches_are_refused() -> None:
    model, ids = patched(), tokens(1, 9)
    both = dict(cache=LambdaCache(model), past_key_values=LambdaCache(model))
    with pytest.raises(ValueError, match="two caches are given"):
        model(ids, **both)
    with pytest.raises(ValueError, match="two caches are given"):
        model.generate(ids, max_new_tokens=2, **both)


def test_outputs_hold_the_cache_under_the_name_of_their_version() -> None:
    model = patched()
    name = cache_argument(model.forward)
    assert name is not None
    assert isinstance(getattr(model(tokens(1, 9), use_cache=True), name), LambdaCache)
    output = model.generate(
        tokens(1, 9), max_new_tokens=2, return_dict_in_generate=True, pad_token_id=0
    )
    assert isinstance(getattr(output, name), LambdaCache)


CACHE = cache_argument(modeling_llama.LlamaModel.forward) or ""


class _RenamedDecoder(modeling_llama.LlamaModel):
    def forward(self, input_ids: Any = None, kv_store: Cache | None = None, **kwargs: Any) -> Any:
        return super().forward(input_ids, **{CACHE: kv_store}, **kwargs)


class _UnknownDecoder(modeling_llama.LlamaModel):
    def forward(self, input_ids: Any = None, kv_store: Any = None, **kwargs: Any) -> Any:
        return super().forward(input_ids, **{CACHE: kv_store}, **kwargs)


class _RenamedModel(modeling_llama.LlamaForCausalLM):
    def forward(self, input_ids: Any = None, kv_store: Cache | None = None, **kwargs: Any) -> Any:
        return super().forward(input_ids, **{CACHE: kv_store}, **kwargs)


def test_a_renamed_cache_of_the_decoder_is_adapted_to() -> None:
    ids = tokens(2, 33)
    expected = with_cache(patched(), ids)
    model = tiny_model()
    model.model.__class__ = _RenamedDecoder
    patch_model(model, n_global=2, window=12)
    torch.testing.assert_close(with_cache(model, ids), expected)
    output = model(ids, use_cache=True)  # makes its own cache
    assert isinstance(getattr(output, CACHE), LambdaCache)
    asked = dict(max_new_tokens=5, do_sample=False, pad_token_id=0)
    assert torch.equal(model.generate(ids, **asked), patched().generate(ids, **asked))


def test_a_renamed_cache_of_the_model_is_adapted_to() -> None:
    ids = tokens(2, 33)
    model = tiny_model()
    model.__class__ = _RenamedModel
    patch_model(model, n_global=2, window=12)
    torch.testing.assert_close(with_cache(model, ids), with_cache(patched(), ids))


def test_a_cache_that_cannot_be_found_is_refused_by_patch_model() -> None:
    model = tiny_model()
    model.model.__class__ = _UnknownDecoder
    with pytest.raises(ValueError, match=r"_UnknownDecoder takes no argument that.*kv_store.*5\.4"):
        patch_model(model, n_global=2, window=12)
    assert not any("lminf" in name for module in model.modules() for name in vars(module))


class _SwallowingAttention(modeling_llama.LlamaAttention):
    """A cache by its old name goes into the keywords, and is not heeded."""

    def forward(self, hidden_states: Tensor, kv_store: Any = None, **kwargs: Any) -> Any:
        assert modeling_llama.ALL_ATTENTION_FUNCTIONS
        kwargs.pop(CACHE)
        return super().forward(hidden_states, **{CACHE: kv_store}, **kwargs)


class _OtherAttention(modeling_llama.LlamaAttention):
    """Names ALL_ATTENTION_FUNCTIONS, and attends in its own way."""

    def forward(self, hidden_states: Tensor, *_: Any, **__: Any) -> Any:
        assert modeling_llama.ALL_ATTENTION_FUNCTIONS
        return self.o_proj(self.q_proj(hidden_states)), None


@pytest.mark.parametrize("layers", [[0], [1], [0, 1]])
def test_a_swallowed_cache_raises(layers: list[int]) -> None:
    model, ids = tiny_model(), tokens(1, 20)
    for index in layers:
        model.model.layers[index].self_attn.__class__ = _SwallowingAttention
    patch_model(model, n_global=2, window=12)
    model(ids, use_cache=False)  # nothing is lost
    cache = LambdaCache(model)
    with pytest.raises(RuntimeError, match=r"without handing its new keys.*tested are 5\.4"):
        model(ids, **cache_keyword(model, cache))
    with pytest.raises(RuntimeError, match="without handing its new keys"):
        model.generate(ids, max_new_tokens=2)
    assert running() is None
    with pytest.raises(RuntimeError, match="did not finish"):
        model(ids, **cache_keyword(model, cache))


@pytest.mark.parametrize("use_cache", [False, True])
def test_a_layer_that_attends_in_another_way_raises(use_cache: bool) -> None:
    model, ids = tiny_model(), tokens(1, 20)
    model.model.layers[1].self_attn.__class__ = _OtherAttention
    patch_model(model, n_global=2, window=12)
    with pytest.raises(RuntimeError, match=r"of 2 attention layers 1 came to Λ attention.*tested"):
        model(ids, use_cache=use_cache)
    assert running() is None


class _MoreOptions(modeling_llama.LlamaAttention):
    """What a softcap and learned sinks would look like, were they called something else."""

    more: ClassVar[dict[str, Any]] = {}

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Any:
        assert modeling_llama.ALL_ATTENTION_FUNCTIONS
        return super().forward(hidden_states, **kwargs, **self.more)


@pytest.mark.parametrize("more", [{"sinks": torch.zeros(4)}, {"logit_cap": 30.0}], ids=str)
def test_an_option_of_another_name_raises(
    more: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, ids = tiny_model(), tokens(1, 20)
    model.model.layers[1].self_attn.__class__ = _MoreOptions
    patch_model(model, n_global=2, window=12)
    expected = model(ids).logits
    monkeypatch.setattr(_MoreOptions, "more", {"is_sliding": False, "size": 3, "nothing": None})
    assert torch.equal(model(ids).logits, expected)
    monkeypatch.setattr(_MoreOptions, "more", more)
    with pytest.raises(RuntimeError, match=rf"_MoreOptions hands {next(iter(more))} to .*tested"):
        model(ids)
    # What the caller of the model adds is the caller's.
    monkeypatch.setattr(_MoreOptions, "more", {})
    assert torch.equal(model(ids, **more).logits, expected)


def test_a_layer_that_comes_twice_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = patched(), tokens(1, 20)
    model.model.layers[1].self_attn.layer_idx = 0
    with pytest.raises(RuntimeError, match="came to layer 0 of the LambdaCache a second time"):
        model(ids, use_cache=True)


def test_own_forwards_need_no_argument_for_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """What an mpt block hands to its attention by any name is not what counts."""
    ids = tokens(2, 33)
    expected = with_cache(patched("mpt"), ids)
    forward: Callable[..., Any] = modeling_mpt.MptBlock.forward
    name = cache_argument(forward)

    def nameless(self: Any, *args: Any, **kwargs: Any) -> Any:
        kwargs.pop(name, None)
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(modeling_mpt.MptBlock, "forward", nameless)
    model = patched("mpt")
    torch.testing.assert_close(with_cache(model, ids), expected)


def test_a_foreign_cache_is_still_refused() -> None:
    model = patched()
    for spelling in SPELLINGS:
        with pytest.raises(TypeError, match="is a DynamicCache; a patched model takes a Lambda"):
            model(tokens(1, 9), **{spelling: DynamicCache()})
    unpatch_model(model)
    output = model(tokens(1, 9), **cache_keyword(model, DynamicCache()))
    assert isinstance(getattr(output, CACHE), DynamicCache)
