"""Staged folders, and what a checkpoint records about itself."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from mindspeed_llm.checkpoint import atomic
from mindspeed_llm.checkpoint.atomic import StagedDirectory, write_text, write_tracker
from mindspeed_llm.checkpoint.layout import Layout
from mindspeed_llm.checkpoint.metadata import BaseRecord, LoraSettings, Metadata, read_metadata, write_metadata
from mindspeed_llm.errors import InputError
from mindspeed_llm.models.config import ModelConfig
from tests.checkpoint.tiny import hf_config


def test_nothing_is_visible_before_publishing_and_everything_after(tmp_path: Path) -> None:
    stage = StagedDirectory(tmp_path / "run" / "iter_0000003")
    folder = stage.create()
    (folder / "mp_rank_00").mkdir()
    (folder / "mp_rank_00" / "file").write_text("x")
    assert not stage.final.exists() and [p.name[0] for p in (tmp_path / "run").iterdir()] == ["."]
    stage.publish()
    assert (stage.final / "mp_rank_00" / "file").read_text() == "x"
    assert os.stat(stage.final / "mp_rank_00" / "file").st_mode & 0o777 == 0o640
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["iter_0000003"]


def test_publishing_replaces_an_older_folder_and_creating_clears_a_leftover(tmp_path: Path) -> None:
    (tmp_path / "it").mkdir()
    (tmp_path / "it" / "old").write_text("1")
    leftover = StagedDirectory(tmp_path / "it")
    (leftover.create() / "half").write_text("killed here")
    stage = StagedDirectory(tmp_path / "it")
    (stage.create() / "new").write_text("2")
    stage.publish()
    assert sorted(p.name for p in (tmp_path / "it").iterdir()) == ["new"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["it"]


def listing(folder: Path) -> list[str]:
    """Names in a folder, hidden ones too."""
    return sorted(path.name for path in folder.iterdir())


def replacement(folder: Path, stays: bool = False) -> StagedDirectory:
    """A new config.json and a.bin about to replace an older folder, which holds other files too."""
    (folder / "sub").mkdir(parents=True)
    for name in ("notes.txt", "sub/deep.txt", "old.bin", "config.json"):
        (folder / name).write_text(f"old {name}")
    (folder / "link").symlink_to("nowhere")
    (folder / "notes.txt").chmod(0o604)
    stage = StagedDirectory(folder, stays)
    stage.create()
    for name in ("config.json", "a.bin"):
        (stage.path / name).write_text(f"new {name}")
    return stage


@pytest.mark.parametrize("swaps", [True, False])
def test_a_replaced_folder_keeps_the_files_it_is_told_to(
    swaps: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not swaps:
        monkeypatch.setattr(atomic, "exchange", lambda *_: False)
    out = tmp_path / "out"
    stage = replacement(out)
    stage.publish(lambda name: name != "old.bin", "config.json")
    assert listing(out) == ["a.bin", "config.json", "link", "notes.txt", "sub"] and listing(tmp_path) == ["out"]
    assert (out / "config.json").read_text() == "new config.json" and (out / "link").readlink() == Path("nowhere")
    assert (out / "sub" / "deep.txt").read_text() == "old sub/deep.txt"
    assert (out / "notes.txt").stat().st_mode & 0o777 == 0o604 and (out / "a.bin").stat().st_mode & 0o777 == 0o640


def test_folders_change_places_in_one_step(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).write_text("")
    assert atomic.exchange(tmp_path / "one", tmp_path / "two")
    assert listing(tmp_path / "one") == ["two"] and listing(tmp_path / "two") == ["one"]
    assert not atomic.exchange(tmp_path / "one", tmp_path / "three")


def test_without_exchange_a_kill_between_the_renames_is_put_right_by_the_next_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = replacement(tmp_path / "out")
    stage.final.rename(stage.old)  # and here the program is killed
    StagedDirectory(tmp_path / "out").create()
    assert (tmp_path / "out" / "config.json").read_text() == "old config.json"
    assert listing(tmp_path) == [".out.partial", "out"]


def test_a_folder_that_stays_is_filled_file_by_file_with_the_marker_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    stage = replacement(out, stays=True)
    (stage.path / "z.json").write_text("new")
    order, inode = [], out.stat().st_ino
    replace = Path.replace
    monkeypatch.setattr(Path, "replace", lambda self, target: (order.append(self.name), replace(self, target))[1])
    stage.publish(last="config.json")
    assert order == ["a.bin", "z.json", "config.json"] and out.stat().st_ino == inode
    assert (out / "notes.txt").read_text() == "old notes.txt" and not stage.path.exists()


def test_a_link_to_a_folder_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "out").symlink_to("real")
    stage = StagedDirectory(tmp_path / "out")
    (stage.create() / "file").write_text("x")
    stage.publish()
    assert (tmp_path / "out").is_symlink() and listing(tmp_path / "real") == ["file"]


def test_an_unwritable_place_is_an_input_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="choose a writable folder"):
        StagedDirectory(tmp_path / "file" / "run").create()


def test_small_files_are_replaced_whole(tmp_path: Path) -> None:
    write_text(tmp_path / "a", "one")
    write_tracker(tmp_path, 20)
    write_tracker(tmp_path, "release")
    assert (tmp_path / "latest_checkpointed_iteration.txt").read_text() == "release"
    assert len(list(tmp_path.iterdir())) == 2


def test_metadata_survives_its_file(tmp_path: Path) -> None:
    metadata = Metadata(
        ModelConfig.from_hf_dict(hf_config(), "here"),
        Layout.even(4, 2, 2, 1),
        iteration=20,
        content_hash="ab" * 32,
        base=BaseRecord("/models/base", "cd" * 32),
        lora=LoraSettings(16, 32.0, ("linear_fc1", "linear_qkv"), 0.1),
        template="qwen3",
        enable_thinking="none",
        options={"lr": 1e-4},
    )
    write_metadata(tmp_path, metadata)
    found = read_metadata(tmp_path)
    assert found == metadata and found.model.hf_config == metadata.model.hf_config
    assert found.lora.scaling("decoder.layers.1.mlp.linear_fc2") == 2.0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(format_version=2), "format version 2"),
        (lambda d: d.pop("model"), "does not describe a checkpoint"),
        (lambda d: d["model"].pop("hidden_size"), "missing fields"),
        (lambda d: d.update(surprise=1), "does not describe a checkpoint"),
        (lambda d: d["layout"].pop("chunks"), "does not describe a checkpoint"),
    ],
)
def test_damaged_or_newer_metadata_is_refused(change: Callable[[dict], object], message: str, tmp_path: Path) -> None:
    write_metadata(tmp_path, Metadata(ModelConfig.from_hf_dict(hf_config(), "here"), Layout.even(4)))
    values = json.loads((tmp_path / "args.json").read_text())
    change(values)
    (tmp_path / "args.json").write_text(json.dumps(values))
    with pytest.raises(InputError, match=message):
        read_metadata(tmp_path)


def test_a_checkpoint_of_another_program_has_no_metadata(tmp_path: Path) -> None:
    assert read_metadata(tmp_path) is None
    (tmp_path / "args.json").write_text("{")
    with pytest.raises(InputError, match="not valid JSON"):
        read_metadata(tmp_path)
