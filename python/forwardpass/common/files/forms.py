"""What JSON from a file has to look like. One check serves plans, checkpoints and whatever else is read with suspicion."""

from __future__ import annotations

import types
import typing
from typing import Any


class AtLeast(dict[str, Any]):
    """The form of an object with these entries, and perhaps others."""


class AtMost(dict[str, Any]):
    """The form of an object with some of these entries, and no others."""


class OneOf(tuple[Any, ...]):
    """The form of one of these values."""

    def __new__(cls, *values: Any) -> OneOf:
        return super().__new__(cls, values)


#: What types are called that have another name in JSON.
_NAMES = {None: "null", type(None): "null", dict: "object"}


def misfit(value: Any, form: Any, where: str = "") -> str | None:
    """Why JSON is not of a form, in part of a sentence that names the place ("layers.3.fqn is 7, no str"). None where it is.

    A form is a type, exactly (True is no int), or None; a union of types, or a tuple of forms, of which one fits; OneOf values; a
    list of one form for a list of any length; a dict for an object of exactly these entries, {"*": form} for one of any names.

    Args:
        where: what the value is called; nothing: its entries go by their own names.
    """
    if isinstance(form, OneOf):
        allowed = any(type(one) is type(value) and one == value for one in form)
        return None if allowed else f"{_here(where, value)}, and not one of {', '.join(map(str, form))}"
    if form is Any:
        return None
    if isinstance(form, types.UnionType) or typing.get_origin(form) is typing.Union:
        form = typing.get_args(form)
    if isinstance(form, tuple):
        problems = [misfit(value, one, where) for one in form]
        if None in problems:
            return None
        return problems[-1] if any(isinstance(one, dict | list) for one in form) else _no(where, value, form)
    if isinstance(form, dict | list):
        return _misfit_within(value, form, where)
    kind = type(None) if form is None else typing.get_origin(form) or form
    return None if type(value) is kind else _no(where, value, (form,))


def _misfit_within(value: Any, form: Any, where: str) -> str | None:
    name, prefix = where or "it", f"{where}." if where else ""
    if isinstance(form, list):
        if type(value) is not list:
            return f"{name} is no list"
        parts = [(f"{prefix}{i}", x, form[0]) for i, x in enumerate(value)]
    elif not isinstance(value, dict):
        return f"{name} is no object"
    elif "*" in form:
        parts = [(f"{prefix}{str(key)[:40]}", x, form["*"]) for key, x in value.items()]
    else:
        if not isinstance(form, AtMost) and (missing := form.keys() - value.keys()):
            return f"{name} has no {min(missing)}"
        if not isinstance(form, AtLeast) and (unknown := [key for key in value if key not in form]):
            return f"{name} has {str(unknown[0])[:60]}, which is not known here"
        parts = [(f"{prefix}{key}", value[key], one) for key, one in form.items() if key in value]
    return next((problem for where, x, one in parts if (problem := misfit(x, one, where))), None)


def _here(where: str, value: Any) -> str:
    return f"{where or 'it'} is {str(value)[:40]!r}"


def _no(where: str, value: Any, kinds: tuple[Any, ...]) -> str:
    names = (_NAMES.get(kind, getattr(kind, "__name__", str(kind))) for kind in kinds)
    return f"{_here(where, value)}, no {' or '.join(names)}"
