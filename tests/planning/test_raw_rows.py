"""What a plan says of rows nobody has prepared, and of pairs: the lengths that preparing them would give."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mindspeed_llm.arguments.parser import parse
from mindspeed_llm.arguments.programs import PosttrainOptions
from mindspeed_llm.data import plan as plan_module
from mindspeed_llm.data import sample_lengths as sampling
from mindspeed_llm.data.on_the_fly import found_rows, plan_rows, prepare_rows
from mindspeed_llm.data.plan import CHAT_FIELDS
from mindspeed_llm.errors import InputError, UsageError
from mindspeed_llm.planning.propose import Lengths, propose
from mindspeed_llm.planning.show import table
from mindspeed_llm.training import planned
from mindspeed_llm.training.raw_rows import preprocess_options
from tests.fixtures import data, done, hf_model, launch, training
from tests.planning.test_plan import TARGETS
from tests.training.test_preference import HANDLER, pair_data, pair_rows

ROWS = 29
CHAT = ("--handler-name", "AlpacaStyleInstructionHandler", "--prompt-type", "qwen3")
LORA = ("--lora-target-modules", *TARGETS)


def options_of(*more: Any) -> PosttrainOptions:
    words = ["--plan", "--cards", 2, "--load", hf_model(), "--no-pad-to-seq-lengths", *more]
    return parse(PosttrainOptions, [str(word) for word in words], "posttrain_gpt.py")


def planned_for(*more: Any) -> Lengths:
    return planned.wish_of(options_of(*LORA, *more)).lengths


def raw_chat() -> tuple[Any, ...]:
    """The rows that `data()` has prepared."""
    return "--dataset", data(rows=ROWS).with_suffix(".jsonl"), *CHAT


KINDS: dict[str, Callable[[], tuple[tuple[Any, ...], tuple[Any, ...]]]] = {
    "rows": lambda: (raw_chat(), ("--data-path", data(rows=ROWS))),
    "pairs": lambda: (
        ("--stage", "dpo", "--dataset", pair_rows(), *HANDLER),
        ("--stage", "dpo", "--data-path", pair_data()),
    ),
}


@pytest.mark.parametrize("padded", [("--pad-to-multiple-of", 8), ("--padding-free",)], ids=["padded", "padding-free"])
@pytest.mark.parametrize("kind", KINDS)
def test_raw_rows_are_planned_as_the_same_rows_prepared(kind: str, padded: tuple[Any, ...]) -> None:
    raw, prepared = (planned_for("--seq-length", 96, *padded, *words) for words in KINDS[kind]())
    assert raw.origin.startswith(f"all {ROWS if kind == 'rows' else 19} {kind}, of ")
    assert prepared.origin.startswith(f"{ROWS if kind == 'rows' else 19} {kind} of ")
    assert (raw.longest, raw.mean) == (prepared.longest, prepared.mean)
    assert raw.trained == pytest.approx(prepared.trained)
    assert 0.05 < raw.trained < 0.95


def test_of_many_rows_the_first_are_read_and_memory_is_for_the_longest_there_may_be(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(planned, "sample_lengths", lambda *given: sampling.sample_lengths(*given, most=5))
    found = planned_for("--seq-length", 512, *raw_chat())
    assert found.longest == 512 and found.mean < 100
    assert "the first 5 rows of about" in found.origin and "memory for 512" in found.origin


def test_sources_are_read_in_proportion_to_their_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    both = ("--dataset", data(rows=ROWS).with_suffix(".jsonl"), data(rows=4 * ROWS).with_suffix(".jsonl"), *CHAT)
    seen: list[str] = []
    read = sampling.Beginning.rows

    def noting(beginning: sampling.Beginning) -> Any:
        for row in read(beginning):
            seen.append(Path(row.file).name)
            yield row

    monkeypatch.setattr(sampling.Beginning, "rows", noting)
    planned_for("--seq-length", 512, *both)
    assert len(seen) == 5 * ROWS
    monkeypatch.setattr(planned, "sample_lengths", lambda *given: sampling.sample_lengths(*given, most=20))
    seen.clear()
    planned_for("--seq-length", 512, *both)
    counts = [seen.count(name) for name in dict.fromkeys(seen)]
    assert len(counts) == 2 and sum(counts) in (19, 20, 21) and 3 <= counts[1] / counts[0] <= 5


def test_rows_an_earlier_run_has_prepared_are_found_and_not_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = ("--data-cache-dir", tmp_path / "cache")
    argv = training(tmp_path / "run", *raw_chat(), *cache, steps=3)
    prefix = argv.index("--data-path")
    done(launch(1, "posttrain_gpt.py", argv[:prefix] + argv[prefix + 2 :]))
    before = planned_for("--seq-length", 64, *raw_chat())
    monkeypatch.setattr(planned, "sample_lengths", None)
    found = planned_for("--seq-length", 64, *raw_chat(), *cache)
    assert found.origin.startswith(f"{ROWS} rows of ")
    assert (found.longest, found.mean, found.trained) == (before.longest, before.mean, pytest.approx(before.trained))
    assert f"as prepared in {tmp_path / 'cache'}" in found.origin


def bytes_read() -> int:
    """By this process until now, from files of any kind."""
    said = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(said["rchar"])


@pytest.mark.skipif(not Path("/proc/self/io").is_file(), reason="Linux tells how much a process has read")
@pytest.mark.parametrize("drawn", ["", "#500", "interleaved", "entries"])
def test_a_plan_reads_the_beginnings_of_large_files_once(
    drawn: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = data(rows=ROWS).with_suffix(".jsonl").read_bytes()
    file, cache = tmp_path / "rows.jsonl", tmp_path / "cache"
    file.write_bytes(rows * 100)
    with file.open("r+b") as stream:
        stream.truncate(1 << 29)  # a hole: takes no room, and is read as zeros
    words = ["--dataset", f"{file}{drawn if drawn == '#500' else ''}", *CHAT, "--data-cache-dir", cache]
    if drawn == "interleaved":
        words[2:2] = [data(rows=ROWS).with_suffix(".jsonl"), "--mix-strategy", "interleave_over"]
    if drawn == "entries":
        (tmp_path / "dataset_info.json").write_text('{"a": {"file_name": "rows.jsonl"}}')
        words = ["--handler-name", "LlamaFactoryInstructionHandler", "--dataset-dir", tmp_path, "--input", "a",
                 "--max-samples", 700, "--prompt-type", "qwen3", "--data-cache-dir", cache]  # fmt: skip
    (cache / "other").mkdir(parents=True)
    (cache / "other" / "data_report.json").write_text('{"key": "", "input": [{"file": "rows.jsonl", "bytes": 1}]}')
    made: list[int] = []
    monkeypatch.setattr(plan_module, "_job", lambda *given, _of=plan_module._job: made.append(1) or _of(*given))
    before = bytes_read()
    found = planned_for("--seq-length", 512, *words)
    assert bytes_read() - before < (1 << 26) and len(made) == 1
    said = {
        "": "the first 2,000 rows of about ",
        "#500": "the first 2,000 rows of their files, from which 500 are taken, of ",
        "interleaved": f"the first {1000 + ROWS:,} rows of about ",
        "entries": "the first 2,000 rows of their files, from which 700 are taken, of ",
    }
    assert found.origin.startswith(said[drawn])


def test_long_rows_are_sampled_by_their_text() -> None:
    plan = plan_rows(preprocess_options(options_of(*raw_chat()), str(hf_model())), CHAT_FIELDS)
    whole, some = sampling.sample_lengths(plan), sampling.sample_lengths(plan, characters=600)
    assert whole.every and not some.every and 1 < len(some.lengths) < ROWS
    assert some.lengths.tolist() == whole.lengths[: len(some.lengths)].tolist()


def test_of_a_source_from_which_rows_are_drawn_all_rows_count(tmp_path: Path) -> None:
    file = data(rows=ROWS).with_suffix(".jsonl")
    drawn, whole = (planned_for("--seq-length", 512, "--dataset", f"{file}{n}", *CHAT) for n in ("#5", ""))
    assert drawn.origin.startswith(f"all {ROWS} rows of their files, from which 5 are taken,")
    assert (drawn.longest, drawn.mean) == (whole.longest, whole.mean)


def test_prepared_rows_whose_input_was_changed_are_not_taken(tmp_path: Path) -> None:
    file, cache = tmp_path / "rows.jsonl", tmp_path / "cache"
    file.write_bytes(data(rows=ROWS).with_suffix(".jsonl").read_bytes())
    made = preprocess_options(options_of("--dataset", f"{file}#7", *CHAT), str(hf_model()))
    prepared = prepare_rows(made, cache)

    def found(said: str, *more: Any) -> Path | None:
        options = options_of("--dataset", said, *CHAT, *more)
        return found_rows(plan_rows(preprocess_options(options, str(hf_model())), CHAT_FIELDS), cache)

    assert found(f"{file}#7") == prepared.prefix
    assert found(f"{file}#8") is None and found(str(file)) is None and found(f"{file}#7", "--seed", 3) is None
    later = file.stat().st_mtime_ns + 10**12
    os.utime(file, ns=(later, later))
    assert found(f"{file}#7") is None


def test_a_plan_of_raw_rows_writes_nothing(tmp_path: Path) -> None:
    planned_for("--seq-length", 64, *raw_chat(), "--data-cache-dir", tmp_path / "cache", "--save", tmp_path / "run")
    assert not list(tmp_path.iterdir())


def test_packed_raw_rows_are_as_long_as_a_pack() -> None:
    found = planned_for("--seq-length", 128, "--pack", "--neat-pack", *raw_chat())
    assert (found.longest, found.mean) == (128, 128) and "packed to --seq-length 128" in found.origin


def test_rows_within_neat_packs_are_those_of_the_data(tmp_path: Path) -> None:
    pack = ("--seq-length", 128, "--pack", "--neat-pack", *raw_chat())
    prepared = prepare_rows(preprocess_options(options_of(*pack), str(hf_model())), tmp_path).prefix
    divided = prepare_rows(
        preprocess_options(options_of(*pack, "--split", "60,40,0"), str(hf_model())), tmp_path
    ).prefix
    part = planned_for("--seq-length", 128, "--train-data-path", f"{divided}_train")
    found = [
        planned_for(*pack),
        planned_for("--seq-length", 128, "--data-path", prepared),
        planned_for("--seq-length", 128, "--padding-free", *raw_chat()),
        planned_for("--seq-length", 128, "--padding-free", "--data-path", data(rows=ROWS)),
    ]
    assert planned_for("--seq-length", 128, *raw_chat()).rows is None
    inner = [one.rows for one in found]
    assert [longest for longest, _ in inner] == [found[3].longest] * 4 and found[3].longest < 128
    assert part.rows == pytest.approx(inner[1])
    assert [mean for _, mean in inner] == pytest.approx([found[3].mean] * 4)
    wish = planned.wish_of(options_of(*LORA, *pack))
    assert {one.job.rows for one in propose(wish)} == {found[3].longest}


@pytest.mark.parametrize("missing", ["tokenizer", "file"])
def test_what_cannot_be_counted_is_assumed_and_said(missing: str, tmp_path: Path) -> None:
    raw = raw_chat() if missing == "tokenizer" else ("--dataset", "owner/name", *CHAT)
    if missing == "tokenizer":
        (tmp_path / "config.json").write_bytes((hf_model() / "config.json").read_bytes())
        raw = (*raw, "--load", tmp_path)
    found = planned_for("--seq-length", 512, *raw)
    assert (found.longest, found.mean, found.trained) == (512, 512, 1.0)
    why = "--tokenizer-name-or-path" if missing == "tokenizer" else "owner/name is not on this machine"
    assert "rows of --seq-length 512 each, assumed" in found.origin and why in found.origin


def test_rows_without_any_that_can_be_trained_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"instruction": 7, "input": {}, "output": []}\n', encoding="utf-8")
    with pytest.raises(InputError, match="none of the first 2,000 rows can be trained on"):
        planned_for("--dataset", file, *CHAT)


def test_rows_of_another_kind_than_the_stage_reads_are_refused() -> None:
    with pytest.raises(UsageError, match="no pairs of answers that --stage dpo reads"):
        planned_for("--stage", "dpo", *raw_chat())


def test_a_plan_for_preferences_counts_pairs_and_needs_an_adapter() -> None:
    words = ("--stage", "dpo", "--data-path", pair_data(), "--seq-length", 96)
    wish = planned.wish_of(options_of(*LORA, *words))
    found = propose(wish)
    text = table(wish, found, 3)
    assert "DPO, LoRA r 16" in text and "pairs a step" in text and "layout, pairs x micro-batches" in text
    plain = propose(planned.wish_of(options_of(*LORA, "--data-path", data(rows=ROWS), "--seq-length", 96)))
    assert found[0].job.pairs and not plain[0].job.pairs
    with pytest.raises(UsageError, match="tune an adapter"):
        planned.wish_of(options_of(*words))
