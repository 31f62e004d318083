"""Runs on rows that stand one behind the other: the same as runs on the same rows padded."""

from pathlib import Path

import pytest

from mindspeed_llm.data.dataset import IndexedDataset
from tests.fixtures import close, data, done, launch, losses, records, training, weights

LONG = ("--seq-length", 256)
CONTEXT = ("--context-parallel-size", 2)
PACK = ("--pack", "--seq-length", "128")


def run(save: Path, *more: object, size: int = 1) -> None:
    done(launch(size, "posttrain_gpt.py", training(save, *more)))


def alike(one: Path, other: Path) -> None:
    assert losses(one) == pytest.approx(losses(other), rel=2e-6)
    close(weights(one), weights(other), 1e-4)


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("size", "layout"),
    [
        (1, ()),
        (2, ("--tensor-model-parallel-size", 2, "--sequence-parallel")),
        (2, ("--pipeline-model-parallel-size", 2)),
        (2, ("--calculate-per-token-loss",)),
        (2, CONTEXT),
    ],
    ids=["alone", "sequence-parallel", "pipeline", "data-parallel", "context-parallel"],
)
def test_a_padding_free_run_equals_a_padded_one(size: int, layout: tuple, tmp_path: Path) -> None:
    # Adam divides by the gradient's own size: with its usual epsilon it would show the rounding of the smallest ones
    run(tmp_path / "padded", *LONG, "--adam-eps", 1e-4, *layout, size=size)
    run(tmp_path / "flat", *LONG, "--adam-eps", 1e-4, "--padding_free", "true", *layout, size=size)
    alike(tmp_path / "flat", tmp_path / "padded")
    flat, padded = (records(tmp_path / name) for name in ("flat", "padded"))
    assert [one["consumed_samples"] for one in flat] == [one["consumed_samples"] for one in padded]


@pytest.mark.distributed
@pytest.mark.parametrize("layout", [(), CONTEXT], ids=["alone", "context-parallel"])
def test_a_neatly_packed_file_trains_as_the_rows_it_was_made_of(layout: tuple, tmp_path: Path) -> None:
    rows = data(rows=12, extra=("--seq-length", "128"))
    packs = data(rows=12, extra=(*PACK, "--neat-pack"))
    step = ("--seq-length", 128, "--micro-batch-size", 1, "--calculate-per-token-loss", "--no-shuffle")
    count = len(IndexedDataset(packs))
    assert 1 < count < len(IndexedDataset(rows)) == 12
    run(tmp_path / "rows", "--data-path", rows, "--global-batch-size", 12, *step)
    packed = ("--data-path", packs, "--global-batch-size", count)
    run(tmp_path / "packs", *packed, *step, *layout, size=2 if layout else 1)
    alike(tmp_path / "packs", tmp_path / "rows")


def test_plain_packs_are_one_row_unless_they_are_to_be_reset(tmp_path: Path) -> None:
    packs = data(rows=12, extra=PACK)
    step = ("--data-path", packs, "--seq-length", 128, "--no-shuffle")
    run(tmp_path / "plain", *step)
    run(tmp_path / "flat", *step, "--padding-free")
    run(tmp_path / "reset", *step, "--reset-attention-mask", "--reset-position-ids")
    alike(tmp_path / "flat", tmp_path / "plain")
    assert losses(tmp_path / "reset")[0] != pytest.approx(losses(tmp_path / "plain")[0], rel=1e-3)


def test_rows_of_one_text_have_nothing_to_reset(tmp_path: Path) -> None:
    run(tmp_path / "plain", *LONG)
    run(tmp_path / "reset", *LONG, "--reset-attention-mask", "--reset-position-ids")
    assert losses(tmp_path / "reset") == losses(tmp_path / "plain")
