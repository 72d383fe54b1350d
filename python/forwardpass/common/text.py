"""What is printed: tables and sentences of at most 100 columns, counts, and the names of layers that are alike as one."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Hashable, Iterable, Sequence
from itertools import chain, zip_longest
from typing import TypeVar

T = TypeVar("T")

#: Columns of a line: beyond it terminals break tables, and logs and pages cut them.
WIDTH = 100
#: Columns that a name, or a text beside one, keeps in a table however many others there are.
LEAST = 20


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


def wrapped(text: str, indent: str = "  ", width: int = WIDTH) -> list[str]:
    """The text in lines; those behind the first one are indented. What has no space in it is not broken."""
    lines = textwrap.wrap(text, width, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)
    return lines or [""]


def shortened(name: str, width: int) -> str:
    """Without its middle where it is too long: the ends tell layers apart."""
    if len(name) <= width:
        return name
    tail = (width - 1) * 2 // 3
    return f"{name[: width - 1 - tail]}…{name[len(name) - tail :]}"


def table(rows: Sequence[tuple[str, ...] | str], right: Sequence[int] = (), heading: bool = True) -> list[str]:
    """Rows as aligned lines of text, at most WIDTH columns wide.

    The first row is the heading, if there is one; its cells may have several lines. A row that is a string is a line of its
    own, such as a reason, for the rows behind it, which are indented. Where all this is too wide, the last column goes on in
    the next line, if it is text, and the names in the first one are shortened.

    Args:
        right: columns of numbers.
    """
    cells = [row for row in rows if not isinstance(row, str)]
    indent = "  " if len(cells) < len(rows) else ""
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


def _fitted(widths: Sequence[int], column: int) -> int:
    """What is left for the column."""
    return min(widths[column], max(LEAST, WIDTH - sum(widths) + widths[column] - 2 * (len(widths) - 1)))


def together(
    items: Iterable[T], name: Callable[[T], str], kind: Callable[[T], Hashable] = lambda item: None
) -> list[tuple[str, list[T]]]:
    """Items of one kind whose names are the same but for numbers: (`encoder.layer.{0-5}.output`, those items), in the order
    of the first of each. A name stands for no other item than these.
    """
    groups: dict[tuple[Hashable, tuple[str, ...]], list[T]] = {}
    for item in items:
        groups.setdefault((kind(item), tuple(name(item).split("."))), []).append(item)
    for position in reversed(range(max((len(parts) for _, parts in groups), default=0))):
        alike: dict[tuple[Hashable, tuple[str, ...]], dict[str, list[T]]] = {}
        for (group_kind, parts), members in groups.items():
            number = parts[position] if position < len(parts) and parts[position].isdigit() else ""
            others = (*parts[:position], "", *parts[position + 1 :]) if number else parts
            alike.setdefault((group_kind, others), {})[number] = members
        groups = {
            (
                group_kind,
                parts if "" in by_number else (*parts[:position], _numbers(by_number), *parts[position + 1 :]),
            ): [*chain(*by_number.values())]
            for (group_kind, parts), by_number in alike.items()
        }
    return [(".".join(parts), members) for (_, parts), members in groups.items()]


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
