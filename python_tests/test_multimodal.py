"""Models that also see: texts and images in the context, and images that cannot be served."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from family_sweep import all_wrappers
from tiny_models import randomize, tokens
from tiny_types import tiny_wrapper_config
from torch import Tensor
from transformers import AutoModelForImageTextToText, DynamicCache

from lminf_cuda import LambdaCache, patch_model, unpatch_model

IMAGE_TOKEN, N_IMAGE = 60, 16  # 32 x 32 pixels in patches of 8 x 8
TOLERANCE = 1e-5


pytestmark = pytest.mark.usefixtures("single_threaded", "without_gradients")


def tiny(model_type: str = "llava", **extra: Any) -> Any:
    config = tiny_wrapper_config(model_type)
    for name, value in ({"image_token_id": IMAGE_TOKEN} | extra).items():
        setattr(config, name, value)
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config, attn_implementation="eager")
    return randomize(model, 1.0)


def llava() -> Any:
    return tiny(vision_feature_select_strategy="default")


def with_image() -> tuple[Tensor, Tensor]:
    """Ids with an image in the middle, and the image."""
    text, more = tokens(1, 12), tokens(1, 20, seed=1)
    ids = torch.cat([text.clamp(max=59), torch.full((1, N_IMAGE), IMAGE_TOKEN)], 1)
    pixels = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(2))
    return torch.cat([ids, more.clamp(max=59)], 1), pixels


def test_an_image_within_the_window_equals_unpatched() -> None:
    ids, pixels = with_image()
    model = llava()
    expected = model(ids, pixel_values=pixels).logits
    assert not torch.allclose(expected, model(ids, pixel_values=2 * pixels).logits, atol=1e-3)
    patch_model(model, n_global=3, window=ids.shape[1])
    for use_cache in (True, False):
        got = model(ids, pixel_values=pixels, use_cache=use_cache).logits
        torch.testing.assert_close(got, expected, rtol=0, atol=TOLERANCE)
    assert torch.equal(unpatch_model(model)(ids, pixel_values=pixels).logits, expected)


def test_an_image_that_leaves_the_window() -> None:
    ids, pixels = with_image()
    model = patch_model(llava(), n_global=3, window=10)
    expected = model(ids, pixel_values=pixels, use_cache=False).logits
    cache = LambdaCache(model)
    first = model(ids[:, :40], pixel_values=pixels, past_key_values=cache).logits
    rest = [model(token, past_key_values=cache).logits for token in ids[:, 40:].split(1, 1)]
    got = torch.cat([first, *rest], 1)
    torch.testing.assert_close(got, expected, rtol=0, atol=TOLERANCE)
    arguments = {"pixel_values": pixels, "max_new_tokens": 5, "do_sample": False}
    arguments["attention_mask"] = torch.ones_like(ids)
    written = model.generate(ids, **arguments)
    assert torch.equal(written, model.generate(ids, use_cache=False, **arguments))


def mllama() -> Any:
    model = tiny("mllama")
    for layer in model.model.language_model.layers:
        if hasattr(layer, "cross_attn"):  # closed in an untrained model
            layer.cross_attn_attn_gate.fill_(0.7)
            layer.cross_attn_mlp_gate.fill_(0.7)
    return model


def test_layers_that_attend_to_an_image_stay_as_they_are() -> None:
    ids = tokens(2, 40).clamp(max=59)
    generator = torch.Generator().manual_seed(2)
    model = mllama()
    tiles = model.config.vision_config.max_num_tiles
    sees = torch.ones(2, 40, 1, tiles, dtype=torch.int64)
    sees[:, :5] = 0
    image = {
        "pixel_values": torch.randn(2, 1, tiles, 3, 32, 32, generator=generator),
        "aspect_ratio_ids": torch.ones(2, 1, dtype=torch.int64),
        "aspect_ratio_mask": torch.ones(2, 1, tiles, dtype=torch.int64),
        "cross_attention_mask": sees,
    }
    expected = model(ids, **image).logits
    assert not torch.allclose(expected, model(ids).logits, atol=1e-2)
    patch_model(model, n_global=3, window=40)
    for use_cache in (True, False):
        got = model(ids, use_cache=use_cache, **image).logits
        torch.testing.assert_close(got, expected, rtol=0, atol=TOLERANCE)
    assert torch.equal(unpatch_model(model)(ids, **image).logits, expected)

    patch_model(model, n_global=3, window=10)
    expected = model(ids, use_cache=False, **image).logits
    cache = LambdaCache(model)
    for rows in ([0, 1], [1, 0]):
        first = image | {"cross_attention_mask": sees[:, :20]}
        got = [model(ids[:, :20], past_key_values=cache, **first).logits]
        cache.reorder_cache(torch.tensor(rows))
        for end in (30, *range(31, 41)):
            piece, mask = ids[rows, cache.get_seq_length() : end], sees[:, :end]
            output = model(piece, past_key_values=cache, cross_attention_mask=mask)
            got.append(output.logits)
        assert cache.memory_bytes() > 0
        torch.testing.assert_close(got[0], expected[:, :20], rtol=0, atol=TOLERANCE)
        torch.testing.assert_close(
            torch.cat(got[1:], 1), expected[rows, 20:], rtol=0, atol=TOLERANCE
        )
        cache.reset()
    text = model(ids, use_cache=False).logits
    torch.testing.assert_close(
        model(ids, past_key_values=cache).logits, text, rtol=0, atol=TOLERANCE
    )
    for arguments in ({}, {"num_beams": 3}, {"do_sample": True, "num_return_sequences": 2}):
        written = []
        for use_cache in (True, False):
            torch.manual_seed(0)
            arguments = {"do_sample": False} | arguments | image
            written.append(model.generate(ids, max_new_tokens=5, use_cache=use_cache, **arguments))
        assert torch.equal(*written)


@pytest.mark.parametrize(
    ("model_type", "argument"),
    [("gemma3", "token_type_ids"), ("molmo2", "mm_token_type_ids")],  # the latter makes the mask
)
def test_tokens_that_see_ahead_are_refused(model_type: str, argument: str) -> None:
    if model_type not in all_wrappers():
        pytest.skip("this transformers does not have the type")
    model = patch_model(tiny(model_type), n_global=3, window=10)
    ids = tokens(1, 30).clamp(max=59)
    types = torch.zeros_like(ids)
    expected = model(ids).logits
    torch.testing.assert_close(model(ids, **{argument: types}).logits, expected)
    types[:, 5:9] = 1
    with pytest.raises(
        ValueError, match=r"tokens of an image or of a prefix see what follows.*unpatch_model"
    ):
        model(ids, **{argument: types})


def test_images_at_positions_of_their_own_are_refused() -> None:
    model = patch_model(tiny("qwen2_5_vl"), n_global=3, window=10)
    ids = tokens(1, 30).clamp(max=55)
    positions = torch.arange(30).expand(3, 1, -1)
    expected = model(ids).logits
    torch.testing.assert_close(model(ids, position_ids=positions).logits, expected)
    positions = positions // torch.tensor([1, 2, 2])[:, None, None]
    with pytest.raises(ValueError, match=r"image or a video stand at positions of their own"):
        model(ids, position_ids=positions)


def test_other_caches_are_refused() -> None:
    model = patch_model(tiny("idefics2"), n_global=3, window=10)  # which makes one by itself
    ids = tokens(1, 20).clamp(max=55)
    cache = model(ids).past_key_values
    assert isinstance(cache, LambdaCache) and cache.get_seq_length() == 20
    with pytest.raises(TypeError, match="is a DynamicCache"):
        model(ids, past_key_values=DynamicCache())


def test_configs_around_are_copied() -> None:
    model, other = llava(), llava()
    other.config = other.model.config = model.config
    patch_model(model, n_global=3, window=10)
    assert other.config.text_config._attn_implementation == "eager"
    assert model.config.text_config is model.model.language_model.config
    unpatch_model(model)
    assert model.config.text_config._attn_implementation == "eager"
