"""Preprocessing inside training: offline's bytes, made once, found by their content."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from mindspeed_llm.arguments.parser import parse
from mindspeed_llm.arguments.preprocess import PreprocessOptions
from mindspeed_llm.data import on_the_fly
from mindspeed_llm.data.on_the_fly import prepared_prefix
from mindspeed_llm.data.preprocess import preprocess
from mindspeed_llm.errors import InputError, UsageError


@pytest.fixture
def options(golden: Path, tmp_path: Path) -> PreprocessOptions:
    source = tmp_path / "rows.jsonl"
    source.write_text("".join(json.dumps({"instruction": f"q{i}", "output": f"a{i}"}) + "\n" for i in range(30)))
    words = ["--dataset", f"{source}#20", "self-cognition#5", "--model-name", "Bot", "--model-author", "Team",
             "--tokenizer-name-or-path", str(golden / "_tok" / "qwen3"), "--prompt-type", "qwen3",
             "--output-prefix", str(tmp_path / "offline" / "x")]  # fmt: skip
    return parse(PreprocessOptions, words, "preprocess_data.py")


def contents(prefix: Path) -> list[bytes]:
    return [file.read_bytes() for file in sorted(prefix.parent.glob(f"{prefix.name}_packed_*"))]


def test_on_the_fly_files_are_the_offline_ones_and_made_once(
    options: PreprocessOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    report = preprocess(options)
    assert report["rows"]["written"] == 25
    inside = replace(options, output_prefix=None)
    prefix = prepared_prefix(inside, tmp_path / "cache", builds=True)
    assert contents(prefix) == contents(tmp_path / "offline" / "x") and len(contents(prefix)) == 6
    monkeypatch.setattr(on_the_fly, "preprocess", lambda _: pytest.fail("it is there already"))
    assert prepared_prefix(inside, tmp_path / "cache", builds=True) == prefix
    assert prepared_prefix(inside, tmp_path / "cache", builds=False) == prefix


def test_what_changes_the_tokens_changes_the_folder_and_nothing_else_does(
    options: PreprocessOptions, tmp_path: Path
) -> None:
    inside = replace(options, output_prefix=None)
    prefix = prepared_prefix(inside, tmp_path / "cache", builds=True)
    for same in (replace(inside, workers=2), replace(inside, log_interval=7)):
        assert prepared_prefix(same, tmp_path / "cache", builds=False) == prefix
    for other in (replace(inside, system="s"), replace(inside, seed=2), replace(inside, enable_thinking="true")):
        with pytest.raises(InputError, match="does not see .*data_report.json after 0 s"):
            prepared_prefix(other, tmp_path / "cache", builds=False, patience=0.0)
    with (tmp_path / "rows.jsonl").open("a") as stream:
        stream.write('{"instruction": "q", "output": "a"}\n')
    assert prepared_prefix(inside, tmp_path / "cache", builds=True) != prefix


def test_options_of_the_program_alone_are_refused(options: PreprocessOptions, tmp_path: Path) -> None:
    for wrong in (options, replace(options, output_prefix=None, num_shards=2)):
        with pytest.raises(UsageError, match="preprocess_data.py alone"):
            prepared_prefix(wrong, tmp_path, builds=True)
