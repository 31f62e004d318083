"""Torch files: equal to torch's own loader, and nothing in them is ever executed."""

import argparse
import enum
import io
import os
import pickle
import random
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mindspeed_llm.checkpoint.formats.blocks import write_values
from mindspeed_llm.checkpoint.formats.lazy import LazyTensor
from mindspeed_llm.checkpoint.formats.pickle_machine import Global, Inert
from mindspeed_llm.checkpoint.formats.torch_file import (
    materialise,
    read_torch_file,
    write_skeleton,
    write_torch_file,
)
from mindspeed_llm.errors import InputError


class Backend(enum.Enum):
    """A class the reader does not know."""

    AUTO = 5


class Exploit:
    """An object whose pickle runs a command when it is loaded by pickle."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> Any:
        return os.system, (self.command,)


def content() -> dict:
    """Everything a training checkpoint holds."""
    base = torch.arange(24, dtype=torch.float32).view(4, 6)
    return {
        "args": argparse.Namespace(tp=2, params_dtype=torch.bfloat16, backend=Backend.AUTO, spec=["a", "b"]),
        "checkpoint_version": 3.0,
        "iteration": 7,
        "model": {
            "bf16": torch.randn(3, 5).bfloat16(),
            "transposed": base.t(),
            "view": base[1:3],
            "strided": base[:, ::2],
            "scalar": torch.tensor(2.5, dtype=torch.float64),
            "empty": torch.empty(0, 4),
            "ids": torch.arange(5),
            "mask": torch.tensor([True, False]),
            "x._extra_state": None,
        },
        "rng": {"python": random.getstate(), "numpy": np.random.get_state(), "seed": np.float64(0.5), "b": b"\x00\xff"},
        "sets": ({1, 2}, frozenset("ab"), (1,), [1, [2]]),
    }


def equal(found: Any, expected: Any) -> bool:
    """Deep equality, tensors and arrays by value."""
    if isinstance(expected, torch.Tensor):
        return found.dtype == expected.dtype and torch.equal(found, expected)
    if isinstance(expected, np.ndarray):
        return found.dtype == expected.dtype and np.array_equal(found, expected)
    if isinstance(expected, dict):
        return found.keys() == expected.keys() and all(equal(found[key], expected[key]) for key in expected)
    if isinstance(expected, list | tuple):
        return len(found) == len(expected) and all(map(equal, found, expected))
    return found == expected


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_every_protocol_gives_what_was_saved(protocol: int, tmp_path: Path) -> None:
    saved = content()
    torch.save(saved, tmp_path / "x.pt", pickle_protocol=protocol)
    found = materialise(read_torch_file(tmp_path / "x.pt"))
    args, expected_args = found.pop("args"), saved.pop("args")
    assert equal(found, saved)
    assert args.params_dtype is torch.bfloat16 and args.spec == expected_args.spec and args.tp == 2
    assert isinstance(args.backend, Inert) and args.backend.kind.name == "Backend" and args.backend.arguments == (5,)


def test_rows_and_columns_of_a_tensor_are_read_alone(tmp_path: Path) -> None:
    tensor = torch.randn(7, 9)
    write_torch_file(tmp_path / "x.pt", {"t": tensor, "cut": tensor[2:].t()})
    lazy = read_torch_file(tmp_path / "x.pt")
    assert torch.equal(lazy["t"].read([(5, 7), (0, 1)]), torch.cat([tensor[5:7], tensor[:1]]))
    assert torch.equal(lazy["t"].read(None, [(3, 5), (8, 9)]), torch.cat([tensor[:, 3:5], tensor[:, 8:]], 1))
    assert torch.equal(lazy["cut"].read([(1, 3)]), tensor[2:].t()[1:3])
    with pytest.raises(IndexError):
        lazy["t"].read([(6, 8)])


def test_all_recorded_checkpoints_read_like_torch_reads_them(golden: Path) -> None:
    files = sorted(golden.glob("cases/**/*.pt"))
    assert files
    for path in files:
        if path.parts[-5].startswith("B_v1_"):  # only these need megatron to unpickle; their sums are tested elsewhere
            assert "args" in read_torch_file(path)
            continue
        expected = torch.load(path, weights_only=False)
        found = materialise(read_torch_file(path))
        expected_args, args = vars(expected.pop("args")), vars(found.pop("args"))
        assert equal(found, expected), path
        assert equal(args, expected_args), path


def replace_pickle(path: Path, data: bytes) -> None:
    """Put another data.pkl into a torch file."""
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, old in members.items():
            archive.writestr(name, data if name.endswith("data.pkl") else old)


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5])
def test_a_malicious_file_runs_nothing(protocol: int, tmp_path: Path) -> None:
    witness, path = tmp_path / "witness", tmp_path / "x.pt"
    write_torch_file(path, {"model": {}})
    evil = pickle.dumps({"model": {"w": Exploit(f"touch {witness}")}, "args": Exploit(f"touch {witness}")}, protocol)
    replace_pickle(path, evil)
    found = read_torch_file(path)
    assert not witness.exists()
    assert isinstance(found["args"], Inert) and found["args"].kind.name == "system"
    assert f"touch {witness}" in found["args"].arguments[0]


@pytest.mark.parametrize(
    "data",
    [
        b"cbuiltins\neval\n(Vopen('w','w')\ntR.",
        b"(Vopen('w','w')\nibuiltins\nexec\n.",
        b"cargparse\nNamespace\n(dS'__class__'\nI1\nsb.",
        b"cbuiltins\ngetattr\n(cbuiltins\nopen\nV__call__\ntR(Vw\ntR.",
        b"c_codecs\nencode\n(Vabc\nVzip\ntR.",
        b"cbuiltins\nlist\n(lcos\nsystem\na0.",
        b"\x80\x02\x82\x01.",
        b"(dp0\n",
        b"",
        b"\x80\x04N",
    ],
)
def test_hand_made_pickles_are_inert_or_refused(data: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_torch_file("x.pt", {})
    replace_pickle(Path("x.pt"), data)
    try:
        found = read_torch_file("x.pt")
        assert isinstance(found, Inert | Global)
    except InputError as error:
        assert "broken pickle" in str(error)
    assert not Path("w").exists()
    assert argparse.Namespace.__class__ is type


def test_a_tensor_reaching_beyond_its_storage_is_refused(tmp_path: Path) -> None:
    class Stretched:
        def __reduce__(self) -> Any:
            return torch._utils._rebuild_tensor_v2, (torch.arange(4.0).storage(), 0, (100,), (1,), False, {})

    torch.save({"t": Stretched()}, tmp_path / "x.pt")
    with pytest.raises(InputError, match="beyond its storage"):
        read_torch_file(tmp_path / "x.pt")


@pytest.mark.parametrize("keep", [0, 10, 300, 0.5, 0.99])
def test_a_truncated_file_is_one_clear_error(keep: float, tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    write_torch_file(path, content())
    data = path.read_bytes()
    path.write_bytes(data[: keep if isinstance(keep, int) else int(len(data) * keep)])
    with pytest.raises(InputError, match=r"x\.pt.*(truncated|empty)"):
        read_torch_file(path)


def test_missing_and_legacy_files_say_so(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        read_torch_file(tmp_path / "none.pt")
    torch.save({"a": torch.ones(2)}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    with pytest.raises(InputError, match=r"before 1\.6"):
        read_torch_file(tmp_path / "old.pt")


def test_a_filled_skeleton_is_what_torch_would_have_saved(tmp_path: Path) -> None:
    values = {"a": torch.randn(5, 3).bfloat16(), "b": torch.randn(2), "s": torch.tensor(3.0), "e": torch.empty(0, 2)}
    path = tmp_path / "x.pt"
    shapes = {name: torch.empty(value.shape, dtype=value.dtype) for name, value in values.items()}
    places = write_skeleton(path, {"model": shapes, "n": 1})
    descriptor = os.open(path, os.O_WRONLY)
    for name, value in values.items():
        write_values(descriptor, places["model"][name].offset, value)
    os.close(descriptor)
    loaded = torch.load(path)
    assert all(torch.equal(loaded["model"][name], value) for name, value in values.items())
    whole = io.BytesIO()
    torch.save({"model": values, "n": 1}, whole)
    assert path.stat().st_size == pytest.approx(len(whole.getvalue()), abs=256)


def test_a_skeleton_takes_no_memory_for_its_tensors(tmp_path: Path) -> None:
    import resource

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    places = write_skeleton(tmp_path / "x.pt", {"t": torch.empty(100_000_000, dtype=torch.float32)})
    assert isinstance(places["t"], LazyTensor) and places["t"].nbytes == 400_000_000
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000
