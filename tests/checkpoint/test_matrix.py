"""Every family, format and layout in all pairs; mutations of every row of every weight table must show."""

from pathlib import Path

import pytest

from tests.checkpoint.matrix import PAGE, Case, cases, page, run_case

CASES = cases()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_weights_arrive_bit_for_bit(case: Case, tmp_path: Path) -> None:
    run_case(case, tmp_path)


def test_there_are_at_least_two_hundred_cases_and_the_page_lists_them() -> None:
    assert len(CASES) >= 200
    assert PAGE.read_text(encoding="utf-8") == page(CASES), "run: python -m tests.checkpoint.matrix"
