"""A conversion that is killed, interrupted, or runs twice at once: readers find the old result, the new one, or none.

A child process ends itself by SIGKILL before its n-th change of the file system or its n-th write of values, so a seed
gives the same moments every time. They are drawn from all of the run, and every one near its end is tried as well: that
is where the result gets its name.
"""

import contextlib
import hashlib
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mindspeed_llm.checkpoint import result
from mindspeed_llm.checkpoint.atomic import TRACKER, exchange
from mindspeed_llm.checkpoint.convert import main
from mindspeed_llm.checkpoint.formats import blocks
from mindspeed_llm.checkpoint.formats.torch_dist_file import METADATA
from mindspeed_llm.errors import InputError, UsageError
from tests.checkpoint.tiny import make_hf
from tests.conftest import REPO

SEED = 20260
LAST = 12
"""So many changes at the end of a run are all tried."""
CHANGES = {"os.rename", "os.mkdir", "os.rmdir", "os.remove", "os.link", "os.symlink", "os.chmod", "os.truncate"}
LAYOUT = ["--target-tensor-parallel-size", "2", "--target-pipeline-parallel-size", "2"]


def files(folder: Path) -> dict[str, str]:
    """Every visible file below a folder with a digest of its bytes; links with where they lead."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        if any(part.startswith(".") and part != METADATA for part in name.parts) or (
            path.is_dir() and not path.is_symlink()
        ):
            continue
        data = str(path.readlink()).encode() if path.is_symlink() else path.read_bytes()
        found[str(name)] = hashlib.sha256(data).hexdigest()
    return found


def hidden(folder: Path) -> list[str]:
    """Names of what a run keeps aside, anywhere below a folder."""
    return [str(path.relative_to(folder)) for path in folder.rglob(".*") if path.name != METADATA]


def run(words: list[str]) -> None:
    """One conversion in this process."""
    assert main(words) == 0


def count_changes(act: Callable[[int], None]) -> None:
    """Call `act(n)` before the n-th change of the file system in this process, which has to end with it."""
    number = 0

    def change() -> None:
        nonlocal number
        number += 1
        act(number)

    def hook(event: str, arguments: tuple) -> None:
        writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        if event in CHANGES or writes:
            change()

    write, swap = blocks.write_values, exchange
    blocks.write_values = lambda *arguments: (change(), write(*arguments))
    sys.modules["mindspeed_llm.checkpoint.atomic"].exchange = lambda *paths: (change(), swap(*paths))[1]
    sys.addaudithook(hook)


def forked(words: list[str], act: Callable[[int], None]) -> int:
    """The wait status of a child that runs a conversion with `act` before each change."""
    child = os.fork()
    if child == 0:
        status = 99
        with contextlib.suppress(BaseException):
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            count_changes(act)
            status = main(words)
        os._exit(status)
    return os.waitpid(child, 0)[1]


def killed_at(words: list[str], number: int) -> bool:
    """Run a conversion that is killed before its change `number`; whether it came that far."""
    status = forked(words, lambda seen: os.kill(os.getpid(), signal.SIGKILL) if seen == number else None)
    assert os.WIFSIGNALED(status) or status == 0
    return os.WIFSIGNALED(status)


def number_of_changes(words: list[str], tmp_path: Path) -> int:
    """How many changes the whole conversion makes."""
    log = tmp_path / "count"
    with log.open("w") as file:
        status = forked(words, lambda seen: os.write(file.fileno(), b"x") and None)
    assert status == 0
    total = log.stat().st_size
    log.unlink()
    return total


class Case:
    """One kind of target.

    Attributes:
        words: the command line.
        prepare: makes what lies there before.
    """

    def __init__(self, folder: Path, kind: str) -> None:
        """`kind` is a key of `MOMENTS`."""
        self.folder, self.kind = folder, kind
        self.hf = make_hf(folder / "hf")
        run(["--load-dir", str(self.hf), "--save-dir", str(folder / "source")])
        self.root = folder / "place"
        self.save = self.root / "out"
        format_flags = {"hf": [], "torch": LAYOUT, "dist": ["--ckpt-format", "torch_dist"]}[kind.partition(" ")[0]]
        self.source = str(self.hf if kind.partition(" ")[0] != "hf" else folder / "source")
        self.words = ["--load-dir", self.source, "--save-dir", str(self.save), *format_flags]
        if "over" in kind:
            self.words.append("--overwrite")

    def prepare(self) -> None:
        """Make the place as it is before the conversion."""
        if self.root.exists():
            subprocess.run(["rm", "-rf", self.root], check=True)
        self.root.mkdir()
        if "beside" in self.kind:
            subprocess.run(["cp", "-r", self.hf, self.save], check=True)
        if "filled" in self.kind:
            self.save.mkdir()
            (self.save / "notes.txt").write_text("mine")
            (self.save / "more").mkdir()
            (self.save / "more" / "notes.txt").write_text("mine too")
        if "over" in self.kind:
            earlier = [*self.words[:4], "--params-dtype", "fp32", "--max-shard-size", "30kB"]
            run(earlier)
        if "later" in self.kind:
            (self.save / "iter_0000001").rename(self.save / "iter_0000020")
            (self.save / TRACKER).write_text("20")

    def seen_by_readers(self) -> dict[str, str]:
        """What a reader finds by the folder's name: of several iteration folders the one the tracker points to."""
        found = files(self.save)
        if self.kind.startswith("hf"):
            return found
        tracker = self.save / TRACKER
        current = f"iter_{int(tracker.read_text()):07d}/" if tracker.exists() else "none"
        return {name: digest for name, digest in found.items() if name.startswith(current) or "iter_" not in name}


MOMENTS = {
    "hf": 20, "hf filled": 6, "hf beside": 6, "hf over": 6, "hf filled over": 20,
    "torch": 20, "torch filled": 6, "torch over": 20, "torch over later": 6, "dist": 20, "dist over": 6,
}  # fmt: skip
"""Of each kind of target, how many moments are drawn from the whole run."""


@pytest.mark.parametrize("kind", MOMENTS)
def test_after_a_kill_at_any_moment_readers_find_the_old_result_or_the_new_one(kind: str, tmp_path: Path) -> None:
    case = Case(tmp_path, kind)
    case.prepare()
    before = case.seen_by_readers()
    run(case.words)
    after = case.seen_by_readers()
    assert before != after and not hidden(case.root)
    case.prepare()
    total = number_of_changes(case.words, tmp_path)
    assert case.seen_by_readers() == after
    moments = random.Random(f"{SEED} {kind}").sample(range(1, total + 1), min(total, MOMENTS[kind]))
    for number in sorted({*moments, *range(max(1, total - LAST), total + 1)}):
        case.prepare()
        assert killed_at(case.words, number)
        seen = case.seen_by_readers()
        without_alias = {name: digest for name, digest in after.items() if name != "mg2hf"}
        assert seen in (before, after, without_alias), f"killed before change {number} of {total}: {sorted(seen)}"
        if seen != before and "over" not in kind:
            with pytest.raises(UsageError, match="a result is there already"):
                run(case.words)
            run([*case.words, "--overwrite"])
        else:
            run(case.words)
        assert case.seen_by_readers() == after, f"after a kill before change {number} of {total}"
        assert not hidden(case.root), f"after a kill before change {number} of {total}: {hidden(case.root)}"


@pytest.mark.parametrize("number", range(1, 4))
def test_a_source_is_as_it_was_after_a_kill(number: int, tmp_path: Path) -> None:
    case = Case(tmp_path, "hf beside over")
    case.prepare()
    kept = files(case.hf)
    killed_at(case.words, 10 * number)
    assert files(case.hf) == kept


SLOW = """
import sys, time
from mindspeed_llm.checkpoint import fingerprint
from mindspeed_llm.checkpoint.formats import blocks
write, count = blocks.write_values, 0
hashed, pause = fingerprint.part_blocks, float(sys.argv.pop(1))
fingerprint.part_blocks = lambda *arguments: (time.sleep(pause), hashed(*arguments))[1]
def slow(*arguments):
    global count
    count += 1
    if count == 20:
        print("midway", flush=True)
    if 20 <= count < 40:
        time.sleep(0.1)
    write(*arguments)
blocks.write_values = slow
from mindspeed_llm.checkpoint.convert import main
from mindspeed_llm.cli import run
run(main)
"""


@contextlib.contextmanager
def midway(words: list[str], pause: float = 0.0) -> Iterator[subprocess.Popen]:
    """The program in a process of its own, in the middle of writing values and slow from there on.

    Args:
        pause: seconds that hashing one tensor takes.
    """
    pipe = subprocess.PIPE
    process = subprocess.Popen([sys.executable, "-c", SLOW, str(pause), *words], stdout=pipe, stderr=pipe, cwd=REPO)
    try:
        assert process.stdout.readline() == b"midway\n"
        yield process
    finally:
        process.kill()
        process.communicate()


@pytest.mark.alone
@pytest.mark.parametrize(
    ("sent", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129), (signal.SIGKILL, -9)]
)
def test_a_signal_ends_the_program_soon_with_its_status_and_cleaned_up(sent: int, status: int, tmp_path: Path) -> None:
    case = Case(tmp_path, "torch over")
    case.prepare()
    before = files(case.save)
    with midway(case.words, pause=0.3) as process:
        process.send_signal(sent)
        started = time.monotonic()
        assert process.wait(10) == status
        assert time.monotonic() - started < 3
    assert files(case.save) == before
    assert bool(hidden(case.root)) == (sent == signal.SIGKILL)
    run(case.words)
    assert files(case.save) != before and not hidden(case.root)


def test_a_signal_while_the_result_gets_its_name_waits_for_it(tmp_path: Path) -> None:
    case = Case(tmp_path, "torch filled")
    case.prepare()
    total = number_of_changes(case.words, tmp_path)
    after = files(case.save)
    case.prepare()
    for back in range(1, 5):
        case.prepare()
        number = total - back
        status = forked(case.words, lambda seen, n=number: os.kill(os.getpid(), signal.SIGTERM) if seen == n else None)
        assert files(case.save) == after and not hidden(case.root)
        assert os.WIFEXITED(status)


def test_two_conversions_into_one_folder_exclude_each_other(tmp_path: Path) -> None:
    case = Case(tmp_path, "torch")
    case.prepare()
    with midway(case.words) as process:
        with pytest.raises(InputError, match="out: another conversion is writing it; wait, or choose another folder"):
            run(case.words)
        with pytest.raises(InputError, match="another conversion"):
            run([*case.words[:4], "--overwrite"])
        assert process.wait(30) == 0
    assert (case.save / TRACKER).read_text() == "1" and not hidden(case.root)
    with pytest.raises(UsageError, match="a result is there already"):
        run(case.words)


def test_a_result_that_appears_while_the_source_is_opened_is_not_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = Case(tmp_path, "hf")
    case.prepare()
    locked = result.locked

    def late(*arguments: Path) -> int:
        monkeypatch.setattr(result, "locked", locked)
        run(case.words)
        (case.save / "mark").write_text("")
        return locked(*arguments)

    monkeypatch.setattr(result, "locked", late)
    with pytest.raises(UsageError, match="a result is there already"):
        run(case.words)
    assert (case.save / "mark").exists() and not hidden(case.root)
