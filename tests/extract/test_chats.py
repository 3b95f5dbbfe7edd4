"""Chats: rendered by the tokenizer's own template, and the tokens of the roles that are asked for."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sae_hooks.documents import tokenised, windows
from sae_hooks.errors import DataError

BOS = 2  # of tiny_tokenizer
EXAMPLES = Path(__file__).parents[2] / "examples"
GEMMA = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for message in messages %}{% set role = 'model' if message.role == 'assistant' else message.role %}"
    "{{ '<start_of_turn>' + role + '\n' + message.content | trim + '<end_of_turn>\n' }}{% endfor %}")
LAST_REASONING = (  # as Qwen3's: earlier turns lose their reasoning, so a chat's beginning is not rendered as alone
    "{% for m in messages %}{{ '[' + m.role + ']' + (m.content if loop.last else m.content.split('</think>')[-1]) }}"
    "{% endfor %}")
SYSTEM_IN_USER = (  # as Gemma 3's: the system prompt stands in the first user's turn
    "{% set first = messages[0].content + '\n' if messages[0].role == 'system' else '' %}"
    "{% for m in messages if m.role != 'system' %}{{ '[' + m.role + ']' + (first if loop.first else '') + m.content }}"
    "{% endfor %}")
MESSAGES = [{"role": "user", "content": "Where is the 🦙?"}, {"role": "assistant", "content": " On the hill.\n"},
            {"role": "user", "content": "user"}, {"role": "assistant", "content": "turn"}]


@pytest.fixture
def chat_tokenizer(tiny_tokenizer: Any) -> Iterator[Any]:
    """tiny_tokenizer with Gemma 2's template; <start_of_turn> is not in its vocabulary, so it falls into pieces."""
    tiny_tokenizer.chat_template = GEMMA
    yield tiny_tokenizer
    tiny_tokenizer.chat_template = None


def said_by(tokenizer: Any, messages: Any, roles: Any) -> str:
    """The wanted tokens, decoded."""
    [found] = tokenised([messages], tokenizer, roles=roles)
    return str(tokenizer.decode(found.ids[found.wanted]))


def test_a_chat_is_tokenised_as_its_template_renders_it(chat_tokenizer: Any) -> None:
    [bare], [row] = (tokenised([row], chat_tokenizer) for row in (MESSAGES, {"messages": MESSAGES, "topic": "llamas"}))
    [array] = tokenised([np.array(MESSAGES)], chat_tokenizer)

    assert array.ids.tolist() == bare.ids.tolist()
    assert bare.ids.tolist() == row.ids.tolist() == chat_tokenizer.apply_chat_template(MESSAGES)["input_ids"]
    assert bare.ids.tolist().count(BOS) == 1
    assert (bare.wanted, bare.prefix, row.columns) == (None, (BOS,), {"topic": "llamas"})


def test_a_role_has_the_tokens_of_its_messages_and_of_nothing_around_them(chat_tokenizer: Any) -> None:
    [found] = tokenised([MESSAGES], chat_tokenizer, roles="assistant")

    wanted = chat_tokenizer.convert_ids_to_tokens(found.ids[found.wanted].tolist())
    assert chat_tokenizer.decode(found.ids[found.wanted]).strip() == "On the hill.turn"
    assert not any("<" in token or ">" in token for token in wanted)
    assert "Where is the 🦙?" in said_by(chat_tokenizer, MESSAGES, ["user"])
    assert [d.ids.tolist() for d in tokenised([MESSAGES], chat_tokenizer)] == [found.ids.tolist()]


def test_roles_that_no_message_of_any_document_has_are_told_at_the_end(chat_tokenizer: Any) -> None:
    chats = [MESSAGES[:1], MESSAGES[1:2], None]
    documents = tokenised(chats, chat_tokenizer, roles="asistant")

    with pytest.raises(DataError, match=r"roles=\['asistant'\], but the messages .* are of assistant, user; name"):
        list(documents)
    found = list(tokenised(chats, chat_tokenizer, roles=["asistant", "user"]))
    assert [bool(d.wanted.any()) for d in found] == [True, False, False]
    assert list(tokenised([], chat_tokenizer, roles="asistant")) == []
    assert len(list(tokenised([None, []], chat_tokenizer, roles="asistant"))) == 2


def test_both_roles_have_what_each_has(chat_tokenizer: Any) -> None:
    [user], [assistant], [both] = (tokenised([MESSAGES], chat_tokenizer, roles=roles)
                                   for roles in (["user"], ["assistant"], ["user", "assistant"]))

    assert both.wanted.tolist() == (user.wanted | assistant.wanted).tolist()
    assert not (user.wanted & assistant.wanted).any()


def test_windows_of_a_chat_carry_what_is_wanted(chat_tokenizer: Any) -> None:
    [found] = tokenised([MESSAGES], chat_tokenizer, roles="user")

    cut = [(int(i), bool(w)) for window in windows(found, 16, 5)
           for i, w in zip(window.ids[window.first:], window.wanted, strict=True)]

    assert cut == list(zip(found.ids.tolist(), found.wanted.tolist(), strict=True))


def test_turns_are_told_where_earlier_ones_are_rendered_otherwise(chat_tokenizer: Any) -> None:
    chat_tokenizer.chat_template = LAST_REASONING
    messages = [{"role": "user", "content": "why"}, {"role": "assistant", "content": "<think>so</think>because"},
                {"role": "user", "content": "ah"}]

    assert said_by(chat_tokenizer, messages, "assistant") == "because"
    assert said_by(chat_tokenizer, messages[:2], "assistant") == "<think>so</think>because"


def test_a_system_prompt_is_told_from_the_user_in_whose_turn_it_stands(chat_tokenizer: Any) -> None:
    chat_tokenizer.chat_template = SYSTEM_IN_USER
    messages = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hello"}]

    assert said_by(chat_tokenizer, messages, "system") == "Be kind."
    assert said_by(chat_tokenizer, messages, "user").strip() == "Hello"


def test_an_empty_message_and_one_that_the_template_leaves_out_have_no_tokens(chat_tokenizer: Any) -> None:
    messages = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": " "}]
    assert said_by(chat_tokenizer, messages, "assistant") == ""

    chat_tokenizer.chat_template = "{{ messages[0].content }}"
    assert said_by(chat_tokenizer, [*messages, {"role": "tool", "content": "42"}], "tool") == ""


@pytest.mark.parametrize("template", [
    "{% for m in messages %}{{ m.content | length }} characters: {{ m.content }}\n{% endfor %}",
    "{% for m in messages %}{{ m.content }}, that is {{ m.content }}\n{% endfor %}",
    "{% for m in messages %}{{ m.content }}{% if m.content == 'Hello' %} world{% endif %}\n{% endfor %}"])
def test_roles_that_the_template_does_not_let_be_told_are_refused(chat_tokenizer: Any, template: str) -> None:
    chat_tokenizer.chat_template = template
    messages = [{"role": "user", "content": "Hello"}]

    assert len(list(tokenised([messages], chat_tokenizer))) == 1
    with pytest.raises(DataError, match=r"list, row 0: roles cannot be told: .* message 0 \(user\)"):
        list(tokenised([messages], chat_tokenizer, roles="user"))


@pytest.mark.parametrize(("row", "said"), [
    ("a text", "roles= needs chat messages, got str"), ([1, 2], "roles= needs chat messages, got list"),
    ([{"role": "system", "content": "x"}], "cannot render the messages: System role not supported"),
    ([{"content": "x"}], "must have a role and a content"),
    ([{"role": "user", "content": "x"}, "y"], "must have a role and a content, got str 'y'"),
    ([{"role": "user"}], "expected a string as the content of message 0, got NoneType"),
    ([{"role": "user", "content": [{"type": "text", "text": "x"}]}], "content of message 0, got list")])
def test_a_row_whose_roles_cannot_be_told_is_named(chat_tokenizer: Any, row: Any, said: str) -> None:
    with pytest.raises(DataError, match="list, row 0") as caught:
        list(tokenised([row], chat_tokenizer, roles="user"))
    assert said in str(caught.value)


def test_a_tokenizer_without_a_template_and_no_tokenizer_are_said(tiny_tokenizer: Any) -> None:
    with pytest.raises(DataError, match=r"chat_template is not set"):
        list(tokenised([MESSAGES], tiny_tokenizer))
    with pytest.raises(DataError, match="tokenizer= is needed for messages"):
        list(tokenised([MESSAGES]))


@pytest.mark.real
def test_the_default_system_prompt_of_smollm2_is_nobodys() -> None:
    tokenizer = smollm2_tokenizer()
    [whole] = tokenised([MESSAGES], tokenizer)

    assert whole.ids.tolist() == tokenizer.apply_chat_template(MESSAGES)["input_ids"]
    assert "You are a helpful AI assistant" in tokenizer.decode(whole.ids)
    assert said_by(tokenizer, MESSAGES, "user") == "Where is the 🦙?user"
    assert said_by(tokenizer, MESSAGES, "assistant").split() == ["On", "the", "hill.", "turn"]
    assert said_by(tokenizer, MESSAGES, ["system", "user"]) == "Where is the 🦙?user"
    assert said_by(tokenizer, [{"role": "system", "content": "Be kind."}, *MESSAGES], "system") == "Be kind."


def smollm2_tokenizer() -> Any:
    """From the example's cache, where that is made; making it takes tens of seconds."""
    from transformers import AutoTokenizer

    spec = importlib.util.spec_from_file_location("sae_hooks_smollm2", EXAMPLES / "smollm2.py")
    assert spec is not None
    assert spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    return AutoTokenizer.from_pretrained(example.unpacked_folder())
