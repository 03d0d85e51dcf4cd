"""LambdaCache: the same logits as without a cache, in a memory that does not grow."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from tiny_models import MODELS, tiny_model, tokens
from torch import Tensor
from transformers.cache_utils import Cache

from lminf_cuda import LambdaCache, patch_model, unpatch_model
from lminf_cuda.models import positions
from lminf_cuda.models.cache.layers import LambdaCacheLayer

N_GLOBAL, WINDOW = 3, 12
TOLERANCE = 1e-5  # float32, logits of order 1; the sums run in another order


pytestmark = pytest.mark.usefixtures("single_threaded")


@pytest.fixture(autouse=True)
def poisoned_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every slot starts as NaN, so that reading an unused one shows."""
    allocate = LambdaCacheLayer.lazy_initialization

    def allocate_nan(layer: LambdaCacheLayer, *args: Any) -> None:
        allocate(layer, *args)
        for buffer in layer.buffers():
            buffer.fill_(torch.nan)

    monkeypatch.setattr(LambdaCacheLayer, "lazy_initialization", allocate_nan)


def patched(
    name: str = "llama", n_global: int = N_GLOBAL, window: int = WINDOW, **extra: Any
) -> Any:
    return patch_model(tiny_model(name), n_global=n_global, window=window, **extra)


def run(
    model: Any, ids: Tensor, chunks: list[int], cache: Any = None, mask: Tensor | None = None
) -> Tensor:
    """Logits of `ids`, fed through one cache in chunks of these lengths."""
    assert sum(chunks) == ids.shape[1]
    cache = LambdaCache(model) if cache is None else cache
    logits, seen = [], cache.get_seq_length()
    for chunk in ids.split(chunks, dim=1):
        seen += chunk.shape[1]
        chunk_mask = None if mask is None else mask[:, :seen]
        output = model(chunk, attention_mask=chunk_mask, past_key_values=cache)
        assert output.past_key_values is cache
        assert cache.get_seq_length() == seen
        logits.append(output.logits)
    return torch.cat(logits, dim=1)


def assert_close(got: Tensor, expected: Tensor) -> None:
    assert got.isfinite().all()
    torch.testing.assert_close(got, expected, rtol=0, atol=TOLERANCE)


CHUNKS = {
    "prefill and decode": [20] + [1] * 25,
    "decode from nothing": [1] * 45,
    "up to the window": [12, 1, 1, 31],
    "window less one": [11, 1, 1, 32],
    "odd chunks": [5, 7, 1, 13, 2, 17],
    "inside the globals": [1, 1, 2, 1, 40],
    "turns": [9, 1, 1, 1, 8, 1, 1, 23],
    "long then longer": [15, 30],
}


@pytest.mark.parametrize("chunks", CHUNKS)
@pytest.mark.parametrize(
    ("n_global", "window", "max_distance"),
    [(3, 12, 12), (3, 12, 20), (0, 12, 12), (16, 4, 4), (2, 1, 1), (2, 64, 64)],
)
def test_cached_equals_uncached(n_global: int, window: int, max_distance: int, chunks: str) -> None:
    model = patched(n_global=n_global, window=window, max_distance=max_distance)
    ids = tokens(2, 45)
    expected = model(ids, use_cache=False).logits
    assert_close(run(model, ids, CHUNKS[chunks]), expected)


@pytest.mark.parametrize("name", MODELS)
def test_cached_equals_uncached_for_every_family(name: str) -> None:
    model = patched(name)
    ids = tokens(2, 45)
    expected = model(ids, use_cache=False).logits
    assert_close(run(model, ids, [5, 20, 1, 1, 11, 1, 6]), expected)


LENGTHS = [1, 2, 3, 4, 12, 13, 29, 40]


def left_padded(lengths: list[int], total: int) -> tuple[Tensor, Tensor]:
    ids = tokens(len(lengths), total)
    mask = torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        mask[row, total - length :] = 1
    return ids, mask


@pytest.mark.parametrize(
    "chunks",
    [[40] + [1] * 20, [7, 5, 18, 10, 1, 1, 9, 9], [1] * 60, [20, 39, 1]],
    ids=str,
)
@pytest.mark.parametrize("may_read_values", [True, False])
def test_left_padded_rows_equal_single_rows(
    chunks: list[int], may_read_values: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also as on a GPU, where a decode step does not look at the mask's values on the host."""
    monkeypatch.setattr(positions, "_may_read_values", lambda inputs: may_read_values)
    model = patched()
    ids, mask = left_padded(LENGTHS, 40)
    more = tokens(len(LENGTHS), 20, seed=1)
    ids, mask = torch.cat([ids, more], 1), torch.cat([mask, torch.ones_like(more)], 1)
    logits = run(model, ids, chunks, mask=mask)
    for row, length in enumerate(LENGTHS):
        alone = model(ids[row : row + 1, 40 - length :], use_cache=False).logits
        assert_close(logits[row : row + 1, 40 - length :], alone)


def test_memory_is_fixed_and_allocated_once() -> None:
    model = patched(n_global=5, window=16)
    cache = LambdaCache(model)
    assert cache.memory_bytes() == 0
    model(tokens(2, 3), past_key_values=cache)
    # layers * (k and v) * rows * kv heads * tokens * head dim * bytes
    assert cache.memory_bytes() == 2 * 2 * 2 * 2 * (5 + 16) * 8 * 4
    pointers = [buffer.data_ptr() for layer in cache.layers for buffer in layer.buffers()]
    for length in (1, 1, 40, 700, 1):
        model(tokens(2, length), past_key_values=cache)
    cache.reorder_cache(torch.tensor([1, 0]))
    cache.reset()
    model(tokens(2, 9), past_key_values=cache)
    assert cache.memory_bytes() == 2 * 2 * 2 * 2 * (5 + 16) * 8 * 4
    assert pointers == [buffer.data_ptr() for layer in cache.layers for buffer in layer.buffers()]


def test_is_a_transformers_cache() -> None:
    model = patched("qwen2_sliding")
    cache = LambdaCache(model)
    assert isinstance(cache, Cache)
    assert len(cache) == 2 and cache.get_seq_length() == 0 and cache.batch_size == -1
    assert not cache.is_compileable and not cache.is_initialized
    output = model(tokens(3, 20))
    cache = output.past_key_values
    assert isinstance(cache, LambdaCache)
    assert cache.is_initialized and cache.batch_size == 3
    assert cache.get_seq_length() == cache.get_seq_length(1) == 20
    assert cache.get_mask_sizes(4, 0) == (24, 0)
    assert [tuple(buffer.shape) for buffer in cache.layers[0].buffers()] == [
        (3, 2, WINDOW, 8),
        (3, 2, WINDOW, 8),
        (3, 2, N_GLOBAL, 8),
        (3, 2, N_GLOBAL, 8),
    ]
    assert tuple(cache.layers[1].buffers()[0].shape) == (3, 2, 8, 8)  # keeps its own window of 8


def test_early_initialization() -> None:
    model = patched()
    cache = LambdaCache(model)
    cache.early_initialization(
        batch_size=2, num_heads=2, head_dim=8, dtype=torch.float32, device=torch.device("cpu")
    )
    assert cache.is_initialized and cache.memory_bytes() > 0
    ids = tokens(2, 20)
    assert_close(run(model, ids, [19, 1], cache), model(ids, use_cache=False).logits)


def test_reset_forgets() -> None:
    model = patched()
    cache = LambdaCache(model)
    run(model, tokens(2, 30), [29, 1], cache)
    cache.reset()
    ids = tokens(2, 25, seed=1)
    assert_close(run(model, ids, [3, 1, 21], cache), model(ids, use_cache=False).logits)


@pytest.mark.parametrize("seen", [2, 7, 12, 13, 30])
def test_reorder_and_select_rows(seen: int) -> None:
    model = patched()
    ids, more = tokens(3, seen), tokens(3, 6, seed=1)
    rows = torch.tensor([2, 0, 2])
    cache = LambdaCache(model)
    run(model, ids, [seen], cache)
    cache.reorder_cache(rows)
    expected = model(torch.cat([ids[rows], more], 1), use_cache=False).logits
    assert_close(run(model, more, [1, 5], copy.deepcopy(cache)), expected[:, seen:])

    cache.batch_select_indices(torch.tensor([1]))
    assert cache.batch_size == 1
    cache.batch_repeat_interleave(2)
    assert cache.batch_size == 2
    expected = model(torch.cat([ids[:1].repeat(2, 1), more[:2]], 1), use_cache=False).logits
    assert_close(run(model, more[:2], [5, 1], cache), expected[:, seen:])


@pytest.mark.parametrize(("seen", "removed"), [(10, 4), (12, 12), (12, 5), (30, 1), (3, 9), (5, 0)])
def test_crop_rolls_back(seen: int, removed: int) -> None:
    model = patched()
    ids, more = tokens(2, seen), tokens(2, 20, seed=1)
    cache = LambdaCache(model)
    run(model, ids, [seen], cache)
    cache.crop(-removed)
    kept = max(seen - removed, 0)
    assert cache.get_seq_length() == kept
    expected = model(torch.cat([ids[:, :kept], more], 1), use_cache=False).logits
    assert_close(run(model, more, [1, 7, 12], cache), expected[:, kept:])


def test_crop_to_a_length() -> None:
    cache = patched()(tokens(1, 10)).past_key_values
    cache.crop(7)
    assert cache.get_seq_length() == 7
    cache.crop(20)
    assert cache.get_seq_length() == 7


def test_crop_past_the_ring_is_refused() -> None:
    model = patched()
    cache = LambdaCache(model)
    ids = tokens(1, 30)
    run(model, ids[:, :28], [28], cache)
    with pytest.raises(RuntimeError, match=r"crop\(-3\) removes 3 of 28 tokens.*ring of 12"):
        cache.crop(-3)
    expected = model(ids, use_cache=False).logits[:, 28:]
    assert_close(run(model, ids[:, 28:], [2], cache), expected)  # and nothing was lost


def test_deepcopy_continues_by_itself() -> None:
    """A prompt is read once and continued in two ways."""
    model = patched()
    prompt, first, second = tokens(1, 30), tokens(1, 9, seed=1), tokens(1, 9, seed=2)
    cache = LambdaCache(model)
    run(model, prompt, [30], cache)
    twin = copy.deepcopy(cache)
    for continued, more in ((cache, first), (twin, second)):
        expected = model(torch.cat([prompt, more], 1), use_cache=False).logits[:, 30:]
        assert_close(run(model, more, [4, 1, 4], continued), expected)


def test_inference_mode_and_no_grad_mix() -> None:
    model = patched()
    ids = tokens(1, 30)
    cache = LambdaCache(model)
    with torch.inference_mode():
        first = run(model, ids[:, :20], [19, 1], cache)
    with torch.no_grad():
        second = run(model, ids[:, 20:], [9, 1], cache)
    assert_close(torch.cat([first, second], 1), model(ids, use_cache=False).logits)


def test_interrupted_forward_is_not_continued() -> None:
    model = patched()
    cache = LambdaCache(model)
    run(model, tokens(1, 20), [20], cache)
    handle = model.model.layers[1].register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(tokens(1, 3), past_key_values=cache)
    handle.remove()
    with pytest.raises(RuntimeError, match=r"did not finish.*cache.reset\(\)"):
        model(tokens(1, 3), past_key_values=cache)
    cache.reset()
    ids = tokens(1, 20)
    assert_close(run(model, ids, [19, 1], cache), model(ids, use_cache=False).logits)


def test_mask_must_agree_with_the_cache() -> None:
    model = patched()
    ids, mask = left_padded([4, 10], 10)
    cache = LambdaCache(model)
    model(ids, attention_mask=mask, past_key_values=cache)
    hole = torch.cat([mask, torch.tensor([[1], [0]])], 1)
    with pytest.raises(ValueError, match="row 1 has padding in the middle"):
        model(ids[:, :1], attention_mask=hole, past_key_values=cache)
    other = torch.cat([torch.ones_like(mask), torch.tensor([[0, 1], [1, 1]])], 1)
    with pytest.raises(ValueError, match=r"marks \[10, 10\] tokens.*holds \[4, 10\]"):
        model(ids[:, :2], attention_mask=other, past_key_values=cache)
    with pytest.raises(ValueError, match="1 columns; it must have 11: 10 in the cache and 1 new"):
        model(ids[:, :1], attention_mask=torch.ones(2, 1), past_key_values=cache)
    with pytest.raises(ValueError, match="position_ids of row 0 are"):
        model(ids[:, :1], position_ids=torch.tensor([[3], [10]]), past_key_values=cache)
    for position_ids in ([[4], [10]], [[10]]):  # a row's own tokens, or columns
        twin = copy.deepcopy(cache)
        model(ids[:, :1], position_ids=torch.tensor(position_ids), past_key_values=twin)


def test_masked_token_of_an_unchecked_step_is_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(positions, "_may_read_values", lambda inputs: False)
    model = patched()
    ids = tokens(2, 30)
    cache = LambdaCache(model)
    mask = torch.ones_like(ids)
    mask[1, 20] = 0
    logits = run(model, ids, [20] + [1] * 10, cache, mask)
    assert_close(logits[:1], model(ids[:1], use_cache=False).logits)
    without = torch.cat([ids[1:, :20], ids[1:, 21:]], 1)
    assert_close(logits[1:, 21:], model(without, use_cache=False).logits[:, 20:])


def test_foreign_caches_are_refused() -> None:
    first = patched()
    ids = tokens(2, 5)
    cache = first(ids).past_key_values
    with pytest.raises(ValueError, match=r"input has 1 rows and the LambdaCache 2"):
        first(ids[:1], past_key_values=cache)
    with pytest.raises(ValueError, match=r"input has 2 rows and the LambdaCache 3"):
        first(ids, past_key_values=LambdaCache(first, batch_size=3))
    unpatch_model(first)
    with pytest.raises(RuntimeError, match="while that is patched"):
        first(ids, past_key_values=cache)
    patch_model(first, n_global=N_GLOBAL, window=WINDOW + 1)
    with pytest.raises(ValueError, match="window is 12 in it and 13 in the model"):
        first(ids, past_key_values=cache)


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="not patched; call patch_model"):
        LambdaCache(tiny_model())
    with pytest.raises(ValueError, match="batch_size is 0"):
        LambdaCache(patched(), batch_size=0)


def test_compiled_decode_is_one_graph() -> None:
    model = patched()
    ids = tokens(2, 24)
    cache = LambdaCache(model)
    logits = [run(model, ids[:, :16], [16], cache)]
    torch._dynamo.reset()
    graphs = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(model, backend=graphs, fullgraph=True)
    for i in range(16, 24):
        mask = torch.ones(2, i + 1, dtype=torch.int64)  # grows, as in generate()
        step = compiled(ids[:, i : i + 1], attention_mask=mask, past_key_values=cache)
        logits.append(step.logits)
    # the second graph is the one for any length: no further step compiles
    assert graphs.frame_count <= 2
    assert_close(torch.cat(logits, 1), model(ids, use_cache=False).logits)
    torch._dynamo.reset()


@pytest.mark.parametrize("name", ["llama", "qwen2_sliding"])
@pytest.mark.parametrize("when", ["before", "within", "beyond"])
@pytest.mark.parametrize("removed", [1, 2, 8, 9])
def test_crop_takes_back_what_is_recorded(name: str, when: str, removed: int) -> None:
    """Over several forwards, one of them longer than the ring, and again after the first crop."""
    model = patched(name)
    ids = tokens(2, 60)
    cache = LambdaCache(model)
    seen = {"before": 0, "within": 7, "beyond": 25}[when]
    if seen:
        run(model, ids[:, :seen], [seen], cache)
    cache.activate_past_recording(8)
    run(model, ids[:, seen : seen + 25], [20, 1, 1, 3], cache)
    seen += 25
    for more in ([1, 1, 1], [5], [20]):
        cache.crop(-removed)
        seen -= removed
        assert cache.get_seq_length() == seen
        branch = tokens(2, sum(more), seed=seen)
        ids = torch.cat([ids[:, :seen], branch], 1)
        expected = model(ids, use_cache=False).logits[:, seen:]
        assert_close(run(model, branch, more, cache), expected)
        seen += sum(more)
        extra = tokens(2, 9, seed=1)  # so that there is enough to take back again
        run(model, extra, [9], cache)
        ids, seen = torch.cat([ids, extra], 1), seen + 9


def test_crop_of_left_padded_rows() -> None:
    model = patched()
    ids, mask = left_padded([3, 14, 20], 20)
    cache = LambdaCache(model)
    cache.activate_past_recording(6)
    run(model, ids, [20], cache, mask)
    more = tokens(3, 10, seed=1)
    mask = torch.cat([mask, torch.ones_like(more)], 1)
    run(model, more[:, :6], [6], cache, mask)
    cache.crop(-5)
    text = torch.cat([ids, more[:, :1], more[:, 2:]], 1)
    mask = mask[:, : text.shape[1]]
    logits = run(model, more[:, 2:], [1, 7], cache, mask)
    expected = model(text, attention_mask=mask, use_cache=False).logits[:, 21:]
    assert_close(logits, expected)


def test_recording_costs_its_slots_once() -> None:
    model = patched()
    cache = LambdaCache(model)
    run(model, tokens(1, 30), [30], cache)
    before = cache.memory_bytes()
    cache.activate_past_recording(6)
    assert cache.memory_bytes() == before * (N_GLOBAL + WINDOW + 6) // (N_GLOBAL + WINDOW)
    cache.activate_past_recording(3)
    assert [layer.capacity for layer in cache.layers] == [WINDOW + 6] * 2
    with pytest.raises(RuntimeError, match=r"crop\(-9\) removes 9 of 30 .*past_recording\(9\)"):
        cache.crop(-9)  # they were gone before
    cache.reset()
    ids = tokens(1, 40)
    run(model, ids, [40], cache)
    cache.crop(-7)
    assert_close(run(model, ids[:, 33:], [1, 6], cache), model(ids, use_cache=False).logits[:, 33:])
    with pytest.raises(ValueError, match="tokens is 0; it must be at least 1"):
        cache.activate_past_recording(0)
