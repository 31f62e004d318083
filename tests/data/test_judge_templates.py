"""Every template with every handler of conversations, on drawn rows, against a straight reading of the contract."""

import json
import zlib
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from mindspeed_llm.data.encode import ChatEncoder, Limits
from mindspeed_llm.data.handlers import Reading, get_handler
from mindspeed_llm.data.rows import Row
from mindspeed_llm.data.sample_tokens import arrays, encode_samples
from mindspeed_llm.data.templates import TEMPLATES_FILE, get_template
from mindspeed_llm.data.tokenize_rows import Job
from mindspeed_llm.data.tokenizer import load_tokenizer
from tests.data.contract_reading import Reader, Said, Tools, Vocabulary

ENTRIES = {entry["name"]: entry for entry in json.loads(TEMPLATES_FILE.read_text(encoding="utf-8"))}
# a test tokenizer that has the template's tokens; qwen3's for all others
TOKENIZERS = {
    "chatglm2": "glm", "chatglm3": "glm", "chatglm3_system": "glm", "glm4": "glm", "glm4_moe": "glm",
    "baichuan2": "glm", "cpm": "glm", "llama3": "llama3", "llama2": "llama2", "mistral": "llama2", "mixtral": "llama2",
    "gemma": "llama2", "alpaca": "llama2", "default": "llama2", "deepseek2": "deepseek", "deepseek2-lite": "deepseek",
    "deepseek3": "deepseek", "minicpm3": "deepseek", "magistral": "deepseek",
}  # fmt: skip
TOOLS: Tools = [
    {"type": "function", "function": {"name": "f", "description": "查 <|im_end|>", "parameters": {"type": "object",
     "properties": {"a": {"type": "string", "description": "甲", "enum": ["x", "y"]},
                    "n": {"type": "array", "items": {"type": "integer"}}}, "required": ["a"]}}},
    {"name": "get_weather", "description": "Weather", "parameters": {"type": "object", "properties": {}}},
]  # fmt: skip
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
    lambda name, value: {"name": name, "arguments": {"a": value, "n": [1]}},
    st.sampled_from(["f", "get_weather"]), st.sampled_from(["x", "北京", "<think>"]),
)  # fmt: skip
CALLS = st.one_of(CALL, st.lists(CALL, min_size=2, max_size=2)).map(lambda calls: json.dumps(calls, ensure_ascii=False))
QUESTION = TEXT.map(lambda text: ("user", text))
ANSWERED = ANSWER.map(lambda text: ("assistant", text))
RESULTS = st.lists(TEXT.map(lambda text: ("observation", text)), min_size=1, max_size=2)
# a question answered at once, or by calls of tools, or thoughts, and what the tools bring
EXCHANGE = st.one_of(
    st.tuples(QUESTION, ANSWERED).map(list),
    st.builds(
        lambda asked, call, results, answered: [asked, call, *results, answered],
        QUESTION, st.one_of(CALLS.map(lambda text: ("function", text)), ANSWERED), RESULTS, ANSWERED,
    ),
)  # fmt: skip
ROW = st.tuples(
    st.lists(EXCHANGE, min_size=1, max_size=3).map(lambda turns: [m for turn in turns for m in turn]),
    TEXT,
    st.sampled_from([[], TOOLS]),
)
Drawn = tuple[list[Said], str, Tools]
MODES = ("true", "false", "none")
ROWS = 200


@cache
def drawn_rows() -> list[Drawn]:
    """Six hundred rows, drawn once; every template takes two hundred of them, from a place of its own."""
    found: list[Drawn] = []

    @settings(
        max_examples=30, deadline=None, database=None, derandomize=True, phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(st.lists(ROW, min_size=20, max_size=20))
    def draw(rows: list[Drawn]) -> None:
        found.extend(rows)

    draw()
    return found


def rows_of(template: str) -> list[Drawn]:
    start = zlib.crc32(template.encode()) % (len(drawn_rows()) - ROWS)
    return drawn_rows()[start : start + ROWS]


@cache
def tools_of_the_trade(golden: Path, template: str, thinking: str) -> tuple[ChatEncoder, Reader]:
    folder = golden / "_tok" / TOKENIZERS.get(template, "qwen3")
    chat = ChatEncoder(get_template(template), load_tokenizer(folder), thinking)
    return chat, Reader(ENTRIES[template], Vocabulary(folder))


def in_pairs(row: Drawn) -> Drawn:
    """What Alpaca's columns can hold of a row: questions, their last answers, and the system."""
    messages, system, _ = row
    asked = [n for n, (role, _) in enumerate(messages) if role == "user"]
    ends = [*(n - 1 for n in asked[1:]), len(messages) - 1]
    return [m for n, end in zip(asked, ends, strict=True) for m in (messages[n], messages[end])], system, []


def alpaca(row: Drawn, other: str) -> dict[str, Any]:
    messages, system, _ = row
    history = [[messages[n][1], messages[n + 1][1]] for n in range(0, len(messages) - 2, 2)]
    answers = {"output": messages[-1][1], "chosen": messages[-1][1], "rejected": other}
    return {"instruction": messages[-2][1], "input": "", "history": history, "system": system, **answers}


NAMES = {"user": "human", "assistant": "gpt", "function": "function_call", "observation": "observation"}


def sharegpt(row: Drawn, other: str) -> dict[str, Any]:
    messages, system, tools = row
    turns = [{"from": NAMES[role], "value": text} for role, text in messages]
    return {"conversations": turns, "system": system, "tools": json.dumps(tools, ensure_ascii=False)}


def sharegpt_pair(row: Drawn, other: str) -> dict[str, Any]:
    columns = sharegpt(row, other)
    return {**columns, "chosen": columns["conversations"].pop(), "rejected": {"from": "gpt", "value": other}}


def openai(row: Drawn, other: str) -> dict[str, Any]:
    messages, system, tools = row
    entries: list[dict[str, Any]] = [{"role": "system", "content": system}] if system else []
    for role, text in messages:
        if role == "function":
            calls = json.loads(text)
            calls = [{"function": call} for call in (calls if isinstance(calls, list) else [calls])]
            entries.append({"role": "assistant", "content": None, "tool_calls": calls})
        else:
            entries.append({"role": {"observation": "tool"}.get(role, role), "content": text})
    return {"messages": entries, "tools": tools}


SYSTEM_TOOLS = {"system": "system", "tools": "tools"}
HISTORY = {"history": "history", "system": "system"}
# kind -> handler, --map-keys, what of a drawn row it holds, the row's columns
HANDLERS: dict[str, tuple[str, dict[str, str], Any, Any]] = {
    "alpaca": ("AlpacaStyleInstructionHandler", HISTORY, in_pairs, alpaca),
    "sharegpt": ("SharegptStyleInstructionHandler", SYSTEM_TOOLS, tuple, sharegpt),
    "openai": ("OpenAIInstructionHandler", {}, tuple, openai),
    "alpaca_pair": ("AlpacaStylePairwiseHandler", HISTORY, in_pairs, alpaca),
    "sharegpt_pair": ("SharegptStylePairwiseHandler", SYSTEM_TOOLS, tuple, sharegpt_pair),
    "ppo": ("PPOAlpacaStyleInstructionHandler", HISTORY, in_pairs, alpaca),
    "r1_alpaca": ("R1AlpacaStyleInstructionHandler", HISTORY, in_pairs, alpaca),
    "r1_sharegpt": ("R1SharegptStyleInstructionHandler", SYSTEM_TOOLS, tuple, sharegpt),
}


def judged(kind: str, reader: Reader, row: Drawn, other: str, thinking: str) -> dict[str, Any]:
    """The fields of a row as the contract has them: ids, or (ids, labels)."""
    messages, system, tools = row
    if kind in ("alpaca", "sharegpt", "openai"):
        return {"": reader.row(messages, system, thinking, tools)}
    if kind.endswith("_pair"):
        sides = {"chosen": messages, "rejected": [*messages[:-1], ("assistant", other)]}
        read = {side: reader.read_last(said, system, thinking, tools) for side, said in sides.items()}
        prompts = ["".join(text for text, trained in parts if not trained) for parts in read.values()]
        if prompts[0] != prompts[1]:  # one of them thinks: then both could
            read = {side: reader.read_last(said, system, "true", tools) for side, said in sides.items()}
        return {side: reader.tokens(parts) for side, parts in read.items()}
    parts = reader.read_last(messages, system, thinking, tools)
    prompt = {"": reader.tokens([part for part in parts if not part[1]])[0]}
    if kind == "ppo":
        return prompt
    return {**prompt, "labels": reader.vocabulary.plain.encode(messages[-1][1], add_special_tokens=False).ids}


@pytest.mark.parametrize("kind", HANDLERS)
@pytest.mark.parametrize("template", ENTRIES)
def test_rows_equal_a_straight_reading_of_the_templates_file(golden: Path, template: str, kind: str) -> None:
    name, map_keys, part, columns_of = HANDLERS[kind]
    reading = Reading(additional_keys=("labels",))
    handler = get_handler(name, map_keys, reading)
    drawn = [part(row) for row in rows_of(template)]
    others = [row[0][-1][1] for row in [*drawn[1:], drawn[0]]]
    for m, thinking in enumerate(MODES):
        chat, reader = tools_of_the_trade(golden, template, thinking)
        chosen = list(zip(drawn, others, strict=True))[m::3]
        rows = [Row("rows", n, columns_of(row, other)) for n, (row, other) in enumerate(chosen)]
        samples = [handler.samples(row.columns)[0] for row in rows]
        job = Job("", template, None, thinking, name, json.dumps(map_keys), Limits(), reading=reading)
        made = encode_samples(job, handler, chat, rows, samples)
        for (row, other), fields in zip(chosen, made, strict=True):
            expected = judged(kind, reader, row, other, thinking)
            assert sorted(fields) == sorted(expected)
            for field, theirs in expected.items():
                assert not fields[field].fault
                ids, labels = (values.tolist() for values in arrays([fields[field]], chat.eos_id))
                if isinstance(theirs, tuple):
                    assert (ids, labels) == theirs, (thinking, row, chat.tokenizer.decode(ids))
                else:
                    assert ids == theirs, (thinking, field, row, chat.tokenizer.decode(ids))
