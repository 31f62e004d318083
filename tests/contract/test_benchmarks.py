"""What benchmarks write: results and pictures, none of which replaces those of another type."""

from pathlib import Path
from typing import Any

import pytest

from tests.conftest import REPO


@pytest.fixture
def epoch(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """The epoch benchmark, writing below a temporary folder; its sides answer at once."""
    monkeypatch.syspath_prepend(str(REPO / "benchmarks"))
    import pairs
    import sft_epoch

    def run(folder: Path, dtype: str, steps: int, clock: str) -> dict[str, dict[str, Any]]:
        seconds = {"float32": 4.0, "bfloat16": 2.0}[dtype]
        one = {"slices": [(seconds, 2)], "seconds": seconds, "steps": 2, "losses": [2.0, 1.0], "held_out": 1.5}
        return {side: {**one, "peak": 1 << 30} for side in sft_epoch.SIDES}

    monkeypatch.setattr(sft_epoch, "run", run)
    monkeypatch.setattr(sft_epoch, "make_model", lambda folder: None)
    for module in (pairs, sft_epoch):
        monkeypatch.setattr(module, "RESULTS", tmp_path / "results.md")
    return sft_epoch


def write(epoch: Any, monkeypatch: pytest.MonkeyPatch, *words: object) -> None:
    monkeypatch.setattr("sys.argv", ["sft_epoch.py", "--rows", "4", *map(str, words)])
    epoch.main()


@pytest.mark.parametrize("named", [False, True], ids=["at the usual place", "where --figure says"])
def test_every_type_has_its_own_picture_which_the_results_show(
    named: bool, epoch: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    place = tmp_path / "elsewhere" / "curves.png" if named else tmp_path / epoch.FIGURE
    more = ("--figure", place) if named else ()
    write(epoch, monkeypatch, "--dtype", "bf16", "--write", *more)
    of_bf16 = (place.parent / f"{place.stem}_bf16.png").read_bytes()
    write(epoch, monkeypatch, "--dtype", "fp32", "--write", *more)
    there = sorted(file.name for file in place.parent.iterdir())
    assert there == [f"{place.stem}_bf16.png", f"{place.stem}_fp32.png"]
    assert (place.parent / f"{place.stem}_bf16.png").read_bytes() == of_bf16
    text, folder = (tmp_path / "results.md").read_text(), place.parent.name
    for long, short in (("bfloat16", "bf16"), ("float32", "fp32")):
        assert f"| {long} | ours |" in text
        assert text.count(f"![{long}: loss of every side]({folder}/{place.stem}_{short}.png)") == 1


def test_pictures_that_the_results_show_are_there() -> None:
    benchmarks = REPO / "benchmarks"
    targets = [part.partition(")")[0] for part in (benchmarks / "results.md").read_text().split("](")[1:]]
    shown = {one for one in targets if one.endswith(".png")}
    assert shown == {file.relative_to(benchmarks).as_posix() for file in (benchmarks / "figures").iterdir()}
