"""Layout of conversations; references are recordings, transformers' chat template form, and closed forms."""

import json
import re
from pathlib import Path

import pytest

from mindspeed_llm.data.encode import ChatEncoder, Conversation, Limits
from mindspeed_llm.data.templates import TEMPLATES_FILE, Message, get_template
from mindspeed_llm.data.tokenizer import load_tokenizer
from mindspeed_llm.errors import InputError, UsageError

EMPTY_THOUGHT = "<think>\n\n</think>\n\n"


def encoder(golden: Path, template: str, thinking: str = "none", tokenizer: str = "qwen3") -> ChatEncoder:
    return ChatEncoder(get_template(template), load_tokenizer(golden / "_tok" / tokenizer), thinking)


def said(*texts: str) -> list[Message]:
    return [Message(role=("user", "assistant")[i % 2], content=text) for i, text in enumerate(texts)]


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


def test_efficient_eos_labels_the_next_turn_upstream_and_is_a_token_at_the_end_in_both_ways(
    golden: Path, tmp_path: Path
) -> None:
    entry = {"name": "e", "format_user": {"slots": [{"token": "<|im_start|>"}, "{{idx}}:{{content}}"]},
             "format_prefix": {"slots": [["bos_token"]]}, "efficient_eos": True}  # fmt: skip
    file = tmp_path / "t.json"
    file.write_text(json.dumps([entry]))
    tokenizer = load_tokenizer(golden / "_tok" / "qwen3")
    text = "<|im_start|>0:ab<|im_start|>1:cd<|im_end|>"
    rows = {}
    for compat in ("upstream", None):
        chat = ChatEncoder(get_template("e", file), tokenizer, compat=compat)
        rows[compat] = chat.encode_rows([Conversation(said("a", "b", "c", "d"))], Limits())[0]
        assert tokenizer.decode(rows[compat].ids) == text
        assert rows[compat].spans[-1] == (len(rows[compat].ids) - 1, len(rows[compat].ids))
    row = rows["upstream"]
    assert row.ids[row.eos_at[0]] == tokenizer.token_to_id("<|im_start|>")
    assert rows[None].eos_at == []


def test_the_token_after_an_answer_is_trained_where_it_is_a_stop_word(golden: Path) -> None:
    chat = encoder(golden, "glm4", tokenizer="glm")
    row = chat.encode_rows([Conversation(said("a", "b", "c", "d"))], Limits())[0]
    trained = [chat.tokenizer.decode(row.ids[start:stop]) for start, stop in row.spans]
    assert trained == ["\nb", "<|user|>", "\nd", "<|endoftext|>"]


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
    for key in ("format_user", "format_assistant", "format_system", "format_observation"):
        for slots, mentions in ((["User:"], f"{key} has no {{{{content}}}}"), ("{{content}}", f"slots of {key} are")):
            (tmp_path / "bad.json").write_text(json.dumps([{"name": "x", key: {"slots": slots}}]))
            with pytest.raises(InputError, match=re.escape(mentions)):
                get_template("x", tmp_path / "bad.json")


def test_the_template_hash_ignores_layout_and_sees_every_string(tmp_path: Path) -> None:
    entries = json.loads(TEMPLATES_FILE.read_text(encoding="utf-8"))
    file = tmp_path / "t.json"
    file.write_text(json.dumps(entries))
    assert get_template("qwen3", file).content_hash == get_template("qwen3").content_hash
    file.write_text(json.dumps(entries).replace("assistant\\n", "assistant "))
    assert get_template("qwen3", file).content_hash != get_template("qwen3").content_hash
