"""The scoped view of torch: only one package sees it, only from the moment it is installed."""

import importlib
import importlib.resources
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from mindspeed_llm.device import adapter
from mindspeed_llm.errors import InputError

PACKAGE = "view_of_torch_example"
MODULE = '''
"""A module that names its device in every way."""
import torch
import torch.cuda
import torch.cuda as renamed
from torch import cuda
from torch.cuda import current_device
from torch.nn import Linear

PLACE = "cuda"
TYPES = ("torch.cuda.FloatTensor", ("cuda", 1))
SENTENCE = "runs on cuda"

def make(device="cuda", *, other="cuda"):
    def inner():
        return "cuda"
    return device, other, inner(), [word for word in ("cuda", "cpu")]

def late():
    import torch as again
    return again.cuda.current_device()
'''


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A package on disk, nothing of which stays imported."""
    folder = tmp_path / PACKAGE
    (folder / "inner").mkdir(parents=True)
    (folder / "__init__.py").write_text("import torch\n")
    (folder / "inner" / "__init__.py").write_text("")
    (folder / "inner" / "module.py").write_text(MODULE)
    (folder / "data.txt").write_text("kept")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    importlib.invalidate_caches()
    yield PACKAGE
    for name in [name for name in sys.modules if name.partition(".")[0] == PACKAGE]:
        del sys.modules[name]


STAND_IN = SimpleNamespace(current_device=lambda: "the stand-in")
WORDS = {"cuda": "cpu", "torch.cuda.FloatTensor": "torch.FloatTensor"}


def test_every_way_of_naming_the_device_leads_to_the_stand_in(package: str) -> None:
    adapter.install(package, {"cuda": STAND_IN}, WORDS, {})
    module = importlib.import_module(f"{package}.inner.module")
    assert module.torch.cuda is module.renamed is module.cuda is STAND_IN
    assert module.current_device() == module.late() == "the stand-in"
    assert module.torch.nn.Linear is module.Linear is torch.nn.Linear
    assert module.torch.Tensor is torch.Tensor


def test_words_are_replaced_where_they_stand_alone_nested_code_and_defaults_included(package: str) -> None:
    adapter.install(package, {"cuda": STAND_IN}, WORDS, {})
    module = importlib.import_module(f"{package}.inner.module")
    assert module.PLACE == "cpu"
    assert module.TYPES == ("torch.FloatTensor", ("cpu", 1))
    assert module.SENTENCE == "runs on cuda"
    assert module.make() == ("cpu", "cpu", "cpu", ["cpu", "cpu"])


def test_all_other_modules_keep_the_real_torch(package: str) -> None:
    real = torch.cuda
    adapter.install(package, {"cuda": STAND_IN}, WORDS, {})
    importlib.import_module(f"{package}.inner.module")
    assert torch.cuda is real is sys.modules["torch.cuda"] is importlib.import_module("torch.cuda")
    assert sys.modules["torch"] is torch


def test_functions_registered_for_a_module_run_after_it(package: str) -> None:
    seen = []
    after = {f"{package}.inner.module": [lambda module: seen.append(module.PLACE)]}
    adapter.install(package, {"cuda": STAND_IN}, WORDS, after)
    importlib.import_module(f"{package}.inner")
    assert seen == []
    importlib.import_module(f"{package}.inner.module")
    assert seen == ["cpu"]


def test_data_files_of_the_package_stay_readable(package: str) -> None:
    adapter.install(package, {"cuda": STAND_IN}, WORDS, {})
    assert importlib.resources.files(importlib.import_module(package)).joinpath("data.txt").read_text() == "kept"


def test_installing_twice_changes_nothing(package: str) -> None:
    for _ in range(2):
        adapter.install(package, {"cuda": STAND_IN}, WORDS, {})
    finders = [one for one in sys.meta_path if isinstance(one, adapter._Finder) and one.package == package]
    assert len(finders) == 1


def test_it_is_too_late_once_the_package_is_imported(package: str) -> None:
    importlib.import_module(package)
    with pytest.raises(InputError, match="imported before the device was chosen; call device.select.. first"):
        adapter.install(package, {"cuda": STAND_IN}, WORDS, {})
