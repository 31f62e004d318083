"""Every family, format and layout in all pairs: weights and adapters arrive bit for bit."""

from pathlib import Path

import pytest

from tests.checkpoint.matrix import PAGE, AdapterCase, Case, adapter_cases, cases, page, run_adapter_case, run_case

CASES, ADAPTERS = cases(), adapter_cases()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_weights_arrive_bit_for_bit(case: Case, tmp_path: Path) -> None:
    run_case(case, tmp_path)


@pytest.mark.parametrize("case", ADAPTERS, ids=str)
def test_adapters_arrive_bit_for_bit(case: AdapterCase, tmp_path: Path) -> None:
    run_adapter_case(case, tmp_path)


def test_there_are_at_least_two_hundred_cases_and_the_page_lists_them() -> None:
    assert len(CASES) >= 200
    assert PAGE.read_text(encoding="utf-8") == page(CASES, ADAPTERS), "run: python -m tests.checkpoint.matrix"
