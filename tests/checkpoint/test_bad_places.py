"""Hostile pickles, full disks, odd places and names: nothing is run, nothing is left, one line says why."""

import contextlib
import errno
import os
import pickle
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from mindspeed_llm.checkpoint import result, sizes
from mindspeed_llm.checkpoint.convert import main
from mindspeed_llm.checkpoint.fingerprint import content_hash
from mindspeed_llm.checkpoint.formats.hf import HFSource
from mindspeed_llm.errors import InputError, UsageError
from tests.checkpoint.damage import LAYOUT, RANK, copy, refused, sources
from tests.checkpoint.test_kills import files
from tests.conftest import REPO

__all__ = ["sources"]


class Bomb:
    """An object whose pickle makes a file when it is loaded."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple:
        return (os.mkdir, (str(self.trace),))


def armed(path: Path, trace: Path) -> None:
    """Put a bomb into a torch file beside what it holds."""
    content = torch.load(path, weights_only=False)
    torch.save({"bomb": Bomb(trace), **content, "again": Bomb(trace)}, path)


FILES = [("torch", RANK), ("bin", "pytorch_model.bin"), ("dist", "iter_0000001/common.pt")]


@pytest.mark.parametrize(("name", "path"), FILES)
def test_code_in_a_pickle_is_never_run(name: str, path: str, sources: dict, tmp_path: Path) -> None:
    folder = copy(sources, name, tmp_path, lambda folder: armed(folder / path, tmp_path / "ran"))
    words = ["--load-dir", str(folder), "--save-dir", str(tmp_path / "out")]
    with pytest.raises(InputError, match="entries are no tensors") if name == "bin" else contextlib.nullcontext():
        main([*words, *(LAYOUT if name == "bin" else [])])
    assert not (tmp_path / "ran").exists()
    with contextlib.suppress(Exception):
        torch.load(folder / path, weights_only=False)
    assert (tmp_path / "ran").exists()  # a plain loader runs it


def test_code_in_the_index_of_a_torch_dist_checkpoint_is_never_run(sources: dict, tmp_path: Path) -> None:
    folder = copy(sources, "dist", tmp_path)
    index = folder / "iter_0000001" / ".metadata"
    content = pickle.loads(index.read_bytes())
    content.planner_data = Bomb(tmp_path / "ran")
    index.write_bytes(pickle.dumps(content))
    main(["--load-dir", str(folder), "--save-dir", str(tmp_path / "out")])
    assert not (tmp_path / "ran").exists()


def full(call: str, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the `count`-th call of a function of `os` find no space left."""
    plain, seen = getattr(os, call), [0]

    def failing(*arguments: Any) -> Any:
        seen[0] += 1
        if seen[0] == count:
            raise OSError(errno.ENOSPC, "No space left on device")
        return plain(*arguments)

    monkeypatch.setattr(os, call, failing)


@pytest.mark.parametrize("target", ["hf", "torch", "dist"])
@pytest.mark.parametrize(
    ("call", "count"), [("pwrite", 1), ("pwrite", 20), ("fsync", 1), ("ftruncate", 1), ("rename", 1)]
)
def test_a_full_disk_leaves_nothing(
    call: str, count: int, target: str, sources: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if call == "ftruncate" and target == "torch":
        pytest.skip("rank files grow by torch's own writer")
    folder = copy(sources, "torch" if target == "hf" else "hf", tmp_path)
    more = ["--ckpt-format", "torch_dist"] if target == "dist" else []
    full(call, count, monkeypatch)
    refused(folder, r"out.*: cannot be written \(No space left on device\)", *more)


def test_a_disk_without_room_is_said_before_anything_is_written(
    sources: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sizes, "free_space", lambda folder: 1000)
    refused(
        copy(sources, "hf", tmp_path), r"out/iter_0000001: needs 60.2 kB, its file system has 1 kB free; choose another"
    )


def test_places_that_cannot_be_written_are_named(
    sources: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = copy(sources, "hf", tmp_path)
    (tmp_path / "file").write_text("mine")
    refused(folder, "--save-dir .*file is a file; choose a folder", save=tmp_path / "file")
    refused(folder, r"file/sub.*: cannot be used \(Not a directory\); choose", save=tmp_path / "file" / "sub")
    refused(folder, r"/sys/kernel/none.*; choose (a writable|another) --save-dir", save=Path("/sys/kernel/none"))
    (tmp_path / "loop").symlink_to("loop")
    refused(
        folder, r"loop: cannot be used \(Too many levels of symbolic links\); choose another", save=tmp_path / "loop"
    )
    refused(tmp_path / "none", "--load-dir .*none: no such folder")
    refused(tmp_path / "file", "--load-dir .*file: no such folder|is a file")
    monkeypatch.setattr(result.os, "access", lambda *_: False)
    (tmp_path / "there").mkdir()
    main(["--load-dir", str(sources["torch"]), "--save-dir", str(tmp_path / "there")])  # its parent is not writable
    assert content_hash(HFSource(tmp_path / "there")) == content_hash(HFSource(sources["hf"]))
    refused(sources["torch"], "cannot be replaced in one step", "--overwrite", save=tmp_path / "there")


def test_a_conversion_into_the_current_folder_fills_it_but_does_not_replace_a_model_there(
    sources: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    inode = Path.cwd().stat().st_ino
    main(["--load-dir", str(sources["torch"]), "--save-dir", "."])
    assert Path.cwd().stat().st_ino == inode and content_hash(HFSource(".")) == content_hash(HFSource(sources["hf"]))
    folder = copy(sources, "torch", tmp_path)
    refused(folder, "cannot be replaced in one step .*current folder", "--overwrite", save=Path("."))


@pytest.mark.parametrize("name", ["模型 权重", "a b'c\"d", "-dash", "new\nline", "%s{0}$HOME"])
def test_any_folder_name_works_and_the_next_command_quotes_it(
    name: str, sources: dict, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    folder = Path(shutil.copytree(sources["hf"], tmp_path / name / "in"))
    main(["--load-dir", str(folder), "--save-dir", str(tmp_path / name / "mg"), *LAYOUT])
    words = shlex.split(capsys.readouterr().out.split("next: ", 1)[1])
    assert words[words.index("--load") + 1] == str(tmp_path / name / "mg")
    main(["--load-dir", str(tmp_path / name / "mg"), "--save-dir", str(tmp_path / name / "back")])
    assert content_hash(HFSource(tmp_path / name / "back")) == content_hash(HFSource(folder))


def script(program: str, *words: object) -> subprocess.CompletedProcess:
    """A script in a process of its own."""
    command = [sys.executable, REPO / program, *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=REPO)


@pytest.mark.parametrize("program", ["convert_ckpt.py", "convert_ckpt_v2.py"])
def test_both_scripts_answer_with_one_line_and_the_exit_status(program: str, sources: dict, tmp_path: Path) -> None:
    folder = copy(sources, "hf", tmp_path, lambda folder: (folder / "model.safetensors").write_bytes(b"x" * 100))
    places = ["--load-dir", folder, "--save-dir", tmp_path / "out"]
    for status, more, message in (
        (1, [], "truncated"),
        (2, ["--target-tensor-parallel-size", 0], "must be at least 1"),
    ):
        done = script(program, *places, *more)
        assert done.returncode == status and message in done.stderr, done.stderr
        assert len(done.stderr.strip().splitlines()) == 1 and done.stderr.startswith(f"{program}: error: ")
        assert not (tmp_path / "out").exists() and not done.stdout


def test_a_result_in_the_place_of_its_source_is_refused(sources: dict, tmp_path: Path) -> None:
    folder = copy(sources, "torch", tmp_path)
    kept = files(folder)
    for load in (folder, folder / "iter_0000001"):
        refused(folder, "choose another", "--save-model-type", "mg", "--overwrite", save=folder, error=UsageError)
        refused(load, "choose another", "--save-model-type", "mg", "--overwrite", save=folder, error=UsageError)
    assert files(folder) == kept
