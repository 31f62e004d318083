"""Layout of conversations; references are recordings, transformers' chat template form, and closed forms."""

import json
from pathlib import Path

import pytest

from mindspeed_llm.data.encode import ChatEncoder, Conversation, Limits
from mindspeed_llm.data.templates import TEMPLATES_FILE, Message, get_template
from mindspeed_llm.data.tokenizer import load_tokenizer
from mindspeed_llm.errors import InputError, UsageError

EMPTY_THOUGHT = "<think>\n\n</think>\n\n"
ROLES = {"human": "user", "gpt": "assistant"}


def encoder(golden: Path, template: str, thinking: str = "none", tokenizer: str = "qwen3") -> ChatEncoder:
    return ChatEncoder(get_template(template), load_tokenizer(golden / "_tok" / tokenizer), thinking)


def said(*texts: str) -> list[Message]:
    return [Message(role=("user", "assistant")[i % 2], content=text) for i, text in enumerate(texts)]


def conversation(row: dict) -> Conversation | None:
    """A ShareGPT row as a conversation; None for the rows upstream drops."""
    turns = row["conversations"]
    system = row["system"]
    if turns and turns[0]["from"] == "system":
        system, turns = turns[0]["value"], turns[1:]
    roles = [turn["from"] for turn in turns]
    if not turns or roles != ["human", "gpt"] * (len(turns) // 2):
        return None
    return Conversation([Message(role=ROLES[t["from"]], content=t["value"]) for t in turns], system)


@pytest.mark.parametrize(
    "case",
    ["A_sharegpt_alpaca", "A_sharegpt_qwen3_think_none", "A_sharegpt_qwen3_think_false",
     "A_sharegpt_qwen3_think_true_seq128"],
)  # fmt: skip
def test_recorded_conversations_of_another_format_encode_alike(golden: Path, case: str) -> None:
    folder = golden / "cases" / case
    expected = json.loads((folder / "expected.json").read_text())
    args = expected["args"]
    value = {args[i]: args[i + 1] for i in range(len(args) - 1)}
    chat = encoder(golden, value["--prompt-type"], value.get("--enable-thinking", "none"), expected["tokenizer"])
    length = int(value["--seq-length"]) if "--seq-length" in value else None
    rows = [c for c in map(conversation, json.loads((folder / "input.json").read_text())) if c]
    encoded = chat.encode_rows(rows, Limits(length))
    assert [row.ids for row in encoded] == expected["files"]["out_packed_input_ids_document"]["sequences"]
    for row, labels in zip(encoded, expected["files"]["out_packed_labels_document"]["sequences"], strict=True):
        trained = {i for start, stop in row.spans for i in range(start, stop)}
        assert labels == [token if i in trained else -100 for i, token in enumerate(row.ids)]


@pytest.mark.parametrize("case", ["A_pair_alpaca_default", "A_pair_alpaca_empty"])
def test_recorded_single_answers_encode_alike(golden: Path, case: str) -> None:
    folder = golden / "cases" / case
    expected = json.loads((folder / "expected.json").read_text())
    args = expected["args"]
    chat = encoder(golden, args[args.index("--prompt-type") + 1], "none", expected["tokenizer"])
    rows = [json.loads(line) for line in (folder / "input.jsonl").read_text().splitlines()]
    for side in ("chosen", "rejected"):
        conversations = [
            Conversation(said("\n".join(p for p in (row["instruction"], row["input"]) if p), row[side])) for row in rows
        ]
        ids = [row.ids for row in chat.encode_rows(conversations, Limits())]
        assert ids == expected["files"][f"out_packed_{side}_input_ids_document"]["sequences"]


def test_thinking_true_trains_an_empty_thought_and_the_others_put_it_into_the_prompt(golden: Path) -> None:
    chat = {mode: encoder(golden, "qwen3", mode) for mode in ("true", "false", "none")}
    text = chat["true"].tokenizer
    prompt = text.encode("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    empty, answer = text.encode("<think>\n\n</think>\n\n"), text.encode("Hello<|im_end|>\n")
    assert chat["true"].encode_multiturn(said("Hi", "Hello")) == [(prompt, empty + answer)]
    assert chat["false"].encode_multiturn(said("Hi", "Hello")) == [(prompt + empty, answer)]
    assert chat["none"].encode_multiturn(said("Hi", "Hello")) == [(prompt + empty, answer)]


def test_thoughts_that_are_there_stay_unless_thinking_is_off(golden: Path) -> None:
    thought = "<think>\nlet me see\n</think>\n\nHello"
    chat = {mode: encoder(golden, "qwen3", mode) for mode in ("true", "false", "none")}
    trained = {mode: e.tokenizer.decode(e.encode_multiturn(said("Hi", thought))[0][1]) for mode, e in chat.items()}
    assert trained == {
        "true": f"{thought}<|im_end|>\n",
        "none": f"{thought}<|im_end|>\n",
        "false": "Hello<|im_end|>\n",
    }


@pytest.mark.parametrize(("mode", "ending"), [("true", ""), ("false", EMPTY_THOUGHT), ("none", EMPTY_THOUGHT)])
def test_a_prompt_is_what_training_showed_before_an_answer_with_old_thoughts_removed(
    golden: Path, mode: str, ending: str
) -> None:
    chat = encoder(golden, "qwen3", mode)
    history = said("a", "<think>\nold\n</think>\n\nb", "c")
    expected = (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n"
        f"<|im_start|>user\nc<|im_end|>\n<|im_start|>assistant\n{ending}"
    )
    assert chat.tokenizer.decode(chat.encode_prompt(history, "Be brief.")) == expected
    source = chat.encode_multiturn(said("c", "d"))[0][0]
    assert chat.encode_prompt(said("c")) == source, "of one turn, the prompt is what stood before the trained answer"


def test_the_mode_of_one_prompt_can_be_chosen(golden: Path) -> None:
    chat = encoder(golden, "qwen3", "true")
    assert chat.encode_prompt(said("x"), enable_thinking="false") == encoder(golden, "qwen3", "false").encode_prompt(
        said("x")
    )


def test_default_alpaca_and_empty_lay_out_text_as_their_strings_say(golden: Path) -> None:
    turns = said("Q1", "A1", "Q2", "A2")
    expected = {
        "default": [("S\nHuman: Q1\nAssistant:", "A1<|im_end|>"), ("\nHuman: Q2\nAssistant:", "A2<|im_end|>")],
        "alpaca": [
            ("S### Instruction:\nQ1\n\n### Response:\n", "A1<|im_end|>"),
            ("\n\n### Instruction:\nQ2\n\n### Response:\n", "A2<|im_end|>"),
        ],
        "empty": [("SQ1", "A1"), ("Q2", "A2")],
    }
    for name, texts in expected.items():
        chat = encoder(golden, name)
        pairs = chat.encode_multiturn(turns, "S")
        assert [(chat.tokenizer.decode(s), chat.tokenizer.decode(t)) for s, t in pairs] == texts


def test_a_single_turn_prompt_of_qwen_equals_the_chatml_text(golden: Path) -> None:
    chat = encoder(golden, "qwen")
    text = (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n你好<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    assert chat.tokenizer.decode(chat.encode_prompt(said("你好"))) == text


def test_replace_eos_pad_and_stop_ids_follow_the_template(golden: Path) -> None:
    base = encoder(golden, "qwen3", tokenizer="qwen_base")
    table = base.tokenizer
    assert table.eos_id == table.token_to_id("<|endoftext|>")
    assert base.eos_id == table.token_to_id("<|im_end|>")
    assert base.pad_id == table.token_to_id("<|endoftext|>")
    assert set(base.stop_ids()) == {base.eos_id, table.eos_id}
    llama = encoder(golden, "default", tokenizer="llama3")
    assert llama.pad_id == llama.eos_id == llama.tokenizer.token_to_id("<|end_of_text|>")


def test_an_answer_ends_at_the_first_stop_token_and_shows_no_control_tokens(golden: Path) -> None:
    chat = encoder(golden, "qwen3")
    ids = chat.tokenizer.encode("<think>\nhm\n</think>\n\nHello<|im_end|>\n<|im_start|>user")
    assert chat.render_answer(ids) == "<think>\nhm\n</think>\n\nHello"


def test_a_prompt_that_ends_with_an_answer_is_refused(golden: Path) -> None:
    with pytest.raises(UsageError, match="ends with a user message"):
        encoder(golden, "qwen3").encode_prompt(said("a", "b"))


def test_efficient_eos_is_a_label_on_the_next_turn_and_a_token_at_the_end(golden: Path, tmp_path: Path) -> None:
    entry = {"name": "e", "format_user": {"slots": [{"token": "<|im_start|>"}, "{{idx}}:{{content}}"]},
             "format_prefix": {"slots": [["bos_token"]]}, "efficient_eos": True}  # fmt: skip
    file = tmp_path / "t.json"
    file.write_text(json.dumps([entry]))
    chat = ChatEncoder(get_template("e", file), load_tokenizer(golden / "_tok" / "qwen3"))
    row = chat.encode_rows([Conversation(said("a", "b", "c", "d"))], Limits())[0]
    text = "<|im_start|>0:ab<|im_start|>1:cd<|im_end|>"
    assert chat.tokenizer.decode(row.ids) == text
    assert row.ids[row.eos_at[0]] == chat.tokenizer.token_to_id("<|im_start|>")
    assert row.spans[-1] == (len(row.ids) - 1, len(row.ids))


def test_unknown_templates_modes_tokens_and_files_are_refused_by_name(golden: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"'qwen33'; did you mean 'qwen3'"):
        get_template("qwen33")
    with pytest.raises(UsageError, match="maybe"):
        encoder(golden, "qwen3", "maybe")
    with pytest.raises(InputError, match=r"'qwen'.*'<\|im_end\|>'.*llama3"):
        encoder(golden, "qwen", tokenizer="llama3")
    with pytest.raises(InputError, match="no.json"):
        get_template("qwen", tmp_path / "no.json")
    (tmp_path / "bad.json").write_text('[{"name": "x", "format_user": {"slots": [3]}}]')
    with pytest.raises(InputError, match="slot 3"):
        get_template("x", tmp_path / "bad.json")


def test_the_template_hash_ignores_layout_and_sees_every_string(tmp_path: Path) -> None:
    entries = json.loads(TEMPLATES_FILE.read_text(encoding="utf-8"))
    file = tmp_path / "t.json"
    file.write_text(json.dumps(entries))
    assert get_template("qwen3", file).content_hash == get_template("qwen3").content_hash
    file.write_text(json.dumps(entries).replace("assistant\\n", "assistant "))
    assert get_template("qwen3", file).content_hash != get_template("qwen3").content_hash
