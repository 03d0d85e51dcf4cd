"""Patched models train: loss and gradients are the unpatched model's while the text fits the window
and the definition's beyond it, by a plain loop, with checkpoints, packed rows, Trainer and PEFT."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from test_patches import ALTERNATING
from tiny_models import MODELS, definition, one_thread, tiny_model, tokens
from torch import Tensor, nn

from lminf_cuda import LambdaCache, patch_model, unpatch_model
from lminf_cuda.models.settings import LayerSettings

N_GLOBAL, WINDOW = 3, 12
# float32 through two layers, forth and back; gradients of order 1
TOLERANCE = 2e-5
BY_STATE = [name for name in ("falcon", "gptj", "mpt", "bloom", "codegen") if name in MODELS]


@pytest.fixture(autouse=True, scope="module")
def single_threaded() -> Iterator[None]:
    with one_thread():
        yield


def trainable(name: str, **config: Any) -> Any:
    model = tiny_model(name, **config)
    model.requires_grad_(True)
    for module in model.modules():  # tiny models have dropout where their family's default has it
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        for attribute in ("attention_dropout", "attn_dropout_p", "hidden_dropout", "dropout_rate"):
            if isinstance(getattr(module, attribute, None), float):
                setattr(module, attribute, 0.0)
    return model.train()


def gradients(model: Any, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad(set_to_none=True)
    loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, x in wanted.items():
        size = max(1.0, x.abs().max().item())
        torch.testing.assert_close(
            found[name], x, rtol=0, atol=TOLERANCE * size, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("name", MODELS)
def test_equals_unpatched_while_text_fits_window(name: str) -> None:
    model = trainable(name)
    ids = tokens(2, 30)
    loss = model(ids, labels=ids).loss
    wanted = gradients(model, loss)
    patch_model(model, n_global=N_GLOBAL, window=30)
    patched = model(ids, labels=ids).loss
    assert abs(patched.item() - loss.item()) < TOLERANCE
    assert_same(gradients(model, patched), wanted)
    unpatch_model(model)
    assert_same(gradients(model, model(ids, labels=ids).loss), wanted)


def next_token_loss(logits: Tensor, ids: Tensor) -> Tensor:
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())


@pytest.mark.parametrize("name", MODELS)
def test_equals_the_definition_beyond_the_window(name: str) -> None:
    model = trainable(name)
    full = (N_GLOBAL, WINDOW, 20)
    slides = {"qwen2_sliding": 1} | dict.fromkeys(ALTERNATING, 0)
    layers = [(0, 8, 8) if index == slides.get(name) else full for index in range(2)]
    ids = tokens(1, 50)
    with definition(model, [LayerSettings(*lengths, None) for lengths in layers]) as dense:
        truth = next_token_loss(dense(ids), ids)
        wanted = gradients(dense.model, truth)  # type: ignore[attr-defined]
    patch_model(model, n_global=N_GLOBAL, window=WINDOW, max_distance=20)
    loss = next_token_loss(model(ids).logits, ids)
    assert abs(loss.item() - truth.item()) < TOLERANCE
    assert_same(gradients(model, loss), wanted)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("name", ["llama", "gpt_oss", *BY_STATE])
def test_gradient_checkpointing(name: str, reentrant: bool) -> None:
    model = patch_model(trainable(name), n_global=N_GLOBAL, window=WINDOW)
    ids = tokens(2, 40)
    wanted = gradients(model, model(ids, labels=ids).loss)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    # Two forwards before either backward: each runs again in its own state.
    first = model(ids, labels=ids).loss
    short = model(ids[:, :20], labels=ids[:, :20]).loss
    assert_same(gradients(model, first), wanted)
    short.backward()
    with pytest.raises(ValueError, match="gradient checkpointing runs layers twice"):
        model(ids, past_key_values=LambdaCache(model))
    unpatch_model(model)
    model(ids, labels=ids).loss.backward()


def test_cached_tokens_have_no_gradients() -> None:
    model = patch_model(trainable("llama"), n_global=N_GLOBAL, window=WINDOW)
    ids = tokens(2, 40)
    full = model(ids).logits[:, 30:]
    wanted = gradients(model, full.square().sum())
    # All tokens at once, into a cache or not.
    cache = LambdaCache(model)
    logits = model(ids, past_key_values=cache).logits[:, 30:]
    assert_same(gradients(model, logits.square().sum()), wanted)
    with pytest.raises(RuntimeError, match="keeps keys and values without their gradients"):
        model(ids, past_key_values=cache)
    with torch.no_grad():
        assert model(ids[:, :1], past_key_values=cache.reset() or cache).logits.isfinite().all()
    # Tokens read without gradients are constants.
    for seen in (1, 30):
        cache = LambdaCache(model)
        with torch.no_grad():
            model(ids[:, :seen], past_key_values=cache)
        logits = model(ids[:, seen:], past_key_values=cache).logits
        torch.testing.assert_close(logits[:, 30 - seen :], full, rtol=0, atol=1e-5)
        found = gradients(model, logits[:, 30 - seen :].square().sum())
        head = "lm_head.weight"  # which sees none of what is constant
        assert_same({head: found[head]}, {head: wanted[head]})


def test_gradients_through_global_tokens_in_a_second_forward() -> None:
    """Global tokens that come with the new ones keep their gradients."""
    model = patch_model(trainable("llama"), n_global=6, window=8)
    ids = tokens(1, 40)
    cache = LambdaCache(model)
    with torch.no_grad():
        model(ids[:, :2], past_key_values=cache)
    embeddings = model.get_input_embeddings()(ids).detach().requires_grad_()
    model(inputs_embeds=embeddings[:, 2:], past_key_values=cache).logits[:, -1].sum().backward()
    far = embeddings.grad[0].abs().sum(-1)
    assert (far[:2] == 0).all() and (far[2:6] > 0).all()


def test_a_decode_step_has_no_backward() -> None:
    model = patch_model(trainable("llama"), n_global=N_GLOBAL, window=WINDOW)
    cache = LambdaCache(model)
    with torch.no_grad():
        model(tokens(1, 20), past_key_values=cache)
    with pytest.raises(RuntimeError, match="lambda_decode has no backward"):
        model(tokens(1, 1), past_key_values=cache)


def test_no_cache_is_made_in_training() -> None:
    model = patch_model(trainable("llama"), n_global=N_GLOBAL, window=WINDOW)
    ids = tokens(1, 20)
    assert model.config.use_cache
    assert model(ids).past_key_values is None
    assert isinstance(model(ids, use_cache=True).past_key_values, LambdaCache)
    with torch.no_grad():
        assert isinstance(model(ids).past_key_values, LambdaCache)


@pytest.mark.parametrize("name", ["llama", "bloom", "falcon", "gptj", "mpt", "codegen"])
def test_attention_dropout_is_refused(name: str) -> None:
    model = patch_model(trainable(name), n_global=N_GLOBAL, window=WINDOW)
    ids = tokens(1, 20)
    names = ("attention_dropout", "attn_dropout", "attn_dropout_p")
    for module in model.modules():
        for attribute in names:
            dropout = getattr(module, attribute, None)
            if isinstance(dropout, nn.Dropout):
                dropout.p = 0.1
            elif dropout is not None:
                setattr(module, attribute, 0.1)
    with pytest.raises(ValueError, match=r"attention dropout is 0\.1 in \w+"):
        model(ids)
    assert model.eval()(ids).logits.isfinite().all()


LENGTHS = (1, 17, 30, 2)


def packed_inputs() -> tuple[Tensor, list[Tensor], Tensor]:
    ids = tokens(1, sum(LENGTHS))
    positions = torch.cat([torch.arange(n) for n in LENGTHS])[None]
    return ids, list(ids.split(LENGTHS, 1)), positions


@pytest.mark.parametrize("how", ["position_ids", "cu_seq_lens", "both", "two rows"])
@pytest.mark.parametrize("name", ["llama", "gpt_oss", "ministral3", "gptj"])
def test_packed_rows(name: str, how: str) -> None:
    if name not in MODELS:
        pytest.skip(f"no tiny {name}")
    if name in BY_STATE and how in ("cu_seq_lens", "both"):
        pytest.skip("its decoder takes no keywords")
    model = patch_model(trainable(name), n_global=N_GLOBAL, window=WINDOW)
    ids, sequences, positions = packed_inputs()
    expected = torch.cat([model(x).logits for x in sequences], dim=1)
    wanted = gradients(model, expected.square().sum())
    ends = torch.tensor([0, *LENGTHS]).cumsum(0).int()
    lengths = {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": 30, "max_length_k": 30}
    if how == "two rows":  # each packed with what makes both of one length
        ids, positions = ids.repeat(2, 1), positions.repeat(2, 1)
        expected, wanted = expected.repeat(2, 1, 1), {n: 2 * x for n, x in wanted.items()}
    given = lengths if how in ("cu_seq_lens", "both") else {}
    if how != "cu_seq_lens":
        given = given | {"position_ids": positions}
    logits = model(ids, **given).logits
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)
    assert_same(gradients(model, logits.square().sum()), wanted)


def test_packed_rows_are_refused_by_name() -> None:
    model = patch_model(tiny_model("llama"), n_global=N_GLOBAL, window=WINDOW)
    ids, _, positions = packed_inputs()
    packed = "several sequences are packed into a row"
    with pytest.raises(ValueError, match=f"{packed}.*use_cache=False"):
        model(ids, position_ids=positions, use_cache=True)
    mask = torch.ones_like(ids)
    mask[:, :3] = 0
    with pytest.raises(ValueError, match=f"{packed}.*marks padding"):
        model(ids, position_ids=positions, attention_mask=mask, use_cache=False)
    ends = torch.tensor([0, ids.shape[1]])
    with pytest.raises(ValueError, match="cu_seq_lens_q and cu_seq_lens_k differ"):
        model(ids, cu_seq_lens_q=ends, cu_seq_lens_k=ends - 1, use_cache=False)
    with pytest.raises(ValueError, match=r"must be .n \+ 1. and end with the number of tokens"):
        model(ids, cu_seq_lens_q=torch.tensor([0, 4]), use_cache=False)
    with pytest.raises(ValueError, match="cu_seq_lens_k is given without cu_seq_lens_q"):
        model(ids, cu_seq_lens_k=torch.tensor([0, 4]), use_cache=False)
    middle = patch_model(
        tiny_model("llama"), n_global=2, window=8, middle_top_k=2, middle_from_layer=0
    )
    with pytest.raises(ValueError, match=f"{packed}.*middle tokens"):
        middle(ids, position_ids=positions, use_cache=False)


def test_label_smoothing_and_padding() -> None:
    """Left-padded rows train as each would alone."""
    model = patch_model(trainable("llama"), n_global=N_GLOBAL, window=WINDOW)
    ids = tokens(2, 40)
    mask = torch.ones_like(ids)
    mask[1, :15] = 0

    def loss(logits: Tensor, ids: Tensor) -> Tensor:
        return nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), label_smoothing=0.1, reduction="sum"
        )

    wanted = gradients(
        model, loss(model(ids[:1]).logits, ids[:1]) + loss(model(ids[1:, 15:]).logits, ids[1:, 15:])
    )
    logits = model(ids, attention_mask=mask).logits
    total = loss(logits[:1], ids[:1]) + loss(logits[1:, 15:], ids[1:, 15:])
    assert_same(gradients(model, total), wanted)


def test_a_plain_loop_learns() -> None:
    model = patch_model(trainable("llama"), n_global=N_GLOBAL, window=WINDOW)
    ids = tokens(4, 60)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(30):
        loss = model(ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2


class _Texts(torch.utils.data.Dataset):  # type: ignore[type-arg]
    def __len__(self) -> int:
        return 16

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        ids = tokens(16, 40)[index]
        return {"input_ids": ids, "labels": ids}


def train(model: Any, folder: Path, **arguments: Any) -> list[float]:
    from transformers import Trainer, TrainingArguments

    options = {"per_device_train_batch_size": 4, "max_steps": 12, "learning_rate": 1e-2}
    options |= {"logging_steps": 1, "report_to": [], "save_strategy": "no", "use_cpu": True}
    options |= {"disable_tqdm": True, "dataloader_num_workers": 0}
    trainer = Trainer(
        model=model,
        args=TrainingArguments(output_dir=str(folder), **(options | arguments)),
        train_dataset=_Texts(),
    )
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize(
    "arguments",
    [{}, {"gradient_checkpointing": True}, {"bf16": True}, {"label_smoothing_factor": 0.1}],
    ids=str,
)
def test_trainer(arguments: dict[str, Any], tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    model = patch_model(trainable("llama"), n_global=N_GLOBAL, window=WINDOW)
    losses = train(model, tmp_path, **arguments)
    assert len(losses) == 12 and losses[-1] < 0.9 * losses[0]


def test_lora(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    pytest.importorskip("accelerate")
    model = patch_model(trainable("llama"), n_global=N_GLOBAL, window=WINDOW)
    config = peft.LoraConfig(r=8, target_modules=["q_proj", "k_proj", "v_proj"], lora_alpha=64)
    adapted = peft.get_peft_model(model, config)
    losses = train(adapted, tmp_path, gradient_checkpointing=True)
    assert losses[-1] < losses[0]
    changed = [n for n, p in adapted.named_parameters() if p.requires_grad and p.grad is not None]
    assert all("lora" in name for name in changed)
    # A model patched after PEFT has wrapped it is the same.
    ids = tokens(1, 50)
    adapted.eval()
    with torch.no_grad():
        expected = adapted(ids, use_cache=False).logits
        unpatch_model(adapted)
        patch_model(adapted, n_global=N_GLOBAL, window=WINDOW)
        torch.testing.assert_close(adapted(ids, use_cache=False).logits, expected)
