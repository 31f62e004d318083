"""Preprocessing inside training: offline's bytes, made once, found by their content."""

import json
import os
import signal
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from importlib import import_module
from multiprocessing import get_context
from pathlib import Path

import pytest

from mindspeed_llm.arguments.parser import parse
from mindspeed_llm.arguments.preprocess import PreprocessOptions
from mindspeed_llm.arguments.sources import SourceOptions
from mindspeed_llm.data import on_the_fly
from mindspeed_llm.data.on_the_fly import prepare_rows
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
    made = prepare_rows(inside, tmp_path / "cache")
    assert made.made and contents(made.prefix) == contents(tmp_path / "offline" / "x")
    assert len(contents(made.prefix)) == 6
    monkeypatch.setattr(on_the_fly, "preprocess", lambda _: pytest.fail("it is there already"))
    again = prepare_rows(inside, tmp_path / "cache")
    assert not again.made and again.prefix == made.prefix and again.report["rows"] == report["rows"]


def test_what_changes_the_tokens_changes_the_folder_and_nothing_else_does(
    options: PreprocessOptions, tmp_path: Path
) -> None:
    inside = replace(options, output_prefix=None)
    prefix = prepare_rows(inside, tmp_path / "cache").prefix
    for same in (replace(inside, workers=2), replace(inside, log_interval=7)):
        assert not prepare_rows(same, tmp_path / "cache").made
    others = [
        prepare_rows(other, tmp_path / "cache").prefix
        for other in (replace(inside, system="s"), replace(inside, seed=2), replace(inside, enable_thinking="true"))
    ]
    with (tmp_path / "rows.jsonl").open("a") as stream:
        stream.write('{"instruction": "q", "output": "a"}\n')
    others.append(prepare_rows(inside, tmp_path / "cache").prefix)
    assert len({prefix, *others}) == 5


def killed(options: PreprocessOptions, cache: Path, module: str, name: str, call: int) -> None:
    """Prepare, and die by SIGKILL at the `call`-th use of `module.name`; run in a process of its own."""
    owner, seen = import_module(module), [0]
    real = getattr(owner, name)

    def dying(*args: object, **kwargs: object) -> object:
        seen[0] += 1
        if seen[0] == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args, **kwargs)

    setattr(owner, name, dying)
    prepare_rows(options, cache)


def test_killed_half_way_the_next_run_makes_the_same_files_and_two_at_once_make_them_once(
    options: PreprocessOptions, tmp_path: Path
) -> None:
    preprocess(options)
    inside, expected = replace(options, output_prefix=None), contents(tmp_path / "offline" / "x")
    places = (("mindspeed_llm.data.preprocess", "complete", 1), ("mindspeed_llm.data.publish", "_write_synced", 1),
              ("mindspeed_llm.data.publish", "_sync_folder", 2))  # fmt: skip
    for number, place in enumerate(places):
        process = get_context("fork").Process(target=killed, args=(inside, tmp_path / f"c{number}", *place))
        process.start()
        process.join(60)
        assert process.exitcode == -signal.SIGKILL, place
        assert contents(prepare_rows(inside, tmp_path / f"c{number}").prefix) == expected
        assert not [*(tmp_path / f"c{number}").glob("*/.*.partial")]
    with ThreadPoolExecutor(2) as both:  # flock is held by the open file, so that two threads are two processes to it
        found = list(both.map(lambda _: prepare_rows(inside, tmp_path / "both"), range(2)))
    assert sorted(one.made for one in found) == [False, True] and contents(found[0].prefix) == expected


def test_what_cannot_be_trained_on_is_refused(options: PreprocessOptions, tmp_path: Path) -> None:
    for wrong in (options, replace(options, output_prefix=None, num_shards=2)):
        with pytest.raises(UsageError, match=r"preprocess_data.py alone"):
            prepare_rows(wrong, tmp_path)
    text = replace(options, output_prefix=None, handler_name="AlpacaPretrainHandler", sources=SourceOptions())
    with pytest.raises(UsageError, match="AlpacaPretrainHandler makes text, no conversations"):
        prepare_rows(replace(text, input=str(tmp_path / "rows.jsonl"), prompt_type=None), tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot write to .*--data-cache-dir"):
        prepare_rows(replace(options, output_prefix=None), tmp_path / "file")
