"""docs/layouts.md says what the tests run."""

import re

from tests.distributed import layouts


def test_the_document_is_what_the_cases_make() -> None:
    assert layouts.DOCUMENT.read_text(encoding="utf-8") == layouts.text(), "run python -m tests.distributed.layouts"


def test_every_defect_is_shown_by_a_test_that_names_its_number() -> None:
    for defect in layouts.DEFECTS:
        source = (layouts.DOCUMENT.parents[1] / "tests/distributed" / defect.shown).read_text(encoding="utf-8")
        assert re.search(rf'def test_{defect.number}_|"{defect.number}: ', source), defect


def test_every_refusal_names_a_file_that_is_there() -> None:
    for what, where in layouts.REFUSED:
        assert (layouts.DOCUMENT.parents[1] / where).is_file(), what
