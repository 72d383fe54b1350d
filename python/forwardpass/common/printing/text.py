"""What is printed: tables and sentences as wide as the terminal, counts, and the names of layers that are alike as one."""

from __future__ import annotations

import contextlib
import os
import re
import sys
import textwrap
from collections.abc import Callable, Hashable, Iterable, Sequence
from itertools import chain, zip_longest
from typing import TypeVar

T = TypeVar("T")

#: Columns of a line where there is no terminal, and at most: logs and pages cut what is longer.
WIDTH = 100
#: Columns of a line at least, however narrow the terminal is.
NARROWEST = 60
#: A number in the name of a layer, as `together` takes it: of `layers.0.fc` and of `layers.layer_0.fc`, and none of `conv1`.
_NUMBER = re.compile(r"(?<![^._])(\d+)(?=\.|$)")
#: Columns that a name, or a text beside one, keeps in a table however many others there are.
LEAST = 20


def columns() -> int:
    """Columns of a line: those of COLUMNS, or of the terminal that stdout or stderr is, between NARROWEST and WIDTH."""
    variable = os.environ.get("COLUMNS", "")
    width = int(variable) if variable.isdecimal() else 0
    for stream in (sys.__stdout__, sys.__stderr__):
        with contextlib.suppress(OSError, ValueError):  # it is no terminal, or closed
            width = width or (os.get_terminal_size(stream.fileno()).columns if stream else 0)
    return max(NARROWEST, min(width or WIDTH, WIDTH))


def count(n: int, noun: str) -> str:
    """`1 batch`, `2 batches`, `3 layers`."""
    plural = (
        noun[:-1] + "ies" if noun.endswith("y") else noun + ("es" if noun.endswith(("s", "x", "ch", "sh")) else "s")
    )
    return f"{n} {noun if n == 1 else plural}"


def megabytes(count: int) -> str:
    return f"{count / 1e6:.1f} MB"


def span(values: Sequence[float], form: str) -> str:
    """`1.13`, or `0.95-1.13` where the values, in that form, differ."""
    low, high = (format(value, form) for value in (min(values), max(values)))
    return low if low == high else f"{low}-{high}"


def wrapped(text: str, indent: str = "  ", width: int | None = None) -> list[str]:
    """The text in lines of `width` columns, by default `columns()`; those behind the first one are indented. What has no space in
    it is not broken.
    """
    lines = textwrap.wrap(
        text, width or columns(), subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    )
    return lines or [""]


def shortened(name: str, width: int) -> str:
    """Without its middle where it is too long: the ends tell layers apart."""
    if len(name) <= width:
        return name
    tail = (width - 1) * 2 // 3
    return f"{name[: width - 1 - tail]}…{name[len(name) - tail :]}"


def table(rows: Sequence[tuple[str, ...] | str], right: Sequence[int] = (), heading: bool = True) -> list[str]:
    """Rows as aligned lines of text, at most `columns()` wide.

    The first row is the heading, if there is one; its cells may have several lines. A row that is a string is a line of its
    own, such as a reason, for the rows behind it, which are indented. Where all this is too wide, the last column goes on in
    the next line, if it is text, and the names in the first one are shortened. Columns for which there is no room even then
    follow as a table of their own, with the same names.

    Args:
        right: columns of numbers.
    """
    cells = [row for row in rows if not isinstance(row, str)]
    indent = "  " if len(cells) < len(rows) else ""
    if (fit := _how_many_fit(cells, right, len(indent))) < len(cells[0]):
        fitting = [row if isinstance(row, str) else row[:fit] for row in rows]
        others = [row if isinstance(row, str) else (row[0], *row[fit:]) for row in rows]
        moved = [i - fit + 1 for i in right if i >= fit]
        return [*table(fitting, [i for i in right if i < fit], heading), "", *table(others, moved, heading)]
    lines = [[cell.split("\n") for cell in row] for row in cells]
    for cell in lines[heading:]:
        cell[0] = [indent + cell[0][0]]
    last = len(cells[0]) - 1
    widths = [max(len(line) for row in lines for line in row[i]) for i in range(last + 1)]
    if last and last not in right:
        widths[last] = _fitted(widths, last)
    widths[0] = _fitted(widths, 0)

    def laid(row: list[list[str]], is_heading: bool) -> list[str]:
        row = [[shortened(row[0][0], widths[0])], *row[1:]] if not is_heading else row
        if last and last not in right:
            row = [*row[:-1], [part for line in row[last] for part in wrapped(line, "", widths[last])]]
        if is_heading:  # its last line is the one above the rule
            row = [[""] * (max(map(len, row)) - len(cell)) + cell for cell in row]
        return [
            "  ".join(c.rjust(w) if i in right else c.ljust(w) for i, (c, w) in enumerate(zip(line, widths))).rstrip()
            for line in zip_longest(*row, fillvalue="")
        ]

    printed: list[str] = []
    remaining = iter(lines)
    if heading:
        printed += laid(first := next(remaining), True)
        rules = widths if last in right else [*widths[:-1], max(map(len, first[last]))]
        printed.append("  ".join("-" * w for w in rules))
    for row in rows[heading:]:
        printed += wrapped(row, "") if isinstance(row, str) else laid(next(remaining), False)
    return printed


def _how_many_fit(cells: Sequence[tuple[str, ...]], right: Sequence[int], indent: int) -> int:
    """How many of the first columns fit beside each other, two at least; names, and text in the last column, take LEAST."""
    last, used = len(cells[0]) - 1, 0
    for i in range(last + 1):
        width = max(len(line) for row in cells for line in row[i].split("\n")) + (indent if i == 0 else 0)
        used += min(width, LEAST) if i == 0 or (i == last and last not in right) else width
        if i > 1 and used + 2 * i > columns():
            return i
    return last + 1


def _fitted(widths: Sequence[int], column: int) -> int:
    """What is left for the column."""
    return min(widths[column], max(LEAST, columns() - sum(widths) + widths[column] - 2 * (len(widths) - 1)))


def together(
    items: Iterable[T], name: Callable[[T], str], kind: Callable[[T], Hashable] = lambda item: None
) -> list[tuple[str, list[T]]]:
    """Items of one kind whose names are the same but for numbers: (`encoder.layer.{0-5}.output`, those items), in the order
    of the first of each. A name stands for no other item than these. A number is a component of a name, or ends one behind `_`.
    """
    groups: dict[tuple[Hashable, tuple[str, ...]], list[T]] = {}
    for item in items:
        groups.setdefault((kind(item), tuple(_NUMBER.split(name(item)))), []).append(item)
    for position in reversed(range(1, max((len(parts) for _, parts in groups), default=0), 2)):
        alike: dict[tuple[Hashable, tuple[str, ...]], dict[str, list[T]]] = {}
        for (group_kind, parts), members in groups.items():
            number = parts[position] if position < len(parts) else ""
            others = (*parts[:position], "", *parts[position + 1 :]) if number else parts
            alike.setdefault((group_kind, others), {})[number] = members
        groups = {
            (
                group_kind,
                parts if "" in by_number else (*parts[:position], _numbers(by_number), *parts[position + 1 :]),
            ): [*chain(*by_number.values())]
            for (group_kind, parts), by_number in alike.items()
        }
    return [("".join(parts), members) for (_, parts), members in groups.items()]


def without_numbers(text: str) -> str:
    """The text with `#` for each number: the same for texts that differ in numbers alone."""
    return re.sub(r"\d+", "#", text)


def with_numbers(texts: Iterable[str]) -> str:
    """One text for several that differ in numbers alone: `{2-4} x 384` for `2 x 384`, `3 x 384` and `4 x 384`."""
    parts = zip(*(re.split(r"(\d+)", text) for text in texts))
    return "".join(_numbers(set(part)) if i % 2 else part[0] for i, part in enumerate(parts))


def _numbers(numbers: Iterable[str]) -> str:
    """`3`, or `{0-3,5}`."""
    runs: list[list[int]] = []
    for n in sorted(map(int, numbers)):
        if runs and n == runs[-1][1] + 1:
            runs[-1][1] = n
        else:
            runs.append([n, n])
    joined = ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)
    return joined if joined.isdigit() else "{" + joined + "}"
