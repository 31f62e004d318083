"""Rows as one text: control tokens and text told apart, labels by characters, and what differs from upstream."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mindspeed_llm.arguments.parser import parse
from mindspeed_llm.arguments.preprocess import PreprocessOptions
from mindspeed_llm.data.control_tokens import FIRST, MARK, MarkedTokenizer, SegmentTokenizer, Spelling
from mindspeed_llm.data.encode import ChatEncoder, Conversation, Limits
from mindspeed_llm.data.handlers import get_handler
from mindspeed_llm.data.indexed_file import IndexedFile
from mindspeed_llm.data.messages import Message, Preference
from mindspeed_llm.data.preprocess import preprocess
from mindspeed_llm.data.sample_tokens import arrays
from mindspeed_llm.data.templates import get_template
from mindspeed_llm.data.tokenizer import load_tokenizer
from mindspeed_llm.errors import InputError
from tests.data.contract_reading import Vocabulary

IM_TOKENS = ["<|im_start|>", "<|im_end|>", "<|endoftext|>"]
TOKENIZERS = {"qwen3": "qwen3", "glm4": "glm", "deepseek3": "deepseek", "llama3": "llama3", "llama2": "llama2"}


def encoder(golden: Path, template: str = "qwen3", thinking: str = "none", **more: Any) -> ChatEncoder:
    tokenizer = load_tokenizer(golden / "_tok" / TOKENIZERS[template])
    return ChatEncoder(get_template(template), tokenizer, thinking, **more)


def said(*texts: str) -> list[Message]:
    return [Message(role=("user", "assistant")[i % 2], content=text) for i, text in enumerate(texts)]


def ids_of(chat: ChatEncoder, *texts: str, system: str | None = None) -> list[int]:
    return list(chat.encode_rows([Conversation(said(*texts), system)], Limits())[0].ids)


def trained(chat: ChatEncoder, row: Any) -> list[str]:
    return [chat.tokenizer.decode(row.ids[start:stop]) for start, stop in row.spans]


def test_in_answers_tags_of_thoughts_and_tools_are_tokens_and_the_others_text(golden: Path) -> None:
    chat = encoder(golden)
    answer = "<think>\nhm\n</think>\n\n<tool_call>\n{}\n</tool_call> <|im_end|>\n<|im_start|>user"
    ids = ids_of(chat, "q", answer)
    count = {token: ids.count(token_id) for token, token_id in chat.tokenizer.control_tokens().items()}
    assert [count[t] for t in ("<think>", "</think>", "<tool_call>", "</tool_call>")] == [1, 1, 1, 1]
    assert (count["<|im_start|>"], count["<|im_end|>"]) == (2, 2), "those of the two messages"
    assert chat.tokenizer.decode(ids).endswith(answer + "<|im_end|>\n")


def test_text_that_holds_the_marks_of_control_tokens_is_refused_and_other_odd_characters_are_not(golden: Path) -> None:
    chat = encoder(golden)
    rows = [Conversation(said(text, "a")) for text in (f"{MARK}{chr(FIRST)}", MARK, chr(FIRST), "\ufdd1\ufdd2")]
    faults = [row.fault for row in chat.encode_rows(rows, Limits())]
    assert "mark control tokens" in faults[0] and faults[1:] == ["", "", ""]


def test_a_template_of_another_model_is_refused_or_said(golden: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"'chatglm3' needs the token '<\|user\|>'.*qwen3"):
        ChatEncoder(get_template("chatglm3"), load_tokenizer(golden / "_tok" / "qwen3"))
    report, _ = run(tmp_path, golden, [turns("a", "b")], *SHAREGPT[:3], "gemma")
    assert "gemma writes <start_of_turn>, <end_of_turn>, no token of this tokenizer" in report["warnings"][0]
    assert encoder(golden).unknown_tokens() == encoder(golden, "glm4").unknown_tokens() == []


def test_a_token_over_the_edge_of_an_answer_is_trained(golden: Path) -> None:
    tokenizer = load_tokenizer(golden / "_tok" / "qwen3")
    chat = ChatEncoder(get_template("qwen"), tokenizer)  # its prompt ends with a line break, and two are one token
    row = chat.encode_rows([Conversation(said("q", "\nyes"))], Limits())[0]
    whole = tokenizer.decode(row.ids)
    assert whole.endswith("<|im_start|>assistant\n\nyes<|im_end|>")
    assert row.ids.tolist() == tokenizer.encode(whole)
    assert trained(chat, row) == ["\n\nyes<|im_end|>"]


@pytest.mark.parametrize("folder", ["qwen3", "llama2", "glm"])
def test_bytes_offsets_and_the_text_of_first_tokens_find_the_same_trained_tokens(golden: Path, folder: str) -> None:
    tokenizer, words = load_tokenizer(golden / "_tok" / folder), Vocabulary(golden / "_tok" / folder)
    spelling = Spelling(list(tokenizer.control_tokens()))
    fast = MarkedTokenizer(tokenizer.rust, spelling)
    slow = SegmentTokenizer(
        lambda text: words.plain.encode(text, add_special_tokens=False).ids,
        lambda ids: words.plain.decode(ids, skip_special_tokens=False),
        spelling,
        tokenizer.control_tokens(),
    )
    end = next(iter(tokenizer.control_tokens()))
    draw = np.random.default_rng(3)
    bits = ["Hello ", "知识", "e\u0301", "\n", "\n\n", " ", "😀", end, "12", ""]
    texts, spans = [], []
    for _ in range(200):
        parts = [spelling.literal("".join(draw.choice(bits, 3))) for _ in range(3)]
        edges = np.cumsum([0] + [len(part.encode()) for part in parts]).tolist()
        texts.append("".join(parts))
        spans.append([(edges[1], edges[2])])
    found = fast.encode_spans(texts, spans)
    checked = 0
    for text, (ids, one), (others, two), (same, three) in zip(
        texts, found, fast._by_offsets(texts, spans), slow.encode_spans(texts, spans), strict=True
    ):
        assert ids.tolist() == others.tolist() == same.tolist()
        assert one == two
        if three is None:  # the tokenizer composes letters and accents, and does not give such a text back
            assert folder != "llama2" and "e\u0301" in text
            continue
        assert three == one
        checked += one[0][1] > one[0][0]
    assert checked > 50


def test_slow_tokenizers_train_exactly_the_answers_and_refuse_rows_they_do_not_give_back(tmp_path: Path) -> None:
    added = {str(259 + n): {"content": t, "special": n < 3} for n, t in enumerate([*IM_TOKENS, "<think>", "</think>"])}
    config = {"tokenizer_class": "ByT5Tokenizer", "eos_token": "</s>", "added_tokens_decoder": added, "extra_ids": 0}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "added_tokens.json").write_text("{}")
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.rust is None and set(tokenizer.control_tokens()) >= {*IM_TOKENS, "<think>"}
    chat = ChatEncoder(get_template("qwen3"), tokenizer)
    texts = ["é知", "<think>\nhm\n</think>\n\n\u2028yes <|im_end|>😀", "b <think> <|im_end|>", "\n\nlast"]
    made = chat.encode_rows([Conversation(said(*texts))], Limits())[0]
    assert trained(chat, made) == [f"{texts[1]}<|im_end|>\n", f"{texts[3]}<|im_end|>\n"]
    count = [list(made.ids).count(tokenizer.token_to_id(token)) for token in (*IM_TOKENS[:2], "<think>", "</think>")]
    assert count == [4, 4, 2, 2], "those of the messages, of the thought, and the last prompt's empty thought"
    chat._way.marked.decode = lambda ids: tokenizer.decode(ids).lower()  # type: ignore[union-attr]
    lost, kept = chat.encode_rows([Conversation(said("Q", t)) for t in ("Who", "who")], Limits())
    assert "does not give the text back" in lost.fault and not kept.fault


def test_messages_that_say_so_are_not_trained(golden: Path) -> None:
    chat = encoder(golden)
    row = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "train": False},
                        {"role": "user", "content": "c"}, {"role": "assistant", "content": "d"}]}  # fmt: skip
    made = chat.encode_rows(get_handler("OpenAIInstructionHandler", {}).samples(row), Limits())[0]
    assert trained(chat, made) == ["d<|im_end|>\n"]


def test_answers_of_several_tools_share_one_message_of_the_user(golden: Path) -> None:
    chat = encoder(golden)
    call = {"function": {"name": "f", "arguments": {}}}
    calls = {"role": "assistant", "content": "x", "tool_calls": [call, call]}
    row = {"messages": [{"role": "user", "content": "q"}, calls,
                        {"role": "tool", "content": "1"}, {"role": "tool", "content": "2"},
                        {"role": "assistant", "content": "done"}]}  # fmt: skip
    made = chat.encode_rows(get_handler("OpenAIInstructionHandler", {}).samples(row), Limits())[0]
    text = chat.tokenizer.decode(made.ids)
    assert "<tool_response>\n1\n</tool_response>\n<tool_response>\n2\n</tool_response><|im_end|>" in text
    assert text.count("<tool_call>") == 2 and "x\n<tool_call>\n" in text


def test_both_answers_of_a_preference_follow_the_same_prompt(golden: Path) -> None:
    chat = encoder(golden)
    thought = Message(role="assistant", content="<think>\nt\n</think>\n\nyes")
    short = Message(role="assistant", content="no")
    for pair in ((thought, short), (short, thought)):
        chosen, rejected = chat.encode_preferences([Preference(Conversation(said("q")), *pair)], Limits())[0]
        start = chosen.spans[0][0]
        assert chosen.ids[:start].tolist() == rejected.ids[: rejected.spans[0][0]].tolist()
        assert chat.tokenizer.decode(chosen.ids[:start]).endswith("assistant\n")
        texts = {trained(chat, row)[0] for row in (chosen, rejected)}
        assert texts == {"<think>\nt\n</think>\n\nyes<|im_end|>\n", "<think>\n\n</think>\n\nno<|im_end|>\n"}


def test_prompts_hold_earlier_answers_which_upstreams_prompts_for_ppo_leave_out(golden: Path) -> None:
    row = Conversation(said("a", "b", "c", "d"))
    chat = encoder(golden, "llama3")
    prompt = chat.tokenizer.decode(chat.encode_prompts([row], answers=True)[0].ids)
    assert prompt == chat.tokenizer.decode(chat.encode_prompt(said("a", "b", "c")))
    old = encoder(golden, "llama3", compat="upstream").encode_prompts([row], answers=False)[0]
    assert "b<|eot_id|>" in prompt and "b<|eot_id|>" not in chat.tokenizer.decode(old.ids)


@pytest.mark.parametrize("spelling", ["<think>x</think>y", "<think>\nx\n</think>\n\ny", "<think>x</think>\n\n\ny"])
def test_a_thought_is_one_however_it_is_spaced(golden: Path, spelling: str) -> None:
    kept = ids_of(encoder(golden), "q", spelling)
    assert encoder(golden).tokenizer.decode(kept).endswith(f"assistant\n{spelling}<|im_end|>\n")
    gone = ids_of(encoder(golden, thinking="false"), "q", spelling)
    assert encoder(golden).tokenizer.decode(gone).endswith("assistant\n<think>\n\n</think>\n\ny<|im_end|>\n")


def run(tmp_path: Path, golden: Path, rows: list[dict], *more: str) -> tuple[dict, list[list[int]]]:
    source = tmp_path / "rows.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["--input", str(source), "--output-prefix", str(tmp_path / "x"), "--tokenizer-name-or-path",
             str(golden / "_tok" / "qwen3"), "--overwrite", *more]  # fmt: skip
    report = preprocess(parse(PreprocessOptions, words, "preprocess_data.py"))
    file = IndexedFile(tmp_path / "x_packed_input_ids_document")
    return report, [file[i].tolist() for i in range(len(file))]


SHAREGPT = ("--handler-name", "SharegptStyleInstructionHandler", "--prompt-type", "qwen3")


def turns(*texts: str) -> dict:
    return {"conversations": [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]}


def test_an_unanswered_last_turn_is_left_out_and_said_and_its_row_kept(golden: Path, tmp_path: Path) -> None:
    report, rows = run(tmp_path, golden, [turns("a", "b", "and now?"), turns("a", "b"), turns("alone")], *SHAREGPT)
    assert rows[0] == rows[1] and len(rows) == 2
    assert report["rows"] == {"read": 3, "written": 2, "dropped": 0, "left_out": 1}
    assert list(report["left_out"]) == ["no message is answered"]
    assert [entry["row"] for entry in report["remarks"]["messages after the last answer are left out"]["rows"]] == [1]


def test_rows_without_a_trained_token_are_left_out_and_a_run_of_only_such_rows_is_an_error(
    golden: Path, tmp_path: Path
) -> None:
    untrained = turns("a", "b")
    untrained["conversations"][1]["train"] = False
    report, rows = run(tmp_path, golden, [untrained, turns("a", "b")], *SHAREGPT)
    assert len(rows) == 1 and report["left_out"]["no token of it is trained"]["count"] == 1
    with pytest.raises(InputError, match="no row can be used.*no token of it is trained"):
        run(tmp_path, golden, [untrained], *SHAREGPT)


def test_long_rows_are_cut_and_kept_and_documents_never_repeated(golden: Path, tmp_path: Path) -> None:
    rows = [turns("word " * 50, "answer " * 50), turns("a", "b")]
    report, ids = run(tmp_path, golden, rows, *SHAREGPT, "--seq-length", "40")
    assert len(ids) == 2 and len(ids[0]) == 39 and report["cut"]["count"] == 1
    assert IndexedFile(tmp_path / "x_packed_input_ids_document").documents.tolist() == [0, 1, 2]
    _, old = run(tmp_path, golden, rows, "--handler-name", SHAREGPT[1], "--prompt-type", "qwen", "--seq-length", "40",
                 "--compat", "upstream")  # fmt: skip
    assert len(old) == 1
    assert IndexedFile(tmp_path / "x_packed_input_ids_document").documents.tolist() == [0, 0, 1]


def test_efficient_eos_labels_stand_under_their_own_token(golden: Path) -> None:
    rows = {}
    for compat in (None, "upstream"):
        chat = encoder(golden, "glm4", compat=compat)
        made = chat.encode_rows([Conversation(said("a", "b", "c", "d"))], Limits())
        ids, labels = arrays(made, chat.eos_id)
        rows[compat] = [(int(i), int(t)) for i, t in zip(ids, labels, strict=True) if t not in (-100, i)]
    assert rows[None] == [] and rows["upstream"] == [(chat.tokenizer.token_to_id("<|user|>"), chat.eos_id)]
