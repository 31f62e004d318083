"""The gate passes what is right: every family, every direction, merges, casts, and with little memory."""

from pathlib import Path

import pytest

from tests.checkpoint.gate_models import FAMILIES, adapter, dense, gate, hf_folder, in_bfloat16, made, statuses
from tests.distributed.pool import pool

SPLIT = ("--target-tensor-parallel-size", 2, "--target-pipeline-parallel-size", 2)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_right_conversion_of_every_family_passes_in_both_directions(name: str, tmp_path: Path) -> None:
    there = gate(hf_folder(name), tmp_path / "mg")
    back = gate(tmp_path / "mg", tmp_path / "hf")
    for report in (there, back):
        assert report["status"] == 0 and report["verdict"] == "PASS", report["out"]
        assert {"weights", "values", "logits"} <= set(statuses(report))
        assert all(one["std"] > 0.5 for one in report["logits"])
        assert all(row["verdict"] == "equal" for row in report["tensors"])
