"""Damaged and hostile torch_dist checkpoints: one line of error each, and nothing in them is run."""

import json
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mindspeed_llm.checkpoint.formats.torch_dist import TorchDistSource, is_torch_dist
from mindspeed_llm.errors import InputError
from mindspeed_llm.models.config import ModelConfig
from tests.checkpoint.dist_models import Drawn, check_source, model, written
from tests.checkpoint.tiny import hf_config


def damaged(folder: Path, change: Callable[[Any], object]) -> Path:
    """Rewrite the index after `change(index)`."""
    index = pickle.loads((folder / ".metadata").read_bytes())
    change(index)
    (folder / ".metadata").write_bytes(pickle.dumps(index))
    return folder


def refused(folder: Path, message: str, **options: Any) -> None:
    """One line of error."""
    with pytest.raises(InputError, match=message) as error:
        TorchDistSource(folder, model("dense"), **options)
    assert "\n" not in str(error.value)


def rename(index: Any, old: str, new: str) -> None:
    """Give a key of the index another name."""
    index.state_dict_metadata[new] = index.state_dict_metadata.pop(old)
    for place in [place for place in index.storage_data if place.fqn == old]:
        index.storage_data[type(place)(new, place.offset, place.index)] = index.storage_data.pop(place)


NORM = "decoder.final_layernorm.weight"


def each_chunk(field: str, value: Any) -> Callable[[Any], None]:
    """A change of one field of every storage record."""
    return lambda index: [setattr(info, field, value) for info in index.storage_data.values()]


DAMAGE = [
    (lambda index: rename(index, NORM, "surprise"), rf"1 tensors are missing \['{NORM}'\]; 1 are unknown .*surprise"),
    (lambda index: index.state_dict_metadata[NORM].chunks.clear(), f"chunks of {NORM} hold 0 of 24 values"),
    (each_chunk("relative_path", "../elsewhere"), r"file '../elsewhere' of .* lies outside the folder; refused"),
    (each_chunk("relative_path", "gone.distcp"), "gone.distcp: no such file, but .metadata lists it"),
    (each_chunk("length", 1 << 40), "truncated"),
    (each_chunk("transform_descriptors", ["zstd"]), "stored compressed"),
    (lambda index: index.storage_data.clear(), "is no checkpoint index"),
]


@pytest.mark.parametrize(("change", "message"), DAMAGE)
def test_a_damaged_index_is_one_line_of_error(change: Callable, message: str, tmp_path: Path) -> None:
    refused(damaged(written(tmp_path / "ckpt", Drawn(model("dense"))), change), message)


def test_other_damage_is_one_line_of_error(tmp_path: Path) -> None:
    folder = written(tmp_path / "ckpt", Drawn(model("dense")))
    whole = (folder / ".metadata").read_bytes()
    (folder / ".metadata").write_bytes(whole[: len(whole) // 2])
    refused(folder, "broken pickle")
    (folder / ".metadata").write_bytes(pickle.dumps({"a": 1}))
    refused(folder, "a dict, expected Metadata")
    (folder / ".metadata").unlink()
    refused(folder, "cannot be read .*the checkpoint is incomplete")
    (folder / ".metadata").write_bytes(whole)
    (folder / "metadata.json").write_text('{"sharded_backend": "zarr"}')
    assert is_torch_dist(folder)
    refused(folder, "'zarr' cannot be read; save it with torch_dist")
    (folder / "metadata.json").write_text("{}")
    refused(folder, "does not name its backend")
    with pytest.raises(InputError, match=r"input_layernorm.weight has shape \[4, 24\], its settings ask for \[3, 24\]"):
        (folder / "metadata.json").write_text('{"sharded_backend": "torch_dist"}')
        TorchDistSource(folder, ModelConfig.from_hf_dict(hf_config(layers=3), "here"))


def test_a_shard_that_is_not_what_the_index_says_is_an_error_when_it_is_read(tmp_path: Path) -> None:
    folder = written(tmp_path / "ckpt", Drawn(model("dense")))
    first, second = (f"decoder.layers.mlp.{part}.weight" for part in ("linear_fc1", "linear_fc2"))

    def swap(index: Any) -> None:
        places = {place.fqn: place for place in index.storage_data if place.offset == (1, 0, 0)}
        for field in ("offset", "length"):
            one, other = (index.storage_data[places[key]] for key in (first, second))
            kept = getattr(one, field)
            setattr(one, field, getattr(other, field))
            setattr(other, field, kept)

    source = TorchDistSource(damaged(folder, swap), model("dense"))
    with pytest.raises(InputError, match=r"lies \[1, 24, 44\], .metadata says \[1, 88, 24\]"):
        source.read("decoder.layers.1.mlp.linear_fc1.weight")
    shard = folder / "__0_0.distcp"
    shard.write_bytes(b"\0" * shard.stat().st_size)
    with pytest.raises(InputError, match="not a complete torch file"):
        source.read(NORM)


def test_unknown_tensors_are_left_out_on_request_and_said(tmp_path: Path) -> None:
    source = Drawn(model("dense"))
    folder = damaged(written(tmp_path / "ckpt", source), lambda index: rename(index, NORM, "surprise"))
    refused(folder, "1 tensors are missing", ignore_unknown=True)
    again = written(tmp_path / "again", source)

    def add(index: Any) -> None:
        index.state_dict_metadata["surprise"] = index.state_dict_metadata[NORM]
        (info,) = [info for place, info in index.storage_data.items() if place.fqn == NORM]
        index.storage_data[type(next(iter(index.storage_data)))("surprise", (0,), 0)] = info

    damaged(again, add)
    refused(again, "1 are unknown to a qwen3 model .*surprise")
    found = TorchDistSource(again, model("dense"), ignore_unknown=True)
    check_source(found, source.read)
    assert found.notes == [f"{again}: 1 unknown tensors are left out: ['surprise']"]


class Bomb:
    """An object whose pickle runs a command when it is loaded."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple:
        return (open, (str(self.trace), "w"))


def test_code_in_an_index_is_never_run(tmp_path: Path) -> None:
    folder = written(tmp_path / "ckpt", Drawn(model("dense")))
    damaged(folder, lambda index: setattr(index, "planner_data", Bomb(tmp_path / "ran")))
    (tmp_path / "ran").unlink(missing_ok=True)
    TorchDistSource(folder, model("dense"))
    assert not (tmp_path / "ran").exists()


def test_reading_and_writing_import_no_megatron_core(tmp_path: Path) -> None:
    folder = written(tmp_path / "ckpt", Drawn(model("dense")))
    (tmp_path / "out").mkdir()
    code = (
        "import sys; from pathlib import Path;"
        "from mindspeed_llm.checkpoint.formats.torch_dist import TorchDistSource;"
        "from mindspeed_llm.checkpoint.formats.torch_dist_writer import write_torch_dist;"
        f"write_torch_dist(TorchDistSource({str(folder)!r}), Path({str(tmp_path / 'out')!r}));"
        "print([name for name in sys.modules if name.startswith('megatron')])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    assert json.loads((tmp_path / "out" / "metadata.json").read_text())["sharded_backend"] == "torch_dist"
