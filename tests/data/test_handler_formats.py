"""Every data format besides Alpaca's: rows as samples, their files, and why a row is none."""

import json
from pathlib import Path
from typing import Any

import pytest

from mindspeed_llm.arguments.parser import parse
from mindspeed_llm.arguments.preprocess import PreprocessOptions
from mindspeed_llm.data.handlers import HANDLERS, BadRow, Reading, Unanswered, get_handler
from mindspeed_llm.data.indexed_file import IndexedFile
from mindspeed_llm.data.messages import PlainTurns
from mindspeed_llm.data.preprocess import preprocess
from mindspeed_llm.data.tokenizer import Tokenizer, load_tokenizer
from mindspeed_llm.errors import InputError, UsageError

SHAREGPT, OPENAI = "SharegptStyleInstructionHandler", "OpenAIInstructionHandler"
UPSTREAM = Reading(upstream=True)


def turn(who: str, text: Any, **more: Any) -> dict[str, Any]:
    return {"from": who, "value": text, **more}


def conversation(name: str, columns: dict[str, Any], **map_keys: Any) -> list[tuple[str, str]]:
    found = get_handler(name, map_keys).samples(columns)[0]
    return [(m["role"], m["content"]) for m in found.messages]


def files(golden: Path, folder: Path, rows: list[dict], *words: str, tok: str = "qwen3") -> dict[str, list[list[int]]]:
    """Preprocess rows: token sequences by field."""
    source = folder / "rows.jsonl"
    source.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    given = ["--input", str(source), "--output-prefix", str(folder / "x"), "--tokenizer-name-or-path",
             str(golden / "_tok" / tok), "--overwrite", *words]  # fmt: skip
    for old in folder.glob("x_*"):
        old.unlink()
    preprocess(parse(PreprocessOptions, given, "preprocess_data.py"))
    made = {}
    for index in folder.glob("x_*_document.idx"):
        file = IndexedFile(index.with_suffix(""))
        made[index.stem.removeprefix("x_").removesuffix("_document")] = [file[i].tolist() for i in range(len(file))]
    return made


@pytest.fixture
def qwen3(golden: Path) -> Tokenizer:
    return load_tokenizer(golden / "_tok" / "qwen3")


def test_every_name_of_the_contract_is_a_handler() -> None:
    assert set(HANDLERS) == {
        "GeneralPretrainHandler", "AlpacaPretrainHandler", "SharegptPretrainHandler",
        "StackOverflowPythonPretrainHandler", "AlpacaStyleInstructionHandler", SHAREGPT, OPENAI,
        "AlpacaStylePairwiseHandler", "SharegptStylePairwiseHandler", "PPOAlpacaStyleInstructionHandler",
        "R1AlpacaStyleInstructionHandler", "R1SharegptStyleInstructionHandler", "HunyuanInstructionHandler",
        "GeneralInstructionHandler", "BelleMultiTurnInstructionHandler", "LeetcodePythonInstructionHandler",
        "MOSSMultiTurnHandler", "MOSSInstructionHandler",
    }  # fmt: skip


def test_sharegpt_turns_tags_and_columns_can_be_renamed() -> None:
    row = {"talk": [{"role": "sys", "text": "s"}, {"role": "u", "text": "a"}, {"role": "a", "text": "b"}], "t": "[]"}
    tags = {"role_tag": "role", "content_tag": "text", "user_tag": "u", "assistant_tag": "a", "system_tag": "sys"}
    found = get_handler(SHAREGPT, {"messages": "talk", "tools": "t", "tags": tags}).samples(row)[0]
    assert [(m["role"], m["content"]) for m in found.messages] == [("user", "a"), ("assistant", "b")]
    assert (found.system, found.tools) == ("s", "[]")
    handler = get_handler(SHAREGPT, {})
    assert handler.ignored_columns(["conversations", "system", "tools"]) == ["system", "tools"]
    with pytest.raises(UsageError, match="tag in --map-keys: 'user'; did you mean 'user_tag'"):
        get_handler(SHAREGPT, {"tags": {"user": "x"}})


def test_a_renamed_tag_does_not_make_the_systems_turn_unknown_as_it_does_upstream() -> None:
    row = {"conversations": [turn("system", "s"), turn("user", "a"), turn("gpt", "b")]}
    keys = {"tags": {"user_tag": "user"}}
    assert get_handler(SHAREGPT, keys).samples(row)[0].system == "s"
    with pytest.raises(BadRow):
        get_handler(SHAREGPT, keys, UPSTREAM).samples(row)


@pytest.mark.parametrize(
    ("turns", "reason"),
    [
        ([turn("human", "a"), turn("human", "b"), turn("gpt", "c")], "roles out of order: user after user"),
        ([turn("gpt", "a"), turn("human", "b"), turn("gpt", "c")], "roles out of order: assistant after nothing"),
        ([turn("human", "a"), turn("bot", "b")], "a turn is by 'bot', known are human, gpt"),
        ([turn("human", None), turn("gpt", "b")], "'value' of a turn is not text"),
        ([turn("human", 3), turn("gpt", "b")], "'value' of a turn is not text"),
        ("text", "not a list of turns"),
        (["text"], "not a list of turns"),
        (None, "not a list of turns"),
        ([], "an empty list"),
    ],
)
def test_a_sharegpt_row_that_is_no_conversation_says_why(turns: Any, reason: str) -> None:
    with pytest.raises(BadRow, match=reason):
        get_handler(SHAREGPT, {}).samples({"conversations": turns})


def test_rows_without_an_answer_are_left_out_and_are_no_fault() -> None:
    with pytest.raises(Unanswered):
        get_handler(SHAREGPT, {}).samples({"conversations": [turn("human", "a")]})
    with pytest.raises(Unanswered):
        get_handler(OPENAI, {}).samples({"messages": [{"role": "user", "content": "a"}]})
    row = {"conversations": [turn("human", "a"), turn("gpt", "b"), turn("human", "c")]}
    assert conversation(SHAREGPT, row) == [("user", "a"), ("assistant", "b")]


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        ({"role": "robot", "content": "x"}, "a message is by 'robot'"),
        ({"role": "user", "content": 3}, "'content' of a message is not text"),
        ({"role": "assistant", "content": None}, "'content' of a message is not text"),
        ({"role": "assistant", "content": "", "tool_calls": "f"}, "not a list of calls"),
        ({"role": "assistant", "content": "", "tool_calls": [{"function": {"arguments": "{}"}}]}, "with names"),
        ({"role": "assistant", "content": "", "tool_calls": [{"name": "f", "arguments": "[1"}]}, "JSON object"),
        ({"role": "assistant", "content": "", "reasoning_content": 1}, "'reasoning_content'"),
        ({"role": "tool", "content": "x", "tool_call_id": "other"}, "names a call that was not made"),
    ],
)  # fmt: skip
def test_an_openai_row_that_is_no_conversation_says_why(message: dict[str, Any], reason: str) -> None:
    call = {"id": "c1", "function": {"name": "f", "arguments": "{}"}}
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "", "tool_calls": [call]}, message,
                {"role": "assistant", "content": "end"}]  # fmt: skip
    if message["role"] == "assistant":
        messages[1:3] = [message]
    with pytest.raises(BadRow, match=reason):
        get_handler(OPENAI, {}).samples({"messages": messages})


def test_a_list_of_no_messages_is_a_fault() -> None:
    with pytest.raises(BadRow, match="column 'messages' is an empty list"):
        get_handler(OPENAI, {}).samples({"messages": []})


def test_openai_content_in_parts_is_joined_and_the_developer_is_a_system() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    row = {"messages": [{"role": "developer", "content": "s"}, {"role": "user", "content": parts},
                        {"role": "assistant", "content": "c"}]}  # fmt: skip
    assert conversation(OPENAI, row) == [("user", "ab"), ("assistant", "c")]
    assert get_handler(OPENAI, {}).samples(row)[0].system == "s"


def test_the_first_of_several_preferred_and_rejected_answers_counts() -> None:
    row = {"instruction": "q", "chosen": ["a", "b"], "rejected": ["c", "d"]}
    for reading, rejected in ((Reading(), "c"), (UPSTREAM, "d")):
        pair = get_handler("AlpacaStylePairwiseHandler", {}, reading).samples(row)[0]
        assert (pair.chosen["content"], pair.rejected["content"]) == ("a", rejected)


def test_a_row_with_two_answers_is_dropped_where_upstream_writes_an_empty_one() -> None:
    row = {"instruction": "q", "output": ["a", "b"]}
    with pytest.raises(BadRow, match="several answers"):
        get_handler("AlpacaStyleInstructionHandler", {}).samples(row)
    empty = get_handler("AlpacaStyleInstructionHandler", {}, UPSTREAM).samples(row)[0]
    assert [m["content"] for m in empty.messages] == ["", ""]


def text_of(sample: PlainTurns) -> str:
    return "".join(str(piece) for pair in sample.turns for side in pair for piece in side)


def test_the_built_in_layout_holds_question_and_answer_and_trains_the_last_answer() -> None:
    general = get_handler("GeneralInstructionHandler", {}).samples({"instruction": "q", "input": "i", "output": "a"})[0]
    assert text_of(general).endswith("step by step.\n### Instruction:\nq\ni\n### Response:\na\n")
    assert general.turns[-1][1] == ("a\n",)
    row = {"code_with_problem": " Sum it. ```python\nx```", "code_only": "y", "explanation_only": "z"}
    leetcode = get_handler("LeetcodePythonInstructionHandler", {}).samples(row)[0]
    assert text_of(leetcode).endswith("### Instruction:\nSum it.\n### Response:\ny\nz\n")
    with pytest.raises(BadRow, match="alternate"):
        get_handler("BelleMultiTurnInstructionHandler", {}).samples({"instruction": "no tags", "output": "a"})


CHAT = {"turn_1": {"Human": "<|Human|>: hi<eoh>\n", "MOSS": "<|MOSS|>: hello<eom>\n"},
        "turn_2": {"Human": "<|Human|>: bye<eoh>\n", "MOSS": "<|MOSS|>: so long<eom>\n"}}  # fmt: skip


def test_moss_rows_are_turns_of_baichuan_tokens_or_one_sample_per_turn(
    golden: Path, tmp_path: Path, qwen3: Tokenizer
) -> None:
    made = files(golden, tmp_path, [{"chat": CHAT}], "--handler-name", "MOSSMultiTurnHandler")
    hi, hello, bye, long = (qwen3.encode(text) for text in ("hi", "hello", "bye", "so long"))
    ids = [195, *hi, 196, *hello, 195, *bye, 196, *long, qwen3.eos_id]
    assert made["packed_input_ids"] == [ids]
    skip = [-100]
    head, tail = skip * (len(hi) + 1) + hello, skip * (len(bye) + 1) + [*long, qwen3.eos_id]
    assert made["packed_labels"] == [[-100, *head, -100, *tail]]
    old = files(golden, tmp_path, [{"chat": CHAT}], "--handler-name", "MOSSMultiTurnHandler", "--compat", "upstream")
    assert old["packed_labels"] == [[qwen3.eos_id, *head, qwen3.eos_id, *tail]]
    growing = files(golden, tmp_path, [{"chat": CHAT}], "--handler-name", "MOSSInstructionHandler")["packed_input_ids"]
    texts = [qwen3.decode(row) for row in growing]
    assert [text.count("### Response") for text in texts] == [1, 2] and texts[1].endswith(
        "bye\n### Response:\nso long\n"
    )


def test_running_text_is_written_per_column_with_the_tokens_its_tokenizer_adds(golden: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    rows = [{"title": "a", "body": "Hello <|im_end|> there."}, {"title": "b", "body": "知识"}]
    for tok in ("qwen3", "llama3"):
        reference = AutoTokenizer.from_pretrained(golden / "_tok" / tok)
        made = files(golden, tmp_path, rows, "--json-keys", "title", "body", tok=tok)
        assert made == {key: [reference(row[key])["input_ids"] for row in rows] for key in ("title", "body")}


def test_documents_are_padded_with_the_padding_token_and_only_where_they_need_it(
    golden: Path, tmp_path: Path, qwen3: Tokenizer
) -> None:
    text = "Hello there, friend."
    length = len(qwen3.encode(text))
    for multiple in (length, length + 2):
        made = files(golden, tmp_path, [{"text": text}], "--pad-to-multiple-of", str(multiple))["text"][0]
        assert made == qwen3.encode(text) + [qwen3.pad_id] * (multiple - length)


def test_alpaca_and_forum_rows_become_one_text() -> None:
    row = {"instruction": "q", "input": "", "output": "a"}
    for reading, middle in ((Reading(), ""), (UPSTREAM, "###None\n\n")):
        text = get_handler("AlpacaPretrainHandler", {}, reading).samples(row)[0].fields["text"]
        assert text.endswith(f"### Instruction:\nq\n\n{middle}### Response: ASSISTANT: a")
    post = {"title": "T", "question_body": "Q", "answer_body": "A"}
    text = get_handler("StackOverflowPythonPretrainHandler", {}).samples(post)[0].fields["text"]
    assert text == "In python, T\n### Question:\nQ\n### Response:\nA\n"
    talk = {"conversations": [turn("human", "a "), turn("gpt", "b")]}
    assert get_handler("SharegptPretrainHandler", {}).samples(talk)[0].fields == {"text": "a b"}


def test_r1_rows_are_prompts_and_the_answer_is_a_field_of_its_own(
    golden: Path, tmp_path: Path, qwen3: Tokenizer
) -> None:
    row = {"conversations": [turn("human", "a"), turn("gpt", "b"), turn("human", "c"), turn("gpt", "d")], "id": 7}
    words = ["--handler-name", "R1SharegptStyleInstructionHandler", "--dataset-additional-keys", "labels", "id"]
    made = files(golden, tmp_path, [row], "--prompt-type", "qwen", *words)
    assert made["packed_labels"] == [qwen3.encode("d")] and made["packed_id"] == [qwen3.encode("7")]
    prompt = qwen3.decode(made["packed_input_ids"][0])
    assert "assistant\nb<|im_end|>" in prompt and prompt.endswith("c<|im_end|>\n<|im_start|>assistant\n")
    assert made["packed_attention_mask"] == [[1] * len(made["packed_input_ids"][0])]


def test_hunyuan_rows_are_trained_between_the_marks_of_its_chat_template(golden: Path, tmp_path: Path) -> None:
    import shutil

    folder = tmp_path / "_tok" / "hunyuan"
    shutil.copytree(golden / "_tok" / "qwen3", folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    known = {"1511": "<|startoftext|>", "1512": "<|extra_0|>", "1513": "<|eos|>"}
    config["added_tokens_decoder"] |= {i: {"content": token, "special": True} for i, token in known.items()}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "chat_template.jinja").write_text(
        "{% for m in messages %}{% if m.role == 'user' %}<|startoftext|>{{ m.content }}<|extra_0|>{% else %}"
        "{{ m.content }}<|eos|>{% endif %}{% endfor %}"
    )
    row = {"conversations": [turn("human", "a<|eos|>"), turn("gpt", "b"), turn("human", "c"), turn("gpt", "d")]}
    made = files(tmp_path, tmp_path, [row], "--handler-name", "HunyuanInstructionHandler", tok="hunyuan")
    tokenizer = load_tokenizer(folder)
    labels = [token for token in made["packed_labels"][0] if token != -100]
    assert tokenizer.decode(labels) == "<|extra_0|>b<|eos|><|extra_0|>d<|eos|>"
    assert made["packed_input_ids"][0].count(1513) == 2, "the user's own is text"


def test_left_out_the_handler_is_that_of_running_text_and_an_unknown_one_is_refused_in_every_mode(
    golden: Path, tmp_path: Path
) -> None:
    row = [{"text": "a b"}]
    assert files(golden, tmp_path, row) == files(golden, tmp_path, row, "--handler-name", "GeneralPretrainHandler")
    for mode in ([], ["--compat", "upstream"]):
        with pytest.raises(UsageError, match="'GeneralPretrainHandlr'; did you mean 'GeneralPretrainHandler'"):
            files(golden, tmp_path, row, "--handler-name", "GeneralPretrainHandlr", *mode)
    with pytest.raises(UsageError, match="needs --prompt-type"):
        files(golden, tmp_path, row, "--handler-name", SHAREGPT)
    with pytest.raises(UsageError, match="--prompt-type qwen3 has no effect with GeneralPretrainHandler"):
        files(golden, tmp_path, row, "--prompt-type", "qwen3")
    with pytest.raises(UsageError, match="--pack joins rows of conversations"):
        files(golden, tmp_path, row, "--pack", "--seq-length", "8")
    with pytest.raises(InputError, match="no chat template"):
        files(golden, tmp_path, [{"conversations": [turn("human", "a"), turn("gpt", "b")]}], "--handler-name", SHAREGPT,
              "--prompt-type", "hf", tok="qwen_base")  # fmt: skip
