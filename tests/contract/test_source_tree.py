"""The shape of the source tree: who may import whom, where vendors are named, how large files are, and lint."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import REPO

PACKAGE = REPO / "mindspeed_llm"
MODULES = sorted(PACKAGE.rglob("*.py"))
BASE = {"arguments", "errors", "cli", "registry"}
MAY_IMPORT = {
    "arguments": {"errors", "cli"},
    "errors": set(),
    "registry": {"errors"},
    "cli": {"arguments", "errors"},
    "device": BASE,
    "models": BASE | {"device"},
    "data": BASE,
    "checkpoint": BASE | {"device", "models", "data"},
    "lora": BASE | {"device", "models", "data", "checkpoint"},
    "planning": BASE | {"device", "models", "checkpoint"},
    "training": BASE | {"device", "models", "data", "checkpoint", "lora", "planning"},
    "inference": BASE | {"device", "models", "data", "checkpoint", "lora"},
    "evaluation": BASE | {"device", "models", "data", "checkpoint", "lora", "inference"},
    "tasks": BASE | {"device", "models"},
}
"""Which parts of the package each part may import besides itself; parts not listed may import all."""


def part_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_parts(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}: imports are absolute"
            names.add(node.module)
            if node.module == "mindspeed_llm":
                names |= {f"mindspeed_llm.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return {n.split(".")[1] for n in names if n.startswith("mindspeed_llm.")}


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(REPO)))
def test_imports_point_one_way(path: Path) -> None:
    part = part_of(path)
    if part in MAY_IMPORT:
        wrong = imported_parts(path) - MAY_IMPORT[part] - {part}
        assert not wrong, f"{part} may not import {sorted(wrong)}"


VENDOR = re.compile(r"torch_npu|\.npu\(|\bcuda\b|\bhccl\b|\bnccl\b|\bascend(?!ing)", re.IGNORECASE)


def code_without_prose(path: Path) -> str:
    """The file's code, comments and docstrings left out: explaining a vendor is not depending on it."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node) is not None:
            node.body[0].value.value = ""
    return ast.unparse(tree)


@pytest.mark.parametrize(
    "path", [p for p in MODULES if part_of(p) not in ("device", "arguments")], ids=lambda p: str(p.relative_to(REPO))
)
def test_no_vendor_is_named_outside_the_device_folder(path: Path) -> None:
    found = [line for line in code_without_prose(path).splitlines() if VENDOR.search(line)]
    assert not found


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(REPO)))
def test_files_and_functions_stay_small(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) < 400
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            assert node.end_lineno - node.lineno < 80, node.name


def test_ruff_has_no_complaint() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "ruff", "check", "--output-format", "concise", "."],
        capture_output=True, text=True, cwd=REPO, timeout=60,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout


def test_shellcheck_has_no_complaint() -> None:
    skipped = {".venv", ".git", "build"}
    scripts = [p for p in sorted(REPO.rglob("*.sh")) if not skipped & set(p.relative_to(REPO).parts)]
    scripts.append(REPO / ".ci" / "run")
    shellcheck = Path(sys.executable).with_name("shellcheck")
    result = subprocess.run(
        [str(shellcheck), "-x", *map(str, scripts)], capture_output=True, text=True, cwd=REPO, timeout=120
    )
    assert result.returncode == 0, result.stdout


def test_the_package_installs_with_the_versions_the_documents_name() -> None:
    text = (REPO / "pyproject.toml").read_text(encoding="utf-8")
    for wanted in ('">=3.10,<3.14"', '"torch>=2.7"', '"megatron-core~=0.16.1"', "eval =", "npu =", "dev ="):
        assert wanted in text
