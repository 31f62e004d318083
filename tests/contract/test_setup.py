"""The set-up commands explain themselves, and cost nothing when there is nothing to do."""

import subprocess
import time

import pytest

from tests.conftest import REPO


@pytest.mark.parametrize("script", ["run_tests.sh", "scripts/setup_env.sh"])
def test_help_is_printed_without_setting_anything_up(script: str) -> None:
    result = subprocess.run(["bash", str(REPO / script), "--help"], capture_output=True, text=True, timeout=10)
    assert result.returncode == 0
    assert result.stdout.startswith("usage: ")


@pytest.mark.alone
def test_a_repeated_set_up_takes_under_two_seconds() -> None:
    if not (REPO / ".venv" / ".mindspeed_llm_setup").exists():
        pytest.skip("this environment was not made by scripts/setup_env.sh")
    subprocess.run(["bash", str(REPO / "scripts/setup_env.sh")], check=True, timeout=300)
    started = time.monotonic()
    subprocess.run(["bash", str(REPO / "scripts/setup_env.sh")], check=True, timeout=300)
    assert time.monotonic() - started < 2


def test_an_unsuitable_interpreter_is_refused_by_name(tmp_path) -> None:
    (tmp_path / "scripts").mkdir()
    script = tmp_path / "scripts" / "setup_env.sh"
    script.write_text((REPO / "scripts/setup_env.sh").read_text())
    (tmp_path / "pyproject.toml").write_text("")
    result = subprocess.run(
        ["bash", str(script)],
        capture_output=True, text=True, timeout=30, env={"PATH": "/usr/bin:/bin", "PYTHON": "/bin/false"},
    )  # fmt: skip
    assert result.returncode == 1
    assert "PYTHON=/bin/false is not a Python 3.10 to 3.13" in result.stderr


def test_continuous_integration_runs_the_same_command() -> None:
    assert "run_tests.sh" in (REPO / ".ci" / "run").read_text()
