"""`report.html`: a run as one page that needs nothing else: numbers, curves, warnings, data and settings."""

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mindspeed_llm.data.report_html import STYLE
from mindspeed_llm.training import charts

OWN_STYLE = """
svg polyline{fill:none;stroke-width:1.5;stroke:var(--bar)}svg polyline.c1{stroke:var(--second)}
svg circle{fill:var(--bar)}svg circle.c1{fill:var(--second)}svg line.bad{stroke:var(--bad);stroke-dasharray:3 3}
:root{--second:#c2571a;--bad:#c62828}@media(prefers-color-scheme:dark){:root{--second:#f0a060;--bad:#ff7b72}}
.warn{border-left:3px solid var(--bad);padding:.2rem .7rem;margin:.4rem 0;overflow-wrap:anywhere}
.key i{display:inline-block;width:.9rem;height:.2rem;margin:0 .4rem .2rem .9rem;background:var(--bar)}
.key i.c1{background:var(--second)}
"""
RECENT = 50  # steps over which the speed told is the median


@dataclass
class Story:
    """What a run's page says besides its steps.

    Attributes:
        title: name of the run. lines: what was said at the start.
        settings: options that were given or differ from their defaults, by name.
        data: reports of the data sets by prefix, as `preprocess_data.py` wrote them; None for other programs' files.
        ceiling: measured TFLOP/s, if measured. warnings: all of them. marks: steps at which something went wrong.
    """

    title: str
    lines: list[str] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)
    data: dict[str, Mapping[str, Any] | None] = field(default_factory=dict)
    ceiling: float | None = None
    warnings: list[str] = field(default_factory=list)
    marks: list[int] = field(default_factory=list)


def page(
    records: Sequence[Mapping[str, Any]], validations: list[tuple[float, float]], story: Story, train_iters: int
) -> str:
    """The whole page.

    Args:
        records: lines of logging.jsonl. validations: (step, loss).
        train_iters: steps of the run in all.
    """
    sections = [
        _tiles(records, validations, story, train_iters),
        _warnings(story.warnings),
        *(_chart(chart, records, validations, story.marks) for chart in charts.CHARTS),
        _data(story.data),
        _settings(story),
    ]
    title = html.escape(story.title)
    lines = "".join(f"<div class=sub>{html.escape(line)}</div>" for line in story.lines)
    return (
        "<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>"
        f"<title>{title}</title><style>{STYLE}{OWN_STYLE}</style><h1>{title}</h1>{lines}{''.join(sections)}</html>\n"
    )


def _tiles(
    records: Sequence[Mapping[str, Any]], validations: list[tuple[float, float]], story: Story, train_iters: int
) -> str:
    """The numbers that matter first."""
    if not records:
        return "<p class=note>No step is done yet.</p>"
    last, recent = records[-1], records[-RECENT:]
    left = (train_iters - last["iteration"]) * _median(recent, "milliseconds") / 1000
    tiles = [
        (f"{last['iteration']:,}", f"of {train_iters:,} steps done"),
        ("not finite" if last["loss"] is None else f"{last['loss']:.4f}", "loss of the last step"),
    ]
    if validations:
        tiles.append((f"{validations[-1][1]:.4f}", f"validation loss, step {validations[-1][0]:,.0f}"))
    tiles += [
        (f"{sum(r['trained_tokens'] for r in records):,}", "tokens trained"),
        (f"{_median(recent, 'tokens_per_second'):,.0f}", "tokens/s, median of the last steps"),
        (f"{_median(recent, 'teraflops'):.3g}", "executed TFLOP/s per device"),
    ]
    if story.ceiling:
        share = _median(recent, "teraflops") / story.ceiling
        tiles.append((f"{share:.0%}", f"of the measured ceiling, {story.ceiling:.3g} TFLOP/s"))
    tiles += [
        (f"{max(r['memory'] for r in records):,.0f} MB", "peak memory of the reporting process"),
        (f"{last['skipped']:,}", "steps not applied"),
        (f"{_clock(sum(r['milliseconds'] for r in records) / 1000)}", "spent in steps"),
        (f"{_clock(left)}", "left, at that speed"),
    ]
    boxes = "".join(
        f"<div class=tile><b>{html.escape(value)}</b><span>{html.escape(name)}</span></div>" for value, name in tiles
    )
    return f"<div class=tiles>{boxes}</div>"


def _median(records: Sequence[Mapping[str, Any]], key: str) -> float:
    values = sorted(r[key] for r in records)
    return float(values[len(values) // 2])


def _clock(seconds: float) -> str:
    whole = max(0, round(seconds))
    return f"{whole // 3600}:{whole % 3600 // 60:02d}:{whole % 60:02d}"


def _warnings(warnings: Sequence[str]) -> str:
    if not warnings:
        return "<h2>Warnings</h2><p class=note>None.</p>"
    return f"<h2>Warnings ({len(warnings):,})</h2>" + "".join(
        f"<div class=warn>{html.escape(one)}</div>" for one in warnings
    )


def _chart(
    chart: charts.Chart,
    records: Sequence[Mapping[str, Any]],
    validations: list[tuple[float, float]],
    marks: Sequence[int],
) -> str:
    curves = charts.curves_of(chart, records, validations)
    drawn = [name for name, points in curves if points]
    key = ""
    if len(drawn) > 1:
        names = "".join(f"<i class=c{n}></i>{html.escape(name)}" for n, name in enumerate(drawn))
        key = f"<span class='note key'>{names}</span>"
    return f"<h2>{html.escape(chart.label.capitalize())}{key}</h2>{charts.svg(curves, chart.label, marks)}"


def _data(reports: Mapping[str, Mapping[str, Any] | None]) -> str:
    """Rows, tokens and warnings of each data set."""
    if not reports:
        return ""
    head = "<tr><th class=w>prefix<th>rows<th>dropped<th>left out<th>cut<th>tokens<th>template"
    rows, notes = [], []
    for prefix, report in reports.items():
        name = html.escape(prefix)
        if report is None:
            rows.append(f"<tr><td>{name}<td colspan=6>made by another program, without a report")
            continue
        counts = report["rows"]
        if not isinstance(counts, Mapping):  # a part of a divided data set: the whole one's report tells the rest
            rows.append(f"<tr><td>{name}<td>{counts:,}<td colspan=5>a part of a divided data set")
            continue
        cells = (
            f"{counts['written']:,}", f"{counts['dropped']:,}", f"{counts['left_out']:,}",
            f"{report['cut']['count']:,}", f"{report['tokens']:,}", _template(report),
        )  # fmt: skip
        rows.append(f"<tr><td>{name}" + "".join(f"<td>{cell}" for cell in cells))
        notes += [f"{prefix}: {one}" for one in report["warnings"]]
    listed = "".join(f"<div class=warn>{html.escape(one)}</div>" for one in notes)
    return f"<h2>Data</h2><table>{head}{''.join(rows)}</table>{listed}"


def _template(report: Mapping[str, Any]) -> str:
    """Name of the template; a report may hold none."""
    found = report.get("template")
    return html.escape(str(found["name"] if isinstance(found, Mapping) else found or "-"))


def _settings(story: Story) -> str:
    rows = "".join(
        f"<tr><td>{html.escape(name)}<td><code>{html.escape(str(value))}</code>"
        for name, value in story.settings.items()
    )
    return f"<h2>Settings</h2><p class=note>Options that differ from their defaults.</p><table>{rows}</table>"
