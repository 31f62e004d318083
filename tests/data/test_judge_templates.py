"""Every template with every chat handler, on drawn conversations, against a straight reading of the templates file."""

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from mindspeed_llm.data.encode import ChatEncoder, Limits
from mindspeed_llm.data.handlers import Handler, get_handler
from mindspeed_llm.data.sample_tokens import arrays
from mindspeed_llm.data.templates import TEMPLATES_FILE, get_template
from mindspeed_llm.data.tokenizer import load_tokenizer
from tests.data.contract_reading import Reader, Vocabulary

ENTRIES = {entry["name"]: entry for entry in json.loads(TEMPLATES_FILE.read_text(encoding="utf-8"))}
# a test tokenizer that has the template's tokens; qwen3's for all others
TOKENIZERS = {
    "chatglm2": "glm", "chatglm3": "glm", "chatglm3_system": "glm", "glm4": "glm", "glm4_moe": "glm",
    "baichuan2": "glm", "cpm": "glm", "llama3": "llama3", "llama2": "llama2", "mistral": "llama2", "mixtral": "llama2",
    "gemma": "llama2", "alpaca": "llama2", "default": "llama2", "deepseek2": "deepseek", "deepseek2-lite": "deepseek",
    "deepseek3": "deepseek", "minicpm3": "deepseek", "magistral": "deepseek",
}  # fmt: skip
TOOLS = [
    {"type": "function", "function": {"name": "f", "description": "查 <|im_end|>", "parameters": {"type": "object"}}}
]
BITS = [
    "", " ", "\n", "\n\n", "Hi", "Hello there. ", "知识", "😀", "é", "e\u0301", "１２3", "{{content}}", "{{idx}}",
    "<|im_end|>", "<think>", "</think>", "<|eot_id|>", "</s>", "[gMASK]", "<｜User｜>", "<tool_call>", "<|user|>\n",
]  # fmt: skip
LETTERS = st.text(st.characters(exclude_categories=["Cs", "Cn", "Co"]), max_size=5)
TEXT = st.lists(st.one_of(st.sampled_from(BITS), LETTERS), max_size=4).map("".join)
SAID = st.lists(st.one_of(st.sampled_from(BITS[:12] + ["<|im_end|>", "</s>"]), LETTERS), max_size=3).map("".join)
ANSWER = st.one_of(
    SAID, SAID.map("<think>\nwell\n</think>\n\n{}".format), SAID.map("<think>x</think>{}".format),
    SAID.map("\n<think> not closed {}".format),
)  # fmt: skip
CALL = st.builds(
    lambda name, value: json.dumps({"name": name, "arguments": {"a": value}}, ensure_ascii=False),
    st.sampled_from(["f", "get_weather"]), st.sampled_from(["x", "北京", "<think>"]),
)  # fmt: skip
QUESTION = TEXT.map(lambda text: ("user", text))
ANSWERED = ANSWER.map(lambda text: ("assistant", text))
# a question answered at once, or by a call of a tool and what it brings
EXCHANGE = st.one_of(
    st.tuples(QUESTION, ANSWERED),
    st.tuples(QUESTION, CALL.map(lambda text: ("function", text)), TEXT.map(lambda t: ("observation", t)), ANSWERED),
)
ROW = st.tuples(
    st.lists(EXCHANGE, min_size=1, max_size=3).map(lambda turns: [m for turn in turns for m in turn]),
    TEXT,
    st.sampled_from([[], TOOLS]),
)


@cache
def tools_of_the_trade(golden: Path, template: str, thinking: str) -> tuple[ChatEncoder, Reader]:
    folder = golden / "_tok" / TOKENIZERS.get(template, "qwen3")
    chat = ChatEncoder(get_template(template), load_tokenizer(folder), thinking)
    return chat, Reader(ENTRIES[template], Vocabulary(folder))


def sharegpt(messages: list[tuple[str, str]], system: str, tools: list) -> dict[str, Any]:
    names = {"user": "human", "assistant": "gpt", "function": "function_call", "observation": "observation"}
    turns = [{"from": names[role], "value": text} for role, text in messages]
    return {"conversations": turns, "system": system, "tools": json.dumps(tools, ensure_ascii=False)}


def openai(messages: list[tuple[str, str]], system: str, tools: list) -> dict[str, Any]:
    entries: list[dict[str, Any]] = [{"role": "system", "content": system}] if system else []
    for role, text in messages:
        if role == "function":
            entries.append({"role": "assistant", "content": None, "tool_calls": [{"function": json.loads(text)}]})
        else:
            entries.append({"role": {"observation": "tool"}.get(role, role), "content": text})
    return {"messages": entries, "tools": tools}


def alpaca(messages: list[tuple[str, str]], system: str, tools: list) -> dict[str, Any]:
    history = [[messages[n][1], messages[n + 1][1]] for n in range(0, len(messages) - 2, 2)]
    asked, answered = messages[-2][1], messages[-1][1]
    return {"instruction": asked, "input": "", "output": answered, "history": history, "system": system}


HANDLERS: dict[str, tuple[str, dict[str, str], Any]] = {
    "alpaca": ("AlpacaStyleInstructionHandler", {"history": "history", "system": "system"}, alpaca),
    "sharegpt": ("SharegptStyleInstructionHandler", {"system": "system", "tools": "tools"}, sharegpt),
    "openai": ("OpenAIInstructionHandler", {}, openai),
}


def written_tools(template: str, tools: list) -> list:
    """The tools the judge spells: the plain and GLM forms have tests of their own."""
    return tools if ENTRIES[template].get("format_tools", {}).get("tool_format") in ("qwen", "ling") else []


@pytest.mark.parametrize("kind", HANDLERS)
@pytest.mark.parametrize("template", ENTRIES)
def test_rows_equal_a_straight_reading_of_the_templates_file(golden: Path, template: str, kind: str) -> None:
    name, map_keys, row_of = HANDLERS[kind]
    handler: Handler = get_handler(name, map_keys)

    # rows come by the dozen, so that a failure is told as it is and not shrunk
    @settings(
        max_examples=20, deadline=None, database=None, derandomize=True, phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(st.lists(ROW, min_size=10, max_size=10), st.sampled_from(["true", "false", "none"]))
    def check(rows: list[tuple[list[tuple[str, str]], str, list]], thinking: str) -> None:
        chat, reader = tools_of_the_trade(golden, template, thinking)
        if kind == "alpaca":
            rows = [([m for m in r[0] if m[0] in ("user", "assistant")], r[1], []) for r in rows]
        rows = [(messages, system, written_tools(template, tools)) for messages, system, tools in rows]
        samples = [sample for row in rows for sample in handler.samples(row_of(*row))]
        stops = [chat.tokenizer.token_to_id(word) for word in chat.template.stop_words]
        for (messages, system, tools), made in zip(rows, chat.encode_rows(samples, Limits()), strict=True):
            ids, labels = reader.row(messages, system, thinking, tools)
            ours, our_labels = arrays([made], chat.eos_id)
            assert ours.tolist() == ids, chat.tokenizer.decode(ours)
            if chat.template.efficient_eos:  # the stop word after an answer: trained, see docs/data.md
                our_labels[np.isin(ours, stops)] = np.array(labels)[np.isin(ours, stops)]
            assert our_labels.tolist() == labels

    check()
