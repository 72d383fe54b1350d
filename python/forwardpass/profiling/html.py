"""A profile as one HTML file: tables, and plots as inline SVG. It loads nothing and runs no script."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from html import escape
from typing import TYPE_CHECKING

from ..common.printing.printed import page
from ..common.printing.text import count
from .layers import BEYOND, Row

if TYPE_CHECKING:
    from .profile import Profile

#: Okabe and Ito's, which colour-blind readers distinguish too
_COLOURS = {
    "input": "#e69f00", "transfer": "#cc79a7", "forward": "#0072b2", "prefill": "#0072b2", "decode": "#56b4e9",
    "output": "#009e73",
}  # fmt: skip
_BOUNDS = {"compute": "#0072b2", "memory": "#d55e00", "overhead": "#888888"}
_STYLE = """
th:first-child, td:first-child { min-width: 6rem; } th { white-space: nowrap; }
th.n, td.n { text-align: right; white-space: nowrap; } td.name { overflow-wrap: anywhere; }
.bar { display: flex; height: 2.2rem; border-radius: .3rem; overflow: hidden; background: var(--panel); }
.bar > span { color: #fff; font-size: .8rem; line-height: 2.2rem; text-align: center; white-space: nowrap; overflow: hidden; }
.legend { display: flex; flex-wrap: wrap; gap: .3rem 1.4rem; margin: .6rem 0; font-size: .85rem; }
.dot { display: inline-block; width: .7rem; height: .7rem; border-radius: .15rem; margin-right: .4rem; }
.meter { display: inline-block; width: 5rem; height: .6rem; background: var(--panel); border-radius: .2rem;
  margin-right: .6rem; overflow: hidden; } .meter > i { display: block; height: 100%; }
.card { background: var(--panel); border-radius: .4rem; padding: .7rem 1rem; margin: .5rem 0; display: grid;
  grid-template-columns: 8.5rem 1fr; }
details summary { cursor: pointer; color: var(--soft); margin: .5rem 0; }
svg { width: 100%; height: auto; display: block; } svg text { fill: var(--soft); font: 11px system-ui, "DejaVu Sans", sans-serif; }
svg .axis { stroke: var(--line); } svg .limit { stroke: var(--ink); fill: none; stroke-width: 1.5; }
"""


def render(profile: Profile) -> str:
    """The whole page."""
    p = profile
    item_ms = p.wall_ms / p.items / p.rounds
    body = [
        f"<h1>{escape(p.model)}: where the time goes</h1>",
        f'<p class="soft">{escape(p.device["name"])}; {count(p.items, "item")} × {count(p.rounds, "round")}, '
        f"{item_ms:.2f} ms an item in the plain loop</p>",
        "<h2>Phases</h2>",
        _phase_bar(p),
        _phase_table(p),
        "<h2>Items, one after the other</h2>",
        _timeline(p),
        "<h2>What to do</h2>",
        *(_card(a.action, f"{a.phase}: {a.text}") for a in p.advice),
        _card("overlap", f"fp.Pipeline, modelled: {p.overlap.period_ms:.2f} ms an item after {p.overlap.plain_ms:.2f}, "
                         f"{p.overlap.speedup:.2f} times as fast; {p.overlap.reason}"),
        *(_card("failed", f"item {f.index} in {f.phase}: {f.error}") for f in p.failed),
        *(_card("warning", w) for w in p.warnings),
    ]  # fmt: skip
    if p.inside:
        limits = p.inside.limits
        sources = "; ".join(f"{name.replace('_per_s', '')}: {source}" for name, source in limits.sources.items())
        body += [
            "<h2>Against the device's limits</h2>",
            _roofline(p),
            '<p class="soft">Each circle is an operation with products, its area the time that it takes. Limits: '
            f"{escape(sources)}.</p>",
            "<h2>Layers by class</h2>",
            _rows(p.inside.kinds),
            "<h2>Operations</h2>",
            _rows(p.inside.operations),
            "<h2>Layers</h2>",
            _rows(p.inside.layers),
            f'<p class="soft">Under the profiler, in passes of their own: {p.inside.ms:.2f} ms a forward. Overhead: less than '
            "a tenth of what memory and arithmetic allow. "
            f"{BEYOND}.</p>",
        ]
    return page(f"{p.model}: forwardpass profile", body, _STYLE)


def _dot(colour: str, text: str) -> str:
    return f'<span><i class="dot" style="background:{colour}"></i>{escape(text)}</span>'


def _phase_bar(p: Profile) -> str:
    parts = [
        f'<span style="flex:{phase.share:.6f};background:{_COLOURS[phase.name]}" title="{phase.name} {phase.share:.1%}">'
        f"{f'{phase.name} {phase.share:.0%}' if phase.share > 0.12 else ''}</span>"
        for phase in p.phases
        if phase.share > 0
    ]
    legend = "".join(_dot(_COLOURS[x.name], f"{x.name} {x.share:.1%}") for x in p.phases)
    return f'<div class="bar">{"".join(parts)}</div><div class="legend">{legend}</div>'


def _table(head: Sequence[str], rows: Iterable[Sequence[str]], numbers: Sequence[int]) -> str:
    """Cells are HTML; `numbers` are the columns that are set right."""

    def line(cells: Sequence[str], tag: str) -> str:
        kinds = ["n" if i in numbers else "name" for i in range(len(cells))]
        return "<tr>" + "".join(f'<{tag} class="{k}">{c}</{tag}>' for k, c in zip(kinds, cells)) + "</tr>"

    return f"<table>{line(head, 'th')}{''.join(line(row, 'td') for row in rows)}</table>"


def _phase_table(p: Profile) -> str:
    def note(details: dict[str, object]) -> str:
        moved = details.get("bytes")
        size = f"{moved / 1e6:.2f} MB " if isinstance(moved, float) and moved else ""
        return escape(size + str(details.get("reason", "")))

    rows = [
        [
            x.name,
            f"{x.share:.1%}",
            f"{x.median_ms:.2f}",
            f"{x.p99_ms:.2f}",
            f"{x.cpu_ms:.2f}",
            f"{x.waiting:.0%}",
            note(x.details),
        ]
        for x in p.phases
    ]
    rows.append(["sum", f"{1 - p.unaccounted:.1%}", "", "", "", "", "of the loop's wall time"])
    head = ["phase", "share", "median ms", "p99 ms", "CPU ms", "waiting", "note"]
    return _table(head, rows, range(1, 6))


def _timeline(p: Profile) -> str:
    """A column for each item, its phases on top of each other; at most 240 of them."""
    samples = p.samples[:: math.ceil(len(p.samples) / 240)]
    width, height, left, bottom = 960, 170, 56, 18
    top = max(sum(s.wall) for s in samples) or 1.0
    step = (width - left) / len(samples)
    parts = []
    for value, label in _ticks(top * 1e3):
        y = height - value / (top * 1e3) * (height - 10)
        parts.append(f'<line class="axis" x1="{left}" x2="{width}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{left - 8}" y="{y + 4:.1f}" text-anchor="end">{label}</text>')
    for i, sample in enumerate(samples):
        y = float(height)
        for phase, seconds in zip([x.name for x in p.phases], sample.wall):
            tall = seconds / top * (height - 10)
            y -= tall
            if tall > 0.05:
                parts.append(f'<rect x="{left + i * step:.2f}" y="{y:.2f}" width="{max(step - 1.5, step * 0.7):.2f}" '
                             f'height="{tall:.2f}" fill="{_COLOURS[phase]}"/>')  # fmt: skip
    parts.append(f'<text x="{left}" y="{height + bottom - 4}">the first timed item</text>')
    parts.append(f'<text x="{width}" y="{height + bottom - 4}" text-anchor="end">the last</text>')
    parts.append('<text x="0" y="14">ms</text>')
    return f'<svg viewBox="0 0 {width} {height + bottom}" role="img">{"".join(parts)}</svg>'


def _ticks(top: float) -> list[tuple[float, str]]:
    """About four round numbers up to `top`."""
    step = 10 ** math.floor(math.log10(top / 2))
    step *= next(m for m in (1, 2, 5, 10, 20) if top / (step * m) <= 4.5)
    return [(i * step, f"{i * step:g}") for i in range(int(top / step) + 1)]


def _card(head: str, text: str) -> str:
    return f'<div class="card"><b>{escape(head)}</b><span>{escape(text)}</span></div>'


def _rate(a_second: float) -> str:
    return f"{a_second / 1e9:.1f}" if a_second else "–"


def _rows(rows: Sequence[Row], limit: int = 15) -> str:
    longest = max((row.share for row in rows), default=1.0) or 1.0

    def cells(row: Row) -> list[str]:
        seconds = row.ms / 1e3
        colour = _BOUNDS[row.bound]
        meter = f'<span class="meter"><i style="width:{row.share / longest:.0%};background:{colour}"></i></span>'
        kind = f" <small>{escape(row.kind)}</small>" if row.kind else ""
        return [
            escape(row.name or "(the model itself)") + kind, f"{meter}{row.share:.1%}", f"{row.ms:.3f}", f"{row.calls:g}",
            _rate(row.flops / seconds), _rate(row.bytes / seconds), f"{row.roofline:.0%}" if row.roofline else "–", row.bound,
        ]  # fmt: skip

    head = ["name", "share of the forward", "ms", "calls", "GFLOP/s", "GB/s", "of limit", "bound by"]
    first = _table(head, map(cells, rows[:limit]), range(1, 7))
    if len(rows) <= limit:
        return first
    others = _table(head, map(cells, rows[limit:]), range(1, 7))
    share = sum(row.share for row in rows[limit:])
    return f"{first}<details><summary>{len(rows) - limit} more, {share:.1%} of the forward</summary>{others}</details>"


def _roofline(p: Profile) -> str:
    """Operations a second over operations a byte, both in powers of ten; a line for each dtype that is computed in."""
    assert p.inside is not None
    limits = p.inside.limits
    points = [r for r in p.inside.operations if r.flops and r.bytes and r.ms]
    if not points:
        return '<p class="soft">No operation with products was counted.</p>'
    peaks = {dtype: limits.flops[dtype] for dtype in sorted({r.dtype for r in points})}
    ridge = max(peaks.values()) / limits.bytes_per_s  # where the memory's line meets the highest
    coordinates = [(r.flops / r.bytes, r.flops / (r.ms / 1e3), r) for r in points]
    x0 = math.floor(math.log10(min(ridge / 4, *(x / 2 for x, _, _ in coordinates))))
    x1 = math.ceil(math.log10(max(ridge * 4, *(x for x, _, _ in coordinates))))
    y0 = math.floor(math.log10(min(y for _, y, _ in coordinates) / 2))
    y1 = math.ceil(math.log10(max(peaks.values()) * 1.1))
    width, height, left, bottom, right = 960, 340, 76, 40, 30

    def px(x: float) -> float:
        return left + (math.log10(x) - x0) / (x1 - x0) * (width - left - right)

    def py(y: float) -> float:
        return (height - bottom) - (math.log10(y) - y0) / (y1 - y0) * (height - bottom - 24)

    parts = []
    for e in range(x0, x1 + 1):
        parts.append(f'<line class="axis" x1="{px(10**e):.1f}" x2="{px(10**e):.1f}" y1="24" y2="{height - bottom}"/>'
                     f'<text x="{px(10**e):.1f}" y="{height - bottom + 16}" text-anchor="middle">{10.0**e:g}</text>')  # fmt: skip
    for e in range(y0, y1 + 1):
        parts.append(f'<line class="axis" x1="{left}" x2="{width - right}" y1="{py(10**e):.1f}" y2="{py(10**e):.1f}"/>'
                     f'<text x="{left - 8}" y="{py(10**e) + 4:.1f}" text-anchor="end">{10.0 ** (e - 9):g}</text>')  # fmt: skip
    parts.append(f'<text x="{width - right}" y="{height - 6}" text-anchor="end">operations a byte</text>')
    parts.append('<text x="0" y="10">GFLOP/s</text>')
    low = max(10.0**x0, 10.0**y0 / limits.bytes_per_s)
    for dtype, peak in peaks.items():
        corner = peak / limits.bytes_per_s
        parts.append(f'<polyline class="limit" points="{px(low):.1f},{py(low * limits.bytes_per_s):.1f} {px(corner):.1f},'
                     f'{py(peak):.1f} {px(10.0**x1):.1f},{py(peak):.1f}"/>'
                     f'<text x="{px(10.0**x1):.1f}" y="{py(peak) - 6:.1f}" text-anchor="end">{escape(dtype)} '
                     f"{peak / 1e9:.0f}</text>")  # fmt: skip
    for x, y, row in sorted(coordinates, key=lambda point: -point[2].share):
        radius, name = 4 + 22 * math.sqrt(row.share), escape(row.name.rpartition("::")[2])
        right_of = px(x) < (left + width) / 2
        beside = (
            f'x="{px(x) + (radius + 4) * (1 if right_of else -1):.1f}" text-anchor="{"start" if right_of else "end"}"'
        )
        parts.append(f'<circle cx="{px(x):.1f}" cy="{py(y):.1f}" r="{radius:.1f}" fill="{_BOUNDS[row.bound]}" opacity="0.75">'
                     f'<title>{escape(row.name)}</title></circle><text {beside} y="{py(y) + 4:.1f}">{name}</text>')  # fmt: skip
    legend = "".join(_dot(colour, f"bound by {bound}") for bound, colour in _BOUNDS.items())
    return f'<div class="legend">{legend}</div><svg viewBox="0 0 {width} {height}" role="img">{"".join(parts)}</svg>'
