"""What the fused forms cost: the formulas of docs/lora.md against what is counted."""

import ast
import operator
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from tests.lora.layer import Layer, Report
from tests.lora.test_fused import BASIC, FIRST, WITH_CHUNKS, WITH_DROPOUT, reports

pytestmark = pytest.mark.distributed
DOCS = Path(__file__).resolve().parents[2] / "docs"
CHUNKS = 4
OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}
Table = dict[str, list[str]]


def tables(page: str = "lora.md") -> tuple[Table, Table]:
    """(communication, work and memory) as the page has them: case -> cells."""
    found: list[Table] = []
    for line in (DOCS / page).read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.replace("\\|", "/").strip("|").split("|")]
        if line.startswith("|---"):
            found.append({})
        elif line.startswith("|") and found and re.match(r"(?!case|what)[a-z_]+( \(\w+\))?$", cells[0]):
            found[-1][cells[0]] = cells[1:]
    return found[1], found[2]


def evaluate(formula: str, values: dict[str, int]) -> int:
    """A formula of the page in numbers."""

    def value(node: ast.expr) -> float:
        if isinstance(node, ast.BinOp):
            return OPERATORS[type(node.op)](value(node.left), value(node.right))
        return values[node.id] if isinstance(node, ast.Name) else node.value

    result = value(ast.parse(formula, mode="eval").body)
    assert result == int(result), f"{formula} is not a whole number"
    return int(result)


def symbols(layer: Layer) -> dict[str, int]:
    """The page's symbols for a layer."""
    sizes = {"i": layer.inputs, "o": layer.outputs, "h": layer.inputs, "f": layer.ffn, "r": layer.rank}
    return {**sizes, "n": layer.length * layer.rows, "t": layer.tensor, "e": 4}


def messages(cell: str, layer: Layer) -> Counter[tuple[str, int]]:
    """A cell of the communication table: (kind, bytes in all) -> messages."""
    chunks = CHUNKS if layer.fused and layer.chunk_bytes == 1 else 1
    found: Counter[tuple[str, int]] = Counter()
    for kind, formula in re.findall(r"(\w+) `([^`]+)`", cell):
        found[kind, evaluate(formula, symbols(layer))] += chunks
    return found


def said(report_: Counter, chunks: int) -> Counter[tuple[str, int]]:
    """What was counted, the chunks of a tensor put together."""
    if chunks == 1:
        return Counter({(kind, nbytes): count for (kind, _, nbytes), count in report_.items()})
    whole: dict[str, list[int]] = {}
    for (kind, _, nbytes), count in report_.items():
        total = whole.setdefault(kind, [0, 0])
        total[0] += nbytes * count
        total[1] += count
    return Counter({(kind, nbytes): count for kind, (nbytes, count) in whole.items()})


def assert_communicates(layer: Layer, seen: list[Report]) -> None:
    """Every rank sends what the page says, in both passes."""
    cells = tables()[0][layer.case][0 if layer.fused else 2 :]
    chunks = CHUNKS if layer.fused and layer.chunk_bytes == 1 else 1
    for report in seen:
        for cell, cost in zip(cells, (report.forward, report.backward), strict=False):
            assert said(cost.collectives, chunks) == messages(cell, layer), f"{layer}: {cost.collectives}, said: {cell}"


def assert_costs(layer: Layer, seen: list[Report]) -> None:
    """Every rank computes, writes and keeps what the page says."""
    row = f"expert ({layer.kind})" if layer.expert else layer.case
    said_ = [evaluate(cell.strip("`"), symbols(layer)) for cell in tables()[1][row]]
    for report in seen:
        found = [report.forward.flops, report.backward.flops, report.forward.pointwise, report.saved]
        assert found == said_, f"{layer}: {found}, said: {said_}"


PLAIN = [*BASIC, *WITH_CHUNKS]
REMOVED = [replace(layer, without=layer.case) for layer in PLAIN]


@pytest.fixture(scope="module")
def seen() -> dict[Layer, list[Report]]:
    """Reports of all layers."""
    fused = [*PLAIN, *WITH_DROPOUT, *FIRST]
    return reports([*fused, *(layer.modular for layer in (*PLAIN, *WITH_DROPOUT)), *REMOVED])


@pytest.mark.parametrize("layer", [*PLAIN, *(layer.modular for layer in BASIC)], ids=str)
def test_messages_are_the_documented_ones(layer: Layer, seen: dict[Layer, list[Report]]) -> None:
    assert_communicates(layer, seen[layer])


@pytest.mark.parametrize("layer", PLAIN, ids=str)
def test_work_and_memory_are_the_documented_ones(layer: Layer, seen: dict[Layer, list[Report]]) -> None:
    assert_costs(layer, seen[layer])


@pytest.mark.parametrize("layer", [one for one in BASIC if one.tensor > 1 and not one.expert], ids=str)
def test_messages_are_fewer_and_bytes_are_no_more_than_in_the_modular_form(
    layer: Layer, seen: dict[Layer, list[Report]]
) -> None:
    def total(report: Report) -> tuple[int, int]:
        both = report.forward.collectives + report.backward.collectives
        return sum(both.values()), sum(nbytes * count for (_, _, nbytes), count in both.items())

    fused, modular = total(seen[layer][0]), total(seen[layer.modular][0])
    assert fused[0] * 2 <= modular[0]
    assert fused[1] < modular[1] if layer.sequence_parallel else fused[1] == modular[1]


@pytest.mark.parametrize("layer", BASIC, ids=str)
def test_no_more_is_kept_than_in_the_modular_form_and_less_with_dropout_and_in_mlps(
    layer: Layer, seen: dict[Layer, list[Report]]
) -> None:
    tokens, e = layer.length * layer.rows, 4
    saved = seen[layer.modular][0].saved - seen[layer][0].saved
    assert saved == (3 * tokens * layer.ffn // layer.tensor * e if layer.kind == "mlp" else 0)
    dropped = replace(layer, dropout=0.3)
    assert seen[dropped][0].saved == seen[layer][0].saved
    split = layer.tensor if layer.kind == "row" or (layer.sequence_parallel and not layer.expert) else 1
    factors = tokens * layer.inputs // split + (tokens * layer.ffn // layer.tensor if layer.kind == "mlp" else 0)
    assert seen[dropped.modular][0].saved - seen[layer.modular][0].saved == factors * e


@pytest.mark.parametrize("layer", REMOVED, ids=str)
def test_a_case_taken_from_the_table_is_noticed(layer: Layer, seen: dict[Layer, list[Report]]) -> None:
    with pytest.raises(AssertionError, match="said"):
        assert_communicates(layer, seen[layer])
        assert_costs(layer, seen[layer])


@pytest.mark.parametrize("layer", [*PLAIN, *WITH_DROPOUT, *FIRST], ids=str)
def test_something_is_computed_while_every_asynchronous_message_is_in_flight(
    layer: Layer, seen: dict[Layer, list[Report]]
) -> None:
    for report in seen[layer]:
        messages_ = sum((report.forward.collectives + report.backward.collectives).values())
        issued = [number for event, number in report.trace if event == "issue"]
        assert len(issued) == len(set(issued)) <= messages_
        if layer.chunk_bytes == 1:
            assert len(issued) == messages_
        for number in issued:
            start, end = report.trace.index(("issue", number)), report.trace.index(("wait", number))
            assert ("compute", -1) in report.trace[start:end], f"nothing hides message {number}"


@pytest.mark.parametrize("layer", [one for one in WITH_DROPOUT if one.tensor > 1 and not one.expert], ids=str)
def test_dropout_adds_one_narrow_message_where_rows_are_gathered_under_it(
    layer: Layer, seen: dict[Layer, list[Report]]
) -> None:
    narrow = layer.length * layer.rows * layer.rank * 4
    gathers = layer.sequence_parallel and layer.kind != "row"
    plain = replace(layer, dropout=0.0)
    for dropped, without in zip(seen[layer], seen[plain], strict=True):
        expected = Counter({("all_gather", "tp", narrow): 1} if gathers else {})
        assert dropped.forward.collectives - without.forward.collectives == expected
        assert dropped.backward.collectives == without.backward.collectives


@pytest.mark.parametrize("layer", [one for one in FIRST if one.tensor > 1 and one.chunk_bytes > 1], ids=str)
def test_a_layer_before_which_nothing_is_trained_sends_no_gradient_of_its_input(
    layer: Layer, seen: dict[Layer, list[Report]]
) -> None:
    narrow, tokens = layer.length * layer.rows * layer.rank * 4, layer.length * layer.rows
    sums = "reduce_scatter" if layer.sequence_parallel else "all_reduce"
    expected = Counter({(sums, "tp", narrow): 1} if layer.kind != "row" and not layer.expert else {})
    if layer.sequence_parallel and layer.kind != "column":
        outputs = layer.outputs if layer.kind == "row" else layer.inputs
        expected["all_gather", "tp", tokens * outputs * 4] += 1
    for report in seen[layer]:
        assert report.backward.collectives == expected


def test_both_languages_have_the_same_tables() -> None:
    for one, other in zip(tables(), tables("lora.zh.md"), strict=True):
        assert {k: re.findall("`[^`]+`", "".join(v)) for k, v in one.items()} == {
            k: re.findall("`[^`]+`", "".join(v)) for k, v in other.items()
        }
        assert len(one) >= 9
