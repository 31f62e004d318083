"""`--prompt-type hf` against transformers, with the chat templates of real models (as trl carries them)."""

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from mindspeed_llm.data.chat_template import ONLY_LAST, HfEncoder
from mindspeed_llm.data.encode import Limits
from mindspeed_llm.data.handlers import get_handler
from mindspeed_llm.data.tokenizer import load_tokenizer

# template -> a test tokenizer with most of its tokens
PLAIN = {
    "qwen2_5": "qwen3", "qwen3": "qwen3", "llama3": "llama3", "llama3_1": "llama3", "llama3_2": "llama3",
    "glm4moe": "glm", "deepseekv3": "deepseek", "gemma": "llama2", "gemma3": "llama2", "phi3": "llama2",
    "phi3_5": "llama2", "gptoss": "qwen3",
}  # fmt: skip
MARKED = {f"{name}_training": tok for name, tok in PLAIN.items() if name not in ("llama3_1", "llama3_2")}
REFUSE_SYSTEM = ("gemma",)
NO_TOOLS = ("gemma", "gemma3", "llama3", "phi3", "phi3_5")
# written as text by the original template, which fails for the objects that the format asks for
TEXT_ARGUMENTS = ("deepseekv3",)
BITS = [
    "Hi",
    "Hello there. ",
    "知识就是力量",
    "😀",
    "é",
    "\n",
    "\n\n",
    " ",
    "a  b",
    "<|im_end|>",
    "<|user|>",
    "</s>",
    "[INST]",
]
# several templates strip what stands around a text, and refuse or drop empty ones
TEXT = st.lists(st.sampled_from(BITS), max_size=4).map(lambda bits: "x" + "".join(bits) + "y")
SAID = st.lists(st.sampled_from(BITS[:9]), max_size=4).map(lambda bits: "x" + "".join(bits) + "y")
THOUGHT = st.one_of(st.none(), SAID)
CALL = st.builds(
    lambda name, value: {"type": "function", "id": "c1", "function": {"name": name, "arguments": {"a": value, "n": 1}}},
    st.sampled_from(["f", "get_weather"]), st.sampled_from(["x", "北京"]),
)  # fmt: skip
TOOL = {"type": "function", "function": {"name": "f", "description": "查 it", "parameters": {"type": "object",
        "properties": {"a": {"type": "string", "description": "d"}}, "required": ["a"]}}}  # fmt: skip


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(text: str, thought: str | None = None, calls: list | None = None) -> dict[str, Any]:
    entry: dict[str, Any] = {"role": "assistant", "content": text}
    return entry | ({"reasoning_content": thought} if thought else {}) | ({"tool_calls": calls} if calls else {})


SIMPLE = st.builds(lambda q, a, t: [user(q), assistant(a, t)], TEXT, SAID, THOUGHT)
RESULT = TEXT.map(lambda text: {"role": "tool", "content": text, "tool_call_id": "c1"})
CALLING = st.builds(
    lambda q, c, result, a: [user(q), assistant("", None, [c]), result, assistant(a)], TEXT, CALL, RESULT, SAID
)
ROW = st.tuples(st.one_of(st.none(), TEXT), st.lists(SIMPLE, min_size=1, max_size=3), st.one_of(st.none(), CALLING))


def row_for(template: str, drawn: tuple) -> dict[str, Any]:
    """A drawn row with what the template can write."""
    name = template.removesuffix("_training")
    system, turns, calling = drawn
    messages = [message for turn in turns for message in turn]
    tools = []
    if calling and name not in NO_TOOLS:
        messages += calling
        tools = [TOOL]
    if system and name not in REFUSE_SYSTEM:
        messages.insert(0, {"role": "system", "content": system})
    return {"messages": messages, **({"tools": tools} if tools else {})}


@cache
def encoder_and_reference(golden: Path, template: str, tok: str) -> tuple[HfEncoder, Any]:
    from transformers import AutoTokenizer

    trl = pytest.importorskip("trl", reason="the chat templates of real models come with trl (the dev extra)")
    source = (Path(trl.__file__).parent / "chat_templates" / f"{template}.jinja").read_text(encoding="utf-8")
    tokenizer, reference = load_tokenizer(golden / "_tok" / tok), AutoTokenizer.from_pretrained(golden / "_tok" / tok)
    tokenizer.chat_template = reference.chat_template = source
    return HfEncoder(tokenizer), reference


def as_reference(template: str, row: dict[str, Any]) -> list[dict[str, Any]]:
    """The messages for transformers: with the names and forms that the template reads."""
    if template.startswith("gptoss"):
        return [m | ({"thinking": m["reasoning_content"]} if "reasoning_content" in m else {}) for m in row["messages"]]
    if template not in TEXT_ARGUMENTS:
        return row["messages"]
    messages = json.loads(json.dumps(row["messages"]))
    for call in (call for message in messages for call in message.get("tool_calls", [])):
        call["function"]["arguments"] = json.dumps(call["function"]["arguments"], ensure_ascii=False)
    return messages


def drawn_rows(check: Any) -> None:
    wrapped = given(st.lists(ROW, min_size=10, max_size=10))(check)
    settings(
        max_examples=20, deadline=None, database=None, derandomize=True, phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )(wrapped)()  # fmt: skip


@pytest.mark.parametrize("template", [*PLAIN, *MARKED])
def test_the_text_is_the_chat_templates_and_marked_answers_are_what_transformers_masks(
    golden: Path, template: str
) -> None:
    chat, reference = encoder_and_reference(golden, template, {**PLAIN, **MARKED}[template])
    handler = get_handler("OpenAIInstructionHandler", {})

    def check(rows: list[tuple]) -> None:
        made = [row_for(template, row) for row in rows]
        samples = [handler.samples(row)[0] for row in made]
        for row, sample, encoded in zip(made, samples, chat.encode_rows(samples, Limits()), strict=True):
            options: dict[str, Any] = {"tools": row.get("tools")}
            messages = as_reference(template, row)
            text = reference.apply_chat_template(messages, tokenize=False, **options)
            assert not encoded.fault and chat.text(sample) == text
            if template not in MARKED:
                continue
            if any(token in m["content"] for m in messages if m["role"] in ("user", "system", "tool")
                   for token in chat.tokenizer.control_tokens()):  # fmt: skip
                continue  # tokens there, text here: see test_encode.py
            both = reference.apply_chat_template(
                messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True, **options
            )
            assert list(encoded.ids) == both["input_ids"]
            trained = [0] * len(encoded.ids)
            for start, stop in encoded.spans:
                trained[start:stop] = [1] * (stop - start)
            assert trained == both["assistant_masks"], text

    drawn_rows(check)


@pytest.mark.parametrize("template", PLAIN)
def test_of_a_template_without_marks_a_trained_part_is_what_its_turn_adds_to_the_prompt(
    golden: Path, template: str
) -> None:
    chat, reference = encoder_and_reference(golden, template, PLAIN[template])
    handler = get_handler("OpenAIInstructionHandler", {})

    def check(rows: list[tuple]) -> None:
        made = [row_for(template, row) for row in rows]
        samples = [handler.samples(row)[0] for row in made]
        for row, encoded in zip(made, chat.encode_rows(samples, Limits()), strict=True):
            answers = sum(message["role"] == "assistant" for message in row["messages"])
            assert len(encoded.spans) == (1 if encoded.note == ONLY_LAST else answers)
            messages = as_reference(template, row)
            whole = reference.apply_chat_template(messages, tokenize=False, tools=row.get("tools"))
            prompt = reference.apply_chat_template(
                messages[:-1], tokenize=False, tools=row.get("tools"), add_generation_prompt=True
            )
            if whole.startswith(prompt):
                start, stop = encoded.spans[-1]
                assert stop == len(encoded.ids)
                added = chat.tokenizer.decode(encoded.ids[start:stop])
                if template == "glm4moe":  # closes no turn: see the test of what ends an answer
                    added = added.removesuffix("<|user|>")
                assert added.endswith(whole[len(prompt) :].lstrip(" ")) or template in (
                    "phi3",
                    "phi3_5",
                    "gemma",
                    "gemma3",
                )

    drawn_rows(check)


def test_an_answer_that_its_template_does_not_close_is_ended_by_what_opens_the_next_turn(golden: Path) -> None:
    chat, _ = encoder_and_reference(golden, "glm4moe", "glm")
    _, judge = encoder_and_reference(golden, "glm4moe_training", "glm")  # it marks these tokens as the model's own
    handler = get_handler("OpenAIInstructionHandler", {})
    assert {chat.tokenizer.id_to_token(i) for i in chat.stop_ids()} == {"<|endoftext|>", "<|user|>", "<|observation|>"}
    judged = 0

    def check(rows: list[tuple]) -> None:
        nonlocal judged
        made = [row_for("glm4moe", row) for row in rows]
        samples = [handler.samples(row)[0] for row in made]
        for row, encoded in zip(made, chat.encode_rows(samples, Limits()), strict=True):
            if "<|user|>" in json.dumps(row):
                continue  # a token there, text here
            both = judge.apply_chat_template(
                row["messages"], tools=row.get("tools"), tokenize=True, return_dict=True,
                return_assistant_tokens_mask=True,
            )  # fmt: skip
            assert list(encoded.ids) == both["input_ids"]
            trained = [0] * len(encoded.ids)
            for start, stop in encoded.spans:
                trained[start:stop] = [1] * (stop - start)
            begin = encoded.spans[-1][0] if encoded.note == ONLY_LAST else 0
            assert trained[begin:] == both["assistant_masks"][begin:]
            judged += not encoded.note

    drawn_rows(check)
    assert judged > 20


def test_a_template_that_leaves_old_thoughts_out_trains_the_last_answer_and_says_so(golden: Path) -> None:
    chat, _ = encoder_and_reference(golden, "qwen3", "qwen3")
    rows = [[user("a"), assistant("b", "t"), user("c"), assistant("d", "u")], [user("c"), assistant("d", "u")]]
    handler = get_handler("OpenAIInstructionHandler", {})
    two, one = chat.encode_rows([handler.samples({"messages": row})[0] for row in rows], Limits())
    trained = [[chat.tokenizer.decode(row.ids[a:b]) for a, b in row.spans] for row in (two, one)]
    assert trained == [["<think>\nu\n</think>\n\nd<|im_end|>\n"]] * 2
    assert (two.note, one.note) == (ONLY_LAST, "")


@pytest.mark.parametrize(("mode", "ending"), [("none", ""), ("true", ""), ("false", "<think>\n\n</think>\n\n")])
def test_thinking_is_told_to_the_chat_template_and_prompts_are_what_training_showed(
    golden: Path, mode: str, ending: str
) -> None:
    plain, reference = encoder_and_reference(golden, "qwen3", "qwen3")
    chat = HfEncoder(plain.tokenizer, mode)
    text = chat.tokenizer.decode(chat.encode_prompt([{"role": "user", "content": "Hi"}]))
    assert text == f"<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n{ending}"
    row = get_handler("OpenAIInstructionHandler", {}).samples({"messages": [user("Hi"), assistant("Yo", "hm")]})
    made = chat.encode_rows(row, Limits())[0]
    start = made.spans[0][0]
    assert chat.tokenizer.decode(made.ids[:start]) == text
    assert ("hm" in chat.tokenizer.decode(made.ids)) is (mode != "false")


def test_a_refused_conversation_is_a_fault_of_its_row_with_the_templates_own_words(golden: Path) -> None:
    chat, _ = encoder_and_reference(golden, "gemma", "llama2")
    messages = [{"role": "system", "content": "s"}, user("a"), assistant("b")]
    row = get_handler("OpenAIInstructionHandler", {}).samples({"messages": messages})
    made = chat.encode_rows(row, Limits())[0]
    assert len(made.ids) == 0 and "System role not supported" in made.fault
