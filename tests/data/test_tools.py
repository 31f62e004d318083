"""How tools are spelled; references are the chat templates of real models, recordings, and closed forms."""

import json
from pathlib import Path
from typing import Any

import pytest

from mindspeed_llm.data.encode import ChatEncoder, Limits
from mindspeed_llm.data.handlers import BadRow, get_handler
from mindspeed_llm.data.jinja_chat import JinjaChat
from mindspeed_llm.data.templates import get_template
from mindspeed_llm.data.tokenizer import load_tokenizer
from mindspeed_llm.data.tools import parse_calls, parse_tools, tool_format
from mindspeed_llm.errors import UsageError

TOOLS = [
    {"type": "function", "function": {"name": "get_weather", "description": "查询天气", "parameters": {
        "type": "object", "properties": {"city": {"type": "string", "description": "城市名"}}, "required": ["city"]}}},
    {"type": "function", "function": {"name": "add", "description": "Add", "parameters": {"type": "object"}}},
]  # fmt: skip
CALLS = [{"function": {"name": "get_weather", "arguments": {"city": "北京", "days": 2}}},
         {"function": {"name": "add", "arguments": {}}}]  # fmt: skip


def real(name: str) -> JinjaChat:
    trl = pytest.importorskip("trl", reason="the chat templates of real models come with trl (the dev extra)")
    source = (Path(trl.__file__).parent / "chat_templates" / f"{name}.jinja").read_text(encoding="utf-8")
    return JinjaChat(source, {})


def text_of(golden: Path, template: str, tok: str, row: dict[str, Any], thinking: str = "none") -> str:
    tokenizer = load_tokenizer(golden / "_tok" / tok)
    chat = ChatEncoder(get_template(template), tokenizer, thinking)
    made = chat.encode_rows(get_handler("OpenAIInstructionHandler", {}).samples(row), Limits())[0]
    return tokenizer.decode(made.ids)


@pytest.mark.parametrize("system", [None, "Be brief."])
def test_tools_and_calls_of_qwen3_are_spelled_as_its_chat_template_does(golden: Path, system: str | None) -> None:
    messages: list[dict[str, Any]] = [{"role": "system", "content": system}] if system else []
    calls = {"role": "assistant", "content": "Let me see.", "reasoning_content": "hm", "tool_calls": CALLS}
    messages += [{"role": "user", "content": "W?"}, calls]
    ours = text_of(golden, "qwen3", "qwen3", {"messages": messages, "tools": TOOLS}, "true")
    assert ours == real("qwen3").render(messages, TOOLS)[0]
    messages += [{"role": "tool", "content": "1"}, {"role": "tool", "content": "2"},
                 {"role": "assistant", "content": "So.", "reasoning_content": "ok"}]  # fmt: skip
    ours = text_of(golden, "qwen3", "qwen3", {"messages": messages, "tools": TOOLS}, "true")
    assert ours == real("qwen3").render(messages, TOOLS)[0]


def test_tools_and_calls_of_glm45_are_spelled_as_its_chat_template_does(golden: Path) -> None:
    messages = [{"role": "user", "content": "W?"}, {"role": "assistant", "content": "", "tool_calls": CALLS}]
    ours = text_of(golden, "glm4_moe", "glm", {"messages": messages, "tools": TOOLS})
    theirs = real("glm4moe").render(messages, TOOLS)[0]
    assert ours[: ours.index("<|user|>")] == theirs[: theirs.index("<|user|>")]
    calls = theirs[theirs.index("<tool_call>get_weather") :]
    assert ours.endswith("\n" + calls + "<|endoftext|>")


def test_tools_of_glm4_are_headed_json_after_the_models_introduction(golden: Path) -> None:
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    text = text_of(golden, "glm4", "glm", {"messages": messages, "tools": TOOLS[1:]})
    tool = json.dumps(TOOLS[1]["function"], indent=4, ensure_ascii=False)
    assert f"# 可用工具\n\n## add\n\n{tool}\n在调用上述函数时" in text and text.startswith(
        "[gMASK]<sop><|system|>\n你是一个名为"
    )


def test_upstream_loses_the_tools_of_glm_and_here_they_are_kept(golden: Path) -> None:
    tokenizer = load_tokenizer(golden / "_tok" / "glm")
    row = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}], "tools": TOOLS}
    sample = get_handler("OpenAIInstructionHandler", {}).samples(row)
    texts = [
        tokenizer.decode(
            ChatEncoder(get_template("glm4"), tokenizer, compat=compat).encode_rows(sample, Limits())[0].ids
        )
        for compat in (None, "upstream")
    ]
    assert "get_weather" in texts[0] and "get_weather" not in texts[1]


def test_templates_without_tools_of_their_own_describe_them_in_sentences(golden: Path) -> None:
    call = {"function": {"name": "add", "arguments": {"a": 1}}}
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": None, "tool_calls": [call]},
                {"role": "tool", "content": "3"}, {"role": "assistant", "content": "3"}]  # fmt: skip
    row = {"messages": messages, "tools": TOOLS}
    text = text_of(golden, "llama3", "llama3", row)
    assert (
        "> Tool Name: get_weather\nTool Description: 查询天气\nTool Args:\n  - city (string, required): 城市名\n"
        in text
    )
    assert 'Action: add\nAction Input: {"a": 1}<|eot_id|><|start_header_id|>tool' in text


@pytest.mark.parametrize("name", ["qwen", "qwen3", "ling", "glm4", "glm4_moe", "default"])
def test_names_of_formats_are_known_and_others_refused(name: str) -> None:
    assert tool_format(name).calls_text([{"name": "f", "arguments": {"a": "x"}}])
    with pytest.raises(UsageError, match="tool_format 'qwen4'; did you mean"):
        tool_format("qwen4")


def test_what_is_no_tool_or_call_is_a_fault_of_its_row() -> None:
    for text in ("not json", "{}", '[{"description": "d"}]', "[3]"):
        with pytest.raises(ValueError):
            parse_tools(text)
    for text in ("not json", "3", '{"name": "f"}', '{"arguments": {}}'):
        with pytest.raises(ValueError):
            parse_calls(text)
    handler = get_handler("SharegptStyleInstructionHandler", {"tools": "tools"})
    good = {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}], "tools": "[]"}
    assert handler.samples(good)
    with pytest.raises(BadRow, match="'tools' is not a JSON list of tools"):
        handler.samples({**good, "tools": "not json"})
    with pytest.raises(BadRow, match="call of tools is not JSON"):
        handler.samples({"conversations": [good["conversations"][0], {"from": "function_call", "value": "no"}]})
