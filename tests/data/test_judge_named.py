"""Named templates against the chat templates of the models they are named after, and where they differ from them."""

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from mindspeed_llm.data.chat_template import HfEncoder
from mindspeed_llm.data.encode import ChatEncoder, Encoded, Limits
from mindspeed_llm.data.handlers import get_handler
from mindspeed_llm.data.messages import Conversation, Preference
from mindspeed_llm.data.rows import Row
from mindspeed_llm.data.shaping import Shape
from mindspeed_llm.data.templates import get_template
from mindspeed_llm.data.tokenize_rows import Job, tokenize_chunk
from mindspeed_llm.data.tokenizer import load_tokenizer
from tests.data.test_judge_chat_templates import NO_TOOLS, PLAIN, ROW, as_reference, encoder_and_reference, row_for
from tests.data.test_judge_handlers import fields

OPENAI = get_handler("OpenAIInstructionHandler", {})
SHAREGPT = get_handler("SharegptStyleInstructionHandler", {"system": "system", "tools": "tools"})
ALPACA = get_handler("AlpacaStyleInstructionHandler", {"system": "system", "history": "history"})
Columns = dict[str, Any]


@cache
def drawn() -> list[tuple]:
    """Two hundred rows, drawn once."""
    found: list[tuple] = []

    @settings(
        max_examples=20, deadline=None, database=None, derandomize=True, phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(st.lists(ROW, min_size=10, max_size=10))
    def draw(rows: list[tuple]) -> None:
        found.extend(rows)

    draw()
    return found


def rows_for(template: str, thoughts: bool = True, tools: bool = True) -> list[Columns]:
    """The drawn rows with what a template can write."""
    rows = [row_for(template, (system, turns, calling if tools else None)) for system, turns, calling in drawn()]
    if not thoughts:
        for message in (message for row in rows for message in row["messages"]):
            message.pop("reasoning_content", None)
    return rows


def named(golden: Path, template: str, tok: str, thinking: str = "true") -> ChatEncoder:
    return ChatEncoder(get_template(template), load_tokenizer(golden / "_tok" / tok), thinking)


def rendered(judge: Any, row: Columns, **more: Any) -> Any:
    return judge.apply_chat_template(row["messages"], tools=row.get("tools"), **{"tokenize": False, **more})


def spells_tokens(chat: ChatEncoder, row: Columns) -> bool:
    """Whether a user's, system's or tool's text holds a control token: text here, a token in the chat template."""
    asked = [message["content"] for message in row["messages"] if message["role"] != "assistant"]
    return any(token in text for text in asked for token in chat.tokenizer.control_tokens())


def mask(row: Encoded) -> list[int]:
    flags = [0] * len(row.ids)
    for start, stop in row.spans:
        flags[start:stop] = [1] * (stop - start)
    return flags


def test_thoughts_of_all_turns_are_trained_as_qwen3s_training_template_writes_them(golden: Path) -> None:
    chat = named(golden, "qwen3", "qwen3")
    _, judge = encoder_and_reference(golden, "qwen3_training", "qwen3")
    rows = [row for row in rows_for("qwen3") if not spells_tokens(chat, row)]
    assert len(rows) > 40
    for row, made in zip(rows, chat.encode_rows([OPENAI.samples(row)[0] for row in rows], Limits()), strict=True):
        both = rendered(judge, row, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
        assert list(made.ids) == both["input_ids"]
        assert mask(made) == both["assistant_masks"]


def test_with_mask_history_rows_of_qwen3_are_what_its_chat_template_writes(golden: Path) -> None:
    chat = named(golden, "qwen3", "qwen3")
    _, judge = encoder_and_reference(golden, "qwen3", "qwen3")
    rows = [row for row in rows_for("qwen3") if not spells_tokens(chat, row)]
    job = Job(
        str(golden / "_tok" / "qwen3"), "qwen3", None, "true", "OpenAIInstructionHandler", "{}", Limits(),
        shape=Shape(mask_history=True),
    )  # fmt: skip
    made = tokenize_chunk(job, [Row("rows", n, row) for n, row in enumerate(rows)])
    for row, ids, labels in zip(rows, *fields(made, "input_ids", "labels"), strict=True):
        assert ids == chat.tokenizer.encode(rendered(judge, row))
        prompt = rendered(judge, {**row, "messages": row["messages"][:-1]}, add_generation_prompt=True)
        start = len(chat.tokenizer.encode(prompt))
        assert labels == [-100] * start + ids[start:]


@pytest.mark.parametrize("thinking", ["true", "false"])
def test_prompts_of_qwen3_are_what_its_chat_template_writes(golden: Path, thinking: str) -> None:
    chat = named(golden, "qwen3", "qwen3", thinking)
    _, judge = encoder_and_reference(golden, "qwen3", "qwen3")
    told = {} if thinking == "true" else {"enable_thinking": False}
    for row in rows_for("qwen3"):
        if spells_tokens(chat, row):
            continue
        sample = OPENAI.samples(row)[0]
        asked = {**row, "messages": row["messages"][:-1]}
        text = rendered(judge, asked, add_generation_prompt=True, **told)
        prompt = chat.encode_prompt(sample.messages[:-1], sample.system, tools=sample.tools)
        assert prompt == chat.tokenizer.encode(text)
        assert prompt == list(chat.encode_prompts([sample], answers=True)[0].ids) or thinking == "true"


def test_thoughts_of_running_calls_stay_in_prompts_and_older_ones_go_as_qwen3s_chat_template_has_it(
    golden: Path,
) -> None:
    chat, (_, judge) = named(golden, "qwen3", "qwen3"), encoder_and_reference(golden, "qwen3", "qwen3")
    call = {"type": "function", "id": "c", "function": {"name": "f", "arguments": {"a": 1}}}
    messages: list[Columns] = [
        {"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "reasoning_content": "old"},
        {"role": "user", "content": "r"},
        {"role": "assistant", "content": "so", "reasoning_content": "running", "tool_calls": [call]},
        {"role": "tool", "content": "1", "tool_call_id": "c"},
    ]  # fmt: skip
    end = {"role": "assistant", "content": "done"}
    sample = OPENAI.samples({"messages": [*messages, end]})[0]
    text = chat.tokenizer.decode(chat.encode_prompt(sample.messages[:-1]))
    assert text == judge.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert "running" in text and "old" not in text


@pytest.mark.parametrize(
    ("template", "model", "tok"),
    [("qwen_lf", "qwen2_5", "qwen3"), ("llama3", "llama3", "llama3"), ("deepseek3", "deepseekv3", "deepseek")],
)
def test_these_templates_write_what_their_models_chat_templates_write(
    golden: Path, template: str, model: str, tok: str
) -> None:
    chat, (_, judge) = named(golden, template, tok), encoder_and_reference(golden, model, tok)
    rows = [row for row in rows_for(model, thoughts=False, tools=False) if not spells_tokens(chat, row)]
    assert len(rows) > 40
    for row, made in zip(rows, chat.encode_rows([OPENAI.samples(row)[0] for row in rows], Limits()), strict=True):
        assert list(made.ids) == chat.tokenizer.encode(rendered(judge, row))


def test_where_named_templates_differ_from_their_models_chat_templates(golden: Path) -> None:
    """The entries are upstream's, whose users' adapters follow them; `--prompt-type hf` writes what the model does."""

    def texts(template: str, tok: str, row: Columns) -> str:
        chat = named(golden, template, tok)
        sample = OPENAI.samples(row)[0]
        last = [chat.template.final_turn(sample.messages, sample.system, "true", sample.tools)]
        turns = last if template == "gpt_oss" else chat.template.turns(sample.messages, sample.system, "true")
        return chat._way.text(turns)  # type: ignore[union-attr]

    judges = {model: encoder_and_reference(golden, model, PLAIN[model])[1] for model in PLAIN}
    for row in rows_for("gemma", thoughts=False, tools=False):
        # the last answer ends with end-of-text, not with the end of its turn
        assert texts("gemma", "llama2", row) + "<end_of_turn>\n" == rendered(judges["gemma"], row)
    for row in rows_for("qwen2_5", thoughts=False, tools=False):
        # no line break after the last answer, and another system text where there is none
        real = rendered(judges["qwen2_5"], row).removesuffix("\n")
        system = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."
        assert texts("qwen", "qwen3", row) == real.replace(system, "You are a helpful assistant.")
    for row in rows_for("glm4moe", thoughts=False, tools=False):
        # a thought within lines of its own, before the line break that opens an answer
        real = rendered(judges["glm4moe"], row).replace("\n<think></think>\n", "<think>\n\n</think>\n\n\n")
        assert texts("glm4_moe", "glm", row) == real
    for row in rows_for("gptoss", tools=False):
        # a shorter system text, end-of-turn where generation ends, an empty thought where there is none
        messages = [m | ({"thinking": m["reasoning_content"]} if "reasoning_content" in m else {})
                    for m in row["messages"] if m["role"] != "system"]  # fmt: skip
        messages[-1].setdefault("thinking", "")
        messages[-1].setdefault("reasoning_content", "")
        real = rendered(judges["gptoss"], {"messages": messages}).replace("<|return|>", "<|end|>")
        ours = texts("gpt_oss", "qwen3", {"messages": messages})
        assert ours[ours.index("<|start|>user") :] == real[real.index("<|start|>user") :]


def sharegpt(row: Columns) -> Columns:
    """A row as ShareGPT writes it."""
    turns = []
    for message in (m for m in row["messages"] if m["role"] != "system"):
        if message.get("tool_calls"):
            value = json.dumps([call["function"] for call in message["tool_calls"]], ensure_ascii=False)
            turns.append({"from": "function_call", "value": value})
        else:
            names = {"user": "human", "assistant": "gpt", "tool": "observation"}
            turns.append({"from": names[message["role"]], "value": message["content"]})
    system = next((m["content"] for m in row["messages"] if m["role"] == "system"), "")
    return {"conversations": turns, "system": system, "tools": json.dumps(row.get("tools", []), ensure_ascii=False)}


def alpaca(row: Columns) -> Columns:
    """A row without tools as Alpaca writes it."""
    said = [m["content"] for m in row["messages"] if m["role"] != "system"]
    system = next((m["content"] for m in row["messages"] if m["role"] == "system"), "")
    history = [said[n : n + 2] for n in range(0, len(said) - 2, 2)]
    return {"instruction": said[-2], "output": said[-1], "history": history, "system": system}


@pytest.mark.parametrize("template", PLAIN)
def test_under_hf_every_handler_of_conversations_is_laid_out_by_the_models_template(
    golden: Path, template: str
) -> None:
    chat, judge = encoder_and_reference(golden, template, PLAIN[template])
    plain = rows_for(template, thoughts=False, tools=False)
    tooled = plain if template in NO_TOOLS else rows_for(template, thoughts=False)
    for handler, columns, rows in ((ALPACA, alpaca, plain), (SHAREGPT, sharegpt, tooled)):
        samples = [handler.samples(columns(row))[0] for row in rows]
        texts = [rendered(judge, {**row, "messages": as_reference(template, row)}) for row in rows]
        assert [chat.text(sample) for sample in samples] == texts
        judged_prompts(chat, judge, template, rows, samples)
        judged_preferences(chat, samples)


def judged_prompts(
    chat: HfEncoder, judge: Any, template: str, rows: list[Columns], samples: list[Conversation]
) -> None:
    """PPO and R1: what the model continues to answer the last question."""
    for row, made in zip(rows, chat.encode_prompts(samples, answers=True), strict=True):
        if spells_tokens(chat, row):
            continue
        asked = {**row, "messages": as_reference(template, row)[:-1]}
        text = rendered(judge, asked, add_generation_prompt=True)
        assert list(made.ids) == chat.tokenizer.encode(text)


def judged_preferences(chat: HfEncoder, samples: list[Conversation]) -> None:
    """Preferences: each answer as it is trained alone, after one prompt."""
    pairs = []
    for sample, other in zip(samples, [*samples[1:], samples[0]], strict=True):
        prompt = Conversation(sample.messages[:-1], sample.system, sample.tools)
        pairs.append(Preference(prompt, sample.messages[-1], other.messages[-1]))
    alone = chat.encode_rows(samples, Limits(), only_last=True)
    for one, (chosen, rejected) in zip(alone, chat.encode_preferences(pairs, Limits()), strict=True):
        assert list(chosen.ids) == list(one.ids) and chosen.spans == one.spans
        start = chosen.spans[0][0]
        assert list(chosen.ids[:start]) == list(rejected.ids[:start]) and rejected.spans[0][0] == start
