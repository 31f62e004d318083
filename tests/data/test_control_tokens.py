"""Control tokens that people write stay text: every added token, every template; and how to switch that off."""

import json
from functools import cache
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mindspeed_llm.data.chat_template import HfEncoder
from mindspeed_llm.data.control_tokens import MARK
from mindspeed_llm.data.encode import ChatEncoder, Conversation, Limits
from mindspeed_llm.data.messages import Message
from mindspeed_llm.data.templates import get_template
from mindspeed_llm.data.tokenizer import load_tokenizer
from tests.data.test_judge_chat_templates import NO_TOOLS, PLAIN, REFUSE_SYSTEM, encoder_and_reference
from tests.data.test_judge_templates import ENTRIES, TOKENIZERS

HF = {"hf:" + model: tok for model, tok in PLAIN.items()}


@cache
def encoder(golden: Path, template: str, allow: bool = False) -> ChatEncoder:
    if template not in HF:
        tokenizer = load_tokenizer(golden / "_tok" / TOKENIZERS.get(template, "qwen3"))
        return ChatEncoder(get_template(template), tokenizer, allow_control_tokens=allow)
    chat, _ = encoder_and_reference(golden, template.removeprefix("hf:"), HF[template])
    return HfEncoder(chat.tokenizer, allow_control_tokens=allow)


def conversation(template: str, text: str) -> Conversation:
    """A row in which users, the system, tools and their answers say `text`, as far as the template knows these."""
    model = template.removeprefix("hf:")
    answer = Message(role="assistant", content="done")
    messages = [Message(role="user", content=text), answer]
    tools = None
    if model not in NO_TOOLS:
        call = json.dumps({"name": "f", "arguments": {"a": 1}})
        parameters = {"type": "object", "properties": {"a": {"type": "string", "description": text}}}
        tools = json.dumps([{"name": "f", "description": text, "parameters": parameters}])
        messages += [Message(role="user", content=text), Message(role="function", content=call)]
        messages += [Message(role="observation", content=text), answer]
    return Conversation(messages, None if model in REFUSE_SYSTEM and template in HF else text, tools)


@pytest.mark.parametrize("template", [*ENTRIES, *HF])
def test_every_control_token_in_what_users_systems_and_tools_say_stays_text(golden: Path, template: str) -> None:
    chat = encoder(golden, template)
    control = chat.tokenizer.control_tokens()
    rows = [conversation(template, text) for text in ("a x b", *(f"a {token} b" for token in control))]
    clean, *made = chat.encode_rows(rows, Limits())
    for (token, token_id), row in zip(control.items(), made, strict=True):
        assert not row.fault and list(row.ids).count(token_id) == list(clean.ids).count(token_id), token
        assert chat.tokenizer.decode(row.ids).count(token) > list(row.ids).count(token_id), token


def test_tokens_that_are_not_special_are_among_those_that_stay_text(golden: Path) -> None:
    content = json.loads((golden / "_tok" / "qwen3" / "tokenizer.json").read_text(encoding="utf-8"))
    plain = {token["content"] for token in content["added_tokens"] if not token["special"]}
    assert {"<think>", "<tool_call>"} <= plain & set(encoder(golden, "qwen3").tokenizer.control_tokens())


@pytest.mark.parametrize("template", ENTRIES)
def test_control_tokens_can_be_allowed_everywhere(golden: Path, template: str) -> None:
    chat = encoder(golden, template, allow=True)
    for token, token_id in chat.tokenizer.control_tokens().items():
        row = conversation(template, f"a {token} b")
        turns = chat.template.turns(row.messages, row.system, "none", row.tools)
        ids = list(chat.encode_rows([row], Limits())[0].ids)
        ids = ids[: len(ids) - int(chat.template.efficient_eos)]
        assert ids == chat.tokenizer.encode(chat._way.text(turns)), token  # type: ignore[union-attr]
        assert ids.count(token_id) >= 2, token


@pytest.mark.parametrize("template", ENTRIES)
def test_rows_without_control_tokens_are_the_tokens_of_their_whole_text(golden: Path, template: str) -> None:
    chat = encoder(golden, template)
    text = st.text(st.characters(exclude_categories=["Cs"]), max_size=20).filter(
        lambda t: not any(token in t for token in chat.tokenizer.control_tokens()) and MARK not in t
    )

    @settings(max_examples=20, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(text, text, text)
    def check(system: str, question: str, answer: str) -> None:
        messages = [Message(role="user", content=question), Message(role="assistant", content=answer)] * 2
        turns = chat.template.turns(messages, system, "none")
        ids = list(chat.encode_rows([Conversation(messages, system)], Limits())[0].ids)
        whole = chat._way.text(turns)  # type: ignore[union-attr]
        assert ids[: len(ids) - int(chat.template.efficient_eos)] == chat.tokenizer.encode(whole)

    check()
