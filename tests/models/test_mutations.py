"""A weight table with a wrong row never passes: rows in disorder move the logits, a missing row is refused."""

from pathlib import Path

import pytest

from tests.distributed.pool import pool
from tests.models.families import DENSE
from tests.models.parity import folder
from tests.models.tiny_moe import EVERY, saved, tokens


def models() -> dict[str, tuple]:
    """One tiny model of each architecture, and a variant of each that has biases or is untied."""
    dense = {one.name: (folder, one) for one in DENSE}
    return {**dense, **{one.name: (saved, one) for one in EVERY}}


@pytest.mark.parametrize("name", models())
def test_every_row_of_the_table_matters(name: str) -> None:
    make, one = models()[name]
    path: Path = make(one)
    (found,) = pool(1).run(
        "tests.models.mutation_worker:differences", folder=path, ids=tokens(rows=2, length=16).numpy()
    )
    assert len(found) >= 8
    assert not [row for row, (moved, _) in found.items() if moved < 1e-3]
    assert not [row for row, (_, refused) in found.items() if not refused]
