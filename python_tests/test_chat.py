"""A conversation: every turn after the last, in a memory that stays."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from test_cli import lminf
from typer.testing import CliRunner

from lminf_cuda import cli, patch_model, unpatch_model
from lminf_cuda.cli.loading import load
from lminf_cuda.cli.options import Device, Dtype
from lminf_cuda.text.chatting import Chat
from lminf_cuda.text.generating import Pace, generate, pinned_tokens

TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


pytestmark = pytest.mark.usefixtures("single_threaded")


@pytest.fixture
def shipped() -> Iterator[Any]:
    loaded = load(None, Dtype.float32, Device.cpu)
    patch_model(loaded.model, n_global=8, window=64)
    yield loaded
    unpatch_model(loaded.model)


def say(talk: Chat, text: str) -> str:
    pieces: list[str] = []
    talk.say(text, pieces.append)
    return "".join(pieces)


@torch.inference_mode()
def continuation(loaded: Any, ids: list[int], n_tokens: int) -> list[int]:
    """Greedy tokens after `ids`, by forwards without a cache."""
    text = list(ids)
    for _ in range(n_tokens):
        logits = loaded.model(torch.tensor([text]), use_cache=False, logits_to_keep=1).logits
        text.append(int(logits[0, -1].argmax()))
    return text[len(ids) :]


def test_turns_follow_each_other(shipped: Any) -> None:
    """Without a template: each answer is the continuation of all that was said before."""
    talk = Chat(shipped.model, shipped.tokenizer, greedy=True, max_new_tokens=12, chunk=20)
    text: list[int] = []
    sizes = set()
    for turn in ("In the beginning God ", "created " * 12, "and the earth was", "a"):
        first = not text
        text += shipped.tokenizer(turn, add_special_tokens=first).input_ids
        expected = continuation(shipped, text, 12)
        assert say(talk, turn) == shipped.tokenizer.decode(expected)
        text += expected
        assert talk.tokens == len(text)
        sizes.add(talk.cache.memory_bytes())
    assert len(sizes) == 1


def test_reset_begins_anew(shipped: Any) -> None:
    talk = Chat(shipped.model, shipped.tokenizer, greedy=True, max_new_tokens=8)
    first = say(talk, "And it came to pass")
    say(talk, "something else")
    talk.reset()
    assert talk.tokens == 0
    assert say(talk, "And it came to pass") == first


class Reading(Chat):
    """A chat that notes what it reads, and answers what it is told to."""

    answers: list[list[int]]

    def _write(self, ids: torch.Tensor) -> Iterator[int]:
        self.read.append(ids[0].tolist())
        answer = self.answers.pop(0)
        self.cache._progress.seen += ids.shape[1] + len(answer) - 1
        if answer[-1] not in self.ends:
            self.unread = [answer[-1]]
        yield from answer


def test_a_template_closes_the_answer_before(shipped: Any) -> None:
    """What the model reads over all turns is what the template makes of the whole conversation."""
    tokenizer = shipped.tokenizer
    tokenizer.chat_template = TEMPLATE
    talk = Reading(shipped.model, tokenizer, system="Be brief.", max_new_tokens=5)
    end = 7
    talk.ends, talk.read = {end}, []  # type: ignore[attr-defined]

    def ids_of(text: str) -> list[int]:
        ids: list[int] = tokenizer(text, add_special_tokens=False).input_ids
        return ids

    # One answer that ends by itself, one that is cut off after its five tokens.
    talk.answers = [[*ids_of("Yes"), end], ids_of("Hello"), [end]]
    assert say(talk, "Is it?") == "Yes"
    assert say(talk, "Greet me.") == "Hello"
    assert say(talk, "Bye.") == ""
    first, second, third = (tokenizer.decode(ids) for ids in talk.read)  # type: ignore[attr-defined]
    assert first == "<system>Be brief.</s>\n<user>Is it?</s>\n<assistant>"
    assert second == "</s>\n<user>Greet me.</s>\n<assistant>"
    assert third == "o</s>\n<user>Bye.</s>\n<assistant>"
    whole = tokenizer.apply_chat_template(
        [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "Is it?"},
            {"role": "assistant", "content": "Yes"},
            {"role": "user", "content": "Greet me."},
            {"role": "assistant", "content": "Hello"},
            {"role": "user", "content": "Bye."},
        ],
        tokenize=False,
        add_generation_prompt=True,
    )
    assert first + "Yes" + second + "Hell" + third == whole


def test_an_end_token_ends_the_answer(shipped: Any) -> None:
    talk = Chat(shipped.model, shipped.tokenizer, greedy=True, max_new_tokens=30)
    answer = say(talk, "And God said, Let there be")
    stop = answer[5]
    talk.reset()
    talk.ends = set(shipped.tokenizer(stop, add_special_tokens=False).input_ids)
    assert say(talk, "And God said, Let there be") == answer[: answer.index(stop)]
    assert talk.unread == []  # the template, or the next turn, stands in its place


def test_bad_options(shipped: Any) -> None:
    for options, text in (
        ({"max_new_tokens": 0}, "max_new_tokens must be 1 or more, got 0"),
        ({"temperature": 0.0}, "temperature must be above 0"),
        ({"top_p": 1.5}, "top_p must be above 0 and at most 1, got 1.5"),
        ({"chunk": 0}, "chunk must be 1 or more, got 0"),
        ({"system": "Be brief."}, "system needs a chat template"),
    ):
        with pytest.raises(ValueError, match=text):
            Chat(shipped.model, shipped.tokenizer, **options)  # type: ignore[arg-type]


def chat_command(turns: str, *arguments: Any) -> str:
    result = CliRunner().invoke(
        cli.app, ["chat", *(str(argument) for argument in arguments)], input=turns
    )
    assert result.exit_code == 0, result.output
    return result.output


def test_the_command_on_the_shipped_model() -> None:
    arguments = ("--max-new-tokens", 10, "--dtype", "float32", "--seed", 1, "--window", 64)
    turns = "In the beginning\n\nand then\n/reset\nIn the beginning\n/exit\nnever read\n"
    output = chat_command(turns, *arguments)
    assert output == chat_command(turns, *arguments)
    counts = [line for line in output.splitlines() if "tokens so far, cache" in line]
    assert len(counts) == 3
    assert "never read" not in output
    sizes = {line.split("cache ")[1] for line in counts}
    assert len(sizes) == 1
    chat_command("In the beginning\n", *arguments)  # the end of input ends it, too


def test_bad_input_is_named() -> None:
    code, output = lminf("chat", "--system", "Be brief.")
    assert code == 2
    assert "system needs a chat template" in output


def test_a_prompt_as_a_turn_is_framed_by_the_template(shipped: Any) -> None:
    shipped.tokenizer.chat_template = TEMPLATE
    try:
        paces: list[Pace] = []
        new = generate(
            shipped.model,
            shipped.tokenizer,
            "hello",
            lambda _: None,
            as_chat=True,
            greedy=True,
            max_new_tokens=4,
            tell=paces.append,
        )
        framed = "<user>hello</s>\n<assistant>"
        ids = shipped.tokenizer(framed, add_special_tokens=False).input_ids
        assert new.tolist() == continuation(shipped, ids, 4)
        assert (paces[0].prompt_tokens, paces[0].new_tokens) == (len(ids), 4)
        pinned = pinned_tokens(shipped.tokenizer, "hello", "hel", as_chat=True)
        assert shipped.tokenizer.decode(ids[:pinned]) == "<user>hel"
    finally:
        shipped.tokenizer.chat_template = None


def test_a_beginning_to_keep_visible_counts_the_tokenizer_s_own_tokens(shipped: Any) -> None:
    own = len(shipped.tokenizer("").input_ids)
    assert pinned_tokens(shipped.tokenizer, "one two", "two", as_chat=False) == own + 7
    with pytest.raises(ValueError, match="does not stand in the prompt"):
        pinned_tokens(shipped.tokenizer, "one two", "", as_chat=False)
