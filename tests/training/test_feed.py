"""What the engine receives, step by step, against the order of rows computed straight from the files."""

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.fixtures import data, done, launch, losses, refused, sentence, training
from tests.training import faults

Row = tuple[list[int], list[int]]  # tokens, and labels shifted as the engine gets them


def rows_of(prefix: Path) -> list[Row]:
    """Every row of a prefix, read from .idx and .bin by the format's description alone."""
    fields = []
    for name in ("input_ids", "labels"):
        index = Path(f"{prefix}_packed_{name}_document.idx").read_bytes()
        count = int(np.frombuffer(index, "<u8", 1, 18)[0])
        lengths, begins = np.frombuffer(index, "<i4", count, 34), np.frombuffer(index, "<i8", count, 34 + 4 * count)
        content = Path(f"{prefix}_packed_{name}_document.bin").read_bytes()
        fields.append([np.frombuffer(content, "<i4", n, b).tolist() for n, b in zip(lengths, begins, strict=True)])
    return [(ids, [*labels[1:], -100]) for ids, labels in zip(*fields, strict=True)]


def received(folder: Path, kind: str = "train", size: int = 1) -> list[list[Row]]:
    """The rows of each global batch, without padding, in the stream's order: micro-batch, then rank."""
    ranks = [
        [json.loads(line) for line in (folder / f"{kind}_{r}.jsonl").read_text().splitlines()] for r in range(size)
    ]
    steps = []
    for step in zip(*ranks, strict=True):
        batches = [batch for micro in zip(*step, strict=True) for batch in micro]
        steps.append([_bare(*pair) for b in batches for pair in zip(b["tokens"], b["labels"], strict=True)])
    return steps


def _bare(tokens: list[int], labels: list[int]) -> Row:
    """A row up to its last trained label's token: what stands behind cannot be told from padding."""
    last = max((n for n, label in enumerate(labels) if label != -100), default=-2)
    return tokens[: last + 2], labels[: last + 2]


def order(seed: int, epoch: int, rows: Sequence[int]) -> list[int]:
    """The documented order of an epoch: numpy's permutation by seed and number of the epoch."""
    return [rows[n] for n in np.random.default_rng([seed, epoch]).permutation(len(rows))]


def run(save: Path, *more: object, size: int = 1, **options: Any) -> str:
    """A run that records what its engine receives in `<save>_seen`, beside an interrupted one's."""
    seen = save.with_name(f"{save.name}_seen")
    seen.mkdir(exist_ok=True)
    argv = training(save, "--seq-length", 256, *more, **options)
    return done(launch(size, "posttrain_gpt.py", argv, around=partial(faults.recorded, str(seen)))).out


def seen(save: Path, kind: str = "train", size: int = 1) -> list[list[Row]]:
    return received(save.with_name(f"{save.name}_seen"), kind, size)


def test_the_engine_receives_the_rows_of_a_shuffled_epoch_in_its_documented_order(tmp_path: Path) -> None:
    run(tmp_path / "run", steps=9)
    rows = [_bare(*row) for row in rows_of(data())]
    stream = [rows[n] for epoch in range(2) for n in order(1234, epoch, range(29))]
    assert seen(tmp_path / "run") == [stream[step * 4 : step * 4 + 4] for step in range(9)]


@pytest.mark.distributed
def test_a_blend_keeps_its_shares_pass_after_pass_and_resumes_in_the_middle_of_one_at_another_layout(
    tmp_path: Path,
) -> None:
    first, second = data(rows=11, longest=9), data(rows=7, longest=12, extra=("--system", "old stones"))
    blend = ("--data-path", 3, first, 1, second)
    per_token = "--calculate-per-token-loss"
    out = run(tmp_path / "whole", *blend, per_token, "--save-interval", 4, steps=10)
    assert f"a pass has 14 of 11 rows (75.0%) of {first}, 4 of 7 rows (25.0%) of {second}" in out
    rows = [[_bare(*row) for row in rows_of(prefix)] for prefix in (first, second)]
    assert not [row for row in rows[0] if row in rows[1]], "the two cannot be told apart"
    stream = [row for step in seen(tmp_path / "whole") for row in step]
    for begin in (0, 18):  # 18 rows a pass; the third pass is not complete
        inside = [row in rows[0] for row in stream[begin : begin + 18]]
        assert sum(inside) == 14 and inside != sorted(inside), "shuffled together"
    for part in rows:
        times = [stream[:36].count(row) for row in part]
        assert max(times) - min(times) <= 1
    more = ("--lora-load", tmp_path / "whole" / "iter_0000004", "--micro-batch-size", 1, "--no-load-rng", per_token)
    resumed = run(tmp_path / "rest", *blend, *more, steps=10, size=2)
    assert "resumed at step 4" in resumed and "warning" not in resumed
    assert seen(tmp_path / "rest", size=2) == seen(tmp_path / "whole")[4:]
    assert losses(tmp_path / "rest") == pytest.approx(losses(tmp_path / "whole")[4:], rel=1e-5)


@pytest.mark.distributed
def test_length_grouping_fills_batches_with_rows_of_like_length_on_every_rank(tmp_path: Path) -> None:
    many = data(rows=90)
    common = ("--data-path", many, "--epochs", 1, "--save-interval", 20)
    run(tmp_path / "run", *common, "--group-by-length", "--micro-batch-size", 1, size=2, steps=None)
    steps = seen(tmp_path / "run", size=2)
    rows = [_bare(*row) for row in rows_of(many)]
    lengths = [[len(tokens) for tokens, _ in step] for step in steps]
    assert len(steps) == 23
    assert sorted([row for step in steps for row in step][:90]) == sorted(rows), "the epoch is complete"
    shuffled = [[len(rows[n][0]) for n in order(1234, 0, range(90))[b : b + 4]] for b in range(0, 88, 4)]
    grouped, plain = ([max(step) - min(step) for step in some] for some in (lengths[:22], shuffled))
    assert sum(grouped) < sum(plain) / 2
    assert max(lengths[0]) == max(map(max, lengths)), "the longest comes first"
    other = ("--length-grouping", "--micro-batch-size", 2, "--lora-load", tmp_path / "run" / "iter_0000020")
    again = run(tmp_path / "one", *common, *other, steps=None)
    assert "resumed at step 20" in again and seen(tmp_path / "one") == steps[20:]


@pytest.mark.distributed
def test_parts_made_by_preprocessing_are_found_validated_whole_and_tested_at_the_end(tmp_path: Path) -> None:
    prefix = data(rows=30, extra=("--split", "60,25,15"))
    rows = {part: [_bare(*row) for row in rows_of(prefix.with_name(f"{prefix.name}_{part}"))] for part in
            ("train", "valid", "test")}  # fmt: skip
    assert all(rows.values()) and sum(map(len, rows.values())) == 30
    out = run(tmp_path / "run", "--data-path", prefix, "--eval-interval", 2, "--lr", 0, "--min-lr", 0, size=2, steps=3)
    assert f"found {prefix.name}_train {prefix.name}_valid {prefix.name}_test" in out
    assert out.count("validation loss at iteration") == 2 and out.count("test loss at iteration 3") == 1
    train = [row for step in seen(tmp_path / "run", size=2) for row in step]
    assert all(row in rows["train"] for row in train)
    fillers = ([], [])
    held = [row for step in seen(tmp_path / "run", "valid", 2) for row in step if row != fillers]
    assert held == [*rows["valid"], *rows["valid"], *rows["test"]], "each row once, no row twice to fill a batch"
    named = [f"--{p}-data-path" for p in ("train", "valid")]
    own = (named[0], prefix.with_name(f"{prefix.name}_train"), named[1], prefix.with_name(f"{prefix.name}_valid"))
    alone = run(tmp_path / "own", "--data-path", None, *own, "--lr", 0, "--min-lr", 0, steps=3, size=1)
    value = [line.split("value: ")[1].split()[0] for text in (out, alone) for line in text.splitlines()
             if "validation loss at" in line]  # fmt: skip
    assert float(value[0]) == pytest.approx(float(value[2]), rel=1e-5), "whatever the layout"
    words = training(tmp_path / "no", "--data-path", prefix, "--split", "90,10,0")
    refused(launch(1, "posttrain_gpt.py", words), 2, "is divided already")


@pytest.mark.distributed
def test_orders_of_large_data_sets_are_drawn_by_rank_0_and_mapped_by_the_others(tmp_path: Path) -> None:
    folders = [tmp_path / "kept_seen", tmp_path / "plain_seen"]
    for folder in folders:
        folder.mkdir()
    more = ("--seq-length", 256, "--micro-batch-size", 1, "--data-cache-dir", tmp_path / "orders")
    argv = training(tmp_path / "kept", *more, steps=9)
    out = done(launch(2, "posttrain_gpt.py", argv, around=partial(faults.orders_kept_on_disk, str(folders[0])))).out
    assert f"orders of rows are kept in {tmp_path / 'orders'}" in out
    assert len(list((tmp_path / "orders").glob("*.npy"))) == 2, "one for each epoch"
    argv = training(tmp_path / "plain", *more, steps=9)
    done(launch(2, "posttrain_gpt.py", argv, around=partial(faults.recorded, str(folders[1]))))
    assert received(folders[0], size=2) == received(folders[1], size=2)
    (tmp_path / "file").write_text("")
    argv = training(tmp_path / "no", "--data-cache-dir", tmp_path / "file")
    around = partial(faults.orders_kept_on_disk, str(folders[0]))
    refused(launch(2, "posttrain_gpt.py", argv, around=around), 1, "cannot write to .*file; name another folder")


def raw(folder: Path, rows: int = 21) -> Path:
    """A file of raw rows of unequal length."""
    file = folder / "raw.jsonl"
    with file.open("w", encoding="utf-8") as stream:
        for n in range(rows):
            row = {"instruction": sentence(n, 3), "output": sentence(n + 50, 1 + n * 5 % 17)}
            stream.write(json.dumps(row, ensure_ascii=False) + "\n")
    return file


RAW = ("--data-path", None, "--handler-name", "AlpacaStyleInstructionHandler", "--prompt-type", "qwen3")


@pytest.mark.distributed
def test_raw_rows_give_the_run_of_their_prepared_files_and_are_prepared_once(tmp_path: Path) -> None:
    from tests.fixtures import hf_model

    file, offline = raw(tmp_path), tmp_path / "offline" / "x"
    argv = ["--input", file, "--output-prefix", offline, "--tokenizer-name-or-path", hf_model(), *RAW[2:]]
    done(launch(1, "preprocess_data.py", argv))
    run(tmp_path / "offline_run", "--data-path", offline)
    out = run(tmp_path / "inside", *RAW, "--input", file, size=2, steps=6)
    inside = next((tmp_path / ".data_cache").glob("*/data_packed_labels_document.bin")).parent / "data"
    for kind in ("bin", "idx"):
        for name in ("input_ids", "labels", "attention_mask"):
            ending = f"_packed_{name}_document.{kind}"
            assert Path(f"{inside}{ending}").read_bytes() == Path(f"{offline}{ending}").read_bytes()
    assert "21 rows read, 21 written" in out
    assert losses(tmp_path / "inside") == pytest.approx(losses(tmp_path / "offline_run"), rel=1e-5)
    assert [sorted(step) for step in seen(tmp_path / "inside", size=2)] == [
        sorted(step) for step in seen(tmp_path / "offline_run")
    ]
    again = run(tmp_path / "again", *RAW, "--dataset", file, steps=6)
    assert len(list((tmp_path / ".data_cache").iterdir())) == 2, "--dataset is another way to say it: its own files"
    third = run(tmp_path / "third", *RAW, "--dataset", file, "--num-workers", 0, steps=6)
    assert "rows prepared by an earlier run" in third and "rows prepared by" not in again
    assert losses(tmp_path / "third") == losses(tmp_path / "again")
    divided = run(tmp_path / "divided", *RAW, "--input", file, "--split", "70,30,0", "--pack", steps=3)
    assert "validation rows" in divided and "validation loss at iteration 3" in divided


@pytest.mark.distributed
def test_a_failure_while_rows_are_prepared_ends_every_rank_at_once_with_its_cause(tmp_path: Path) -> None:
    argv = training(tmp_path / "run", *RAW, "--input", raw(tmp_path))
    for kind, status in (("InputError", 1), ("UsageError", 2)):
        around = partial(faults.raised_while_preparing, kind, 0.5)
        outcomes = launch(2, "posttrain_gpt.py", argv, around=around)
        refused(outcomes, status, "the cause of it")
        assert "the cause of it" in outcomes[1].err
    missing = training(tmp_path / "run", *RAW, "--input", tmp_path / "nowhere.jsonl")
    refused(launch(2, "posttrain_gpt.py", missing), 1, "nowhere.jsonl: no such file")
    both = training(tmp_path / "run", "--input", raw(tmp_path))
    refused(launch(1, "posttrain_gpt.py", both), 2, "--input names raw rows and --data-path prepared ones")
    stray = training(tmp_path / "run", "--mask-history")
    refused(launch(1, "posttrain_gpt.py", stray), 2, "--mask-history is about raw rows")


@pytest.mark.distributed
def test_without_shared_storage_each_node_prepares_its_own_and_other_rows_are_refused(tmp_path: Path) -> None:
    argv = training(tmp_path / "run", *RAW, "--input", "raw.jsonl", "--no-shared-storage", steps=3)
    for rank in range(2):
        (tmp_path / f"node{rank}").mkdir()
        raw(tmp_path / f"node{rank}")
    around = partial(faults.node_folders, str(tmp_path))
    done(launch(2, "posttrain_gpt.py", argv, around=around))
    made = [sorted(p.name for p in (tmp_path / f"node{rank}" / ".data_cache").iterdir()) for rank in range(2)]
    assert made[0] == made[1] and len(made[0]) == 1
    argv[argv.index("raw.jsonl")] = tmp_path / "node0" / "raw.jsonl"
    argv[argv.index(tmp_path / "run")] = tmp_path / "shared"
    out = done(launch(2, "posttrain_gpt.py", argv, around=around)).out
    assert out.count("rows prepared by an earlier run") == 2, "where the folder is shared after all, nothing is lost"
    argv[argv.index(tmp_path / "node0" / "raw.jsonl")] = "raw.jsonl"
    raw(tmp_path / "node1", rows=20)
    argv[argv.index(tmp_path / "shared")] = tmp_path / "other"
    refused(launch(2, "posttrain_gpt.py", argv, around=around), 1, "rank 1 has other rows in its files than rank 0")
    (tmp_path / "node1" / "raw.jsonl").unlink()
    refused(launch(2, "posttrain_gpt.py", argv, around=around), 1, "--input raw.jsonl: no such file")


@pytest.mark.distributed
def test_every_data_set_of_a_blend_must_fit_the_model_and_the_others(tmp_path: Path) -> None:
    other = data(rows=11, longest=9, template="chatml")
    words = training(tmp_path / "run", "--data-path", 1, data(), 1, other)
    refused(launch(2, "posttrain_gpt.py", words), 1, "were made with different settings .template: qwen3 and chatml")
    words = training(tmp_path / "run", "--data-path", 1, data(), 1, other, "--prompt-type", "qwen3")
    refused(launch(1, "posttrain_gpt.py", words), 1, f"the data {other} were made with --prompt-type chatml")


def test_a_resumed_run_is_told_when_its_rows_come_in_another_order(tmp_path: Path) -> None:
    run(tmp_path / "run", "--save-interval", 2, steps=3)
    from_2 = ("--lora-load", tmp_path / "run" / "iter_0000002")
    assert "warning: --seed changed since" in run(tmp_path / "other", *from_2, "--seed", 7, steps=3)
    assert "changed since" not in run(tmp_path / "same", *from_2, steps=3)
