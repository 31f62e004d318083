"""The report as one page that needs nothing else: lengths, what is trained, what was dropped, samples."""

import html
from collections.abc import Mapping, Sequence
from typing import Any

from mindspeed_llm.data.preview import Shown, as_html

LISTED = 20  # rows shown per reason; the report beside the page lists more
STYLE = """
:root{--ink:#1c2430;--soft:#5b6675;--line:#d9dee6;--paper:#fff;--panel:#f5f7fa;--bar:#2f6fb3;--mark:#c9efd4}
@media(prefers-color-scheme:dark){:root{--ink:#e6eaf0;--soft:#9aa6b5;--line:#37404d;--paper:#161b22;--panel:#1f262f;
--bar:#6ca8e8;--mark:#1f5a35}}
body{font:15px/1.5 system-ui,sans-serif;color:var(--ink);background:var(--paper);max-width:960px;margin:2rem auto;
padding:0 1rem}
h1{font-size:1.5rem;margin-bottom:.2rem}h2{font-size:1.1rem;margin:2rem 0 .6rem}
.sub{color:var(--soft);overflow-wrap:anywhere}
.tiles{display:grid;grid-template-columns:repeat(auto-fill,minmax(9.5rem,1fr));gap:.7rem;margin:1.2rem 0}
.tile{background:var(--panel);border:1px solid var(--line);border-radius:.5rem;padding:.6rem .8rem}
.tile b{display:block;font-size:1.3rem;font-variant-numeric:tabular-nums}.tile span{color:var(--soft);font-size:.85rem}
.share{display:grid;grid-template-columns:11rem 1fr 4.5rem;gap:.8rem;align-items:center;margin:.35rem 0;
font-size:.88rem}
.share b{text-align:right;font-variant-numeric:tabular-nums;font-weight:600}
.share div{background:var(--line);border-radius:.3rem;height:.7rem;overflow:hidden}
.share i{display:block;height:100%;background:var(--bar)}
table{border-collapse:collapse;width:100%;table-layout:fixed;font-size:.88rem}
th.n{width:4.5rem}th.f{width:13rem}th.w{width:13rem}
th,td{text-align:left;padding:.3rem .6rem .3rem 0;border-bottom:1px solid var(--line);vertical-align:top;
overflow-wrap:anywhere}td.n,th.n{text-align:right;white-space:nowrap}
details{margin:.5rem 0}summary{cursor:pointer}code,pre{font:13px/1.5 ui-monospace,monospace}
pre{white-space:pre-wrap;overflow-wrap:anywhere;background:var(--panel);border:1px solid var(--line);
border-radius:.5rem;padding:.7rem;margin:.3rem 0}
figure{margin:0 0 1.2rem}figcaption{color:var(--soft);font-size:.88rem}
mark{background:var(--mark);color:inherit;border-radius:.2rem}
.note{color:var(--soft);font-size:.88rem;margin:.2rem 0}svg{width:100%;height:auto;display:block}
svg text{fill:var(--soft);font:11px system-ui,sans-serif}svg rect{fill:var(--bar)}svg line{stroke:var(--line)}
"""


def page(report: Mapping[str, Any], samples: Sequence[Shown], title: str) -> str:
    """The whole page.

    Args:
        report: content of `<prefix>_report.json`.
        samples: rows to show.
        title: the output prefix.
    """
    sections = [
        _tiles(report),
        _shares(report),
        _warnings(report["warnings"]),
        "<h2>Row lengths</h2>" + histogram(report["histogram"]),
        _listings("Dropped: rows that cannot be used", report["dropped"]),
        _listings("Left out: well made, but too long or with nothing to train", report["left_out"]),
        _listings("Written, and worth a look", _kept(report)),
        "<h2>Samples as the model gets them</h2><p class=note>Marked text is trained.</p>"
        + "".join(map(as_html, samples)),
        _settings(report),
    ]
    names = ", ".join(report["sources"][:6])
    more = f" and {len(report['sources']) - 6} more" if len(report["sources"]) > 6 else ""
    return (
        f"<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>"
        f"<title>{html.escape(title)}</title><style>{STYLE}</style>"
        f"<h1>{html.escape(title)}</h1><div class=sub>from {html.escape(names + more)}</div>"
        f"{''.join(sections)}</html>\n"
    )


def _tiles(report: Mapping[str, Any]) -> str:
    """The numbers that matter first."""
    rows, tokens = report["rows"], report["tokens"]
    tiles = [
        (f"{rows['read']:,}", "rows read"),
        (f"{rows['written']:,}", "rows written"),
        (f"{rows['dropped']:,}", "dropped"),
        (f"{rows['left_out']:,}", "left out"),
        (f"{report['cut']['count']:,}", "cut"),
        (f"{report['duplicates']:,}", "duplicates of an earlier row"),
        (f"{tokens:,}", "tokens"),
        (f"{report['trained_tokens'] / tokens:.1%}" if tokens else "-", "of them trained"),
        (f"{report['longest_row']:,}", "tokens in the longest row"),
    ]
    if report["pack"]:
        tiles += [(f"{report['sequences']:,}", "packed sequences"), (f"{report['fill']:.2%}", "of them filled")]
    for part, made in report.get("parts", {}).items():
        tiles.append((f"{made['rows']:,}", f"rows in {part}"))
    cells = "".join(f"<div class=tile><b>{number}</b><span>{what}</span></div>" for number, what in tiles)
    return f"<div class=tiles>{cells}</div>"


def _shares(report: Mapping[str, Any]) -> str:
    """Bars of what is a part of something: rows written, tokens trained, sequences filled."""
    read, tokens = report["rows"]["read"], report["tokens"]
    shares = [
        ("rows that are written", report["rows"]["written"] / read if read else 0.0),
        ("tokens that are trained", report["trained_tokens"] / tokens if tokens else 0.0),
    ]
    if report["pack"]:
        shares.append(("packed sequences filled", report["fill"]))
        parts = report.get("parts", {}).items()
        shares += [(f"... those of {part}", made["fill"]) for part, made in parts if made["sequences"]]
    return "".join(
        f"<div class=share><span>{html.escape(what)}</span><div><i style='width:{min(share, 1):.2%}'></i></div>"
        f"<b>{share:.2%}</b></div>"
        for what, share in shares
    )


def _warnings(lines: Sequence[str]) -> str:
    if not lines:
        return ""
    return "<h2>Worth knowing</h2><ul>" + "".join(f"<li>{html.escape(line)}" for line in lines) + "</ul>"


def histogram(counts: Mapping[str, Sequence[int]]) -> str:
    """Bars of the rows by length, as an SVG picture.

    Args:
        counts: `edges` [bins + 1] in tokens and `rows` [bins].
    """
    edges, rows = counts["edges"], counts["rows"]
    if not rows or not max(rows):
        return "<p class=note>No rows.</p>"
    width, height, left, bottom = 900, 260, 56, 34
    step = (width - left - 10) / len(rows)
    top = max(rows)
    parts = [f"<svg viewBox='0 0 {width} {height}' role=img aria-label='rows by their number of tokens'>"]
    for share in (0.0, 0.5, 1.0):
        y = height - bottom - share * (height - bottom - 20)
        parts.append(f"<line x1={left} x2={width - 10} y1={y:.1f} y2={y:.1f} />")
        parts.append(f"<text x={left - 6} y={y + 4:.1f} text-anchor=end>{round(top * share):,}</text>")
    every = max(1, -(-len(rows) // 12))
    for n, count in enumerate(rows):
        x = left + n * step
        tall = count / top * (height - bottom - 20)
        parts.append(
            f"<rect x={x + 1:.1f} y={height - bottom - tall:.1f} width={max(step - 2, 1):.1f} height={tall:.1f}>"
            f"<title>{edges[n]:,} to {edges[n + 1] - 1:,} tokens: {count:,} rows</title></rect>"
        )
        if n % every == 0:
            parts.append(f"<text x={x:.1f} y={height - bottom + 16} text-anchor=middle>{edges[n]:,}</text>")
    parts.append(f"<text x={width - 10} y={height - 2} text-anchor=end>tokens of a row</text></svg>")
    return "".join(parts)


def _kept(report: Mapping[str, Any]) -> dict[str, Any]:
    """Listings of rows that were written although something was done to them, by what."""
    subjects = {
        "cut": "cut to the length",
        "untrained": "no token of it is trained",
        "unrecognised_thoughts": "thought tags that are not the template's",
    }
    counted = {text: report[key] for key, text in subjects.items() if report[key]["count"]}
    return {**counted, **report["remarks"]}


def _listings(title: str, listings: Mapping[str, Any]) -> str:
    """A table of the first rows for each reason."""
    if not listings:
        return ""
    parts = [f"<h2>{html.escape(title)}</h2>"]
    for reason, listing in listings.items():
        listed = listing["rows"][:LISTED]
        noted = any(row["note"] not in ("", reason) for row in listed)
        rows = "".join(
            f"<tr><td class=n>{row['row']:,}<td>{html.escape(row['file'])}"
            f"{'<td>' + html.escape(row['note']) if noted else ''}<td><code>{html.escape(row['excerpt'])}</code>"
            for row in listed
        )
        hidden = listing["count"] - min(LISTED, len(listing["rows"]))
        more = f"<p class=note>and {hidden:,} more</p>" if hidden else ""
        head = f"<tr><th class=n>row<th class=f>file{'<th class=w>what' if noted else ''}<th>begins"
        parts.append(
            f"<details open><summary>{listing['count']:,} × {html.escape(reason)}</summary><table>"
            f"{head}{rows}</table>{more}</details>"
        )
    return "".join(parts)


def _settings(report: Mapping[str, Any]) -> str:
    """Every option that differs from nothing, and what the data are bound to."""
    bound = {
        "tokenizer": f"{report['tokenizer']['path']} (sha256 {report['tokenizer']['sha256'][:16]})",
        "template": f"{report['template']['name']} (sha256 {str(report['template']['sha256'])[:16]})",
    }
    options = {name: value for name, value in report["options"].items() if value not in (None, [], False, "")}
    rows = "".join(
        f"<tr><td>{html.escape(str(name))}<td><code>{html.escape(str(value))}</code>"
        for name, value in {**bound, **options}.items()
    )
    table = f"<table>{rows}</table>"
    return f"<h2>Made with</h2><details><summary>options, tokenizer and template</summary>{table}</details>"
