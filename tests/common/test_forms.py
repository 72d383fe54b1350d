"""One check of JSON: what fits, and what is said of what does not."""

import pytest

from forwardpass.common.files.forms import AtLeast, AtMost, OneOf, misfit

FORM = {
    "name": str,
    "size": (int, float),
    "note": str | None,
    "kind": OneOf("a", "b", None),
    "rows": [{"n": int, "on": bool}],
    "by_name": {"*": (None, AtLeast({"low": float}))},
    "some": AtMost({"x": int, "y": int}),
}
WHOLE = {
    "name": "n",
    "size": 1.5,
    "note": None,
    "kind": "a",
    "rows": [{"n": 1, "on": True}],
    "by_name": {"x": None, "y": {"low": 1.0, "more": [{}]}},
    "some": {"y": 2},
}


def test_what_fits():
    assert misfit(WHOLE, FORM) is None
    assert misfit({**WHOLE, "rows": [], "by_name": {}, "some": {}, "kind": None, "size": 3}, FORM) is None


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"name": 7}, "name is '7', no str"),
        ({"name": "x" * 400, "size": "y" * 400}, f"size is '{'y' * 40}', no int or float"),
        ({"size": True}, "size is 'True', no int or float"),
        ({"note": 3}, "note is '3', no str or null"),
        ({"kind": "c"}, "kind is 'c', and not one of a, b, None"),
        ({"kind": ["a"]}, "kind is \"['a']\", and not one of a, b, None"),
        ({"rows": {}}, "rows is no list"),
        ({"rows": [3]}, "rows.0 is no object"),
        ({"rows": [{"n": 1, "on": 1}]}, "rows.0.on is '1', no bool"),
        ({"rows": [{"n": 1}]}, "rows.0 has no on"),
        ({"by_name": {"x": {"low": "fast"}}}, "by_name.x.low is 'fast', no float"),
        ({"by_name": {"x": {}}}, "by_name.x has no low"),
        ({"some": {"z": 1}}, "some has z, which is not known here"),
        ({"more": 1}, "it has more, which is not known here"),
    ],
)
def test_what_does_not(change, problem):
    assert misfit({**WHOLE, **change}, FORM) == problem
    assert misfit(WHOLE | change, FORM, "its part").startswith(("its part.", "its part has"))


@pytest.mark.parametrize("value", [None, 3, "x", [], {}, [WHOLE]])
def test_what_is_nothing_of_the_kind(value):
    assert misfit(value, FORM) in ("it is no object", "it has no by_name")
