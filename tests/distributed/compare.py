"""From every rank's shares to whole tensors, and the one comparison every layout has to pass."""

from collections.abc import Sequence
from functools import cache

import numpy

from tests.distributed.cases import SIZES, Arrays, Case
from tests.distributed.flat import row_by_row, steps_for
from tests.distributed.moe_reference import moe_reference, sizes_of
from tests.distributed.pool import pool
from tests.distributed.reference import Reference, reference
from tests.distributed.worker_result import Result

TOLERANCE = 1e-5  # of the largest value of a tensor, fp32
ROWS = ("linear_proj", "linear_fc2")  # cut along their input
LATER_TOLERANCE = 5e-5  # of norms once Adam, which divides by the root of a gradient's square, has magnified rounding


def reference_of(case: Case) -> Reference:
    """The truth for a case: the layout does not change it."""
    if case.model != "qwen3":
        return moe_reference(case.truth)
    return reference(case.tied, case.lora, case.ragged, case.per_token)


@cache
def results(case: Case) -> tuple[Result, ...]:
    """Every rank's report of a case, run once."""
    truth = reference_of(case)
    steps = steps_for(case, truth.steps[: case.steps])
    arguments = {"case": case, "folder": truth.folder, "adapter": truth.adapter, "steps": steps}
    return tuple(pool(case.world).run("tests.distributed.worker:train", **arguments))


def assert_close(found: numpy.ndarray, expected: numpy.ndarray, name: str, tolerance: float = TOLERANCE) -> None:
    """max|a - b| <= tolerance max|b|, and no nan."""
    assert found.shape == expected.shape, f"{name}: {found.shape}, expected {expected.shape}"
    if not expected.any():  # also when it is empty: a process without tokens of its own
        assert not found.any(), f"{name}: expected zeros"
        return
    worst = numpy.abs(found.astype(numpy.float64) - expected).max() / numpy.abs(expected).max()
    assert worst <= tolerance, f"{name}: differs by {worst:.2e} of its largest value"


def whole(name: str, shares: Sequence[numpy.ndarray], vocab: int = SIZES.vocab) -> numpy.ndarray:
    """The tensor that TP ranks share; `name` says which.

    Shares of columns (qkv, gate and up, vocabulary) lie in rows and those of rows (proj, fc2) in columns; of an
    adapter's factors only the one on the split side is split. What is not split is the same, bit for bit, on all.
    """
    row = any(part in name for part in ROWS)
    replicated = (".lora_B.", ".lora_B_start.", ".lora_magnitude_vector.") if row else (".lora_A.", ".lora_A_start.")
    if any(part in name for part in ("norm", "router", "_down_proj", *replicated)):
        for share in shares[1:]:
            assert numpy.array_equal(share, shares[0]), f"{name}: replicas differ over TP"
        return shares[0]
    if "linear_fc1" in name:
        halves = [numpy.split(share, 2) for share in shares]
        return numpy.concatenate([half[i] for i in (0, 1) for half in halves])
    if "linear_proj" in name or "linear_fc2" in name:
        return numpy.concatenate(shares, axis=1)
    joined = numpy.concatenate(shares)
    return joined[:vocab] if "embedding" in name or "output_layer" in name else joined


def gathered(reports: Sequence[Result], what: str, case: Case) -> Arrays:
    """All ranks' `gradients` or `trained` as whole tensors; every replica must agree bit for bit."""
    held: dict[str, dict[int, numpy.ndarray]] = {}
    for report in reports:
        for name, value in getattr(report, what).items():
            part = report.etp if "local_experts" in name else report.tp
            known = held.setdefault(name, {}).setdefault(part, value)
            assert numpy.array_equal(known, value), f"{what} {name}: replicas differ over DP or PP"
    joined = {}
    for name, shares in held.items():
        parts = (case.expert_tensor or case.tensor) if "local_experts" in name else case.tensor
        assert sorted(shares) == list(range(parts)), f"{name}: shares of TP ranks {sorted(shares)} only"
        joined[name] = whole(f"{what} {name}", [shares[rank] for rank in range(parts)], sizes_of(case).vocab)
    if case.tied and case.pipeline > 1 and not case.lora:  # the last stage's copy of a tied embedding
        copy = joined.pop("output_layer.weight")
        assert numpy.array_equal(copy, joined["embedding.word_embeddings.weight"]), f"{what}: tied copies differ"
    return joined


def own_logits(real: numpy.ndarray, cp: int, context: int) -> numpy.ndarray:
    """Which of the logits of all real positions [s, b] a CP rank has: of its early and its late piece, in order."""
    numbers = numpy.where(real.T, numpy.cumsum(real.T).reshape(real.T.shape) - 1, -1)
    parts = numpy.split(numbers, 2 * context)
    own = numpy.concatenate([parts[cp], parts[-1 - cp]]) if context > 1 else numbers
    return own[own >= 0]


def own_packed_logits(lengths: Sequence[int], filling: int, cp: int, context: int) -> numpy.ndarray:
    """The same of packed rows: of each row an early and a late piece, what is left of all rows cut as one sequence.

    That is the cut of rows longer than a piece of the whole; shorter ones are left over.
    """
    total, start = sum(lengths) + filling, 0
    own, left = [], []
    for length in (*lengths, filling):
        piece = length // (2 * context) if length > total // (2 * context) else 0
        row = numpy.arange(start, start + length)
        own += [row[cp * piece : (cp + 1) * piece], row[(2 * context - 1 - cp) * piece : (2 * context - cp) * piece]]
        left.append(row[2 * context * piece :])
        start += length
    parts = numpy.split(numpy.concatenate(left), 2 * context)
    found = numpy.sort(numpy.concatenate([*own, parts[cp], parts[-1 - cp]]))
    return found[found < sum(lengths)]


def logits_of(case: Case) -> tuple[numpy.ndarray, ...]:
    """The reference's logits of the first global batch, in the case's order of positions."""
    truth = reference_of(case)
    if not case.packed:
        return truth.logits
    return tuple(row_by_row(one, batch["real"]) for one, batch in zip(truth.logits, truth.steps[0], strict=True))


def assert_exact(case: Case, reports: Sequence[Result]) -> None:
    """Logits, losses, norms and every gradient equal the reference's."""
    truth = reference_of(case)
    last = [report for report in reports if report.pp == case.pipeline - 1]
    for report in last:
        expected = logits_of(case)[report.dp :: case.replicas]
        assert len(report.logits) == len(expected), f"{len(report.logits)} micro-batches of logits"
        batches = truth.steps[0][report.dp :: case.replicas]
        laid_out = steps_for(case, truth.steps[:1])[0][report.dp :: case.replicas]
        for number, (found, value) in enumerate(zip(report.logits, expected, strict=True)):
            real = batches[number]["real"]
            if case.packed and case.context > 1:
                filling = laid_out[number]["tokens"].size - int(real.sum())
                own = own_packed_logits(real.sum(1).tolist(), filling, report.cp, case.context)
            else:
                own = own_logits(real, report.cp, case.context)
            assert_close(found, value[own], f"logits of micro-batch {number}")
    gradients = gathered(reports, "gradients", case)
    assert set(gradients) == set(truth.gradients), set(gradients) ^ set(truth.gradients)
    for name, value in truth.gradients.items():
        assert_close(gradients[name], value, f"gradient of {name}")
    losses, norms = numpy.array(truth.losses[: case.steps]), numpy.array(truth.norms[: case.steps])
    for report in reports:
        assert_close(numpy.array(report.losses), losses, "losses")
        assert_close(numpy.array(report.norms[:1]), norms[:1], "first gradient norm")
        assert_close(numpy.array(report.norms), norms, "gradient norms", LATER_TOLERANCE)
