"""The state of one forward lives in that forward: threads, nested and broken ones, compilation."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from tiny_models import MODELS, tiny_model, tokens
from torch import Tensor, nn

from lminf_cuda import LambdaCache, patch_model, unpatch_model
from lminf_cuda.models.compat import cache_keyword
from lminf_cuda.models.description import attention_modules
from lminf_cuda.models.families import find_decoder
from lminf_cuda.models.forward_state import running

# Decoders that hand no keywords on to their attention modules, and some that do.
NAMES = (
    *("bloom", "codegen", "diffllama", "falcon_alibi", "gpt_neox_japanese", "gptj", "mpt"),
    *("nemotron", "stablelm", "llama", "gpt_neox", "gemma2"),
)


def patched(name: str) -> Any:
    if name not in MODELS:
        pytest.skip(f"no tiny {name}")
    return patch_model(tiny_model(name), n_global=2, window=12)


def read(model: Any, ids: Tensor) -> Tensor:
    """Logits with a cache of their own, 9 tokens, then one by one."""
    cache = LambdaCache(model)
    with torch.no_grad():
        pieces = [ids[:, :9], *ids[:, 9:].split(1, dim=1)]
        return torch.cat([model(p, **cache_keyword(model, cache)).logits for p in pieces], dim=1)


def in_threads(jobs: list[Callable[[], Any]]) -> list[Any]:
    with ThreadPoolExecutor(len(jobs)) as pool:
        return [future.result() for future in [pool.submit(job) for job in jobs]]


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_two_threads_share_a_model(name: str, use_cache: bool) -> None:
    """They meet in the middle of every forward, so that none is through before the other begins."""
    model = patched(name)
    texts = [tokens(1, 24, seed=1), tokens(1, 24, seed=2)]

    def logits(ids: Tensor) -> Tensor:
        if use_cache:
            return read(model, ids)
        return torch.cat([model(ids[:, :n], use_cache=False).logits[:, -1] for n in (5, 24)])

    expected = [logits(ids) for ids in texts]
    meeting = threading.Barrier(2, timeout=20)
    decoder, family = find_decoder(model)

    def meet(*_: Any) -> None:
        meeting.wait()

    for module in attention_modules(decoder, family):
        module.register_forward_pre_hook(meet)
    got = in_threads([lambda ids=ids: logits(ids) for ids in texts])
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["bloom", "gptj", "mpt", "falcon_alibi", "stablelm", "llama"])
def test_generate_in_six_threads(name: str) -> None:
    model = patched(name)
    texts = [tokens(1, 8 + seed, seed=seed) for seed in range(6)]

    def write(ids: Tensor) -> Tensor:
        written: Tensor = model.generate(ids, max_new_tokens=12, do_sample=False, pad_token_id=0)
        return written

    expected = [write(ids) for ids in texts]
    got = in_threads([lambda ids=ids: write(ids) for ids in texts])
    assert all(map(torch.equal, got, expected))


def test_threads_share_an_encoder_decoder() -> None:
    from transformers import AutoConfig, AutoModelForSeq2SeqLM

    config = AutoConfig.for_model(
        "t5", vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, n_positions=64
    )
    torch.manual_seed(0)
    model = patch_model(AutoModelForSeq2SeqLM.from_config(config).eval(), n_global=2, window=6)
    texts = [tokens(1, 12, seed=seed) for seed in range(4)]

    def write(ids: Tensor) -> Tensor:
        written: Tensor = model.generate(
            ids, max_new_tokens=14, min_new_tokens=14, do_sample=False, decoder_start_token_id=0
        )
        return written

    expected = [write(ids) for ids in texts]
    got = in_threads([lambda ids=ids: write(ids) for ids in texts])
    assert all(map(torch.equal, got, expected))


@pytest.mark.parametrize("name", ["bloom", "mpt", "llama"])
def test_two_caches_in_turn(name: str) -> None:
    model = patched(name)
    texts = [tokens(1, 20, seed=1), tokens(2, 20, seed=2)]
    caches = [LambdaCache(model), LambdaCache(model)]
    steps: list[list[Tensor]] = [[], []]
    for start, end in [(0, 8), (8, 13), *((n, n + 1) for n in range(13, 20))]:
        for ids, cache, kept in zip(texts, caches, steps, strict=True):
            kept.append(model(ids[:, start:end], **cache_keyword(model, cache)).logits)
    for ids, kept in zip(texts, steps, strict=True):
        expected = model(ids, use_cache=False).logits
        torch.testing.assert_close(torch.cat(kept, dim=1), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["bloom", "gptj", "llama"])
def test_a_forward_that_breaks_leaves_nothing_behind(name: str) -> None:
    model, ids = patched(name), tokens(1, 20)
    expected = read(model, ids)
    decoder, family = find_decoder(model)
    last = attention_modules(decoder, family)[-1]

    def interrupt(*_: Any) -> None:
        raise KeyError("interrupted")

    for arguments in (dict(use_cache=False), cache_keyword(model, LambdaCache(model))):
        hook = last.register_forward_pre_hook(interrupt)
        with pytest.raises(KeyError, match="interrupted"):
            model(ids, **arguments)
        hook.remove()
        assert running() is None
    with pytest.raises(RuntimeError, match="works in a patched model only"):
        _attend_alone(model, last)
    torch.testing.assert_close(read(model, ids), expected)
    with pytest.raises(ValueError, match="is_causal"):
        model(ids, is_causal=False) if name == "llama" else decoder(ids, is_causal=False)
    assert running() is None


def _attend_alone(model: Any, module: nn.Module) -> None:
    """Calls an attention module outside of any forward of its decoder."""
    hidden = torch.randn(1, 4, model.config.hidden_size)
    arguments: dict[str, Any] = {"attention_mask": None}
    if type(module).__name__ == "BloomAttention":
        arguments |= {"residual": hidden}
    if type(module).__name__ == "LlamaAttention":
        dim = model.config.hidden_size // model.config.num_attention_heads
        arguments |= {"position_embeddings": (torch.ones(1, 4, dim), torch.zeros(1, 4, dim))}
    module(hidden, **arguments)


def test_an_interrupted_forward_is_no_outer_one() -> None:
    """KeyboardInterrupt goes past the hooks that clean up."""
    model, ids = patched("bloom"), tokens(1, 12)
    expected = read(model, ids)

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    hook = model.transformer.h[1].register_forward_pre_hook(interrupt)
    for _ in range(3):
        with pytest.raises(KeyboardInterrupt):
            model(ids, use_cache=False)
    hook.remove()
    torch.testing.assert_close(read(model, ids), expected)
    assert running() is None


def test_a_model_inside_of_another_models_forward() -> None:
    """As an assistant or a judge that is called from a hook."""
    outer, inner = patched("bloom"), patched("mpt")
    ids = tokens(1, 16)
    expected_outer, expected_inner = read(outer, ids), read(inner, ids)
    seen = []

    def look(*_: Any) -> None:
        seen.append(read(inner, ids))

    outer.transformer.h[1].register_forward_pre_hook(look)
    torch.testing.assert_close(read(outer, ids), expected_outer)
    torch.testing.assert_close(seen[-1], expected_inner)
    assert running() is None


@pytest.mark.parametrize("name", ["bloom", "gptj", "stablelm", "llama"])
def test_compiled_steps_of_decoders_that_hand_nothing_on(name: str) -> None:
    model, ids = patched(name), tokens(1, 14)
    expected = read(model, ids)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True, dynamic=True)
    cache = LambdaCache(model)
    with torch.no_grad():
        got = [model(ids[:, :9], **cache_keyword(model, cache)).logits]
        for token in ids[:, 9:].split(1, dim=1):
            got.append(compiled(token, **cache_keyword(model, cache)).logits)
    torch.testing.assert_close(torch.cat(got, dim=1), expected)
    torch._dynamo.reset()


def test_nothing_of_a_forward_stays_on_the_modules() -> None:
    for name in ("bloom", "mpt", "llama"):
        model = patched(name)
        before = {id(m): set(vars(m)) for m in model.modules()}
        read(model, tokens(1, 16))
        assert all(set(vars(m)) == before[id(m)] for m in model.modules())
        unpatch_model(model)
        assert not any("lminf" in word for m in model.modules() for word in vars(m))
