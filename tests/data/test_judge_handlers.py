"""The handlers that need no template, on drawn rows, against the contract read aloud (section 2.3).

The reading below knows the contract's layouts and the tokenizer alone; rows come as their files hold them and leave as
ids and labels, through all of preprocessing that a worker does.
"""

import json
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from mindspeed_llm.data.encode import Limits
from mindspeed_llm.data.handlers import Reading
from mindspeed_llm.data.llama_factory import form_name, named_data
from mindspeed_llm.data.rows import Row
from mindspeed_llm.data.tokenize_rows import Chunk, Job, tokenize_chunk
from mindspeed_llm.data.tokenizer import load_tokenizer
from tests.data.contract_reading import Reader, Vocabulary
from tests.data.test_judge_templates import ENTRIES, SAID, TEXT

ALPACA_LAYOUT = (
    "\nBelow is an instruction that describes a task, paired with an input that provides further context. Write a "
    "response that appropriately completes the request. Please note that you need to think through your response "
    "logically and step by step.\n"
)
VICUNA = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the user's questions.USER: Below is an instruction that describes a task. Write a response "
    "that appropriately completes the request.\n\n### Instruction:\n"
)
SPEECH = TEXT.filter(lambda text: "Human" not in text and "Assistant" not in text)
Tokens = tuple[list[int], list[int]]  # ids, labels


@cache
def texts() -> list[list[str]]:
    """Two hundred times six texts, drawn once."""
    found: list[list[str]] = []

    @settings(
        max_examples=10, deadline=None, database=None, derandomize=True, phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(st.lists(st.tuples(SPEECH, SPEECH, SPEECH, SAID, SAID, SAID), min_size=20, max_size=20))
    def draw(rows: list[tuple[str, ...]]) -> None:
        # the answers of even rows are never empty, so that most rows are trained
        found.extend([*row[:3], *(text + "." * (n % 2) for text in row[3:])] for n, row in enumerate(rows))

    draw()
    return found


def chunk(job: Job, rows: list[dict[str, Any]]) -> Chunk:
    return tokenize_chunk(job, [Row("rows", n, columns) for n, columns in enumerate(rows, 1)])


def fields(made: Chunk, *names: str) -> list[list[list[int]]]:
    """The samples of some fields."""
    found = []
    for name in names:
        field, at, samples = made.fields[name], 0, []
        for length in field.lengths:
            samples.append(field.values[at : at + length].tolist())
            at += length
        found.append(samples)
    return found


def job_for(folder: Path, handler: str, **more: Any) -> Job:
    return Job(str(folder), None, None, "none", handler, "{}", Limits(), **more)


class Reading23:
    """The contract's built-in layouts; of control tokens only the tags of thoughts and tools in answers are tokens."""

    def __init__(self, folder: Path) -> None:
        self.words = Vocabulary(folder)
        self.reader = Reader({}, self.words)

    def one_turn(self, question: str, answer: str, before: str = "") -> Tokens:
        """General, Belle, Leetcode, MOSS: the whole text, a token with any of the answer trained."""
        prompt = f"{ALPACA_LAYOUT}{before}### Instruction:\n{question}\n### Response:\n"
        return self.reader.tokens([(prompt, False), (self.words.mark_tags(f"{answer}\n", self.reader.words), True)])

    def baichuan(self, turns: list[tuple[str, str]]) -> Tokens:
        """MOSS, several turns: 195 before what the user says, 196 before the answer, every answer trained."""
        ids: list[int] = []
        labels: list[int] = []
        for asked, answered in turns:
            source = [195, *self.words.encode(asked)[0], 196]
            target = self.words.encode(answered)[0]
            ids += source + target
            labels += [-100] * len(source) + target
        eos = self.words.added(self.words.eos)
        return [*ids, eos], [*labels, eos]


def general(read: Reading23, t: list[str]) -> tuple[dict, list[Tokens]]:
    row = {"instruction": t[0], "input": t[1], "output": t[3]}
    return row, [read.one_turn(f"{t[0]}\n{t[1]}", t[3])]


def belle(read: Reading23, t: list[str]) -> tuple[dict, list[Tokens]]:
    row = {"instruction": f"Human:{t[0]}\nAssistant:{t[3]}\nHuman:{t[1]}\nAssistant:", "input": "", "output": t[4]}
    asked, answered, again = (text.strip("\n ") for text in (t[0], t[3], t[1]))
    before = f"### Instruction:\n{asked}\n### Response:\n{answered}\n"
    return row, [read.one_turn(again, t[4], before)]


def leetcode(read: Reading23, t: list[str]) -> tuple[dict, list[Tokens]]:
    row = {"code_with_problem": f"{t[0]}```{t[1]}", "code_only": t[3], "explanation_only": t[4]}
    return row, [read.one_turn(t[0].strip(), f"{t[3]}\n{t[4]}")]


def chat_of(t: list[str]) -> tuple[dict, list[tuple[str, str]]]:
    said = [(t[0], t[3]), (t[1], t[4])]
    turns = {
        f"turn_{n}": {"Human": f"<|Human|>: {asked}<eoh>\n", "MOSS": f"<|MOSS|>: {answered}<eom>\n"}
        for n, (asked, answered) in enumerate(said)
    }
    return {"chat": turns}, [(asked.strip(), answered.strip()) for asked, answered in said]


def moss(read: Reading23, t: list[str]) -> tuple[dict, list[Tokens]]:
    row, ((asked, answered), (again, last)) = chat_of(t)
    before = f"### Instruction:\n{asked}\n### Response:\n{answered}\n"
    return row, [read.one_turn(asked, answered), read.one_turn(again, last, before)]


def moss_turns(read: Reading23, t: list[str]) -> tuple[dict, list[Tokens]]:
    row, turns = chat_of(t)
    return row, [read.baichuan(turns)]


PLAIN: dict[str, Callable[[Reading23, list[str]], tuple[dict, list[Tokens]]]] = {
    "GeneralInstructionHandler": general,
    "BelleMultiTurnInstructionHandler": belle,
    "LeetcodePythonInstructionHandler": leetcode,
    "MOSSInstructionHandler": moss,
    "MOSSMultiTurnHandler": moss_turns,
}


@pytest.mark.parametrize("tok", ["qwen3", "llama2"])
@pytest.mark.parametrize("name", PLAIN)
def test_rows_of_handlers_without_a_template_equal_a_straight_reading(golden: Path, name: str, tok: str) -> None:
    read = Reading23(golden / "_tok" / tok)
    rows, expected = [], []
    for drawn in texts():
        row, samples = PLAIN[name](read, drawn)
        rows.append(row)
        expected += samples
    made = chunk(job_for(golden / "_tok" / tok, name), rows)
    assert list(zip(*fields(made, "input_ids", "labels"), strict=True)) == expected
    assert len(expected) >= 200 and not made.dropped and not made.left_out


def alpaca_text(t: list[str]) -> tuple[dict, str]:
    given = f"### Input:\n{t[1]}\n\n" if t[1] else ""
    return {
        "instruction": t[0],
        "input": t[1],
        "output": t[3],
    }, f"{VICUNA}{t[0]}\n\n{given}### Response: ASSISTANT: {t[3]}"


def sharegpt_text(t: list[str]) -> tuple[dict, str]:
    return {"conversations": [{"from": "human", "value": t[0]}, {"from": "gpt", "value": t[3]}]}, t[0] + t[3]


def forum_text(t: list[str]) -> tuple[dict, str]:
    row = {"title": t[0], "question_body": t[1], "answer_body": t[3]}
    return row, f"In python, {t[0]}\n### Question:\n{t[1]}\n### Response:\n{t[3]}\n"


RUNNING: dict[str, Callable[[list[str]], tuple[dict, str]]] = {
    "GeneralPretrainHandler": lambda t: ({"text": t[0] + t[3]}, t[0] + t[3]),
    "AlpacaPretrainHandler": alpaca_text,
    "SharegptPretrainHandler": sharegpt_text,
    "StackOverflowPythonPretrainHandler": forum_text,
}


@pytest.mark.parametrize("tok", ["qwen3", "llama3", "deepseek"])
@pytest.mark.parametrize("name", RUNNING)
def test_documents_are_the_contracts_text_with_what_transformers_puts_around_it(
    golden: Path, name: str, tok: str
) -> None:
    from transformers import AutoTokenizer

    judge = AutoTokenizer.from_pretrained(golden / "_tok" / tok)
    pairs = [RUNNING[name](drawn) for drawn in texts()]
    made = chunk(job_for(golden / "_tok" / tok, name), [row for row, _ in pairs])
    assert fields(made, "text")[0] == [judge(text)["input_ids"] for _, text in pairs if text]


def test_hunyuan_rows_are_trained_from_extra_0_to_eos_of_its_chat_template(golden: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    folder = tmp_path / "hunyuan"
    shutil.copytree(golden / "_tok" / "qwen3", folder)
    file = folder / "tokenizer_config.json"
    config = json.loads(file.read_text())
    marks = {"1511": "<|startoftext|>", "1512": "<|extra_0|>", "1513": "<|eos|>"}
    config["added_tokens_decoder"] |= {i: {"content": token, "special": True} for i, token in marks.items()}
    file.write_text(json.dumps(config))
    (folder / "chat_template.jinja").write_text(
        "{% for m in messages %}{% if m.role == 'user' %}<|startoftext|>{{ m.content }}<|extra_0|>"
        "{% elif m.role == 'system' %}{{ m.content }}\n{% else %}{{ m.content }}<|eos|>{% endif %}{% endfor %}"
    )
    judge = AutoTokenizer.from_pretrained(folder)
    rows, expected = [], []
    control = list(load_tokenizer(folder).control_tokens())
    for t in texts():
        if any(token in text for text in t for token in control):
            continue  # text here, tokens there: see test_handler_formats.py
        said = [("system", t[2]), ("human", t[0]), ("gpt", t[3]), ("human", t[1]), ("gpt", t[4])]
        said = said[0 if t[2] else 1 :]
        rows.append({"conversations": [{"from": who, "value": text} for who, text in said]})
        names = {"human": "user", "gpt": "assistant", "system": "system"}
        messages = [{"role": names[who], "content": text} for who, text in said]
        ids = judge.apply_chat_template(messages, tokenize=True, return_dict=True)["input_ids"]
        labels, inside = [], False
        for token in ids:
            inside = inside or token == 1512
            labels.append(token if inside else -100)
            inside = inside and token != 1513
        expected.append((ids, labels))
    made = chunk(job_for(folder, "HunyuanInstructionHandler"), rows)
    assert list(zip(*fields(made, "input_ids", "labels"), strict=True)) == expected and len(expected) > 60


@pytest.mark.parametrize("template", ["qwen", "llama3", "glm4"])
def test_rows_of_dataset_info_are_read_as_its_entries_say(golden: Path, tmp_path: Path, template: str) -> None:
    tok = {"llama3": "llama3", "glm4": "glm"}.get(template, "qwen3")
    entries = {
        "a": {"file_name": "a.json", "columns": {"prompt": "q", "query": "more", "response": "r", "system": "s"}},
        "s": {"file_name": "s.json", "formatting": "sharegpt", "columns": {"messages": "talk", "system": "s"},
              "tags": {"role_tag": "who", "content_tag": "what", "user_tag": "u", "assistant_tag": "m"}},
    }  # fmt: skip
    (tmp_path / "dataset_info.json").write_text(json.dumps(entries))
    for entry in entries.values():
        (tmp_path / entry["file_name"]).write_text("[]")  # the rows stand below
    forms = [(form_name(entry), entry.handler, entry.map_keys) for entry in named_data(str(tmp_path), "a,s")]
    job = Job(
        str(golden / "_tok" / tok), template, None, "none", forms[0][1], forms[0][2], Limits(), forms=tuple(forms),
        reading=Reading(),
    )  # fmt: skip
    reader = Reader(ENTRIES[template], Vocabulary(golden / "_tok" / tok))
    rows, expected = [], []
    for n, t in enumerate(texts()):
        if n % 2:
            columns: dict[str, Any] = {"q": t[0], "more": t[1], "r": t[3], "s": t[2]}
            messages = [("user", "\n".join(text for text in t[:2] if text)), ("assistant", t[3])]
        else:
            said = [("u", t[0]), ("m", t[3]), ("u", t[1]), ("m", t[4])]
            columns = {"talk": [{"who": who, "what": what} for who, what in said], "s": t[2]}
            messages = [({"u": "user", "m": "assistant"}[who], what) for who, what in said]
        rows.append(Row("rows", n, columns, form=forms[1 - n % 2][0]))
        expected.append(reader.row(messages, t[2], "none", []))
    made = tokenize_chunk(job, rows)
    assert list(zip(*fields(made, "input_ids", "labels"), strict=True)) == expected
