"""Checkpoints in either format, written at once or in the background, limited, judged and started anew."""

import json
import os
import re
from pathlib import Path

import pytest

from mindspeed_llm.checkpoint.atomic import TRACKER
from tests.fixtures import close, done, launch, losses, refused, same, training, weights
from tests.training import faults

TP_SP_DP = ("--tensor-model-parallel-size", 2, "--sequence-parallel", "--use-distributed-optimizer")
PP = ("--pipeline-model-parallel-size", 2)
DIST = ("--ckpt-format", "torch_dist")


def run(size: int, *argv: object, **more: object) -> str:
    return done(launch(size, "posttrain_gpt.py", argv, **more)).out


def names(save: Path) -> list[str]:
    """What lies in a run folder, hidden leftovers included."""
    return sorted(path.name for path in save.iterdir())


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six LoRA steps in one process, in rank files, saved every second step."""
    save = tmp_path_factory.mktemp("whole") / "run"
    run(1, *training(save, "--save-interval", 2))
    return save


def test_torch_dist_holds_what_rank_files_hold_and_continues_bit_for_bit(whole: Path, tmp_path: Path) -> None:
    run(1, *training(tmp_path / "run", *DIST), around=faults.terminated_in_step_3)
    out = run(1, *training(tmp_path / "run", *DIST, "--auto-resume", "--async-save"))
    assert "resumed at step 3" in out and "belongs to another layout" not in out
    assert losses(tmp_path / "run") == losses(whole)
    same(weights(tmp_path / "run"), weights(whole))


@pytest.mark.distributed
def test_torch_dist_continues_at_another_layout_to_rounding(whole: Path, tmp_path: Path) -> None:
    save = tmp_path / "run"
    run(2, *training(save, *DIST, *PP), around=faults.terminated_in_step_3)
    assert (save / TRACKER).read_text() == "3"
    out = run(4, *training(save, *TP_SP_DP, *DIST, "--async-save", "--micro-batch-size", 2, "--auto-resume"))
    assert "resumed at step 3" in out and "belongs to another layout" in out
    assert losses(save) == pytest.approx(losses(whole), rel=1e-5)
    close(weights(save), weights(whole), 1e-4)
    assert {path.name.split("_")[2] for path in (save / "iter_0000006").glob("__*.distcp")} == {"0", "1"}


@pytest.mark.distributed
def test_full_tuning_in_torch_dist_is_a_model_for_any_layout_and_for_megatron_core(tmp_path: Path) -> None:
    more = ("--lr", 0.002)
    run(1, *training(tmp_path / "whole", *more, lora=False))
    run(2, *training(tmp_path / "run", *more, *DIST, *PP, lora=False), around=faults.terminated_in_step_3)
    run(
        2,
        *training(
            tmp_path / "run", *more, "--tensor-model-parallel-size", 2, *DIST, "--load", tmp_path / "run", lora=False
        ),
    )
    assert losses(tmp_path / "run") == pytest.approx(losses(tmp_path / "whole"), rel=1e-5)
    close(weights(tmp_path / "run"), weights(tmp_path / "whole"), 1e-4)
    from torch.distributed.checkpoint import FileSystemReader

    keys = FileSystemReader(tmp_path / "run" / "iter_0000006").read_metadata().state_dict_metadata
    qkv = "decoder.layers.self_attention.linear_qkv.weight"
    for key in (qkv, f"optimizer.state.fp32_param.{qkv}", f"optimizer.state.exp_avg_sq.{qkv}"):
        assert keys[key].size[0] == 4 and len({chunk.offsets for chunk in keys[key].chunks}) == 8


def test_what_is_saved_in_the_background_is_the_step_it_was_asked_for(whole: Path, tmp_path: Path) -> None:
    save = tmp_path / "run"
    out = run(1, *training(save, "--save-interval", 2, "--async-save", "--lr", 0.02), around=faults.slow_rank_files)
    for step in (2, 4, 6):
        same(weights(save / f"iter_000000{step}"), weights(whole / f"iter_000000{step}"))
    assert losses(save) == losses(whole)
    lines = re.findall(r"successfully saved checkpoint from iteration +(\d+) .* in ([\d.]+) s, training waited", out)
    assert [line[0] for line in lines] == ["2", "4", "6"] and all(float(line[1]) > 0.3 for line in lines)
    # training went on while the first one was written
    assert out.index(" iteration        3/") < out.index("successfully saved checkpoint from iteration       2")


@pytest.fixture(scope="module")
def judged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose validation loss falls and then, at a learning rate far too high, rises."""
    save = tmp_path_factory.mktemp("judged") / "run"
    more = ("--split", "80,20,0", "--eval-interval", 1, "--save-interval", 1, "--lr", 0.3, "--min-lr", 0.3)
    out = run(1, *training(save, *more, "--save-total-limit", 2, "--early-stopping-patience", 3, steps=30))
    (save.parent / "out").write_text(out)
    return save


def test_the_best_and_the_last_stay_and_patience_ends_the_run(judged: Path, tmp_path: Path) -> None:
    out = (judged.parent / "out").read_text()
    found = [float(one) for one in re.findall(r"validation loss at iteration \d+ \| lm loss value: (\S+)", out)]
    best = found.index(min(found)) + 1
    assert len(found) == best + 3 < 30, "three validations without a lower loss end the run"
    assert names(judged) == sorted([f"iter_{best:07d}", f"iter_{best + 3:07d}", "best", TRACKER])
    assert os.readlink(judged / "best") == f"iter_{best:07d}" and (judged / TRACKER).read_text() == str(best + 3)
    assert f"stopped early at step {best + 3}" in out and f"at step {best}" in out.splitlines()[-2]
    again = ("--early-stopping-patience", 3)
    assert f"{best + 3}, and 3 validations in a row had no lower" in run(
        1, *training(judged, "--auto-resume", *again, steps=30)
    )
    argv = training(tmp_path / "on", "--lora-load", judged, *again, steps=30)
    refused(launch(1, "posttrain_gpt.py", argv), 1, "3 validations in a row", "raise it")
    out = run(1, *training(tmp_path / "next", "--lora-load", judged / "best", steps=best + 3))
    assert f"resumed at step {best} from {judged / f'iter_{best:07d}'}" in out


def test_a_limit_without_validation_keeps_the_newest(tmp_path: Path) -> None:
    save = tmp_path / "run"
    out = run(1, *training(save, "--save-interval", 1, "--save-total-limit", 2, "--async-save"))
    assert names(save) == ["iter_0000005", "iter_0000006", TRACKER]
    assert [f"removed iter_000000{n}: --save-total-limit 2" in out for n in range(1, 7)] == [True] * 4 + [False] * 2


def test_without_room_nothing_is_begun_and_a_full_disk_costs_no_step(whole: Path, tmp_path: Path) -> None:
    argv = training(tmp_path / "none", "--save-interval", 2)
    refused(launch(1, "posttrain_gpt.py", argv, around=faults.no_room), 1, "needs .*kB, its file system has 1 kB free")
    save = tmp_path / "short"
    out = run(1, *training(save, "--save-interval", 2), around=faults.no_room_at_the_second_save)
    assert "the checkpoint of step 4 needs" in out and "it is not saved, and training goes on" in out
    assert names(save) == ["iter_0000002", "iter_0000006", TRACKER]
    same(weights(save), weights(whole))
    argv = training(tmp_path / "last")
    refused(launch(1, "posttrain_gpt.py", argv, around=faults.no_room_at_the_first_save), 1, "nothing was written")
    assert not list((tmp_path / "last").glob("*"))


def test_versions_are_numbered_and_continued(whole: Path, tmp_path: Path) -> None:
    run(1, *training(tmp_path, "--add-version", "--log-dir", tmp_path / "logs"), around=faults.terminated_in_step_3)
    (first,) = tmp_path.glob("v*")
    assert re.fullmatch(r"v0-\d{8}-\d{6}", first.name)
    run(1, *training(tmp_path, "--add-version", "--auto-resume", "--log-dir", tmp_path / "logs"))
    assert [path.name for path in tmp_path.glob("v*")] == [first.name]
    same(weights(first), weights(whole))
    run(1, *training(tmp_path, "--add-version", "--log-dir", tmp_path / "logs", steps=3))
    assert [path.name.split("-")[0] for path in sorted(tmp_path.glob("v*"))] == ["v0", "v1"]


def test_a_run_killed_behind_its_last_checkpoint_is_put_right_and_ends_well(tmp_path: Path) -> None:
    save = tmp_path / "run"
    run(1, *training(save, "--save-interval", 3))
    (save / TRACKER).write_text("3")
    out = run(1, *training(save, "--save-interval", 3, "--save-total-limit", 1, "--auto-resume"))
    assert "is at step 6 of 6: nothing is left to train" in out
    assert (save / TRACKER).read_text() == "6" and names(save) == ["iter_0000006", TRACKER]


def test_leftovers_of_killed_saves_and_removals_are_removed_at_the_next_start(tmp_path: Path) -> None:
    save = tmp_path / "run"
    for name in (".iter_0000009.partial", ".iter_0000002.deleted"):
        (save / name / "mp_rank_00").mkdir(parents=True)
    out = run(1, *training(save, "--auto-resume", steps=3))
    assert "removed .iter_0000009.partial" in out and names(save) == ["iter_0000003", TRACKER]


def test_the_time_of_saving_is_told_and_is_not_the_steps(tmp_path: Path) -> None:
    more = ("--save-interval", 1, "--log-dir", tmp_path / "logs")
    out = run(1, *training(tmp_path / "run", *more, steps=4), around=faults.slow_rank_files)
    waits = re.findall(r"training waited ([\d.]+) s", out)
    assert len(waits) == 4 and all(float(wait) > 0.4 for wait in waits)
    lines = (tmp_path / "logs" / "run" / "logging.jsonl").read_text().splitlines()
    assert min(json.loads(line)["milliseconds"] for line in lines[1:]) < 400
