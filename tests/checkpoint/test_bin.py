"""`.bin` folders: read like safetensors, lazily and without running what is in them."""

import json
import pickle
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mindspeed_llm.checkpoint.fingerprint import content_hash
from mindspeed_llm.checkpoint.formats.bin_file import read_bin
from mindspeed_llm.checkpoint.formats.hf import HFSource
from mindspeed_llm.checkpoint.formats.lazy import LazyTensor
from mindspeed_llm.errors import InputError
from tests.checkpoint.tiny import make_hf

INDEX = "pytorch_model.bin.index.json"


def as_bin(folder: Path, shards: int = 1) -> Path:
    """Turn a folder's safetensors into `.bin` files, with an index when there are several."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    if shards == 1:
        torch.save(tensors, folder / "pytorch_model.bin")
        return folder
    names = [f"pytorch_model-{n + 1:05d}-of-{shards:05d}.bin" for n in range(shards)]
    where = {name: names[n * shards // len(tensors)] for n, name in enumerate(tensors)}
    for file in names:
        torch.save({name: tensors[name] for name in tensors if where[name] == file}, folder / file)
    (folder / INDEX).write_text(json.dumps({"weight_map": where}))
    return folder


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("index", [True, False])
def test_a_bin_folder_is_the_same_model_as_its_safetensors(shards: int, index: bool, tmp_path: Path) -> None:
    expected = content_hash(HFSource(make_hf(tmp_path / "hf")))
    as_bin(tmp_path / "hf", shards)
    if not index:
        (tmp_path / "hf" / INDEX).unlink(missing_ok=True)
    source = HFSource(tmp_path / "hf")
    assert content_hash(source) == expected
    assert all(isinstance(tensor, LazyTensor) for tensor in source.tensors.values())


def test_safetensors_are_preferred_where_both_lie(tmp_path: Path) -> None:
    folder = make_hf(tmp_path / "hf")
    (folder / "pytorch_model.bin").write_bytes(b"not read")
    assert {tensor.path.suffix for tensor in HFSource(folder).tensors.values()} == {".safetensors"}


def test_views_shared_storages_strides_and_parameters_are_read_as_torch_shows_them(tmp_path: Path) -> None:
    base = torch.randn(7, 12)
    tensors = {
        "base": base,
        "view": base[2:5, 1:9],
        "transposed": base.t(),
        "every_other": base[::2],
        "column": base[:, 3],
        "parameter": torch.nn.Parameter(base[1:3].clone()),
        "wide": base.expand(2, 7, 12),
        "scalar": torch.tensor(3.5),
        "empty": torch.empty(0, 4),
        "half": base.to(torch.bfloat16),
    }
    torch.save(tensors, tmp_path / "x.bin")
    found = read_bin(tmp_path / "x.bin")
    assert list(found) == list(tensors)
    for name, values in tensors.items():
        assert found[name].dtype == values.dtype and torch.equal(found[name].read(), values.detach()), name
    box = found["transposed"].read([(1, 3), (8, 12)], [(2, 6)])
    assert torch.equal(box, base.t()[[1, 2, 8, 9, 10, 11], 2:6])
    size = (tmp_path / "x.bin").stat().st_size
    assert found["view"].path == tmp_path / "x.bin" and 0 < found["view"].offset < size


def test_a_tied_output_layer_that_shares_its_storage_is_accepted(tmp_path: Path) -> None:
    folder = make_hf(tmp_path / "hf", tied=True)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    torch.save(tensors, folder / "pytorch_model.bin")
    assert "output_layer.weight" not in HFSource(folder).names()
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + 1
    torch.save(tensors, folder / "pytorch_model.bin")
    with pytest.raises(InputError, match="holds other values"):
        HFSource(folder)


class Bomb:
    """An object whose pickle runs a command when it is loaded."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple:
        return (open, (str(self.trace), "w"))


@pytest.mark.parametrize("legacy", [False, True])
def test_code_in_a_bin_file_is_never_run(legacy: bool, tmp_path: Path) -> None:
    path = tmp_path / "x.bin"
    torch.save({"w": torch.ones(2), "bomb": Bomb(tmp_path / "ran")}, path, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(InputError, match="save it again" if legacy else r"1 entries are no tensors \(bomb\)"):
        read_bin(path)
    path.write_bytes(pickle.dumps(Bomb(tmp_path / "ran")))
    with pytest.raises(InputError, match="not a zip archive"):
        read_bin(path)
    assert not (tmp_path / "ran").exists()


def test_the_command_a_legacy_file_is_refused_with_makes_it_readable(tmp_path: Path) -> None:
    path = tmp_path / "x.bin"
    values = torch.randn(3, 5)
    torch.save({"w": values}, path, _use_new_zipfile_serialization=False)
    with pytest.raises(InputError, match="save it again") as refused:
        read_bin(path)
    words = shlex.split(str(refused.value).partition("save it again by ")[2])
    subprocess.run([sys.executable, *words[1:]], check=True)
    assert torch.equal(read_bin(path)["w"].read(), values)


def test_damaged_bin_folders_are_named(tmp_path: Path) -> None:
    folder = as_bin(make_hf(tmp_path / "hf"), 3)
    shards = sorted(folder.glob("*.bin"))
    whole = shards[1].read_bytes()
    shards[1].write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match=r"00002-of-00003.bin: not a complete torch zip file .*truncated"):
        HFSource(folder)
    shards[1].unlink()
    with pytest.raises(InputError, match="00002-of-00003.bin: no such file, but pytorch_model.bin.index.json lists it"):
        HFSource(folder)
    (folder / INDEX).unlink()
    with pytest.raises(InputError, match=r"2 shards .* of 3; download the missing ones"):
        HFSource(folder)
    torch.save([1, 2], tmp_path / "list.bin")
    with pytest.raises(InputError, match="holds a list"):
        read_bin(tmp_path / "list.bin")
