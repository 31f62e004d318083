"""Rows on their way in: chunks of bounded size, faults instead of crashes; what is kept and trained of them."""

from pathlib import Path

import pytest

from mindspeed_llm.data.encode import Encoded
from mindspeed_llm.data.intake import CHUNK_CHARACTERS, CHUNK_ROWS, TOO_MUCH_TEXT, in_chunks
from mindspeed_llm.data.publish import READY, Aside, settle
from mindspeed_llm.data.rows import Row
from mindspeed_llm.data.shaping import Shape, last_answer, window


def test_chunks_end_at_their_number_of_rows_or_characters_and_keep_the_order() -> None:
    sizes = [10] * 700 + [900_000] * 5 + [3]
    rows = [Row("f", n, {"a": "x" * size}) for n, size in enumerate(sizes)]
    chunks = list(in_chunks(rows, 1_000_000))
    assert [row.number for chunk in chunks for row in chunk] == list(range(706))
    assert max(map(len, chunks)) == CHUNK_ROWS
    assert max(sum(len(row.columns["a"]) for row in chunk) for chunk in chunks) <= CHUNK_CHARACTERS


def test_rows_of_too_much_text_and_half_characters_come_as_faults_without_their_text() -> None:
    rows = [Row("f", 1, {"a": "x" * 11}), Row("f", 2, {"a": ["x\ud800"]}), Row("f", 3, {}, "broken", "{")]
    (chunk,) = in_chunks(rows, 10)
    assert [row.fault for row in chunk] == [TOO_MUCH_TEXT, "text holds half of a surrogate pair, which is no character",
                                            "broken"]  # fmt: skip
    assert chunk[0].excerpt == "11 characters: a: xxxxxxxxxxx" and not any(row.columns for row in chunk)


def encoded(length: int, *spans: tuple[int, int]) -> Encoded:
    return Encoded(list(range(length)), list(spans), [], length)


@pytest.mark.parametrize(
    ("shape", "ids", "spans"),
    [
        (Shape(), range(10), [(2, 4), (6, 9), (9, 10)]),
        (Shape(mask_history=True), range(10), [(6, 9), (9, 10)]),
        (Shape(train_on_prompt=True), range(10), [(0, 10)]),
        (Shape(7, "left"), range(3, 10), [(0, 1), (3, 6), (6, 7)]),
        (Shape(7, "right"), range(7), [(2, 4), (6, 7)]),
        (Shape(3, "right", mask_history=True), range(3), []),
        (Shape(10), range(10), [(2, 4), (6, 9), (9, 10)]),
    ],
)
def test_a_row_is_cut_and_trained_as_asked(shape: Shape, ids: range, spans: list) -> None:
    row = shape.apply(encoded(10, (2, 4), (6, 9), (9, 10)))
    assert row is not None and list(row.ids) == list(ids) and row.spans == spans


def test_a_row_above_the_length_is_left_out_by_default() -> None:
    assert Shape(9).apply(encoded(10, (2, 4))) is None
    assert last_answer([(0, 2), (5, 5)]) == [(0, 2)] and last_answer([]) == []
    assert window(Encoded([1, 2, 3, 4], [(1, 3)], [3, 0], 4), 2, 4).eos_at == [1]


def test_a_set_appears_as_a_whole_and_a_dead_run_is_settled(tmp_path: Path) -> None:
    prefix = tmp_path / "x[1]"
    (tmp_path / "x[1].idx").write_text("old")
    with pytest.raises(RuntimeError), Aside(prefix) as aside:
        (aside.path / "x[1].bin").write_text("new")
        raise RuntimeError
    assert [f.name for f in tmp_path.iterdir()] == ["x[1].idx"], "a run that fails leaves what was there"
    dead = tmp_path / ".x[1].dead.partial"
    for ready in (False, True):
        dead.mkdir()
        for name in ("x[1].bin", "x[1].idx"):
            (dead / name).write_text("new")
        if ready:
            (dead / READY).write_text('["x[1].bin", "x[1].idx"]')
        assert settle(prefix) == (["x[1].bin", "x[1].idx"] if ready else []) and not dead.exists()
    assert (tmp_path / "x[1].idx").read_text() == (tmp_path / "x[1].bin").read_text() == "new"
    assert len(list(tmp_path.iterdir())) == 2


def test_a_run_that_lives_is_left_alone(tmp_path: Path) -> None:
    with Aside(tmp_path / "x") as aside:
        assert settle(tmp_path / "x") == [] and aside.path.exists()
        (aside.path / "x.bin").write_text("1")
        aside.publish(["x.bin"])
    assert [f.name for f in tmp_path.iterdir()] == ["x.bin"]
