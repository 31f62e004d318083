"""Curves of a run: PNG files by matplotlib where it is installed, and inline SVG that needs nothing."""

import html
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

POINTS = 800  # of a curve in a page: more cannot be told apart
SIZE = (880, 260)
LEFT, RIGHT, TOP, BOTTOM = 70, 26, 12, 36


@dataclass(frozen=True)
class Chart:
    """One picture over steps.

    Attributes:
        name: of its file. label: of the vertical axis, with the unit.
        keys: of the records drawn, each with its name in the legend.
    """

    name: str
    label: str
    keys: tuple[tuple[str, str], ...]


CHARTS = (
    Chart("loss", "loss (nats per token)", (("loss", "training"), ("validation", "validation"))),
    Chart("learning_rate", "learning rate", (("learning_rate", "learning rate"),)),
    Chart("grad_norm", "gradient norm before clipping", (("grad_norm", "gradient norm"),)),
    Chart("throughput", "tokens per second", (("tokens_per_second", "all processes"),)),
)

Points = list[tuple[float, float]]


def curve(records: Sequence[Mapping[str, Any]], key: str) -> Points:
    """(step, value) of the records that have a number there."""
    return [(r["iteration"], r[key]) for r in records if r.get(key) is not None]


def thinned(points: Points, most: int = POINTS) -> Points:
    """The lowest and the highest point of each of `most` / 2 stretches: peaks stay."""
    if len(points) <= most:
        return points
    length = math.ceil(2 * len(points) / most)
    kept: Points = []
    for start in range(0, len(points), length):
        part = points[start : start + length]
        ends = {min(part, key=lambda p: p[1]), max(part, key=lambda p: p[1])}
        kept += sorted(ends)
    return kept


def ticks(low: float, high: float, count: int = 4) -> list[float]:
    """Round numbers within [low, high], about `count` of them."""
    span = high - low
    if span <= 0 or not math.isfinite(span):
        return [low]
    step = 10 ** math.floor(math.log10(span / count))
    step *= next(factor for factor in (1, 2, 5, 10) if span / (step * factor) <= count)
    first = math.ceil(low / step - 1e-9)
    return [n * step for n in range(first, math.floor(high / step + 1e-9) + 1)]


def shown(value: float) -> str:
    """A number for people: 12,000 or 0.25 or 1.25e-05."""
    if value and (abs(value) < 1e-3 or abs(value) >= 1e7):
        return f"{value:.3g}"
    return f"{value:,.6g}" if abs(value) < 1000 else f"{value:,.0f}"


def svg(curves: Sequence[tuple[str, Points]], label: str, marks: Sequence[int] = ()) -> str:
    """One chart as an SVG element.

    Args:
        curves: names and points; those of the second and later ones are drawn as dots on a line.
        marks: steps at which a vertical line tells that something went wrong.
    """
    curves = [(name, thinned(points)) for name, points in curves if points]
    if not curves:
        return "<p class=note>No finite values.</p>"
    xs = [x for _, points in curves for x, _ in points] + list(marks)
    ys = [y for _, points in curves for _, y in points]
    (x0, x1), (y0, y1) = _range(xs), _range(ys)
    width, height = SIZE

    def at(x: float, y: float) -> tuple[float, float]:
        along, up = (x - x0) / (x1 - x0), (y - y0) / (y1 - y0)
        return LEFT + along * (width - LEFT - RIGHT), height - BOTTOM - up * (height - BOTTOM - TOP)

    parts = [f"<svg viewBox='0 0 {width} {height}' role=img aria-label='{html.escape(label)} over steps'>"]
    for y in ticks(y0, y1):
        level = at(x0, y)[1]
        parts.append(f"<line x1={LEFT} x2={width - RIGHT} y1={level:.1f} y2={level:.1f} />")
        parts.append(f"<text x={LEFT - 8} y={level + 4:.1f} text-anchor=end>{shown(y)}</text>")
    for x in (x for x in ticks(x0, x1, 8) if x == int(x)):
        parts.append(f"<text x={at(x, y0)[0]:.1f} y={height - BOTTOM + 16} text-anchor=middle>{int(x):,}</text>")
    for step in marks:
        across = at(step, y0)[0]
        parts.append(
            f"<line class=bad x1={across:.1f} x2={across:.1f} y1={TOP} y2={height - BOTTOM}>"
            f"<title>step {step}</title></line>"
        )
    for number, (name, points) in enumerate(curves):
        places = [at(x, y) for x, y in points]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        parts.append(f"<polyline class=c{number} points='{path}'><title>{html.escape(name)}</title></polyline>")
        if number or len(points) == 1:
            parts += [f"<circle class=c{number} cx={x:.1f} cy={y:.1f} r=3 />" for x, y in places]
    parts.append(f"<text x={width - RIGHT} y={height - 4} text-anchor=end>step</text></svg>")
    return "".join(parts)


def _range(values: Sequence[float]) -> tuple[float, float]:
    """Lowest and highest value, apart."""
    low, high = min(values), max(values)
    if low == high:
        margin = abs(low) * 0.1 or 0.5
        return low - margin, high + margin
    return low, high


def draw(curves: Sequence[tuple[str, Points]], label: str, path: Path) -> None:
    """One chart as a PNG of 880 x 550 pixels. Needs matplotlib."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for number, (name, points) in enumerate(curves):
        if points:
            axes.plot(*zip(*points, strict=True), "o-" if number else "-", markersize=4, linewidth=1, label=name)
    if len([1 for _, points in curves if points]) > 1:
        axes.legend()
    axes.set_xlabel("step")
    axes.set_ylabel(label)
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=110)


def draw_all(records: Sequence[Mapping[str, Any]], validations: Points, folder: Path) -> list[Path]:
    """Every chart as a PNG in `folder`; -> the files, none of them without matplotlib."""
    if find_spec("matplotlib") is None:
        return []
    files = []
    for chart in CHARTS:
        path = folder / f"{chart.name}.png"
        draw(curves_of(chart, records, validations), chart.label, path)
        files.append(path)
    return files


def curves_of(chart: Chart, records: Sequence[Mapping[str, Any]], validations: Points) -> list[tuple[str, Points]]:
    """A chart's named curves."""
    return [(name, validations if key == "validation" else curve(records, key)) for key, name in chart.keys]
