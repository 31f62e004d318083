"""Good sources of every format to damage, and the refusal that has to follow."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mindspeed_llm.checkpoint.convert import main
from mindspeed_llm.checkpoint.formats.hf import HFSource, write_hf
from mindspeed_llm.errors import InputError
from tests.checkpoint.tiny import make_hf

Damage = Callable[[Path], object]
LAYOUT = ["--target-tensor-parallel-size", "2", "--target-pipeline-parallel-size", "2"]
RANK = "iter_0000001/mp_rank_00_000/model_optim_rng.pt"
OTHER = "iter_0000001/mp_rank_01_000/model_optim_rng.pt"
ARGS = "iter_0000001/args.json"
SHARD = "iter_0000001/__0_0.distcp"
INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One good source of each format: hf, sharded (hf), bin (hf), torch (TP2 PP2) and dist."""
    root = tmp_path_factory.mktemp("sources")
    hf = make_hf(root / "hf")
    sharded = Path(shutil.copytree(hf, root / "sharded"))
    write_hf(HFSource(hf), sharded, shard_bytes=9000)
    (sharded / "model.safetensors").unlink()
    binary = Path(shutil.copytree(hf, root / "bin"))
    torch.save(load_file(binary / "model.safetensors"), binary / "pytorch_model.bin")
    (binary / "model.safetensors").unlink()
    main(["--load-dir", str(hf), "--save-dir", str(root / "torch"), *LAYOUT])
    main(["--load-dir", str(hf), "--save-dir", str(root / "dist"), "--ckpt-format", "torch_dist"])
    return {name: root / name for name in ("hf", "sharded", "bin", "torch", "dist")}


def snapshot(folder: Path) -> dict[str, tuple]:
    """Times, kinds and bytes of everything in a folder."""
    found = {}
    for path in sorted(folder.rglob("*")):
        data = path.read_bytes() if path.is_file() and not path.is_symlink() else None
        found[str(path)] = (path.lstat().st_mtime_ns, path.lstat().st_mode, data)
    return found


def refused(
    load: Path, message: str, *more: object, error: type[Exception] = InputError, save: Path | None = None
) -> str:
    """The line a conversion is refused with: it leaves the source as it was, and nothing else."""
    root = load.parent
    before = snapshot(root)
    words = ["--load-dir", load, "--save-dir", save or root / "out", *more]
    with pytest.raises(error, match=message) as caught:
        main([str(word) for word in words])
    assert "\n" not in str(caught.value)
    assert snapshot(root) == before
    return str(caught.value)


def copy(sources: dict[str, Path], name: str, tmp_path: Path, damage: Damage | None = None) -> Path:
    """A copy of a source, damaged."""
    folder = Path(shutil.copytree(sources[name], tmp_path / "in"))
    if damage:
        damage(folder)
    return folder


def one(folder: Path, pattern: str) -> Path:
    """The first file of a pattern."""
    return sorted(folder.glob(pattern))[0]


def edit_json(name: str, change: Callable[[Any], object]) -> Damage:
    """Rewrite a JSON file after `change(values)`, which may give another value."""

    def damage(folder: Path) -> None:
        values = json.loads((folder / name).read_text())
        given = change(values)
        (folder / name).write_text(json.dumps(values if given is None else given))

    return damage


def edit_tensors(change: Callable[[dict], object]) -> Damage:
    """Rewrite model.safetensors after `change(tensors)`."""

    def damage(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors")

    return damage


def edit_rank(change: Callable[[dict], object], name: str = RANK) -> Damage:
    """Rewrite a rank file after `change(content)`, which may give another content."""

    def damage(folder: Path) -> None:
        content = torch.load(folder / name, weights_only=False)
        given = change(content)
        torch.save(content if given is None else given, folder / name)

    return damage


def without_args_json(damage: Damage) -> Damage:
    """As another program would have written it."""
    return lambda folder: ((folder / ARGS).unlink(), damage(folder))
