"""Data sets named in LLaMA-Factory's dataset_info.json."""

import json
from pathlib import Path

import pytest

from mindspeed_llm.arguments.parser import parse
from mindspeed_llm.arguments.preprocess import PreprocessOptions
from mindspeed_llm.data.indexed_file import IndexedFile
from mindspeed_llm.data.llama_factory import HANDLER, named_data
from mindspeed_llm.data.preprocess import preprocess
from mindspeed_llm.errors import InputError, UsageError


def made(golden: Path, prefix: Path, *words: str) -> list[list[int]]:
    common = [
        "--output-prefix",
        str(prefix),
        "--tokenizer-name-or-path",
        str(golden / "_tok" / "qwen3"),
        "--prompt-type",
        "qwen",
    ]
    preprocess(parse(PreprocessOptions, [*common, "--overwrite", *words], "preprocess_data.py"))
    file = IndexedFile(prefix.with_name(f"{prefix.name}_packed_input_ids_document"))
    return [file[i].tolist() for i in range(len(file))]


def test_entries_of_two_formats_are_the_rows_their_handlers_make(golden: Path, tmp_path: Path) -> None:
    folder = golden / "cases" / "A_lf_a" / "input"
    named = ["--handler-name", HANDLER, "--dataset-dir", str(folder), "--input"]
    alpaca = made(
        golden, tmp_path / "x", "--handler-name", "AlpacaStyleInstructionHandler", "--input", str(folder / "a.json")
    )
    keys = json.dumps({"messages": "conversations", "system": "system", "tools": "tools"})
    sharegpt = made(golden, tmp_path / "x", "--handler-name", "SharegptStyleInstructionHandler", "--map-keys", keys,
                    "--input", str(folder / "s.json"))  # fmt: skip
    assert made(golden, tmp_path / "y", *named, "a") == alpaca
    assert made(golden, tmp_path / "y", *named, "a,s") == alpaca + sharegpt
    drawn = made(golden, tmp_path / "y", *named, "a,s", "--max-samples", "2")
    assert len(drawn) == 4 and all(row in alpaca for row in drawn[:2]) and all(row in sharegpt for row in drawn[2:])
    mixed = made(golden, tmp_path / "y", *named, "a,s", "--mix-strategy", "interleave_over")
    assert len(mixed) > 8 and {tuple(row) for row in mixed} == {tuple(row) for row in alpaca + sharegpt}


def test_preferences_are_read_by_the_pairwise_handlers(golden: Path, tmp_path: Path) -> None:
    rows = [{"instruction": "q", "chosen": "a", "rejected": "b"}]
    (tmp_path / "p.json").write_text(json.dumps(rows))
    entry = {
        "file_name": "p.json",
        "ranking": True,
        "columns": {"prompt": "instruction", "chosen": "chosen", "rejected": "rejected"},
    }
    (tmp_path / "dataset_info.json").write_text(json.dumps({"p": entry, "i": {"file_name": "p.json"}}))
    assert named_data(str(tmp_path), "p")[0].handler == "AlpacaStylePairwiseHandler"
    words = ["--input", "p,i", "--dataset-dir", str(tmp_path), "--handler-name", HANDLER]
    with pytest.raises(UsageError, match="mix running text, conversations or preferences"):
        made(golden, tmp_path / "x", *words)


def test_a_number_of_samples_draws_rows_or_repeats_them(golden: Path, tmp_path: Path) -> None:
    write_entries(tmp_path, 4, e={"num_samples": 10}, f={"num_samples": 3})
    words = ["--dataset-dir", str(tmp_path), "--handler-name", HANDLER, "--input"]
    rows = {tuple(row) for row in made(golden, tmp_path / "x", *words, "e")}
    drawn = [tuple(row) for row in made(golden, tmp_path / "y", *words, "f")]
    assert len(rows) == 4 and len(drawn) == len(set(drawn)) == 3 and set(drawn) < rows
    assert len(made(golden, tmp_path / "x", *words, "e")) == 10
    assert len(made(golden, tmp_path / "x", *words, "e", "--max-samples", "5")) == 5


def test_an_entry_of_the_hub_is_its_folder_in_the_hubs_cache(
    golden: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_entries(tmp_path, 4)
    asked = []
    monkeypatch.setattr("mindspeed_llm.data.sources._from_hub", lambda name, place: asked.append(name) or tmp_path)
    (tmp_path / "dataset_info.json").rename(tmp_path / "kept")
    (tmp_path / "info").mkdir()
    (tmp_path / "info" / "dataset_info.json").write_text(json.dumps({"h": {"hf_hub_url": "some/set"}}))
    words = ["--dataset-dir", str(tmp_path / "info"), "--handler-name", HANDLER, "--input", "h"]
    assert len(made(golden, tmp_path / "x", *words)) == 4 and asked == ["some/set"]


@pytest.mark.parametrize(
    ("entry", "mentions"),
    [
        ({"columns": ["a"]}, r"entry 'e': columns is \['a'\], which is no object"),
        ({"columns": {"images": "images"}}, "entry 'e': unknown key in columns: 'images'"),
        ({"columns": {"prompt": "question"}}, "no column 'question'.*it has: instruction, input, output"),
        ({"split": "test"}, "split 'test': only train is read"),
        ({"num_samples": 0}, "num_samples 0: must be at least 1"),
        ({"file_name": "nowhere.jsonl"}, "entry 'e':.*nowhere.jsonl: no such file"),
        ({"file_name": ""}, "has no file_name"),
    ],
)
def test_an_entry_that_cannot_be_followed_is_refused_naming_it(
    golden: Path, tmp_path: Path, entry: dict, mentions: str
) -> None:
    write_entries(tmp_path, 4, e=entry)
    with pytest.raises(InputError, match=mentions):
        made(golden, tmp_path / "x", "--dataset-dir", str(tmp_path), "--handler-name", HANDLER, "--input", "e")
    assert not list(tmp_path.glob("x_*"))


def write_entries(folder: Path, count: int, **entries: dict) -> None:
    """rows.jsonl with `count` rows, and a dataset_info.json whose entries name it unless they say otherwise."""
    rows = [{"instruction": f"q{i}", "input": "", "output": f"a{i}"} for i in range(count)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    named = {name: {"file_name": "rows.jsonl", **entry} for name, entry in entries.items()}
    (folder / "dataset_info.json").write_text(json.dumps(named))


def test_what_is_missing_is_named_with_its_file(golden: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="needs --dataset-dir"):
        named_data(None, "a")
    with pytest.raises(InputError, match="dataset_info.json.*--dataset-dir"):
        named_data(str(tmp_path), "a")
    entries = {"alpaca_en": {"ms_hub_url": "x/y"}, "odd": {"file_name": "a.json", "formatting": "dolly"}}
    (tmp_path / "dataset_info.json").write_text(json.dumps(entries))
    with pytest.raises(UsageError, match="'alpaca_eng'; did you mean 'alpaca_en'"):
        named_data(str(tmp_path), "alpaca_eng")
    with pytest.raises(InputError, match="has no file_name but ms_hub_url 'x/y': that is neither fetched nor executed"):
        named_data(str(tmp_path), "alpaca_en")
    with pytest.raises(InputError, match="'dolly' is not one of alpaca, sharegpt"):
        named_data(str(tmp_path), "odd")
