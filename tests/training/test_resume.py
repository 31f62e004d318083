"""A run that stops and goes on is the run that never stopped, bit for bit at the same layout."""

import json
import os
import shutil
import signal
from pathlib import Path

import pytest

from mindspeed_llm.checkpoint.atomic import TRACKER
from tests.fixtures import close, done, hf_model, launch, losses, records, refused, same, scratch, training, weights
from tests.training import faults

TP_SP_DP = ("--tensor-model-parallel-size", 2, "--sequence-parallel", "--use-distributed-optimizer")
PP_VPP = ("--pipeline-model-parallel-size", 2, "--num-layers-per-virtual-pipeline-stage", 1, "--micro-batch-size", 1)
LAYOUTS = {
    "one process": (1, ()),
    "fused, bf16, dropout": (1, ("--lora-fusion", "--bf16", "--lora-dropout", 0.3)),
    "PP2 VPP2": (2, PP_VPP),
    "DP2 with the distributed optimizer": (2, ("--use-distributed-optimizer", "--micro-batch-size", 1)),
    "TP2 SP DP2 with the distributed optimizer, fused MLP, dropout": (
        4,
        (*TP_SP_DP, "--micro-batch-size", 1, "--lora-fusion", "--use-fused-mlp", "--lora-dropout", 0.3),
    ),
}


def run(size: int, *argv: object, **more: object) -> str:
    return done(launch(size, "posttrain_gpt.py", argv, **more)).out


def stopped_after(save: Path, size: int, *more: object, lora: bool = True) -> Path:
    """A run of 6 steps that a SIGTERM ends after step 3."""
    out = run(size, *training(save, *more, lora=lora), around=faults.terminated_in_step_3)
    assert "stopped; continue with the same launcher and: posttrain_gpt.py" in out and "--auto-resume" in out
    assert (save / TRACKER).read_text() == "3" and not (save / "iter_0000006").exists()
    return save


@pytest.fixture(scope="module")
def whole() -> Path:
    """Six steps without a stop, in one process."""
    save = scratch() / "resume_whole"
    run(1, *training(save, "--save-interval", 3))
    return save


@pytest.mark.distributed
@pytest.mark.parametrize("name", LAYOUTS)
def test_a_lora_run_stopped_and_continued_equals_the_uninterrupted_one_bit_for_bit(name: str, tmp_path: Path) -> None:
    size, layout = LAYOUTS[name]
    run(size, *training(tmp_path / "whole", *layout))
    stopped_after(tmp_path / "parts", size, *layout)
    out = run(size, *training(tmp_path / "parts", *layout, "--lora-load", tmp_path / "parts"))
    assert "resumed at step 3" in out
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    same(weights(tmp_path / "parts"), weights(tmp_path / "whole"))


@pytest.mark.distributed
@pytest.mark.parametrize(("size", "layout"), [(1, ("--bf16",)), (2, PP_VPP)])
@pytest.mark.parametrize("tied", [False, True])
def test_full_tuning_continues_bit_for_bit_from_load(tied: bool, size: int, layout: tuple, tmp_path: Path) -> None:
    more = (*layout, "--load", hf_model(tied=tied), "--lr", 0.002)
    run(size, *training(tmp_path / "whole", *more, lora=False))
    stopped_after(tmp_path / "parts", size, *more, lora=False)
    run(size, *training(tmp_path / "parts", *more[:-4], "--lr", 0.002, "--load", tmp_path / "parts", lora=False))
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    same(weights(tmp_path / "parts"), weights(tmp_path / "whole"))


@pytest.mark.distributed
def test_a_run_continues_at_another_layout_to_rounding(whole: Path, tmp_path: Path) -> None:
    stopped_after(tmp_path / "parts", 1)
    out = run(4, *training(tmp_path / "parts", *TP_SP_DP, "--micro-batch-size", 2, "--lora-load", tmp_path / "parts"))
    assert "resumed at step 3" in out and "belongs to another layout" in out
    one, other = losses(tmp_path / "parts"), losses(whole)
    assert one[:3] == other[:3] and one[3:] == pytest.approx(other[3:], rel=1e-5)
    assert (tmp_path / "parts/iter_0000006/mp_rank_01").is_dir()
    close(weights(tmp_path / "parts"), weights(whole), 1e-4)


@pytest.mark.distributed
def test_one_rank_that_is_warned_stops_all_and_the_run_continues(tmp_path: Path) -> None:
    run(2, *training(tmp_path / "whole", *PP_VPP))
    run(2, *training(tmp_path / "parts", *PP_VPP), around=faults.usr1_in_step_3_of_rank_1)
    assert (tmp_path / "parts" / TRACKER).read_text() == "3"
    run(2, *training(tmp_path / "parts", *PP_VPP, "--auto-resume"))
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")


@pytest.mark.parametrize("tracker", ["stale", "missing", "right"])
def test_auto_resume_takes_the_newest_complete_checkpoint_whatever_the_tracker_says(
    tracker: str, whole: Path, tmp_path: Path
) -> None:
    save = stopped_after(tmp_path / "parts", 1, "--save-interval", 2)
    assert sorted(p.name for p in save.glob("iter_*")) == ["iter_0000002", "iter_0000003"]
    (save / ".iter_0000004.partial" / "mp_rank_00").mkdir(parents=True)
    (save / ".iter_0000004.partial" / "mp_rank_00" / "model_optim_rng.pt").write_bytes(b"half")
    if tracker == "stale":
        (save / TRACKER).write_text("2")
    elif tracker == "missing":
        (save / TRACKER).unlink()
    out = run(1, *training(save, "--auto-resume", "--finetune", "--save-interval", 2))
    assert f"resumed at step 3 from {save / 'iter_0000003'}" in out
    assert losses(save) == losses(whole)
    same(weights(save), weights(whole))
    assert (save / TRACKER).read_text() == "6" and not list(save.glob(".*"))


def test_auto_resume_starts_anew_when_the_run_was_killed_before_its_first_checkpoint(
    whole: Path, tmp_path: Path
) -> None:
    save = tmp_path / "parts"
    (save / ".iter_0000003.partial").mkdir(parents=True)
    (save / "events.log").write_text("of the killed run")
    assert "resumed" not in run(1, *training(save, "--auto-resume"))
    assert losses(save) == losses(whole)


def test_auto_resume_continues_full_tuning_without_naming_the_base(tmp_path: Path) -> None:
    run(1, *training(tmp_path / "whole", lora=False))
    stopped_after(tmp_path / "parts", 1, lora=False)
    run(1, *training(tmp_path / "parts", "--auto-resume", "--load", None, lora=False))
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")


def test_finetune_takes_the_adapter_alone_and_starts_at_step_0(whole: Path, tmp_path: Path) -> None:
    out = run(1, *training(tmp_path / "second", "--finetune", "--lora-load", whole, "--lr", 0, "--min-lr", 0))
    assert "resumed" not in out
    history = records(tmp_path / "second")
    assert [r["iteration"] for r in history] == [1, 2, 3, 4, 5, 6] and history[0]["consumed_samples"] == 4
    first, second = weights(whole), weights(tmp_path / "second")
    same({n: v for n, v in first.items() if n.startswith("lora/")}, {n: v for n, v in second.items() if "lora/" in n})
    assert all(value.abs().sum() > 0 for name, value in first.items() if name.startswith("exp_avg/"))


def test_the_optimizer_is_taken_unless_it_is_declined(whole: Path, tmp_path: Path) -> None:
    for name, more in (("with", ()), ("without", ("--no-load-optim", "--no-load-rng"))):
        run(1, *training(tmp_path / name, "--lora-load", whole / "iter_0000003", *more))
        assert [r["iteration"] for r in records(tmp_path / name)] == [4, 5, 6]
    assert losses(tmp_path / "with") == losses(whole)[3:]
    # the first loss after the resumption comes from the weights alone, the next from the moments too
    assert losses(tmp_path / "without")[0] == losses(whole)[3] and losses(tmp_path / "without")[1] != losses(whole)[4]


def test_a_run_saved_without_its_optimizer_says_so_when_it_is_continued(tmp_path: Path) -> None:
    run(1, *training(tmp_path / "run", "--no-save-optim", "--no-save-rng", steps=3))
    again = training(tmp_path / "next", "--lora-load", tmp_path / "run")
    refused(launch(1, "posttrain_gpt.py", again), 1, "holds no optimizer state", "--no-load-optim")
    assert "seeded anew" in run(1, *again, "--no-load-optim")


def test_going_on_from_an_earlier_checkpoint_never_leaves_later_ones_behind(tmp_path: Path) -> None:
    save = tmp_path / "run"
    run(1, *training(save, "--save-interval", 2))
    argv = training(save, "--save-interval", 3, "--lora-load", save / "iter_0000002", steps=5)
    refused(launch(1, "posttrain_gpt.py", argv), 1, "iter_0000006, which is later than iter_0000002", "--overwrite")
    run(1, *argv, "--overwrite")
    assert sorted(p.name for p in save.glob("iter_*")) == ["iter_0000002", "iter_0000003", "iter_0000005"]


def test_a_save_folder_in_use_needs_overwrite_which_replaces_its_checkpoints(whole: Path, tmp_path: Path) -> None:
    save = tmp_path / "run"
    shutil.copytree(whole, save)
    before = {path: path.read_bytes() for path in save.rglob("*") if path.is_file()}
    refused(launch(1, "posttrain_gpt.py", training(save, steps=2)), 1, "not empty", "--auto-resume.*--overwrite")
    assert {path: path.read_bytes() for path in save.rglob("*") if path.is_file()} == before
    run(1, *training(save, "--overwrite", steps=3))
    assert [p.name for p in save.glob("iter_*")] == ["iter_0000003"] and (save / TRACKER).read_text() == "3"


def killed(argv: list, around: object) -> int:
    """The exit status of a run in a process of its own, which may kill itself."""
    from tests.distributed.pool import Pool

    alone = Pool(1)
    try:
        alone.run(
            "tests.fixtures:run_on_rank", script="posttrain_gpt.py", argv=[*map(str, argv)], cwd=".", around=around
        )
    except AssertionError as error:
        assert "died with exit code -9" in str(error), error
        return -signal.SIGKILL
    finally:
        alone.close()
    return os.EX_OK


def die_in_second_file() -> object:
    return faults.killed_writing(2)


def die_before_second_tracker() -> object:
    return faults.killed_before_tracker(2)


@pytest.mark.distributed
@pytest.mark.parametrize(("around", "newest"), [(die_in_second_file, 2), (die_before_second_tracker, 4)])
def test_a_kill_while_saving_leaves_the_checkpoint_before_usable(
    around: object, newest: int, whole: Path, tmp_path: Path
) -> None:
    save = tmp_path / "run"
    assert killed(training(save, "--save-interval", 2), around) == -signal.SIGKILL
    assert (save / TRACKER).read_text() == "2", "the tracker names a finished checkpoint at every moment"
    assert len(weights(save)) == len(weights(whole))
    assert sorted(p.name for p in save.glob("iter_*"))[-1] == f"iter_000000{newest}"
    out = run(1, *training(save, "--auto-resume", "--save-interval", 2))
    assert f"resumed at step {newest}" in out
    assert losses(save) == losses(whole)
    same(weights(save), weights(whole))
    assert json.loads((save / "iter_0000006" / "args.json").read_text())["iteration"] == 6
