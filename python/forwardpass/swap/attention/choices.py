"""What `attention=` of a swap says: of all attention of a model, or by patterns of names."""

from __future__ import annotations

from collections.abc import Mapping

from ...common.models.patterns import patterns
from ...nn.eight_bits import check_crossover
from ...ops.attention_8bit import DTYPES

#: What `attention=` says of one module, None in a dict alone: it stays.
Choice = str | bool | None
#: What a swap takes: one for all, or by pattern of modules' names, of which the first that matches decides.
Attention = str | bool | Mapping[str, Choice]
CHOICES = ("auto", True, False, *DTYPES)


class AttentionChoices:
    """What becomes of each module's attention, of what a user gives for `attention`.

    Raises:
        ValueError, TypeError: it is none of the choices, or a pattern is none.
    """

    def __init__(self, attention: Attention):
        by_name = isinstance(attention, Mapping)
        named = dict(attention) if isinstance(attention, Mapping) else {"**": attention}
        if not named:
            raise ValueError("attention is an empty dict, which names none: pass False to leave all attention as it is")
        for choice in named.values():
            _check(choice, by_name)
        self._of = [*zip(patterns("attention", named), named.values())]

    def find(self, fqn: str) -> Choice:
        """None for a module that stays: a dict says so, or does not name it."""
        return next((choice for pattern, choice in self._of if pattern.matches(fqn)), None)

    @property
    def all(self) -> tuple[Choice, ...]:
        return tuple(choice for _, choice in self._of)

    @property
    def is_asked_for(self) -> bool:
        """Whether attention is swapped wherever it can be: all of it, or that of some names."""
        return any(choice is True or choice in DTYPES for choice in self.all)


def _listed(choices: tuple[Choice, ...]) -> str:
    return ", ".join(map(repr, choices))


def _check(choice: Choice, by_name: bool) -> None:
    choices = (*CHOICES, None) if by_name else CHOICES
    if choice not in choices or (isinstance(choice, int) and not isinstance(choice, bool)):
        what = "attention by name" if by_name else "attention"
        patterns = "" if by_name else ", or a dict of patterns of names and these"
        raise ValueError(f"{what} is one of {_listed(choices)}{patterns}, not {choice!r}")


def is_asked_for(attention: Attention) -> bool:
    return AttentionChoices(attention).is_asked_for


def check_choice(attention: Attention, crossover: int | None, planned: bool) -> None:
    choices = AttentionChoices(attention)
    for name, x, default in (("attention", attention, "auto"), ("crossover", crossover, None)):
        if planned and x != default:
            raise ValueError(f"{name}={x!r} does not go with plan=, which names what is swapped: drop it")
    check_crossover(crossover)
    if crossover is not None and not any(choice in DTYPES for choice in choices.all):
        raise ValueError(f"crossover={crossover} is for attention in 8 bits, and attention is {attention!r}: pass "
                         f"attention={DTYPES[0]!r}, or drop it")  # fmt: skip
