"""The program as a whole: same files whatever the number of workers, nothing lost, nothing half-written."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from mindspeed_llm.data.dataset import IndexedDataset
from mindspeed_llm.data.indexed_file import IndexedFile
from mindspeed_llm.data.tokenizer import load_tokenizer
from mindspeed_llm.errors import InputError, UsageError
from tests.data.command import run, run_words, words

REPO = Path(__file__).resolve().parents[2]


def rows(count: int) -> list[dict]:
    return [
        {"instruction": f"Question {i}?", "input": "文" * (i % 3), "output": "word " * (i * 7 % 50 + 1)}
        for i in range(count)
    ]


def write(file: Path, values: list) -> Path:
    file.write_text("".join(json.dumps(value) + "\n" for value in values))
    return file


@pytest.fixture
def tokenizer(golden: Path) -> Path:
    return golden / "_tok" / "qwen3"


def run_script(source: Path, prefix: Path, tokenizer: Path, *more: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(REPO / "preprocess_data.py"), *words(source, prefix, tokenizer, *more)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=REPO)


def test_the_files_do_not_depend_on_workers(tokenizer: Path, tmp_path: Path) -> None:
    source = write(tmp_path / "rows.jsonl", rows(1300))
    run(source, tmp_path / "one" / "x", tokenizer, "--seq-length", "64")
    run(source, tmp_path / "two" / "x", tokenizer, "--seq-length", "64", "--workers", "2")
    for file in sorted((tmp_path / "one").glob("x_packed_*")):
        assert file.read_bytes() == (tmp_path / "two" / file.name).read_bytes(), file.name
    reports = [json.loads((tmp_path / side / "x_report.json").read_text()) for side in ("one", "two")]
    for report in reports:
        del report["options"]
    assert reports[0] == reports[1]


def test_bad_rows_are_counted_and_listed_and_the_others_kept(tokenizer: Path, tmp_path: Path) -> None:
    values = rows(20)
    values[3]["output"] = None
    values[7]["instruction"] = 12
    values[9]["output"] = ["a", "b"]
    values[11]["output"] = ""
    report = run(write(tmp_path / "rows.jsonl", values), tmp_path / "x", tokenizer)
    assert report["rows"] == {"read": 20, "written": 17, "dropped": 3, "left_out": 0}
    listed = {reason: [(r["row"], r["excerpt"]) for r in entry["rows"]] for reason, entry in report["dropped"].items()}
    assert listed == {
        "column 'output' is missing or null": [(4, json.dumps(values[3], ensure_ascii=False)[:80])],
        "column 'instruction' is not text": [(8, json.dumps(values[7], ensure_ascii=False)[:80])],
        "column 'output' holds several answers": [(10, json.dumps(values[9], ensure_ascii=False)[:80])],
    }
    assert len(IndexedDataset(tmp_path / "x")) == 17
    assert report["input"][0]["sha256"] and report["tokenizer"]["sha256"] == load_tokenizer(tokenizer).content_hash


def test_too_many_bad_rows_publish_nothing(tokenizer: Path, tmp_path: Path) -> None:
    values = rows(200)
    for value in values[:10]:
        value["output"] = 5
    source = write(tmp_path / "rows.jsonl", values)
    with pytest.raises(InputError, match="10 of 200 rows cannot be used, nothing was written.*'output' is not text"):
        run(source, tmp_path / "out" / "x", tokenizer)
    assert list((tmp_path / "out").iterdir()) == []
    values[0]["output"] = "good"
    assert run(write(source, values), tmp_path / "out" / "x", tokenizer)["rows"]["dropped"] == 9


def test_rows_that_lose_their_tail_are_cut_to_the_length_and_listed(tokenizer: Path, tmp_path: Path) -> None:
    report = run(write(tmp_path / "rows.jsonl", rows(60)), tmp_path / "x", tokenizer, "--seq-length", "40")
    data = IndexedDataset(tmp_path / "x")
    assert len(data) == 60 and max(data.lengths) == 39 == report["longest_row"]
    assert report["cut"]["count"] == len(report["cut"]["rows"]) > 0
    assert all((data[i]["labels"] != -100).any() for i in range(60))
    whole = run(write(tmp_path / "rows.jsonl", rows(60)), tmp_path / "y", tokenizer)
    longer = {i + 1 for i, n in enumerate(IndexedDataset(tmp_path / "y").lengths) if n > 39}
    assert {entry["row"] for entry in report["cut"]["rows"]} == longer and whole["cut"]["count"] == 0


def test_an_end_of_text_token_is_added_within_the_length(tokenizer: Path, tmp_path: Path) -> None:
    source = write(tmp_path / "rows.jsonl", rows(60))
    run(source, tmp_path / "x", tokenizer, "--seq-length", "40", "--append-eod")
    data = IndexedDataset(tmp_path / "x")
    eos = load_tokenizer(tokenizer).eos_id
    assert max(data.lengths) == 40
    assert all(data[i]["input_ids"][-1] == data[i]["labels"][-1] == eos for i in range(len(data)))


@pytest.mark.parametrize("neat", [False, True])
def test_packs_hold_every_row_once_also_the_long_ones(tokenizer: Path, tmp_path: Path, neat: bool) -> None:
    source = write(tmp_path / "rows.jsonl", rows(200))
    more = ["--seq-length", "50", "--pack"] + (["--neat-pack"] if neat else [])
    report = run(source, tmp_path / "x", tokenizer, *more)
    data = IndexedDataset(tmp_path / "x")
    assert report["sequences"] == len(data) and set(data.lengths.tolist()) == {50}
    assert data.neat_packed is neat
    questions = load_tokenizer(tokenizer)
    text = "".join(questions.decode(data[i]["input_ids"].tolist()) for i in range(len(data)))
    assert text.count("<|im_start|>user\nQuestion") == 200 and report["cut"]["count"] > 0
    trained = sum(int((data[i]["labels"] != -100).sum()) for i in range(len(data)))
    assert trained == report["trained_tokens"]
    if neat:
        pad = np.concatenate([data[i]["attention_mask"] == 0 for i in range(len(data))])
        assert pad.sum() == 50 * len(data) - report["tokens"]


def test_reasons_that_quote_the_data_are_told_apart_up_to_a_number(tokenizer: Path, tmp_path: Path) -> None:
    values = [{"conversations": [{"from": "human", "value": "q"}, {"from": f"bot{i}", "value": "a"}]}
              for i in range(500)]  # fmt: skip
    values.append({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]})
    source = write(tmp_path / "rows.jsonl", values)
    more = ["--handler-name", "SharegptStyleInstructionHandler"]
    with pytest.raises(InputError, match="500 of 501 rows cannot be used.*'bot0'.*; and 35 more; repair") as refused:
        run(source, tmp_path / "x", tokenizer, *more)
    assert len(str(refused.value)) < 2000
    for shards in ("1", "3"):
        report = run(source, tmp_path / f"x{shards}", tokenizer, *more, "--on-bad-row", "skip", "--num-shards", shards)
        assert len(report["dropped"]) == 41 and report["rows"]["dropped"] == 500
        others = report["dropped"]["other reasons, given with each row"]
        assert others["count"] == 460 and "'bot499'" in others["rows"][-1]["note"]


def test_half_characters_in_names_of_columns_are_written_as_question_marks(tokenizer: Path, tmp_path: Path) -> None:
    values = [*rows(3), {"\ud800": "x", "instruction": "q"}, {"\udc80": "x", **rows(1)[0]}]
    report = run(write(tmp_path / "rows.jsonl", values), tmp_path / "x", tokenizer)
    assert report["dropped"]["column 'output' is missing or null"]["rows"][0]["excerpt"].startswith('{"?": "x"')
    assert report["rows"]["written"] == 4 and '"?"' in (tmp_path / "x_report.html").read_text().replace("&quot;", '"')


def test_a_longest_row_decides_before_packing_cuts(tokenizer: Path, tmp_path: Path) -> None:
    source = write(tmp_path / "rows.jsonl", rows(60))
    run(source, tmp_path / "all", tokenizer)
    lengths = IndexedDataset(tmp_path / "all").lengths
    more = ["--max-length", "40", "--seq-length", "40", "--pack"]
    report = run(source, tmp_path / "x", tokenizer, *more)
    assert report["rows"]["left_out"] == int((lengths > 40).sum()) > 0 == report["cut"]["count"]
    assert report["tokens"] == int(lengths[lengths <= 40].sum())
    cut = run(source, tmp_path / "y", tokenizer, *more, "--truncation-strategy", "right")
    assert cut["tokens"] == int(np.minimum(lengths, 40).sum()) and cut["rows"]["left_out"] == 0


@pytest.mark.parametrize(("handler", "strategy"), [("pair", "delete"), ("text", "delete"), ("text", "left")])
def test_a_longest_row_holds_for_every_kind_of_row(
    tokenizer: Path, tmp_path: Path, handler: str, strategy: str
) -> None:
    values = [{"instruction": "q", "chosen": "a " * (i % 30), "rejected": "b " * (i % 7), "text": "word " * (i % 40)}
              for i in range(1, 80)]  # fmt: skip
    source = write(tmp_path / "rows.jsonl", values)
    common = ["--input", str(source), "--tokenizer-name-or-path", str(tokenizer)]
    if handler == "pair":
        common += ["--handler-name", "AlpacaStylePairwiseHandler", "--prompt-type", "qwen3"]
    for prefix, more in (("all", []), ("x", ["--max-length", "30", "--truncation-strategy", strategy])):
        given = [*common, "--output-prefix", str(tmp_path / prefix), *more]
        report = run_words(given)
    names = ["packed_chosen_input_ids", "packed_rejected_input_ids"] if handler == "pair" else ["text"]
    whole, kept = ([IndexedFile(tmp_path / f"{prefix}_{name}_document") for name in names] for prefix in ("all", "x"))
    fits = np.all([file.lengths <= 30 for file in whole], axis=0)
    if strategy == "delete":
        assert 0 < fits.sum() == len(kept[0]) and report["rows"]["left_out"] == int((~fits).sum())
        assert all(np.array_equal(a.lengths[fits], b.lengths) for a, b in zip(whole, kept, strict=True))
    else:
        assert [kept[0][i].tolist() for i in range(len(fits))] == [whole[0][i][-30:].tolist() for i in range(len(fits))]


def test_empty_answers_are_told_and_a_file_in_the_way_of_the_folder_is_named(tokenizer: Path, tmp_path: Path) -> None:
    values = [*rows(3), {"instruction": "q", "input": "", "output": " \n"}]
    source = write(tmp_path / "rows.jsonl", values)
    report = run(source, tmp_path / "x", tokenizer)
    assert [entry["row"] for entry in report["remarks"]["an answer is empty"]["rows"]] == [4]
    for prefix in (source / "x", source / "deep" / "x"):
        with pytest.raises(InputError, match=r"--output-prefix .*rows\.jsonl.* is a file, no folder"):
            run(source, prefix, tokenizer)


def test_columns_left_unread_and_odd_thoughts_are_said(tokenizer: Path, tmp_path: Path) -> None:
    values = rows(5)
    values[0] |= {"system": "s", "output": "<think>not closed, x"}
    values[1]["output"] = "<think>\nproper\n</think>\n\nx"
    report = run(write(tmp_path / "rows.jsonl", values), tmp_path / "x", tokenizer, "--append-eod")
    assert [entry["row"] for entry in report["unrecognised_thoughts"]["rows"]] == [1]
    said = " ".join(report["warnings"])
    assert "column 'system' is not read" in said and "--append-eod adds another" in said and "thought tags" in said


def test_existing_output_needs_overwrite_and_stays_when_a_run_fails(tokenizer: Path, tmp_path: Path) -> None:
    source = write(tmp_path / "rows.jsonl", rows(5))
    run(source, tmp_path / "x", tokenizer)
    before = {f.name: f.read_bytes() for f in tmp_path.glob("x_*")}
    with pytest.raises(InputError, match="--overwrite"):
        run(source, tmp_path / "x", tokenizer)
    source.write_text(source.read_text() + '{"instruction": "cut o')
    with pytest.raises(InputError, match=r"rows\.jsonl, row 6: not valid JSON \(Unterm.*--on-bad-row skip"):
        run(source, tmp_path / "x", tokenizer, "--overwrite", "--on-bad-row", "error")
    assert {f.name: f.read_bytes() for f in tmp_path.glob("x_*")} == before
    assert not list(tmp_path.glob(".*"))
    write(source, rows(7))
    assert run(source, tmp_path / "x", tokenizer, "--overwrite")["rows"]["written"] == 7
    assert len(IndexedDataset(tmp_path / "x")) == 7


def test_a_run_stopped_while_publishing_leaves_a_set_that_is_refused(
    tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(write(tmp_path / "rows.jsonl", rows(5)), tmp_path / "x", tokenizer)
    replace, done = Path.replace, []

    def stop_at_third(self: Path, target: Path) -> Path:
        if Path(target).parent == tmp_path:
            done.append(target)
            if len(done) == 3:
                raise KeyboardInterrupt
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", stop_at_third)
    with pytest.raises(KeyboardInterrupt):
        run(write(tmp_path / "rows.jsonl", rows(6)), tmp_path / "x", tokenizer, "--overwrite")
    with pytest.raises(InputError):
        IndexedDataset(tmp_path / "x")
    monkeypatch.setattr(Path, "replace", replace)
    report = run(tmp_path / "rows.jsonl", tmp_path / "x", tokenizer)
    assert report["rows"]["written"] == 6 == len(IndexedDataset(tmp_path / "x")), "the next run finishes the renaming"
    assert not list(tmp_path.glob(".*"))


def test_missing_columns_and_unusable_options_are_refused(tokenizer: Path, tmp_path: Path) -> None:
    source = write(tmp_path / "rows.jsonl", [{"question": "q", "answer": "a"}])
    with pytest.raises(InputError, match=r"no column 'output' \(it has: question, answer\).*--map-keys"):
        run(source, tmp_path / "x", tokenizer)
    with pytest.raises(InputError, match="no column 'text'.*name the columns with --json-keys"):
        given = ["--input", str(source), "--output-prefix", str(tmp_path / "x")]
        run_words([*given, "--tokenizer-name-or-path", str(tokenizer)])
    for keys, mentions in (("{", "not valid JSON"), ("[]", "must be a JSON object"), ('{"a": "b"}', "'a'")):
        with pytest.raises(UsageError, match=mentions):
            run(source, tmp_path / "x", tokenizer, "--map-keys", keys)
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(InputError, match="no row can be used: it is empty"):
        run(tmp_path / "empty.jsonl", tmp_path / "x", tokenizer)


@pytest.mark.parametrize(
    ("more", "status", "mentions"),
    [
        (["--handler-name", "AlpacaStyleInstructionHandlr"], 2, "did you mean 'AlpacaStyleInstructionHandler'"),
        (["--prompt-type", "qwen4"], 2, "did you mean 'qwen"),
        (["--enable-thinking", "maybe"], 2, "maybe"),
        (["--input", "nowhere.jsonl"], 1, "nowhere.jsonl"),
        (["--tokenizer-name-or-path", "nowhere"], 1, "nowhere"),
    ],
)
def test_the_script_says_what_is_wrong_in_one_line(
    tokenizer: Path, tmp_path: Path, more: list[str], status: int, mentions: str
) -> None:
    result = run_script(write(tmp_path / "rows.jsonl", rows(3)), tmp_path / "out" / "x", tokenizer, *more)
    assert result.returncode == status, result.stderr
    assert len(result.stderr.strip().splitlines()) == 1 and mentions in result.stderr
    assert not (tmp_path / "out").exists()


def test_the_script_makes_its_folder_and_says_upstreams_lines(tokenizer: Path, tmp_path: Path) -> None:
    result = run_script(write(tmp_path / "rows.jsonl", rows(30)), tmp_path / "new" / "folder" / "x", tokenizer)
    assert result.returncode == 0, result.stderr
    for line in ("building dataset: ", "dataset will use AlpacaStyleInstructionHandler to handle dataset",
                 "template will use qwen3 to format dataset", "Vocab size: 1511", "Output prefix: ",
                 "Time to startup:", "Processed 30 documents ("):  # fmt: skip
        assert line in result.stderr
    assert len(IndexedDataset(tmp_path / "new" / "folder" / "x")) == 30


def test_with_a_fast_tokenizer_neither_torch_nor_transformers_is_loaded(tokenizer: Path, tmp_path: Path) -> None:
    source = write(tmp_path / "rows.jsonl", rows(3))
    code = (
        "import sys; from mindspeed_llm.data.preprocess import main; main(sys.argv[1:]);"
        "heavy = {'torch', 'megatron', 'transformers', 'datasets', 'pandas'} & set(sys.modules);"
        "assert not heavy, heavy"
    )
    command = [sys.executable, "-c", code, *words(source, tmp_path / "x", tokenizer)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=REPO)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(
    ("kill", "to_all"),
    [(signal.SIGTERM, False), (signal.SIGTERM, True), (signal.SIGINT, True), (signal.SIGKILL, False)],
)
def test_a_stopped_run_publishes_nothing_and_leaves_no_process(
    tokenizer: Path, tmp_path: Path, kill: signal.Signals, to_all: bool
) -> None:
    source = write(tmp_path / "rows.jsonl", rows(500) * 60)
    command = [sys.executable, str(REPO / "preprocess_data.py")]
    command += words(source, tmp_path / "out" / "x", tokenizer, "--workers", "2")
    with subprocess.Popen(command, cwd=REPO, stderr=subprocess.PIPE, text=True, start_new_session=True) as process:
        assert process.stderr is not None
        while not list((tmp_path / "out").glob(".x.*.partial/*.bin")) and process.poll() is None:
            time.sleep(0.02)
        time.sleep(0.5)
        # a terminal's Ctrl-C and a scheduler's cancel go to every process of the run
        os.killpg(process.pid, kill) if to_all else process.send_signal(kill)
        process.wait(timeout=30)
        assert process.returncode != 0
        said = process.stderr.read()  # ends only when no worker holds the pipe any more
    left = list((tmp_path / "out").iterdir())
    assert left == [] if kill != signal.SIGKILL else all(path.name.startswith(".x.") for path in left)
    assert "Traceback" not in said and (kill != signal.SIGINT or said.strip().endswith("error: interrupted"))
