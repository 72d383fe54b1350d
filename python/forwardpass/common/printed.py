"""Results that print: the same sentences and tables as text of the terminal's width, and as HTML in a notebook."""

from __future__ import annotations

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
    cells = (
        f'<{tag} style="text-align: {"right" if i in right else "left"}">{escape(cell)}</{tag}>'
        for i, cell in enumerate(row)
    )
    return f"<tr>{''.join(cells)}</tr>"


#: A sentence, a table, or "", an empty line.
Block = str | Table


def as_text(blocks: Iterable[Block]) -> str:
    """As wide as the terminal."""
    lines: list[str] = []
    for block in blocks:
        lines += wrapped(block) if isinstance(block, str) else table(block.rows, block.right, block.heading)
    return "\n".join(lines)


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
        parts = (x.html() if isinstance(x, Table) else f"<p>{escape(x)}</p>" for x in self._blocks() if x)
        return f"<div>{''.join(parts)}</div>"
