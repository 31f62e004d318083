"""Every change to foreign code: its target is there, the version is one it was checked with, it is still needed."""

import importlib
import json
import subprocess
import sys
from importlib.metadata import version
from types import ModuleType, SimpleNamespace

import pytest
import torch
from packaging.specifiers import SpecifierSet

from mindspeed_llm.device import MODULES, patches
from mindspeed_llm.device.patches import PATCHES, Patch

DISTRIBUTIONS = {"torch": "torch", "megatron": "megatron-core"}
UNPATCHED = """
import importlib, json, sys, warnings
warnings.simplefilter("ignore")
facts = {}
for module, attribute in json.loads(sys.argv[1]):
    target = importlib.import_module(module)
    for part in attribute.split("."):
        target = getattr(target, part, None)
    facts[module + "." + attribute] = [getattr(target, "__module__", None), getattr(target, "__name__", None)]
import torch
from megatron.core.transformer.moe.token_dispatcher import maybe_move_tensor_to_cpu
facts["counts"] = type(maybe_move_tensor_to_cpu(torch.ones(1), as_numpy=True)).__name__
try:
    torch.zeros(1).cuda()
    facts["cuda"] = "works"
except Exception as error:
    facts["cuda"] = type(error).__name__
print(json.dumps(facts))
"""


def name(patch: Patch) -> str:
    return f"{patch.module}.{patch.attribute}"


@pytest.fixture(scope="module")
def unpatched() -> dict:
    """The targets as they are in a process of their own, where no device was chosen."""
    wanted = json.dumps([(patch.module, patch.attribute) for patch in PATCHES])
    done = subprocess.run([sys.executable, "-c", UNPATCHED, wanted], capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("patch", PATCHES, ids=name)
def test_the_target_exists_in_the_installed_version(patch: Patch, unpatched: dict) -> None:
    assert unpatched[name(patch)][1] is not None


@pytest.mark.parametrize("patch", PATCHES, ids=name)
def test_the_installed_version_is_one_the_patch_was_checked_with(patch: Patch) -> None:
    installed = version(DISTRIBUTIONS[patch.module.partition(".")[0]])
    assert SpecifierSet(patch.versions, prereleases=True).contains(installed)


@pytest.mark.parametrize("patch", PATCHES, ids=name)
def test_a_patch_says_why_and_where(patch: Patch) -> None:
    assert len(patch.reason) > 40
    assert set(patch.devices) <= set(MODULES)


def test_the_patches_are_still_needed(unpatched: dict) -> None:
    assert unpatched["megatron.core.jit.jit_fuser"] == ["torch", "compile"]
    assert unpatched["counts"] == "Tensor"
    if not torch.cuda.is_available():
        assert unpatched["cuda"] in ("AssertionError", "RuntimeError")


def test_token_counts_reach_the_collectives_as_numpy_integers() -> None:
    (patch,) = (one for one in PATCHES if one.attribute == "maybe_move_tensor_to_cpu")
    counts = torch.tensor([3, 4])
    assert patch.value(counts, as_numpy=True, record_stream=False).tolist() == [3, 4]
    assert not isinstance(patch.value(counts, as_numpy=True), torch.Tensor)
    assert patch.value(counts) is counts and patch.value(None, as_numpy=True) is None


def test_a_target_that_is_gone_is_an_error_that_names_it() -> None:
    patch = Patch("some.module", "Thing.method", ("cpu",), ">=0", "because", len)
    with pytest.raises(AttributeError, match="some.module.Thing.method is gone: see device/patches.py"):
        patch.apply(SimpleNamespace(Thing=SimpleNamespace()))
    changed = SimpleNamespace(Thing=SimpleNamespace(method=None))
    patch.apply(changed)
    assert changed.Thing.method is len


def test_patches_apply_to_their_devices_only(monkeypatch: pytest.MonkeyPatch) -> None:
    applied = []
    target = ModuleType("patched_example")
    monkeypatch.setitem(sys.modules, "patched_example", target)
    for attribute in ("one", "two"):
        setattr(target, attribute, None)
    examples = tuple(
        Patch("patched_example", attribute, (where,), ">=0", "because", applied.append)
        for attribute, where in (("one", "cpu"), ("two", "npu"))
    )
    monkeypatch.setattr(patches, "PATCHES", examples)
    patches.apply_now("cpu")
    assert (target.one, target.two) == (applied.append, None)
    assert list(patches.by_module("npu")) == ["patched_example"]
    assert patches.by_module("cuda") == {}
    assert importlib.import_module("patched_example") is target
