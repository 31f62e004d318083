"""quickstart.sh as a user meets it before anything runs."""

import os
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


def test_every_recipe_and_module_the_script_names_exists() -> None:
    text = (REPO / "quickstart.sh").read_text(encoding="utf-8")
    recipes = {word.split("/")[1].split('"')[0] for word in text.split() if word.startswith('"$RECIPES/')}
    assert len(recipes) == 9
    for recipe in recipes:
        assert (REPO / "examples" / "mcore" / "qwen3" / recipe).is_file(), recipe
