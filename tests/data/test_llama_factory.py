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


def test_what_is_missing_is_named_with_its_file(golden: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="needs --dataset-dir"):
        named_data(None, "a")
    with pytest.raises(InputError, match="dataset_info.json.*--dataset-dir"):
        named_data(str(tmp_path), "a")
    entries = {"alpaca_en": {"hf_hub_url": "x/y"}, "odd": {"file_name": "a.json", "formatting": "dolly"}}
    (tmp_path / "dataset_info.json").write_text(json.dumps(entries))
    with pytest.raises(UsageError, match="'alpaca_eng'; did you mean 'alpaca_en'"):
        named_data(str(tmp_path), "alpaca_eng")
    with pytest.raises(InputError, match="has no file_name but hf_hub_url: download it"):
        named_data(str(tmp_path), "alpaca_en")
    with pytest.raises(InputError, match="'dolly' is not one of alpaca, sharegpt"):
        named_data(str(tmp_path), "odd")
