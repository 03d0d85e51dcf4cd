"""What people do to a model, done to a patched one.

Compilation, device maps and checkpointing; copies, pickles and saved models; other dtypes; several
patched models at once. Each with families of every way in which the state of a forward reaches the
attention modules and in which these are found.
"""

from __future__ import annotations

import copy
import io
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import MODELS, tiny_model, tokens
from tiny_types import tiny

from lminf_cuda import LambdaCache, patch_model, unpatch_model
from lminf_cuda.models.compat import recurrent_layers_are_known

_RECURRENT = pytest.mark.skipif(
    not recurrent_layers_are_known(), reason="this transformers' caches know no such layers"
)
FAMILIES = [
    *("llama", "gemma3_text", "gpt_oss", "stablelm", "falcon", "mpt", "codegen", "diffllama"),
    "llama4_text",  # scales queries
    "longcat_flash",  # two attention modules a layer
    "mllama",  # layers that attend to an image
    "qwen2_vl",
    pytest.param("lfm2", marks=_RECURRENT),
    pytest.param("zamba2", marks=_RECURRENT),  # one attention module for several layers
]
# Compiling takes seconds: two decoders and one inside a wrapper, then the others.
COMPILED = ["llama", "codegen", "mllama"]
COMPILED += [
    pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES[:9] if name not in COMPILED
]
SETTINGS = {"n_global": 3, "window": 12}


def build(name: str) -> Any:
    """The same random model on every call."""
    return tiny_model(name) if name in MODELS else tiny(name)


pytestmark = pytest.mark.usefixtures("single_threaded", "without_gradients")


def assert_same(model: Any, twin: Any) -> None:
    """Bit for bit, read at once and generated with a cache."""
    ids = tokens(1, 40)
    assert torch.equal(model(ids, use_cache=False).logits, twin(ids, use_cache=False).logits)
    written = [x.generate(ids, max_new_tokens=3, do_sample=False) for x in (model, twin)]
    assert torch.equal(*written)


@pytest.mark.parametrize("name", COMPILED)
def test_compiled_model_has_one_graph(name: str) -> None:
    model = patch_model(build(name), **SETTINGS)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    ids = tokens(1, 40)
    expected = model(ids, use_cache=False).logits
    assert torch.equal(compiled(ids, use_cache=False).logits, expected)


@pytest.mark.parametrize("name", COMPILED)
def test_compiled_model_decodes(name: str) -> None:
    model = patch_model(build(name), **SETTINGS)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager")
    ids = tokens(1, 30)
    cache, plain = LambdaCache(model), LambdaCache(model)
    for piece in (ids[:, :20], *ids[:, 20:].split(1, dim=1)):
        got = compiled(piece, past_key_values=cache).logits
        assert torch.equal(got, model(piece, past_key_values=plain).logits)


@pytest.mark.parametrize("name", FAMILIES)
def test_gradient_checkpointing_in_eval(name: str) -> None:
    model, plain = (patch_model(build(name), **SETTINGS) for _ in range(2))
    model.gradient_checkpointing_enable()
    assert_same(model.eval(), plain)


def dispatch(model: Any, offload: bool) -> None:
    accelerate = pytest.importorskip("accelerate")
    if offload:
        accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    else:
        accelerate.dispatch_model(model, device_map={"": "cpu"}, force_hooks=True)


@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize("patch_first", [False, True])
@pytest.mark.parametrize("name", FAMILIES)
def test_device_map(name: str, patch_first: bool, offload: bool) -> None:
    model, plain = build(name), build(name)
    vanilla = plain(tokens(1, 40)).logits
    if name in ("llama4_text", "longcat_flash") and offload:
        pytest.skip("unpatched, it raises an error or gives other logits")
    if patch_first:
        patch_model(model, **SETTINGS)
    dispatch(model, offload)
    if not patch_first:
        patch_model(model, **SETTINGS)
    assert_same(model, patch_model(plain, **SETTINGS))
    assert torch.equal(unpatch_model(model)(tokens(1, 40)).logits, vanilla)


@pytest.mark.parametrize("patch_first", [False, True])
@pytest.mark.parametrize("name", ["llama", "falcon", "diffllama"])
def test_hooks_that_are_taken_off_a_patched_model(name: str, patch_first: bool) -> None:
    accelerate = pytest.importorskip("accelerate")
    model, plain = build(name), patch_model(build(name), **SETTINGS)
    if patch_first:
        patch_model(model, **SETTINGS)
    dispatch(model, offload=False)
    if not patch_first:
        patch_model(model, **SETTINGS)
    accelerate.hooks.remove_hook_from_module(model, recurse=True)
    assert_same(model, plain)
    assert torch.equal(
        unpatch_model(model)(tokens(1, 40)).logits, build(name)(tokens(1, 40)).logits
    )


@pytest.mark.parametrize("name", FAMILIES)
def test_deepcopy_stands_alone(name: str) -> None:
    model, plain = patch_model(build(name), **SETTINGS), patch_model(build(name), **SETTINGS)
    model(tokens(1, 20))
    twin = copy.deepcopy(model)
    assert torch.equal(
        unpatch_model(model)(tokens(1, 40)).logits, build(name)(tokens(1, 40)).logits
    )
    assert_same(twin, plain)
    assert torch.equal(unpatch_model(twin)(tokens(1, 40)).logits, model(tokens(1, 40)).logits)


@pytest.mark.parametrize("name", FAMILIES)
def test_pickle_stands_alone(name: str) -> None:
    model, plain = patch_model(build(name), **SETTINGS), patch_model(build(name), **SETTINGS)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    twin = torch.load(file, weights_only=False)
    vanilla = unpatch_model(model)(tokens(1, 40)).logits
    assert_same(twin, plain)
    assert torch.equal(unpatch_model(twin)(tokens(1, 40)).logits, vanilla)
    assert torch.equal(vanilla, build(name)(tokens(1, 40)).logits)


@pytest.mark.parametrize("name", ["llama", pytest.param("llama4_text", marks=pytest.mark.slow)])
def test_pickle_in_another_process(name: str, tmp_path: Path) -> None:
    """A cache goes with its model, and is refused by the first one that is patched there."""
    model = patch_model(build(name), **SETTINGS)
    ids = tokens(1, 40)
    cache = LambdaCache(model)
    model(ids[:, :30], past_key_values=cache)
    torch.save((model, cache, ids), tmp_path / "model.pt")
    expected = model(ids, use_cache=False).logits[:, 30:]
    script = f"""
import sys
import torch
sys.path.insert(0, {str(Path(__file__).parent)!r})
from tiny_models import tiny_model
from lminf_cuda import LambdaCache, patch_model
stranger = patch_model(tiny_model("llama4_text"), n_global=3, window=13)
model, cache, ids = torch.load({str(tmp_path / "model.pt")!r}, weights_only=False)
try:
    stranger(ids[:, 30:], past_key_values=cache)
except ValueError as error:
    assert "made for another model" in str(error)
    with torch.no_grad():
        logits = model(ids[:, 30:], past_key_values=cache).logits
    torch.save(logits, {str(tmp_path / "logits.pt")!r})
"""
    subprocess.run([sys.executable, "-c", script], check=True)
    got = torch.load(tmp_path / "logits.pt")
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", FAMILIES)
def test_save_pretrained_saves_the_plain_model(name: str, tmp_path: Path) -> None:
    model, ids = build(name), tokens(1, 40)
    expected, entries = model(ids).logits, list(model.state_dict())
    patch_model(model, **SETTINGS)
    assert list(model.state_dict()) == entries
    model.save_pretrained(tmp_path)
    assert "lminf" not in (tmp_path / "config.json").read_text()
    loaded = type(model).from_pretrained(tmp_path, attn_implementation="eager").eval()
    assert torch.equal(loaded(ids).logits, expected)
    assert_same(patch_model(loaded, **SETTINGS), model)


@pytest.mark.parametrize("name", FAMILIES)
def test_two_patched_models_do_not_meet(name: str) -> None:
    first, second, ids = build(name), build(name), tokens(1, 40)
    second.config = first.config
    vanilla = first(ids).logits
    patch_model(first, n_global=0, window=5)
    assert torch.equal(second(ids).logits, vanilla)
    alone = first(ids).logits
    patch_model(second, n_global=4, window=20)
    other = second(ids).logits
    assert not torch.allclose(alone, other, atol=1e-3)
    assert torch.equal(first(ids).logits, alone)
    with pytest.raises(ValueError, match="window is 20 in it and 5 in the model"):
        first(ids[:, :1], past_key_values=second(ids, use_cache=True).past_key_values)
    unpatch_model(first)
    assert torch.equal(second(ids).logits, other)
    assert torch.equal(first(ids).logits, vanilla)
    assert torch.equal(unpatch_model(second)(ids).logits, vanilla)


@pytest.mark.parametrize("name", FAMILIES)
def test_patching_twice(name: str) -> None:
    model, ids = build(name), tokens(1, 40)
    vanilla = model(ids).logits
    expected = patch_model(model, **SETTINGS)(ids).logits
    assert patch_model(model, **SETTINGS) is model
    assert torch.equal(model(ids).logits, expected)
    with pytest.raises(ValueError, match=r"n_global=3, window=12.*unpatch_model"):
        patch_model(model, n_global=3, window=13)
    assert torch.equal(model(ids).logits, expected)
    assert torch.equal(unpatch_model(model)(ids).logits, vanilla)
    with pytest.raises(ValueError, match="not patched"):
        unpatch_model(model)
    assert torch.equal(patch_model(model, **SETTINGS)(ids).logits, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", FAMILIES)
def test_low_precision_after_patching(name: str, dtype: torch.dtype) -> None:
    """The same, bit for bit, as a model that was small before it was patched."""
    ids = tokens(1, 40)
    small = build(name).to(dtype)
    exact = {k: v for k, v in build(name).named_buffers() if k.endswith("inv_freq")}
    for key, value in exact.items():  # as from_pretrained leaves them
        owner, _, attribute = key.rpartition(".")
        setattr(small.get_submodule(owner), attribute, value)
    cast_first = patch_model(small, **SETTINGS)
    cast_last = patch_model(build(name), **SETTINGS)
    cast_last = cast_last.half() if dtype == torch.float16 else cast_last.to(dtype)
    assert_same(cast_last, cast_first)
    logits = cast_last(ids, use_cache=False).logits
    assert logits.dtype == dtype and logits.isfinite().all()
    vanilla = build(name).to(dtype)(ids).logits
    assert torch.equal(unpatch_model(cast_last)(ids).logits, vanilla)


@pytest.mark.parametrize("name", FAMILIES)
def test_rows_of_a_cache(name: str) -> None:
    """Repeated, reordered, selected and reset, each time as if read anew."""
    model = patch_model(build(name), **SETTINGS)
    text, more = tokens(2, 25), tokens(4, 3, seed=1)

    def assert_goes_on(cache: Any, rows: list[int]) -> None:
        ids = torch.cat([text[rows], more[: len(rows)]], 1)
        expected = model(ids, use_cache=False).logits[:, 25:]
        got = [model(token, past_key_values=cache).logits for token in ids[:, 25:].split(1, dim=1)]
        torch.testing.assert_close(torch.cat(got, 1), expected, rtol=0, atol=2e-4)

    cache = LambdaCache(model)
    model(text, past_key_values=cache)
    for change, rows in (
        (lambda twin: twin.batch_repeat_interleave(2), [0, 0, 1, 1]),
        (lambda twin: twin.reorder_cache(torch.tensor([1, 0])), [1, 0]),
        (lambda twin: twin.reorder_cache(torch.tensor([1, 1])), [1, 1]),
        (lambda twin: twin.batch_select_indices(torch.tensor([1])), [1]),
    ):
        twin = copy.deepcopy(cache)
        change(twin)
        assert_goes_on(twin, rows)
    assert_goes_on(cache, [0, 1])
    cache.reset()
    assert cache.get_seq_length() == 0
    model(text, past_key_values=cache)
    assert_goes_on(cache, [0, 1])


@pytest.mark.parametrize("name", FAMILIES[:-1])  # transformers' own Zamba takes no embeddings
def test_generation_from_embeddings_and_of_several_sequences(name: str) -> None:
    model, ids = patch_model(build(name), **SETTINGS), tokens(2, 20)
    sampling = {"do_sample": True, "num_return_sequences": 2, "max_new_tokens": 4}
    written = []
    for use_cache in (True, False):
        torch.manual_seed(1)
        written.append(model.generate(ids, use_cache=use_cache, **sampling))
    assert written[0].shape == (4, 24) and torch.equal(*written)
    plain = model.generate(ids, max_new_tokens=4, do_sample=False)
    embeds = model.get_input_embeddings()(ids)
    got = model.generate(inputs_embeds=embeds, max_new_tokens=4, do_sample=False)
    assert torch.equal(got, plain[:, 20:])


@pytest.mark.parametrize(
    "arguments",
    [
        {"penalty_alpha": 0.6, "top_k": 4},
        {"dola_layers": "low"},
        {"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 1.0},
        {"num_beams": 2, "constraints": [1]},
    ],
    ids=str,
)
def test_what_generate_refuses_it_refuses_of_a_patched_model(arguments: dict[str, Any]) -> None:
    def outcome(model: Any) -> tuple[Any, str]:
        try:
            written = model.generate(tokens(1, 9), max_new_tokens=2, do_sample=False, **arguments)
        except Exception as error:
            return type(error), str(error)
        return written.tolist(), ""

    plain = outcome(build("llama"))
    assert isinstance(plain[0], type)
    assert outcome(patch_model(build("llama"), n_global=3, window=30)) == plain
