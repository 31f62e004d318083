"""Parts of a run: merged they are the one run's bytes, made ones are not made again, other runs' are refused."""

import json
import os
import random
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from mindspeed_llm.arguments.parser import parse
from mindspeed_llm.arguments.preprocess import PreprocessOptions
from mindspeed_llm.data import intake, shards
from mindspeed_llm.data.indexed_file import IndexedFile
from mindspeed_llm.data.preprocess import preprocess
from mindspeed_llm.errors import InputError
from tests.data.command import run, run_words, words

REPO = Path(__file__).resolve().parents[2]
SPLIT = ("--split", "80,15,5")
PACK = ("--pack", "--neat-pack", "--seq-length", "64")


def write_rows(file: Path, count: int = 300) -> Path:
    draw = random.Random(5)
    with file.open("w") as stream:
        for i in range(count):
            row = {"instruction": f"Question {i % 250}?", "output": "word " * draw.randint(1, 30)}
            stream.write("{broken\n" if i == 17 else json.dumps(row) + "\n")
    return file


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "rows.jsonl")


@pytest.fixture
def tokenizer(golden: Path) -> Path:
    return golden / "_tok" / "qwen3"


def data_files(folder: Path) -> dict[str, bytes]:
    return {f.name: f.read_bytes() for f in sorted(folder.iterdir()) if f.suffix in (".bin", ".idx")}


def counts_of(report: dict) -> dict:
    return {name: report[name] for name in report if name not in ("options", "key", "input")}


@pytest.mark.parametrize("more", [(), SPLIT, PACK, SPLIT + PACK], ids=["rows", "split", "pack", "split and pack"])
def test_parts_merged_are_byte_equal_to_one_run(
    source: Path, tokenizer: Path, tmp_path: Path, more: tuple[str, ...]
) -> None:
    once = run(source, tmp_path / "one" / "x", tokenizer, *more)
    merged = run(source, tmp_path / "all" / "x", tokenizer, *more, "--num-shards", "3")
    for index in range(5):
        run(source, tmp_path / "parts" / "x", tokenizer, *more, "--num-shards", "5", "--shard-index", str(index))
    command = ["--input", str(tmp_path / "parts"), "--output-prefix", str(tmp_path / "last" / "x")]
    command += ["--merge-group-keys", "packed_input_ids_document"]
    later = run_words(command)
    one = data_files(tmp_path / "one")
    assert len(one) == (6 if not more or more == PACK else 18)
    assert data_files(tmp_path / "all") == one == data_files(tmp_path / "last")
    assert counts_of(once) == counts_of(merged) == counts_of(later)
    assert not list((tmp_path / "all").glob("*_shard_*")), "parts are removed when the run has merged them itself"


@pytest.mark.parametrize("kind", ["counts", "interleaved", "preferences", "running text"])
def test_parts_of_every_kind_of_rows_and_sources_are_byte_equal_to_one_run(
    source: Path, tokenizer: Path, tmp_path: Path, kind: str
) -> None:
    preferences = tmp_path / "pairs.jsonl"
    with preferences.open("w") as stream:
        for i in range(90):
            row = {"instruction": f"q{i}", "chosen": "a " * (i % 9), "rejected": None if i == 40 else "b " * (i % 5)}
            stream.write(json.dumps({**row, "text": "word " * (i % 13)}) + "\n")
    template = ["--prompt-type", "qwen3"]
    named = [*template, "--model-name", "小黄", "Bot", "--model-author", "Team"]
    more = {
        "counts": ["--dataset", f"{source}#130", f"{source}#700", "self-cognition#200", *named, *PACK, *SPLIT],
        "interleaved": ["--dataset", str(source), "self-cognition#20", "--mix-strategy", "interleave_over", *named],
        "preferences": ["--input", str(preferences), "--handler-name", "AlpacaStylePairwiseHandler", *template, *SPLIT],
        "running text": ["--input", str(preferences), *SPLIT],
    }[kind]
    common = [*more, "--tokenizer-name-or-path", str(tokenizer), "--output-prefix"]
    reports = []
    for folder, options in (("one", ["--workers", "2"] if kind == "counts" else []), ("all", ["--num-shards", "4"])):
        given = [*common, str(tmp_path / folder / "x"), *options]
        reports.append(run_words(given))
    assert len(data_files(tmp_path / "one")) == {"interleaved": 6, "preferences": 24, "running text": 6}.get(kind, 18)
    assert data_files(tmp_path / "one") == data_files(tmp_path / "all")
    assert counts_of(reports[0]) == counts_of(reports[1])


def test_a_run_keeps_few_bytes_per_row(tokenizer: Path, tmp_path: Path) -> None:
    peaks = []
    for count in (15_000, 45_000):
        file = tmp_path / f"{count}.txt"
        file.write_text("".join(f"{i % 97}\n" for i in range(count)))
        given = ["--input", str(file), "--output-prefix", str(tmp_path / f"{count}" / "x"), "--num-shards", "2"]
        given += ["--tokenizer-name-or-path", str(tokenizer), "--split", "90,5,5"]
        options = parse(PreprocessOptions, given, "preprocess_data.py")
        tracemalloc.start()
        preprocess(options)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert (peaks[1] - peaks[0]) / 30_000 < 32


@pytest.mark.parametrize(("rows", "characters"), [(1, 2_000_000), (7, 2_000_000), (500, 100)])
def test_the_files_do_not_depend_on_how_many_rows_are_tokenised_at_once(
    source: Path, tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows: int, characters: int
) -> None:
    run(source, tmp_path / "one" / "x", tokenizer, *PACK)
    monkeypatch.setattr(intake, "CHUNK_ROWS", rows)
    monkeypatch.setattr(intake, "CHUNK_CHARACTERS", characters)
    run(source, tmp_path / "two" / "x", tokenizer, *PACK)
    assert data_files(tmp_path / "one") == data_files(tmp_path / "two")


def test_equal_rows_are_in_one_part_of_a_split_and_shares_are_as_asked(tokenizer: Path, tmp_path: Path) -> None:
    report = run(write_rows(tmp_path / "rows.jsonl", 2000), tmp_path / "x", tokenizer, *SPLIT)
    rows = {}
    for part in ("train", "valid", "test"):
        file = IndexedFile(tmp_path / f"x_{part}_packed_input_ids_document")
        rows[part] = [file[i].tobytes() for i in range(len(file))]
        assert report["parts"][part]["rows"] == len(file)
        own = json.loads((tmp_path / f"x_{part}_report.json").read_text())
        assert own["part"] == part and own["tokenizer"] == report["tokenizer"]
    assert not set(rows["train"]) & set(rows["valid"]) and not set(rows["valid"]) & set(rows["test"])
    distinct = {row for part in rows.values() for row in part}
    assert sum(map(len, rows.values())) == 1999 and report["duplicates"] == 1999 - len(distinct)
    for part, share in (("train", 0.8), ("valid", 0.15), ("test", 0.05)):
        assert abs(len(rows[part]) / 1999 - share) < 0.03
    again = run(write_rows(tmp_path / "rows.jsonl", 1000), tmp_path / "y", tokenizer, *SPLIT)
    fewer = IndexedFile(tmp_path / "y_valid_packed_input_ids_document")
    assert {fewer[i].tobytes() for i in range(len(fewer))} <= set(rows["valid"]), "a row's part depends on it alone"
    assert again["parts"]["test"]["rows"] > 0


def test_parts_that_are_there_are_not_made_again(
    source: Path, tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = run(source, tmp_path / "one" / "x", tokenizer)
    for index in (0, 2):
        run(source, tmp_path / "x", tokenizer, "--num-shards", "3", "--shard-index", str(index))
    made = []
    write = shards.write_rows
    monkeypatch.setattr(shards, "write_rows", lambda plan, folder, b, e: made.append(b) or write(plan, folder, b, e))
    merged = run(source, tmp_path / "x", tokenizer, "--num-shards", "3")
    assert made == [100] and counts_of(merged) == counts_of(one)


def test_parts_of_other_runs_and_missing_ones_are_refused(source: Path, tokenizer: Path, tmp_path: Path) -> None:
    folder = tmp_path / "parts"
    merge = ["--input", str(folder), "--output-prefix", str(tmp_path / "x"), "--merge-group-keys", "a"]
    for index, more in ((0, ()), (1, ("--system", "other"))):
        run(source, folder / "x", tokenizer, "--num-shards", "3", "--shard-index", str(index), *more)
    with pytest.raises(InputError, match="lacks part 2 of 3; make it with --num-shards 3 --shard-index 2"):
        run_words(merge)
    run(source, folder / "x", tokenizer, "--num-shards", "3", "--shard-index", "2")
    with pytest.raises(InputError, match="made from different inputs, options or tokenizers"):
        run_words(merge)
    with pytest.raises(InputError, match="--overwrite"):
        run(source, folder / "x", tokenizer, "--num-shards", "3")


def test_too_many_bad_rows_are_told_when_the_parts_are_merged(tokenizer: Path, tmp_path: Path) -> None:
    source = tmp_path / "rows.jsonl"
    source.write_text('{"instruction": "q", "output": "a"}\n' * 40 + "{broken\n" * 12)
    with pytest.raises(InputError, match="12 of 52 rows cannot be used.*not valid JSON"):
        run(source, tmp_path / "x", tokenizer, "--num-shards", "4")
    assert not list(tmp_path.glob("x_packed*"))


def test_other_programs_files_are_merged_by_name(golden: Path, tmp_path: Path) -> None:
    folder = golden / "cases" / "A_merge"
    expected = json.loads((folder / "expected.json").read_text())
    names = [w.replace("${CASE}", str(folder)).replace("${TOK}", str(golden / "_tok")) for w in expected["args"]]
    names[names.index("--output-prefix") + 1] = str(tmp_path / "out")
    run_words(names)
    for name, recorded in expected["files"].items():
        file = IndexedFile(tmp_path / name)
        assert [file[i].tolist() for i in range(len(file))] == recorded["sequences"]
        assert file.documents.tolist() == recorded["document_indices"]
    with pytest.raises(InputError, match="no file in .* has that in its name"):
        names[names.index("--merge-group-keys") + 1] = "nothing_like_it"
        run_words(names)


SHARDED = (*SPLIT, *PACK, "--num-shards", "3")
KILLS = int(os.environ.get("KILLS", "4"))  # per phase; KILLS=20 for a long run by hand


def driven(trials: list[dict]) -> list[dict | None]:
    """What became of each trial of `killing.py`."""
    command = [sys.executable, str(Path(__file__).with_name("killing.py"))]
    environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false", "PYTHONPATH": str(REPO)}
    done = subprocess.run(command, input=json.dumps({"trials": trials}), capture_output=True, text=True,
                          env=environment)  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize(
    ("phase", "more"),
    [
        ("tokenising", SHARDED), ("merging", SHARDED), ("dividing", SHARDED), ("packing", SHARDED),
        ("publishing", SHARDED), ("tokenising", ()), ("publishing", SPLIT),
    ],
    ids=["tokenising", "merging", "dividing", "packing", "publishing", "tokenising alone", "publishing alone"],
)  # fmt: skip
def test_a_run_killed_at_any_moment_of_a_phase_finishes_when_run_again_without_making_parts_anew(
    tokenizer: Path, tmp_path: Path, phase: str, more: tuple[str, ...]
) -> None:
    source = write_rows(tmp_path / "rows.jsonl", 1500)
    draw = random.Random(f"{phase} {more}")
    run(source, tmp_path / "one" / "x", tokenizer, *more)
    kills = []
    for number in range(KILLS):
        argv = words(source, tmp_path / str(number) / "x", tokenizer, *more)
        count_argv = words(source, tmp_path / "count" / "x", tokenizer, *more)
        kills.append({"argv": argv, "count_argv": count_argv, "phase": phase, "share": draw.random()})
    assert driven(kills) == [None] * KILLS, "every trial is killed"
    parts = [len(list((tmp_path / str(number)).glob("x_shard_*_report.json"))) for number in range(KILLS)]
    merged = [(tmp_path / str(number) / "x_report.json").exists() for number in range(KILLS)]
    again = driven([{"argv": trial["argv"], "phase": None} for trial in kills])
    whole = data_files(tmp_path / "one")
    assert len(whole) == (6 if not more else 18)
    for number, answer in enumerate(again):
        folder = tmp_path / str(number)
        assert answer is not None and (not answer["error"] or (merged[number] and "--overwrite" in answer["error"]))
        assert data_files(folder) == whole
        assert not list(folder.glob(".*")) and not list(folder.glob("*_shard_*"))
        if "--num-shards" in more:
            assert len(answer["made"]) <= (0 if merged[number] else 3 - parts[number]), "made parts are not made again"


def test_the_parts_of_any_number_of_rows_cover_them_once(tokenizer: Path, tmp_path: Path) -> None:
    source = write_rows(tmp_path / "rows.jsonl", 7)
    for index in range(10):
        run(source, tmp_path / "x", tokenizer, "--num-shards", "10", "--shard-index", str(index))
    reports = [json.loads(f.read_text()) for f in sorted(tmp_path.glob("x_shard_*_report.json"))]
    assert [r["shard"]["begin"] for r in reports] == [0] + [r["shard"]["end"] for r in reports[:-1]]
    assert sum(r["rows"]["read"] for r in reports) == 7
    assert np.diff([r["shard"]["begin"] for r in reports]).max() == 1


@pytest.mark.parametrize("removed", [0, 5, 16])
def test_a_run_stopped_while_it_removes_its_merged_parts_removes_the_others_when_run_again(
    source: Path, tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, removed: int
) -> None:
    unlink, done = Path.unlink, []

    def stop(self: Path, missing_ok: bool = False) -> None:
        if "_shard_" in self.name and self.suffix != "" and ".partial" not in str(self) and len(done) == removed:
            raise KeyboardInterrupt
        done.append(self) if "_shard_" in self.name and self.parent == tmp_path else None
        unlink(self, missing_ok)

    more = [*PACK, "--num-shards", "4"]
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        for index in range(4):
            run(source, tmp_path / "x", tokenizer, *more, "--shard-index", str(index))
        done.clear()
        patched.setattr(Path, "unlink", stop)
        run(source, tmp_path / "x", tokenizer, *more)
    assert list(tmp_path.glob("*_shard_*"))
    report = run(source, tmp_path / "x", tokenizer, *more)
    assert not list(tmp_path.glob("*_shard_*")) and report["rows"]["written"] == 299
