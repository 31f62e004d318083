"""What a plan says of rows nobody has prepared, and of pairs: the lengths that preparing them would give."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mindspeed_llm.arguments.parser import parse
from mindspeed_llm.arguments.programs import PosttrainOptions
from mindspeed_llm.data import sample_lengths as sampling
from mindspeed_llm.errors import InputError, UsageError
from mindspeed_llm.planning.propose import Lengths, propose
from mindspeed_llm.planning.show import table
from mindspeed_llm.training import planned
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
    read = sampling.first_rows

    def noting(*given: Any) -> Any:
        for row in read(*given):
            seen.append(Path(row.file).name)
            yield row

    monkeypatch.setattr(sampling, "first_rows", noting)
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


def test_a_plan_of_raw_rows_writes_nothing(tmp_path: Path) -> None:
    planned_for("--seq-length", 64, *raw_chat(), "--data-cache-dir", tmp_path / "cache", "--save", tmp_path / "run")
    assert not list(tmp_path.iterdir())


def test_packed_raw_rows_are_as_long_as_a_pack() -> None:
    found = planned_for("--seq-length", 128, "--pack", "--neat-pack", *raw_chat())
    assert (found.longest, found.mean) == (128, 128) and "packed to --seq-length 128" in found.origin


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
