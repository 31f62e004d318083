"""`--compat upstream` gives upstream's recorded tokens, for every recorded case of preprocessing."""

import json
from pathlib import Path

import pytest

from mindspeed_llm.arguments.parser import parse
from mindspeed_llm.arguments.preprocess import PreprocessOptions
from mindspeed_llm.data.indexed_file import IndexedFile
from mindspeed_llm.data.preprocess import preprocess
from mindspeed_llm.data.templates import TEMPLATES_FILE
from mindspeed_llm.data.tokenizer import load_tokenizer
from mindspeed_llm.errors import InputError, UsageError
from tests.data.contract_reading import Reader, Vocabulary

CASES = Path(__file__).resolve().parents[3] / "shared" / "golden" / "cases"

# recorded cases that are not compared (numbers: the recordings' README)
EXEMPT = {
    "A_pretrain_unknown_handler": "18: an unknown handler silently means running text; here refused in every mode",
    "A_merge": "files are merged, not made: tests/data/test_shards.py",
    "A_openai_tools_deepseek4_think_false_drop_true": "deepseek4 is no template of this repository",
    "A_openai_tools_deepseek4_think_false_drop_false": "deepseek4 is no template of this repository",
}
FLAGS_WITHOUT_EFFECT = {"--streaming": 0}
# recorded crashes whose remedy is an error message
REFUSED = {
    "A_alpaca_no_prompt_type": (UsageError, "--prompt-type"),
    "A_mapkeys_bad_value": (InputError, "nope"),
    "A_neatpack_nopack": (UsageError, "--pack"),
    "A_pack_noseq_qwen": (UsageError, "--seq-length"),
    "A_ppo_sharegpt_tools": (InputError, "has no column 'output' .*--map-keys"),
}
# recorded crashes that are files here -> a recorded case that holds the same rows
SAME_ROWS = {
    "A_many_nsubs2": "A_many_w1",
    "A_pretrain_nsubs2": "A_pretrain_qwen3_eod",
    "A_pretrain_nsubs3": "A_pretrain_qwen3_eod",
    "A_lf_a": "A_alpaca_qwen_nomap",
}
# recorded crashes that are files here -> rows dropped, by reason
DROPPED = {
    "A_sharegpt_emptyconv": {"column 'conversations' is an empty list": 1},
    "A_sharegpt_empty": {
        "roles out of order: assistant after nothing": 1,
        "a turn is by 'bot', known are human, gpt, observation, function_call": 1,
        "no text at all": 1,
    },
}
TOOLS_OF_QWEN3 = ("A_tools_qwen3", "A_openai_tools_qwen3")
BAD_CALLS = "A_tools_badjson_qwen3"
CRASHED = {*REFUSED, *SAME_ROWS, *DROPPED, *TOOLS_OF_QWEN3, BAD_CALLS}


def expectation(name: str) -> dict:
    return json.loads((CASES / name / "expected.json").read_text())


def recorded_cases() -> list[str]:
    """The recorded cases that must come out token for token: all that are not named above; empty without recordings."""
    return [f.name for f in sorted(CASES.glob("A_*")) if f.name not in EXEMPT and f.name not in CRASHED]


def arguments(golden: Path, name: str, prefix: Path) -> list[str]:
    """A recorded case's command line, its output under `prefix`."""
    folder = golden / "cases" / name
    words = [
        w.replace("${CASE}", str(folder)).replace("${TOK}", str(golden / "_tok")) for w in expectation(name)["args"]
    ]
    words[words.index("--output-prefix") + 1] = str(prefix)
    return [word for word in words if word not in FLAGS_WITHOUT_EFFECT]


def run_case(golden: Path, name: str, out: Path, *more: str) -> tuple[dict, dict[str, IndexedFile]]:
    """Preprocess a recorded case's input: (our report, our files by the recorded names)."""
    args = expectation(name)["args"]
    prefix = out / args[args.index("--output-prefix") + 1].rpartition("/")[2]
    words = [*arguments(golden, name, prefix), *more]
    report = preprocess(parse(PreprocessOptions, words, "preprocess_data.py"))
    made = {file.stem: IndexedFile(file.with_suffix("")) for file in sorted(out.glob("*_document.idx"))}
    return report, made


@pytest.mark.parametrize("name", recorded_cases() or [pytest.param("none", marks=pytest.mark.skip("no recordings"))])
def test_every_recorded_case_comes_out_token_for_token(golden: Path, name: str, tmp_path: Path) -> None:
    _, files = run_case(golden, name, tmp_path, "--compat", "upstream")
    recorded = expectation(name)["files"]
    assert sorted(files) == sorted(recorded)
    for key, file in files.items():
        assert [file[i].tolist() for i in range(len(file))] == recorded[key]["sequences"], key
        assert file.documents.tolist() == recorded[key]["document_indices"]
        assert file.lengths.tolist() == recorded[key]["sequence_lengths"]
        assert file.offsets.tolist() == recorded[key]["sequence_pointers"]


@pytest.mark.parametrize(
    "name", ["A_alpaca_qwen3_think_true", "A_alpaca_qwen3_think_false", "A_alpaca_qwen3_think_none"]
)
def test_files_are_byte_equal_to_upstreams(golden: Path, name: str, tmp_path: Path) -> None:
    run_case(golden, name, tmp_path, "--compat", "upstream")
    for file in sorted((golden / "cases" / name).glob("out_packed_*")):
        assert (tmp_path / file.name).read_bytes() == file.read_bytes(), file.name


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("mode", [(), ("--compat", "upstream")])
def test_recorded_crashes_of_the_command_line_are_one_line_errors(
    golden: Path, name: str, mode: tuple[str, ...], tmp_path: Path
) -> None:
    error, mentions = REFUSED[name]
    with pytest.raises(error, match=mentions):
        run_case(golden, name, tmp_path, *mode)
    assert list(tmp_path.iterdir()) == []


def texts(golden: Path, files: dict[str, IndexedFile]) -> list[str]:
    """The rows as text."""
    file, tokenizer = files["out_packed_input_ids_document"], load_tokenizer(golden / "_tok" / "qwen3")
    return [tokenizer.decode(file[i].tolist()) for i in range(len(file))]


def test_every_recorded_case_is_compared_or_named_with_what_we_do_instead(golden: Path) -> None:
    for name in (folder.name for folder in (golden / "cases").glob("A_*")):
        if name not in EXEMPT:
            assert (expectation(name)["status"] == "ok") is (name not in CRASHED), f"{name}: neither compared nor named"


@pytest.mark.parametrize("name", SAME_ROWS)
def test_recorded_crashes_over_parts_and_named_data_are_the_files_of_another_recorded_case(
    golden: Path, name: str, tmp_path: Path
) -> None:
    _, files = run_case(golden, name, tmp_path, "--compat", "upstream")
    recorded = expectation(SAME_ROWS[name])["files"]
    assert sorted(files) == sorted(recorded)
    for key, file in files.items():
        rows = [file[i].tolist() for i in range(len(file))]
        assert rows and rows == recorded[key]["sequences"][: len(rows)], key
        assert name == "A_lf_a" or len(rows) == len(recorded[key]["sequences"])


@pytest.mark.parametrize("name", DROPPED)
def test_recorded_crashes_over_one_row_drop_that_row_and_write_the_others(
    golden: Path, name: str, tmp_path: Path
) -> None:
    report, files = run_case(golden, name, tmp_path)
    assert {reason: entry["count"] for reason, entry in report["dropped"].items()} == DROPPED[name]
    source = json.loads((golden / "cases" / name / "input.json").read_text(encoding="utf-8"))
    bad = {entry["row"] for reason in report["dropped"].values() for entry in reason["rows"]}
    bad |= {entry["row"] for reason in report["left_out"].values() for entry in reason["rows"]}
    made = texts(golden, files)
    kept = [row["conversations"] for n, row in enumerate(source, 1) if n not in bad]
    assert len(made) == len(kept) > 0
    for text, turns in zip(made, kept, strict=True):
        answered = turns[: max(n for n, turn in enumerate(turns, 1) if turn["from"] == "gpt")]
        assert all(turn["value"] in text for turn in answered)
        assert name == "A_sharegpt_emptyconv" or text.endswith("".join(t["value"] for t in answered if t != turns[0]))


@pytest.mark.parametrize("name", TOOLS_OF_QWEN3)
def test_recorded_crashes_over_qwen3s_tools_are_the_straight_reading_of_its_template(
    golden: Path, name: str, tmp_path: Path
) -> None:
    _, files = run_case(golden, name, tmp_path)
    vocabulary = Vocabulary(golden / "_tok" / "qwen3")
    entry = next(e for e in json.loads(TEMPLATES_FILE.read_text(encoding="utf-8")) if e["name"] == "qwen3")
    file = next((golden / "cases" / name).glob("input.json*"))
    content = file.read_text(encoding="utf-8")
    rows = json.loads(content) if file.suffix == ".json" else [json.loads(line) for line in content.splitlines()]
    assert len(rows) == len(files["out_packed_input_ids_document"])
    for n, row in enumerate(rows):
        messages, system, tools = as_conversation(row)
        ids, labels = Reader(entry, vocabulary).row(messages, system, "none", tools)
        assert files["out_packed_input_ids_document"][n].tolist() == ids, texts(golden, files)[n]
        assert files["out_packed_labels_document"][n].tolist() == labels


def as_conversation(row: dict) -> tuple[list[tuple[str, str]], str, list[dict]]:
    """(role and text of each message, system, tools) of a recorded ShareGPT or OpenAI row."""
    tools = json.loads(row["tools"]) if isinstance(row.get("tools"), str) and row["tools"] else row.get("tools") or []
    if "conversations" in row:
        roles = {"human": "user", "gpt": "assistant", "function_call": "function", "observation": "observation"}
        return [(roles[turn["from"]], turn["value"]) for turn in row["conversations"]], row.get("system", ""), tools
    messages = []
    for entry in row["messages"]:
        thought = f"<think>\n{entry['reasoning_content']}\n</think>\n\n" if entry.get("reasoning_content") else ""
        calls = [f"<tool_call>\n{spelled_call(call)}\n</tool_call>" for call in entry.get("tool_calls") or []]
        text = thought + "\n".join([*([entry["content"]] if entry["content"] else []), *calls])
        messages.append(({"tool": "observation"}.get(entry["role"], entry["role"]), text))
    return messages, "", tools


def spelled_call(call: dict) -> str:
    arguments = call["function"]["arguments"]
    spelled = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    value = json.dumps(json.loads(spelled), ensure_ascii=False)
    return f'{{"name": "{call["function"]["name"]}", "arguments": {value}}}'


def test_recorded_crash_over_a_call_that_is_no_json_drops_the_row_and_says_why(golden: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no row can be used.*a call of tools is not JSON with name and arguments"):
        run_case(golden, BAD_CALLS, tmp_path)
    assert list(tmp_path.iterdir()) == []
