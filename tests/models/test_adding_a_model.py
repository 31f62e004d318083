"""The page of docs/adding_a_model.md, added as the document says: it converts, loads and answers as transformers."""

import re
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy
import pytest
from safetensors.torch import load_file

from mindspeed_llm.checkpoint.convert import main
from mindspeed_llm.models import families
from mindspeed_llm.models.config import ModelConfig
from tests.conftest import REPO
from tests.distributed.pool import pool
from tests.models.parity import Tiny, assert_equal, folder, ours, reference, tokens

DOCUMENT = (REPO / "docs" / "adding_a_model.md").read_text(encoding="utf-8")
PAGE, ROWS, TINY = re.findall(r"```python\n(.*?)```", DOCUMENT, re.DOTALL)
((MODULE, NAME),) = re.findall(r"\+from mindspeed_llm\.models\.families\.(\w+) import (\w+)", DOCUMENT)
TINIES: list[Tiny] = eval(TINY.partition(" = ")[2], {"Tiny": Tiny})


@pytest.fixture
def page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The page as a module of its own, registered in this process."""
    path = tmp_path / f"{MODULE}.py"
    path.write_text(PAGE)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(families, "FAMILIES", (*families.FAMILIES, getattr(__import__(MODULE), NAME)))
    yield path
    sys.modules.pop(MODULE)


def test_the_page_is_as_short_as_promised_and_not_shipped() -> None:
    assert len(PAGE.splitlines()) <= 40
    assert MODULE not in {one.name for one in families.FAMILIES}


@pytest.mark.parametrize("tiny", TINIES, ids=str)
def test_the_documents_page_answers_as_transformers(tiny: Tiny, page: Path) -> None:
    assert_equal(ours(tiny, "logits_of_a_new_family", page=page, family=NAME)[0], reference(tiny))
    with pytest.raises(AssertionError, match="are not supported"):  # the registration ended with the task
        pool(1).run("tests.models.parity_worker:logits", folder=folder(tiny), tokens=tokens(tiny))


@pytest.mark.parametrize("tiny", TINIES, ids=str)
def test_the_documents_page_converts_there_and_back(tiny: Tiny, page: Path, tmp_path: Path) -> None:
    assert ModelConfig.from_hf(folder(tiny)).family == MODULE
    there = ["--load-model-type", "hf", "--save-model-type", "mg", "--target-tensor-parallel-size", "2"]
    assert main([*there, "--load-dir", str(folder(tiny)), "--save-dir", str(tmp_path / "mg")]) == 0
    back = ["--load-model-type", "mg", "--save-model-type", "hf"]
    assert main([*back, "--load-dir", str(tmp_path / "mg"), "--save-dir", str(tmp_path / "hf")]) == 0
    (found,) = (load_file(file) for file in tmp_path.glob("hf/**/*.safetensors"))
    wanted = load_file(folder(tiny) / "model.safetensors")
    assert set(found) == set(wanted)
    assert all(numpy.array_equal(found[name].numpy(), wanted[name].numpy()) for name in wanted)


def test_the_documents_rows_are_those_of_internlm2() -> None:
    from mindspeed_llm.models.families import base, internlm2, rows

    found = eval(f"dict({ROWS.strip()})", {**vars(rows), **vars(base)})
    assert found["weights"] == internlm2.INTERNLM2.weights
