"""Patterns that name layers: globs over whole components of a fully qualified name, or regular expressions.

`layer.1` names `encoder.layer.1` and everything in it, and not `layer.11`: a pattern matches where it covers a run of
whole components. `*` and `?` stay within a component, `**` crosses dots. `re:` starts a regular expression, held to
the same rule.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

_GLOB = re.compile(r"\*\*|\*|\?|\[[^\]]*\]")
_MEANING = {"**": r".*", "*": r"[^.]*", "?": r"[^.]"}


class Pattern:
    """One include or exclude pattern."""

    def __init__(self, text: str):
        if not isinstance(text, str) or not text:
            raise TypeError(f"a pattern is a string such as 'encoder.*.output' or 're:…', not {text!r}")
        self.text = text
        #: The last component where it is spelled out: `lm_head`, `*.gate`; it overrides the default skips of such a
        #: layer.
        self.spelled_out: str | None = None
        if text.startswith("re:"):
            body = text[3:]
        else:
            last = text.rsplit(".", 1)[-1]
            self.spelled_out = None if _GLOB.search(last) else last
            literal = _GLOB.split(text)
            globs = [*_GLOB.findall(text), ""]
            body = "".join(re.escape(a) + _MEANING.get(g, g.replace("[!", "[^")) for a, g in zip(literal, globs))
        try:
            self._match = re.compile(rf"(?:^|\.)(?:{body})(?=\.|$)").search
        except re.error as e:
            raise ValueError(
                f"the pattern {text!r} is not a regular expression ({e}): correct it, or use a glob"
            ) from None

    def matches(self, fqn: str) -> bool:
        return self._match(fqn) is not None

    def spells_out(self, fqn: str) -> bool:
        """Whether it names this very layer, not only a group it is in."""
        return self.spelled_out == fqn.rsplit(".", 1)[-1] and self.matches(fqn)


def patterns(argument: str, texts: str | Iterable[str]) -> tuple[Pattern, ...]:
    """`include=` or `exclude=`: a string is one pattern, not its letters."""
    if isinstance(texts, str):
        texts = (texts,)
    try:
        return tuple(Pattern(text) for text in texts)
    except TypeError as e:
        raise TypeError(f"{argument}: {e}") from None
