"""Results that print: the same sentences and tables as text of the terminal's width, and as HTML in a notebook."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

from .text import table, wrapped

#: Lines of a result that a prompt shows: a screen, with room for what was typed.
SCREEN = 20


@dataclass(frozen=True)
class Table:
    """The arguments of `text.table`."""

    rows: Sequence[tuple[str, ...] | str]
    right: Sequence[int] = ()
    heading: bool = True

    def html(self) -> str:
        columns = max(len(row) for row in self.rows if not isinstance(row, str))
        rows = [
            _row(row, "th" if self.heading and i == 0 else "td", self.right, columns) for i, row in enumerate(self.rows)
        ]
        return f"<table>{''.join(rows)}</table>"


def _row(row: tuple[str, ...] | str, tag: str, right: Sequence[int], columns: int) -> str:
    if isinstance(row, str):
        return f'<tr><td colspan="{columns}" style="text-align: left"><i>{escape(row)}</i></td></tr>'
    number = "right" if tag == "th" else "right; white-space: nowrap"
    whole = [cell.replace("-\n", "") for cell in row]  # a word that is divided to keep text narrow
    cells = (
        f'<{tag} style="text-align: {number if i in right else "left"}">{escape(cell)}</{tag}>'
        for i, cell in enumerate(whole)
    )
    return f"<tr>{''.join(cells)}</tr>"


@dataclass(frozen=True)
class Gallery:
    """Pictures side by side: a row for each, of what is said of it and a PNG with a caption for each column. Text has no PNG."""

    columns: Sequence[str]
    rows: Sequence[tuple[Sequence[str], Sequence[tuple[bytes, str]]]]

    def html(self) -> str:
        head = "".join(f'<th style="text-align: left">{escape(name)}</th>' for name in ("", *self.columns))
        body = "".join(
            f"<tr><td>{'<br>'.join(map(escape, lines))}</td>{''.join(_picture(png, caption) for png, caption in pictures)}</tr>"
            for lines, pictures in self.rows
        )
        return f"<table><tr>{head}</tr>{body}</table>"


def _picture(png: bytes, caption: str) -> str:
    """A small picture is shown with its pixels as squares."""
    source = f"data:image/png;base64,{base64.b64encode(png).decode()}"
    note = f"<br><small>{escape(caption)}</small>" if caption else ""
    return f'<td><img src="{source}" alt="" style="width: 12rem; image-rendering: {_rendering(png)}">{note}</td>'


def _rendering(png: bytes) -> str:
    width = int.from_bytes(png[16:20], "big")  # of its header
    return "pixelated" if width < 128 else "auto"


#: A sentence, a table, pictures, or "", an empty line.
Block = str | Table | Gallery


def as_text(blocks: Iterable[Block]) -> str:
    """As wide as the terminal."""
    lines: list[str] = []
    for block in blocks:
        if isinstance(block, Table):
            lines += table(block.rows, block.right, block.heading)
        else:
            for text in [block] if isinstance(block, str) else [", ".join(words) for words, _ in block.rows]:
                lines += wrapped(text)
    return "\n".join(lines)


#: Of every page that is written.
_STYLE = """
:root { --ink: #1b1f24; --soft: #667080; --line: #dfe3e8; --paper: #ffffff; --panel: #f6f8fa; color-scheme: light dark; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e9ee; --soft: #9aa4b2; --line: #333a45; --paper: #14171c; --panel: #1c2027; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2rem 1.5rem 4rem; max-width: 66rem; color: var(--ink); background: var(--paper);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", "DejaVu Sans", sans-serif; }
h1 { font-size: 1.5rem; margin: 0; } h2 { font-size: 1.1rem; margin: 2.2rem 0 .7rem; }
p { margin: .4rem 0; } .soft { color: var(--soft); } small { color: var(--soft); }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; font-size: .9rem; }
th { text-align: left; font-weight: 600; color: var(--soft); border-bottom: 1px solid var(--line); }
th, td { padding: .28rem .9rem .28rem 0; vertical-align: top; } td { border-bottom: 1px solid var(--line); }
"""


def page(title: str, body: Iterable[str], style: str = "") -> str:
    """One HTML file that loads nothing and runs no script. title: text; body: HTML; style: CSS beyond what all pages have."""
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{_STYLE}{style}</style></head>'
        f"<body>{''.join(body)}</body></html>\n"
    )


class Printed:
    """A result that consists of blocks: `print` shows all of them, a prompt one screen, a notebook HTML."""

    def _blocks(self) -> Iterable[Block]:
        raise NotImplementedError

    def __str__(self) -> str:
        return as_text(self._blocks())

    def __repr__(self) -> str:
        lines = str(self).split("\n")
        if len(lines) <= SCREEN:
            return "\n".join(lines)
        return "\n".join([*lines[: SCREEN - 1], f"… and {len(lines) - SCREEN + 1} lines more: print it to see all"])

    def _repr_html_(self) -> str:
        parts = (f"<p>{escape(x)}</p>" if isinstance(x, str) else x.html() for x in self._blocks() if x)
        return f"<div>{''.join(parts)}</div>"
