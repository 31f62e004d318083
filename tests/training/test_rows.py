"""From rows to steps as a run does it: lengths, cuts, splits, batch arithmetic, epochs."""

from pathlib import Path

import numpy as np
import pytest

from mindspeed_llm.data.batch import collate
from mindspeed_llm.data.dataset import IndexedDataset, split_dataset
from tests.fixtures import close, data, done, hf_model, launch, losses, records, refused, same, training, weights

SHORT = ("--seq-length", 256)


def run(save: Path, *more: object, size: int = 1, **options: object) -> str:
    return done(launch(size, "posttrain_gpt.py", training(save, *more, **options))).out


def lengths(prefix: Path) -> np.ndarray:
    return IndexedDataset(prefix).lengths


@pytest.mark.distributed
@pytest.mark.parametrize("layout", [(1, ()), (2, ("--tensor-model-parallel-size", 2, "--sequence-parallel"))])
def test_padding_to_the_longest_row_and_to_the_sequence_length_give_the_same_run(layout: tuple, tmp_path: Path) -> None:
    size, flags = layout
    run(tmp_path / "ragged", *SHORT, *flags, size=size)
    padded = [word for word in training(tmp_path / "padded", *SHORT, *flags) if word != "--no-pad-to-seq-lengths"]
    done(launch(size, "posttrain_gpt.py", padded))
    assert losses(tmp_path / "ragged") == pytest.approx(losses(tmp_path / "padded"), rel=2e-6)
    close(weights(tmp_path / "ragged"), weights(tmp_path / "padded"), 1e-4)
    assert records(tmp_path / "padded")[0]["tokens_per_second"] > 0


def test_rows_that_are_cut_are_counted_and_warned_of_once(tmp_path: Path) -> None:
    count = int((lengths(data()) > 64).sum())
    out = run(tmp_path / "cut")
    assert count and out.count("are cut") == 1
    assert f"warning: {count} of 29 rows are longer than --seq-length 64 and are cut" in out
    assert "are cut" not in run(tmp_path / "whole", *SHORT)


def test_the_two_rules_of_cutting_train_on_different_tokens(tmp_path: Path) -> None:
    run(tmp_path / "turns")
    run(tmp_path / "hard", "--cut-max-seqlen")
    assert losses(tmp_path / "turns") != losses(tmp_path / "hard")


def test_no_cut_token_refuses_long_rows_and_writes_nothing(tmp_path: Path) -> None:
    row = int(np.flatnonzero(lengths(data()) > 64)[0])
    argv = training(tmp_path / "run", "--no-cut-token")
    refused(
        launch(1, "posttrain_gpt.py", argv), 1, f"first row {row} with {lengths(data())[row]} tokens", "seq-length 64"
    )
    assert not list(tmp_path.iterdir())
    run(tmp_path / "run", "--no-cut-token", *SHORT)


@pytest.mark.distributed
def test_the_global_batch_decides_the_run_not_how_it_is_divided(tmp_path: Path) -> None:
    # Adam divides by the gradient's own size: with its usual epsilon it would show the rounding of the smallest ones
    words = (*SHORT, "--calculate-per-token-loss", "--adam-eps", 1e-4)
    run(tmp_path / "one", "--micro-batch-size", 4, *words)
    run(tmp_path / "micro", "--micro-batch-size", 1, *words)
    run(tmp_path / "spread", "--micro-batch-size", 1, *words, size=4)
    run(tmp_path / "zero", "--micro-batch-size", 2, *words, "--use-distributed-optimizer", size=2)
    for name in ("micro", "spread", "zero"):
        assert losses(tmp_path / name) == pytest.approx(losses(tmp_path / "one"), rel=2e-6), name
        close(weights(tmp_path / name), weights(tmp_path / "one"), 1e-4)


def test_without_a_global_batch_size_a_step_is_one_micro_batch_of_every_replica(tmp_path: Path) -> None:
    run(tmp_path / "run", "--global-batch-size", None)
    assert [r["consumed_samples"] for r in records(tmp_path / "run")] == [2, 4, 6, 8, 10, 12]


@pytest.mark.parametrize(("epochs", "steps"), [(1, 8), (2, 15), (None, 8)])
def test_epochs_become_steps_that_see_every_row(epochs: int | None, steps: int, tmp_path: Path) -> None:
    out = run(tmp_path / "run", *(("--epochs", epochs) if epochs else ()), steps=None)
    assert len(records(tmp_path / "run")) == steps and f"{steps} steps of 4 rows = {steps * 4 / 29:.2f} epochs" in out


def test_the_validation_loss_is_transformers_loss_on_the_rows_kept_back(tmp_path: Path) -> None:
    import torch
    from transformers import Qwen3ForCausalLM

    out = run(tmp_path / "run", "--split", "59,41,0", "--eval-interval", 3, "--lr", 0, "--min-lr", 0, *SHORT)
    found = [
        float(line.split("value: ")[1].split()[0])
        for line in out.splitlines()
        if "validation loss" in line and "value: " in line
    ]
    train, kept, _ = split_dataset(IndexedDataset(data()), "59,41,0")
    assert f"{len(train)} training rows" in out and len(found) == 2 and found[0] == found[1]
    assert len(train) + len(kept) == 29 and len(kept) > 3 and not set(train.rows.tolist()) & set(kept.rows.tolist())
    model = Qwen3ForCausalLM.from_pretrained(hf_model()).float()
    total = count = 0.0
    for row in (kept[number] for number in range(len(kept))):
        batch = collate([row], 0, 256, 8, pad_to_longest=True)
        with torch.no_grad():
            logits = model(torch.as_tensor(batch["tokens"])).logits[0]
        total += float(torch.nn.functional.cross_entropy(logits, torch.as_tensor(batch["labels"])[0], reduction="sum"))
        count += float(batch["loss_mask"].sum())
    assert found[0] == pytest.approx(total / count, rel=1e-5)
    assert "validation loss" not in run(tmp_path / "off", "--split", "59,41,0", "--eval-iters", 0)


def test_several_data_prefixes_are_joined(tmp_path: Path) -> None:
    out = run(tmp_path / "run", "--data-path", data(), data(rows=11, longest=9))
    assert "40 training rows" in out


def test_background_threads_change_nothing(tmp_path: Path) -> None:
    run(tmp_path / "inline")
    run(tmp_path / "threads", "--num-workers", 2)
    assert losses(tmp_path / "inline") == losses(tmp_path / "threads")
    same(weights(tmp_path / "inline"), weights(tmp_path / "threads"))


def test_no_shuffle_reads_the_rows_in_their_order(tmp_path: Path) -> None:
    run(tmp_path / "ordered", "--no-shuffle", "--seed", 1, "--lr", 0, "--min-lr", 0)
    run(tmp_path / "again", "--no-shuffle", "--seed", 2, "--lr", 0, "--min-lr", 0)
    run(tmp_path / "shuffled", "--seed", 2, "--lr", 0, "--min-lr", 0)
    assert losses(tmp_path / "ordered") == losses(tmp_path / "again") != losses(tmp_path / "shuffled")
