"""generate() on a patched model: the same tokens as without a cache."""

from __future__ import annotations

import inspect
import threading
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from tiny_models import MODELS, TRAINED, VOCAB, tiny_model, tokens
from torch import Tensor
from transformers import DynamicCache
from transformers.generation import StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from lminf_cuda import LambdaCache, patch_model, unpatch_model

N_GLOBAL, WINDOW, NEW = 3, 12, 20
NO_EOS = VOCAB  # an id that no model gives; prompt lookup of transformers 5.4 fails without one


pytestmark = pytest.mark.usefixtures("single_threaded")


def patched(name: str = "llama") -> Any:
    return patch_model(tiny_model(name), n_global=N_GLOBAL, window=WINDOW)


def generate(model: Any, ids: Tensor, **arguments: Any) -> Tensor:
    arguments = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": NO_EOS} | arguments
    arguments.setdefault("attention_mask", torch.ones_like(ids))
    output: Tensor = model.generate(ids, **arguments)
    return output


@pytest.mark.parametrize("name", MODELS)
def test_greedy_equals_uncached(name: str) -> None:
    model = patched(name)
    ids = tokens(2, WINDOW + 2)
    got = generate(model, ids, max_new_tokens=8)
    assert got.shape == (2, WINDOW + 10)
    assert torch.equal(got, generate(model, ids, max_new_tokens=8, use_cache=False))


def test_greedy_is_the_argmax_of_each_step() -> None:
    model = patched()
    ids = tokens(1, 20)
    expected = ids
    for _ in range(NEW):
        logits = model(expected, use_cache=False).logits
        expected = torch.cat([expected, logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(generate(model, ids), expected)


def test_far_beyond_the_trained_length() -> None:
    model = patched("phi3_longrope")  # whose own generate() drops the cache at 33 tokens
    ids = tokens(1, 28)
    got = generate(model, ids, max_new_tokens=TRAINED)
    assert torch.equal(got, generate(model, ids, max_new_tokens=TRAINED, use_cache=False))


def test_left_padded_batch_equals_single_rows() -> None:
    model = patched()
    lengths = [1, 4, 12, 30]
    ids = tokens(len(lengths), 30)
    mask = torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        mask[row, 30 - length :] = 1
    for arguments in ({}, {"prefill_chunk_size": 7}):
        got = generate(model, ids, attention_mask=mask, **arguments)
        for row, length in enumerate(lengths):
            alone = generate(model, ids[row : row + 1, 30 - length :], use_cache=False)
            assert torch.equal(got[row, 30 - length :], alone[0])


def test_chunked_prefill() -> None:
    model = patched()
    ids = tokens(2, 29)
    expected = generate(model, ids, use_cache=False)
    for size in (1, 5, 28, 100):
        assert torch.equal(generate(model, ids, prefill_chunk_size=size), expected)


def test_turns_in_one_cache() -> None:
    model = patched()
    cache = LambdaCache(model)
    text = tokens(1, 9)
    for turn in range(3):
        expected = generate(model, text, use_cache=False)
        text = generate(model, text, past_key_values=cache)
        assert torch.equal(text, expected)
        assert cache.get_seq_length() == text.shape[1] - 1  # the last token was not fed yet
        text = torch.cat([text, tokens(1, 6, seed=turn)], 1)


def test_beam_search() -> None:
    model = patched()
    ids = tokens(2, 20)
    arguments = {"num_beams": 3, "num_return_sequences": 2}
    got = generate(model, ids, **arguments)
    assert torch.equal(got, generate(model, ids, use_cache=False, **arguments))


def test_sampling() -> None:
    model = patched()
    ids = tokens(1, 20)
    samples = []
    for use_cache in (True, False):
        torch.manual_seed(7)
        samples.append(
            generate(model, ids, do_sample=True, num_return_sequences=3, use_cache=use_cache)
        )
    assert torch.equal(*samples)


def test_returns_its_cache() -> None:
    model = patched()
    output: Any = generate(model, tokens(1, 20), return_dict_in_generate=True)
    cache = output.past_key_values
    assert isinstance(cache, LambdaCache)
    assert cache.get_seq_length() == 20 + NEW - 1


def test_inputs_embeds() -> None:
    model = patched()
    ids = tokens(1, 20)
    got = model.generate(
        inputs_embeds=model.get_input_embeddings()(ids), max_new_tokens=NEW, do_sample=False
    )
    assert torch.equal(got, generate(model, ids, use_cache=False)[:, 20:])


def test_two_threads_share_a_model() -> None:
    model = patched()
    prompts = [tokens(1, 18), tokens(2, 25, seed=1)]
    expected = [generate(model, ids) for ids in prompts]
    got: list[Tensor | None] = [None, None]

    def work(index: int) -> None:
        got[index] = generate(model, prompts[index])

    threads = [threading.Thread(target=work, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for result, ids in zip(got, expected, strict=True):
        assert result is not None and torch.equal(result, ids)


@pytest.mark.parametrize("implementation", ["static", "quantized", "dynamic"])
def test_cache_implementation_is_refused(implementation: str) -> None:
    with pytest.raises(ValueError, match=f"cache_implementation is '{implementation}'.*leave"):
        generate(patched(), tokens(1, 5), cache_implementation=implementation)


def test_other_caches_are_refused() -> None:
    with pytest.raises(TypeError, match=r"is a DynamicCache.*LambdaCache\(model\)"):
        generate(patched(), tokens(1, 5), past_key_values=DynamicCache())


def test_output_attentions_is_refused() -> None:
    with pytest.raises(ValueError, match="output_attentions=True"):
        generate(patched(), tokens(1, 5), output_attentions=True, return_dict_in_generate=True)


def repetitive(length: int) -> Tensor:
    """A text in which prompt lookup finds drafts."""
    return tokens(1, 7).repeat(1, length // 7 + 1)[:, :length]


@pytest.mark.parametrize("length", [3, 13, 40])
@pytest.mark.parametrize("drafted", [2, 10, 30])
def test_prompt_lookup(length: int, drafted: int) -> None:
    model = patched()
    ids = repetitive(length)
    expected = generate(model, ids, use_cache=False, max_new_tokens=60)
    got = generate(model, ids, prompt_lookup_num_tokens=drafted, max_new_tokens=60)
    assert torch.equal(got, expected)


@pytest.mark.parametrize("assistant", ["same", "other", "unpatched"])
@pytest.mark.parametrize("schedule", ["constant", "heuristic"])
def test_assisted_decoding(assistant: str, schedule: str) -> None:
    model = patched()
    helper = {"same": lambda: patched(), "other": other_model, "unpatched": tiny_model}[assistant]()
    helper.generation_config.num_assistant_tokens = 6
    helper.generation_config.num_assistant_tokens_schedule = schedule
    helper.generation_config.assistant_confidence_threshold = 0.0
    for length in (1, 12, 30):
        ids = tokens(1, length, seed=length)
        expected = generate(model, ids, use_cache=False, max_new_tokens=50)
        got = generate(model, ids, assistant_model=helper, max_new_tokens=50)
        assert torch.equal(got, expected)


def other_model() -> Any:
    """A patched model that often agrees with `patched()` and often does not."""
    model = tiny_model()
    with torch.no_grad():
        for parameter in model.model.layers[1].parameters():
            parameter.mul_(0.9)
    return patch_model(model, n_global=1, window=9)


def test_early_exit_drafts() -> None:
    model = patched()
    ids = tokens(1, 25)
    got = generate(model, ids, assistant_early_exit=1)
    assert torch.equal(got, generate(model, ids, use_cache=False))


def test_turns_after_assisted_decoding() -> None:
    """A cache that took drafts back goes on like any other, and its size stays."""
    model = patched()
    cache = LambdaCache(model)
    text = repetitive(20)
    sizes = set()
    for turn in range(3):
        expected = generate(model, text, use_cache=False)
        drafts = {"prompt_lookup_num_tokens": 5} if turn == 0 else {}
        text = generate(model, text, past_key_values=cache, **drafts)
        assert torch.equal(text, expected)
        assert cache.get_seq_length() == text.shape[1] - 1
        sizes.add(cache.memory_bytes())
        text = torch.cat([text, tokens(1, 30, seed=turn)], 1)
    assert len(sizes) == 1
    with pytest.raises(ValueError, match=r"holds 139 tokens already.*leave past_key_values out"):
        generate(model, text, past_key_values=cache, prompt_lookup_num_tokens=5)


def test_assisted_sampling() -> None:
    """Drafts do not change the distribution: here, every token but one has no probability."""
    model = patched()
    ids = repetitive(30)
    expected = generate(model, ids, use_cache=False)
    got = generate(model, ids, prompt_lookup_num_tokens=4, do_sample=True, top_k=1)
    assert torch.equal(got, expected)


@pytest.mark.parametrize(
    "arguments",
    [
        {"num_beams": 4, "length_penalty": 0.5},
        {"num_beams": 4, "num_return_sequences": 4, "early_stopping": True},
        {"num_beams": 2, "eos_token_id": 7},
        {"num_beams": 3, "prefill_chunk_size": 6},
    ],
    ids=str,
)
def test_beam_search_of_padded_rows(arguments: dict[str, Any]) -> None:
    model = patched()
    ids = tokens(3, 20)
    mask = torch.ones_like(ids)
    mask[0, :19] = 0
    mask[1, :9] = 0
    arguments = arguments | {"attention_mask": mask}
    got = generate(model, ids, **arguments)
    uncached = {k: v for k, v in arguments.items() if k != "prefill_chunk_size"}
    assert torch.equal(got, generate(model, ids, use_cache=False, **uncached))


@pytest.mark.parametrize("num_beams", [1, 3])
def test_beam_and_padded_sampling(num_beams: int) -> None:
    model = patched()
    ids = tokens(2, 20)
    mask = torch.ones_like(ids)
    mask[0, :15] = 0
    arguments = {"do_sample": True, "num_beams": num_beams, "temperature": 0.7, "top_p": 0.9}
    samples = []
    for use_cache in (True, False):
        torch.manual_seed(3)
        samples.append(generate(model, ids, attention_mask=mask, use_cache=use_cache, **arguments))
    assert torch.equal(*samples)


def test_every_length_of_left_padded_rows() -> None:
    model = patched()
    lengths = list(range(1, WINDOW + N_GLOBAL + 4))
    total = max(lengths)
    ids = tokens(len(lengths), total)
    mask = (torch.arange(total) >= total - torch.tensor(lengths)[:, None]).long()
    got = generate(model, ids, attention_mask=mask)
    for row, length in enumerate(lengths):
        alone = generate(model, ids[row : row + 1, total - length :], use_cache=False)
        assert torch.equal(got[row, total - length :], alone[0])


class StopAt(StoppingCriteria):
    """Stops when the text is so long."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        return torch.full((input_ids.shape[0],), input_ids.shape[1] >= self.length)


@pytest.mark.parametrize("drafts", [{}, {"prompt_lookup_num_tokens": 3}], ids=str)
def test_stopping_criteria_and_streamers(drafts: dict[str, Any]) -> None:
    model = patched()
    ids = repetitive(25)
    expected = generate(model, ids, use_cache=False)

    class Collect(BaseStreamer):
        def __init__(self) -> None:
            self.tokens: list[int] = []
            self.ended = False

        def put(self, value: Tensor) -> None:
            self.tokens += value.flatten().tolist()

        def end(self) -> None:
            self.ended = True

    streamer = Collect()
    cache = LambdaCache(model)
    got = generate(
        model,
        ids,
        streamer=streamer,
        stopping_criteria=StoppingCriteriaList([StopAt(33)]),
        past_key_values=cache,
        **drafts,
    )
    assert 33 <= got.shape[1] <= 36
    assert torch.equal(got, expected[:, : got.shape[1]])
    assert streamer.ended and streamer.tokens == got[0].tolist()
    # The cache stands right behind the text, whatever was drafted, and goes on from there.
    assert cache.get_seq_length() == got.shape[1] - 1
    more = generate(model, got, past_key_values=cache, max_new_tokens=45 - got.shape[1])
    assert torch.equal(more, expected)


@pytest.mark.parametrize(("dynamic", "graphs_made"), [(True, 1), (None, 2)])
def test_compiled_generation_does_not_recompile(dynamic: bool | None, graphs_made: int) -> None:
    """One graph for all steps; left to itself PyTorch makes one for the first, one for the rest."""
    model = patched()
    ids = tokens(2, 16)
    expected = generate(model, ids, max_new_tokens=40, use_cache=False)
    prefill = model.forward
    torch._dynamo.reset()
    graphs = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(prefill, backend=graphs, fullgraph=True, dynamic=dynamic)

    def forward(*args: Any, **kwargs: Any) -> Any:
        is_step = kwargs["input_ids"].shape[1] == 1
        return (compiled if is_step else prefill)(*args, **kwargs)

    forward.__signature__ = inspect.signature(prefill)  # type: ignore[attr-defined]
    model.forward = forward
    got = generate(model, ids, max_new_tokens=40)
    assert torch.equal(got, expected)
    assert graphs.frame_count == graphs_made
    torch._dynamo.reset()


def test_continuous_batching_is_refused() -> None:
    model = patched()
    ids = tokens(1, 9)
    for call in (
        lambda: model.generate_batch([[1, 2, 3]]),
        lambda: model.init_continuous_batching(),
        lambda: model.continuous_batching_context_manager(),
        lambda: generate(model, ids, cache_implementation="paged"),
    ):
        with pytest.raises(NotImplementedError, match=r"continuous batching.*left-padded batch"):
            call()
    unpatch_model(model)
    assert "lminf" not in type(model).generate_batch.__module__
    assert "generate_batch" not in vars(model)


def test_paged_attention_is_refused() -> None:
    model = patched()
    model.config._attn_implementation = "paged|eager"
    with pytest.raises(RuntimeError, match=r"was set to 'paged\|eager'; call unpatch_model"):
        generate(model, tokens(1, 9))
