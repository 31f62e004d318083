"""quickstart.sh as a user meets it before anything runs."""

import os
import re
import subprocess
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]


def quickstart(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the script."""
    command = ["bash", str(REPO / "quickstart.sh"), *words]
    return subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True)


def test_help_names_every_setting_and_exits_with_zero() -> None:
    found = quickstart("--help")
    assert found.returncode == 0
    for name in ("DIR", "SEED", "NAME", "STEPS", "LORA_STEPS"):
        assert f"QUICKSTART_{name}" in found.stdout


def test_an_unknown_option_is_refused() -> None:
    found = quickstart("--seed", "3")
    assert found.returncode == 2 and "--help" in found.stderr


@pytest.mark.parametrize(("name", "value"), [("SEED", "x"), ("STEPS", "0"), ("LORA_STEPS", "-1")])
def test_a_setting_that_is_no_count_is_refused_before_set_up(name: str, value: str) -> None:
    found = quickstart(**{f"QUICKSTART_{name}": value})
    assert found.returncode == 2 and f"QUICKSTART_{name}={value}" in found.stderr


def calls() -> list[tuple[str, set[str]]]:
    """(recipe, variables set for it) of every call in the script."""
    text = (REPO / "quickstart.sh").read_text(encoding="utf-8").replace("\\\n", " ")
    found = []
    for line in text.splitlines():
        if call := re.search(r'^(.*)bash "\$RECIPES/([^"]+)"', line):
            found.append((call[2], set(re.findall(r"(?:^|\s)([A-Z_]+)=", call[1]))))
    return found


def test_every_recipe_the_script_calls_exists_and_has_the_variables_it_sets() -> None:
    found = calls()
    assert len({recipe for recipe, _ in found}) == 9
    for recipe, variables in found:
        text = (REPO / "examples" / "mcore" / "qwen3" / recipe).read_text(encoding="utf-8")
        known = set(re.findall(r'^([A-Z_]+)="\$\{\1:-', text, re.MULTILINE)) | {"OMP_NUM_THREADS"}
        assert variables and variables <= known, (recipe, variables - known)
