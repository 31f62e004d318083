"""Every path, flag and command that the documents name exists and parses."""

import re
import shlex
from pathlib import Path

import pytest

from mindspeed_llm.arguments.aliases import ALIASES, ALIASES_BY_SCRIPT
from mindspeed_llm.arguments.flags import flags_of, spelling
from mindspeed_llm.arguments.parser import parse
from mindspeed_llm.arguments.programs import PROGRAMS
from mindspeed_llm.arguments.upstream import ACCEPTED, ACCEPTED_BY_SCRIPT, REFUSED
from tests.conftest import REPO

DOCUMENTS = sorted([*REPO.glob("*.md"), *REPO.glob("docs/**/*.md")])
LINK = re.compile(r"\[[^\]]*\]\(([^)#\s]+)[^)]*\)")
CODE = re.compile(r"`([^`\n]+)`")
FENCE = re.compile(r"```(?:bash|shell|sh)\n(.*?)```", re.DOTALL)
FLAG = re.compile(r"(?<![\w-])--[a-z][a-z0-9_-]+")
REPOSITORY_PATH = re.compile(
    r"^(?:\./)?((?:mindspeed_llm|examples|docs|tests|scripts|configs|benchmarks)/[\w./-]+|[\w-]+\.(?:py|sh|md|toml))$"
)
FOREIGN = {"--help", "--config", "--typo", "--fix", "--flag", "--name", "--option", "--nproc_per_node", "--nnodes"}
FOREIGN |= {"--node_rank", "--master_addr", "--master_port", "--max-restarts", "--no-such-flag"}
"""Flags of other tools, and the placeholders with which documents explain how flags are written."""


def known_flags() -> set[str]:
    names = {flag.name for program in PROGRAMS.values() for flag in flags_of(program)}
    names |= set(ALIASES).union(*ALIASES_BY_SCRIPT.values()) | set(ACCEPTED) | set(REFUSED)
    for table in ACCEPTED_BY_SCRIPT.values():
        names |= set(table)
    return {spelling(name) for name in names} | FOREIGN


def ids(path: Path) -> str:
    return str(path.relative_to(REPO))


@pytest.mark.parametrize("path", DOCUMENTS, ids=ids)
def test_links_lead_somewhere(path: Path) -> None:
    for target in LINK.findall(path.read_text(encoding="utf-8")):
        if "://" not in target:
            assert (path.parent / target).exists(), target


@pytest.mark.parametrize("path", DOCUMENTS, ids=ids)
def test_paths_of_the_repository_exist(path: Path) -> None:
    for code in CODE.findall(LINK.sub("", path.read_text(encoding="utf-8"))):
        match = REPOSITORY_PATH.match(code)
        if match and "*" not in code and "<" not in code:
            named = match.group(1)
            assert (
                (REPO / named).exists()
                or (path.parent / named).exists()
                or "/" not in named
                and any(REPO.glob(f"mindspeed_llm/**/{named}"))
            ), named


@pytest.mark.parametrize("path", DOCUMENTS, ids=ids)
def test_flags_are_real(path: Path) -> None:
    known = known_flags()
    unknown = set()
    for code in [*CODE.findall(path.read_text(encoding="utf-8")), *FENCE.findall(path.read_text(encoding="utf-8"))]:
        if code.startswith(("pip", "git", "python -m pip")):
            continue
        unknown |= {flag for flag in FLAG.findall(code) if flag.replace("_", "-") not in known and flag not in known}
    assert not unknown


def commands(path: Path) -> list[list[str]]:
    """Every command line in the document's shell blocks, comments and continuation lines resolved."""
    found = []
    for block in FENCE.findall(path.read_text(encoding="utf-8")):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words:
                found.append(words)
    return found


@pytest.mark.parametrize("path", DOCUMENTS, ids=ids)
def test_commands_name_real_scripts_and_parse(path: Path) -> None:
    for words in commands(path):
        for index, word in enumerate(words):
            name = Path(word).name
            if name in PROGRAMS:
                options = [w for w in words[index + 1 :] if w != "..."]
                if "--help" not in options:
                    parse(PROGRAMS[name], options, name)
                break
            if word.endswith((".sh", ".py")) and not word.startswith(("$", "/")):
                assert (REPO / word).exists(), word


@pytest.mark.parametrize("path", DOCUMENTS, ids=ids)
def test_documents_speak_of_the_product_only(path: Path) -> None:
    text = path.read_text(encoding="utf-8").lower()
    for word in ("/work/", "/root/", "/tmp/brief"):
        assert word not in text
