"""Under real launchers: a dead rank ends the job with its cause, restarts go on, kills at named points cost nothing."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import REPO, free_port
from tests.fixtures import done, launch, losses, same, training, weights

DP = ("--use-distributed-optimizer", "--micro-batch-size", 1, "--save-interval", 2)
TORCHRUN = ("-m", "torch.distributed.run")
LAUNCH = (str(REPO / "scripts" / "launch.py"),)


def start(launcher: tuple[str, ...], argv: list, by: str, step: int) -> subprocess.CompletedProcess[str]:
    """Run two ranks of which the second dies; -> how the launcher ended."""
    script = str(REPO / "tests" / "training" / "dying_posttrain.py")
    words = [*launcher, "--nproc_per_node", "2", "--master_port", str(free_port()), script, *map(str, argv)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MINDSPEED_LLM_DEVICE": "cpu", "PYTHONPATH": str(REPO)}
    environment |= {"DYING_RANK": "1", "DYING_STEP": str(step), "DYING_BY": by}
    words = [sys.executable, *words]
    return subprocess.run(words, capture_output=True, text=True, timeout=240, env=environment, check=False)


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("by", "status", "said"),
    [
        ("KILL", 137, "rank 1 was ended by SIGKILL, often for want of memory"),
        ("17", 17, "rank 1 ended with exit status 17"),
    ],
)
def test_a_dead_rank_ends_the_job_with_its_cause(by: str, status: int, said: str, tmp_path: Path) -> None:
    argv = training(tmp_path / "run", "--tensor-model-parallel-size", 2)
    ended = start(LAUNCH, argv, by, 2)
    assert ended.returncode == status, ended.stderr
    assert ended.stderr.splitlines()[-1] == f"launch: {said}"
    assert "iteration        1/" in ended.stdout and not (tmp_path / "run").exists()


@pytest.mark.distributed
def test_torchrun_restarts_a_run_which_goes_on_from_its_last_checkpoint(tmp_path: Path) -> None:
    done(launch(2, "posttrain_gpt.py", training(tmp_path / "whole", *DP)))
    argv = training(tmp_path / "run", *DP, "--auto-resume")
    ended = start((*TORCHRUN, "--max-restarts", "1"), argv, "KILL", 4)
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert "resumed at step 2 from" in ended.stdout
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")
    same(weights(tmp_path / "run"), weights(tmp_path / "whole"))


@pytest.mark.distributed
def test_kills_at_named_points_leave_weights_and_losses_as_they_were() -> None:
    words = [sys.executable, str(REPO / "benchmarks" / "kill_resume.py"), "--kills", "5"]
    words += ["--only", "before-rename", "mid-optimizer", "mid-removal", "mid-export"]
    ended = subprocess.run(words, capture_output=True, text=True, timeout=240, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    lines = ended.stdout.splitlines()
    assert len(lines) == 5 and all(": equal" in line for line in lines[:4]) and lines[4] == "0 of 4 differ"
