"""Middle tokens in a patched model: against a dense rewrite, with and without a cache."""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from test_cache import left_padded
from tiny_models import definition, tiny_model, tokens
from torch import Tensor, nn

from lminf_cuda import LambdaCache, patch_model, reference
from lminf_cuda.models import middle
from lminf_cuda.models.settings import LayerSettings

N_GLOBAL, WINDOW, TOP_K, FROM_LAYER = 3, 12, 4, 1
TOLERANCE = 1e-5  # float32, logits of order 1


pytestmark = pytest.mark.usefixtures("single_threaded")


def patched(name: str = "llama", **middle: Any) -> Any:
    middle = {"middle_top_k": TOP_K, "middle_from_layer": FROM_LAYER} | middle
    return patch_model(tiny_model(name), n_global=N_GLOBAL, window=WINDOW, **middle)


@contextmanager
def dense(model: Any, distance: int = WINDOW // 2, from_layer: int = FROM_LAYER) -> Iterator[Any]:
    """A copy of an unpatched model that attends by the definition, one softmax a query.

    The last query of the text has its middle tokens, in the layers from `from_layer` on.
    """
    model = copy.deepcopy(model)
    rotary = type(model.model.rotary_emb)(model.config)
    modeling: Any = sys.modules[type(model.model.layers[0].self_attn).__module__]

    def attention(
        module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Any, scaling: float, **_: Any
    ) -> tuple[Tensor, None]:
        q, k, v = q.double(), k.double(), v.double()
        n = q.shape[2]
        score = {"inv_freq": rotary.inv_freq, "scale": scaling}
        out = reference.lambda_attention(q, k, v, n_global=N_GLOBAL, window=WINDOW, **score)
        if module.layer_idx >= from_layer and n - WINDOW - N_GLOBAL >= TOP_K:
            k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))

            def scores(keys: Tensor, distances: Tensor) -> Tensor:
                """Of the last query with `keys` [B, H, m, D] at `distances` [m]: [B, H, m]."""
                at = q[:, :, -1:].expand(-1, -1, len(distances), -1)
                at = reference.clamped_rope(at, distances, rotary.inv_freq)
                return (at * keys).sum(-1) * scaling

            middle = scores(
                k[:, :, N_GLOBAL : n - WINDOW], torch.full((n - WINDOW - N_GLOBAL,), distance)
            )
            best, index = middle.topk(TOP_K)
            index = (index + N_GLOBAL)[..., None].expand(-1, -1, -1, q.shape[3])
            seen = [*range(N_GLOBAL), *range(n - WINDOW, n)]
            distances = (n - 1 - torch.tensor(seen)).clamp(max=WINDOW)
            p = torch.cat([scores(k[:, :, seen], distances), best], -1).softmax(-1)
            values = torch.cat([v[:, :, seen], v.gather(2, index)], dim=2)
            out[:, :, -1:] = p[:, :, None] @ values
        return out.to(mask.dtype if mask is not None else torch.float32).transpose(1, 2), None

    kept = modeling.apply_rotary_pos_emb, modeling.eager_attention_forward
    modeling.apply_rotary_pos_emb = lambda q, k, cos, sin, *_, **__: (q, k)
    modeling.eager_attention_forward = attention
    try:
        yield model
    finally:
        modeling.apply_rotary_pos_emb, modeling.eager_attention_forward = kept


def assert_close(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got, expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("length", [12, 15, 18, 19, 20, 48])
@pytest.mark.parametrize("distance", [None, 0, 9, WINDOW])
def test_equals_a_dense_rewrite(length: int, distance: int | None) -> None:
    model = patched(middle_distance=distance)
    ids = tokens(2, length)
    at = WINDOW // 2 if distance is None else distance
    with dense(tiny_model(), at) as slow:
        expected = slow(ids, use_cache=False).logits
    assert_close(model(ids, use_cache=False).logits, expected)
    assert_close(model(ids).logits, expected)
    without = patched(middle_top_k=0)(ids, use_cache=False).logits
    assert torch.equal(without[:, :-1], model(ids, use_cache=False).logits[:, :-1])
    has_middle = length - WINDOW - N_GLOBAL >= TOP_K
    assert has_middle == (not torch.allclose(without[:, -1], expected[:, -1], atol=TOLERANCE))


@pytest.mark.parametrize(
    "name",
    ["gemma2", "gpt_oss", "falcon", "falcon_alibi", "mpt", "gpt_neox", "cohere", "gptj", "bloom"],
)
def test_all_of_the_middle_is_as_if_all_were_global(name: str) -> None:
    """Softcap, sinks, one key head, slopes, rotations: met at max_distance, where no key is left.

    In the last layer, where no other query reads what the last one gave.
    """
    length = 40
    ids = tokens(1, length)
    own = (0, 8, 8) if name in ("gemma2", "gpt_oss") else (N_GLOBAL, WINDOW, WINDOW)
    layers = [LayerSettings(*own, None), LayerSettings(length, WINDOW, WINDOW, None)]
    with definition(tiny_model(name), layers) as slow:
        expected = slow(ids)[:, -1]
    top_k = length - WINDOW - N_GLOBAL
    model = patched(name, middle_top_k=top_k, middle_from_layer=1, middle_distance=WINDOW)
    assert_close(model(ids, use_cache=False).logits[:, -1], expected)
    assert_close(model(ids).logits[:, -1], expected)
    cache = LambdaCache(model)
    model(ids[:, :-1], past_key_values=cache)
    assert_close(model(ids[:, -1:], past_key_values=cache).logits[:, -1], expected)
    # and the tolerance can tell it from the strongest of these keys alone
    fewer = patched(name, middle_top_k=1, middle_from_layer=1, middle_distance=WINDOW)
    assert not torch.allclose(fewer(ids).logits[:, -1], expected, atol=TOLERANCE)


def test_from_the_first_layer_on() -> None:
    ids = tokens(1, 40)
    with dense(tiny_model(), from_layer=0) as slow:
        expected = slow(ids, use_cache=False).logits
    assert_close(patched(middle_from_layer=0)(ids, use_cache=False).logits, expected)


def greedy_definition(model: Any, ids: Tensor, steps: int) -> Tensor:
    """What decoding does to a model with middle tokens in its last layer only.

    No token's keys and values then hang on middle tokens, so every step is a forward of all tokens.
    """
    logits = []
    for _ in range(steps):
        logits.append(model(ids, use_cache=False).logits[:, -1])
        ids = torch.cat([ids, logits[-1].argmax(-1, keepdim=True)], 1)
    return torch.stack(logits, 1)


@pytest.mark.parametrize("keep_middle", [None, "device", "cpu"])
@pytest.mark.parametrize("chunks", [[30], [7, 11, 12], [1] * 30], ids=str)
def test_cached_steps(keep_middle: str | None, chunks: list[int]) -> None:
    model = patched()
    ids = tokens(2, 30)
    with dense(tiny_model()) as slow:
        expected = greedy_definition(slow, ids, 20)
    cache = LambdaCache(model, keep_middle=keep_middle)
    for chunk in ids.split(chunks, dim=1):
        logits = model(chunk, past_key_values=cache).logits[:, -1]
    got = []
    for _ in range(20):
        got.append(logits)
        logits = model(logits.argmax(-1, keepdim=True), past_key_values=cache).logits[:, -1]
    assert_close(torch.stack(got, 1), expected)


def test_generate() -> None:
    model = patched()
    ids = tokens(2, 30)
    with dense(tiny_model()) as slow:
        expected = greedy_definition(slow, ids, 20).argmax(-1)
    arguments = {"max_new_tokens": 20, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    assert torch.equal(model.generate(ids, **arguments)[:, 30:], expected)
    beams = model.generate(ids, num_beams=3, **arguments)
    assert torch.equal(beams, model.generate(ids, num_beams=3, use_cache=False, **arguments))


def test_left_padded_rows_equal_single_rows() -> None:
    model = patched()
    lengths = [1, 3, 12, 18, 19, 20, 30, 60]
    ids, mask = left_padded(lengths, 60)
    more = tokens(len(lengths), 5, seed=1)
    got = [model(ids, attention_mask=mask, use_cache=False).logits[:, -1]]
    cache = LambdaCache(model)
    got.append(model(ids, attention_mask=mask, past_key_values=cache).logits[:, -1])
    for token in more.split(1, dim=1):
        got.append(model(token, past_key_values=cache).logits[:, -1])
    for row, length in enumerate(lengths):
        alone = model(ids[row : row + 1, 60 - length :], past_key_values=LambdaCache(model))
        expected = [alone.logits[:, -1], alone.logits[:, -1]]
        for token in more[row : row + 1].split(1, dim=1):
            step = model(token, past_key_values=alone.past_key_values)
            expected.append(step.logits[:, -1])
        for step_got, step_expected in zip(got, expected, strict=True):
            assert_close(step_got[row : row + 1], step_expected)


def test_crop_reorder_and_reset() -> None:
    model = patched()
    ids = tokens(3, 300)
    cache = LambdaCache(model)
    cache.activate_past_recording(8)
    model(ids[:, :270], past_key_values=cache)
    cache.crop(-6)
    rows = torch.tensor([2, 0, 0])
    cache.reorder_cache(rows)
    text = torch.cat([ids[rows, :264], ids[:, 270:300]], 1)
    got = model(ids[:, 270:300], past_key_values=cache).logits
    assert_close(got, model(text, use_cache=False).logits[:, 264:])
    cache.reset()
    got = model(ids[:, :50], past_key_values=cache).logits
    assert_close(got, model(ids[:, :50], use_cache=False).logits)


def test_memory_per_token() -> None:
    model = patched()
    fixed = patched(middle_top_k=0)(tokens(1, 5)).past_key_values.memory_bytes()
    cache = LambdaCache(model)
    for length in (5, 1, 1000, 3000):
        model(tokens(1, length), past_key_values=cache)
        slots = cache.layers[1].middle.k.shape[2]  # type: ignore[union-attr]
        assert cache.layers[0].middle is None
        assert cache.get_seq_length() < slots <= 2 * max(256, cache.get_seq_length())
        assert cache.memory_bytes() == fixed + slots * 2 * 2 * 8 * 4  # k, v; heads, dims, bytes


def test_sliding_layers_have_none() -> None:
    model = patched("qwen2_sliding", middle_from_layer=0)
    layers = model._lminf_settings.layers
    assert [layer.middle_top_k for layer in layers] == [TOP_K, 0]
    model(tokens(1, 40))


def test_patching_again_with_other_middle_tokens_is_refused() -> None:
    model = patched()
    assert patch_model(
        model, n_global=N_GLOBAL, window=WINDOW, middle_top_k=TOP_K, middle_from_layer=FROM_LAYER
    )
    with pytest.raises(ValueError, match="middle_top_k=4, middle_from_layer=1, middle_distance=6"):
        patch_model(model, n_global=N_GLOBAL, window=WINDOW)


def test_bad_arguments() -> None:
    for arguments, text in (
        ({"middle_top_k": -1}, "middle_top_k is -1; it must be at least 0"),
        ({"middle_from_layer": -1}, "middle_from_layer is -1; it must be at least 0"),
        ({"middle_from_layer": 2}, "middle_from_layer is 2, but this model has 2 layers"),
        ({"middle_distance": -1}, "middle_distance is -1; it must be at least 0"),
        ({"middle_distance": 13}, "middle_distance is 13; it must be at most max_distance"),
    ):
        with pytest.raises(ValueError, match=text):
            patched(**arguments)
    with pytest.raises(TypeError, match=r"middle_top_k is 2.5; it must be an int"):
        patched(middle_top_k=2.5)
    with pytest.raises(ValueError, match="keep_middle is 'disk'; it must be 'device' or 'cpu'"):
        LambdaCache(patched(), keep_middle="disk")
    with pytest.raises(ValueError, match="the model has no middle tokens to keep"):
        LambdaCache(patched(middle_top_k=0), keep_middle="cpu")


@pytest.mark.parametrize("drafts", [{"prompt_lookup_num_tokens": 3}, {"assistant_model": "tiny"}])
def test_assisted_decoding_is_refused(drafts: dict[str, Any]) -> None:
    """Drafts would be checked by queries that have no middle tokens."""
    if "assistant_model" in drafts:
        drafts = {"assistant_model": tiny_model()}
    ids = tokens(1, 30)
    with pytest.raises(ValueError, match=r"patched with middle_top_k.*without an assistant"):
        patched().generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=5, **drafts)


def test_a_device_without_the_kernel_is_named() -> None:
    middle.check_device(torch.device("cpu"))
    if torch._C._dispatch_has_kernel_for_dispatch_key("lminf::middle_topk", "CUDA"):
        pytest.skip("this build has the kernel")
    with pytest.raises(RuntimeError, match=r'no CUDA kernel.*keep_middle="cpu"'):
        middle.check_device(torch.device("cuda"))
