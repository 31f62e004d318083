"""Exit statuses and the one line an engineer sees, from real processes."""

import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from tests.conftest import REPO


def run_main(body: str, *words: str, environment: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    program = "import sys\nfrom mindspeed_llm.cli import run\nfrom mindspeed_llm.errors import *\n"
    program += "def main(argv):\n" + textwrap.indent(textwrap.dedent(body), "    ") + "\nrun(main)\n"
    return subprocess.run(
        [sys.executable, "-c", program, *words],
        capture_output=True,
        text=True,
        cwd=REPO,
        env={**os.environ, **(environment or {})},
        timeout=60,
    )


@pytest.mark.parametrize(
    ("body", "status", "said"),
    [
        ("return 0", 0, ""),
        ("return None", 0, ""),
        ("return 3", 3, ""),
        ("raise UsageError('--lr is wrong')", 2, "error: --lr is wrong\n"),
        ("raise InputError('file\\nis cut')", 1, "error: file is cut\n"),
        ("raise OSError(28, 'No space left on device', '/full/x')", 1, "No space left on device: /full/x\n"),
        ("open('/nowhere/x')", 1, "No such file or directory: /nowhere/x\n"),
        ("raise KeyboardInterrupt", 130, "interrupted\n"),
    ],
)
def test_each_kind_of_failure_has_its_exit_status_and_one_line(body: str, status: int, said: str) -> None:
    result = run_main(body)
    assert result.returncode == status
    assert result.stderr.endswith(said)
    assert result.stderr.count("\n") == (1 if said else 0)


def test_a_defect_keeps_its_traceback() -> None:
    result = run_main("raise ValueError('surprise')")
    assert result.returncode == 1
    assert "Traceback" in result.stderr and "ValueError: surprise" in result.stderr


def test_a_failing_rank_of_a_launch_names_itself() -> None:
    result = run_main("raise InputError('lost')", environment={"RANK": "3", "WORLD_SIZE": "4"})
    assert "[rank 3] error: lost" in result.stderr


@pytest.mark.parametrize(("rank", "lines"), [("0", 1), ("1", 0)])
def test_a_wrong_command_line_is_reported_by_rank_zero_alone(rank: str, lines: int) -> None:
    body = """
    from mindspeed_llm.arguments.parser import parse
    from mindspeed_llm.arguments.programs import PosttrainOptions
    parse(PosttrainOptions, argv, "posttrain_gpt.py")
    """
    result = run_main(body, "--typo", environment={"RANK": rank, "WORLD_SIZE": "2"})
    assert result.returncode == 2
    assert result.stderr.count("\n") == lines


def test_a_reader_that_has_gone_is_no_traceback() -> None:
    command = f"{sys.executable} -m mindspeed_llm.arguments.check posttrain_gpt.py --help | head -1"
    result = subprocess.run(["bash", "-c", command], capture_output=True, text=True, cwd=REPO, timeout=60)
    assert "usage: posttrain_gpt.py" in result.stdout
    assert "Traceback" not in result.stderr


SCRIPTS = ["convert_ckpt.py", "preprocess_data.py", "posttrain_gpt.py", "inference.py", "evaluation.py"]


@pytest.mark.alone
@pytest.mark.parametrize("script", SCRIPTS)
def test_help_of_every_script_is_quick_and_loads_no_heavy_package(script: str, tmp_path: Path) -> None:
    started = time.monotonic()
    watched = subprocess.run(
        [sys.executable, "-X", "importtime", str(REPO / script), "--help"],
        capture_output=True, text=True, cwd=tmp_path, timeout=60,
    )  # fmt: skip
    elapsed = time.monotonic() - started
    assert watched.returncode == 0, watched.stderr[-2000:]
    assert f"usage: {script}" in watched.stdout
    loaded = {line.rpartition("|")[2].strip() for line in watched.stderr.splitlines()}
    heavy = {"torch", "megatron", "transformers", "peft", "lm_eval", "matplotlib", "pyarrow"}
    if script == "convert_ckpt.py":
        heavy.remove("torch")  # a second; conversion needs nothing heavier
    assert not loaded & heavy
    assert elapsed < 10


@pytest.mark.parametrize("script", SCRIPTS)
def test_an_unknown_flag_ends_every_script_with_status_two_and_one_line(script: str, tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, str(REPO / script), "--no-such-flag"], capture_output=True, text=True, cwd=tmp_path, timeout=60
    )
    assert result.returncode == 2
    assert result.stderr.startswith(f"{script}: error: unknown option --no-such-flag")
    assert result.stderr.count("\n") == 1
