"""The source of a class without a parse of its module per class."""

import ast
import importlib
import inspect
import textwrap

import pytest

from forwardpass.common import syntax

MODULE = """
    import functools

    def marked(cls):
        return cls

    class First:
        class Within:
            x = 1

    @marked
    @functools.partial(
        marked
    )
    class Decorated(First):
        '''A line.'''
        def forward(self):
            class Local:
                y = 2
            return Local

    if True:
        class InABranch: pass
    else:
        class InABranch: z = 3

    try:
        class Tried: pass
    except ImportError:
        class Instead: pass
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    (tmp_path / "module_of_classes.py").write_text(textwrap.dedent(MODULE))
    monkeypatch.syspath_prepend(tmp_path)
    return importlib.import_module("module_of_classes")


def test_it_is_what_inspect_finds(module):
    local = module.Decorated().forward()
    for cls in (module.First, module.First.Within, module.Decorated, local, module.InABranch, module.Tried):
        assert syntax.source_of_class(cls) == inspect.getsource(cls), cls
    assert syntax.source_of_class(module.Decorated).startswith("@marked\n@functools.partial(\n    marked\n)\nclass Dec")


def test_a_module_is_parsed_once(module, monkeypatch):
    parse, parsed = ast.parse, []
    monkeypatch.setattr(
        ast, "parse", lambda source, *args, **kwargs: parsed.append(source) or parse(source, *args, **kwargs)
    )
    syntax._classes.cache_clear()
    for cls in (module.First, module.Decorated, module.Tried):
        syntax.source_of_class(cls)
    assert len(parsed) == 1


def test_without_a_text_it_raises_as_inspect_does(module):
    made = type("Made", (), {"__module__": "module_of_classes"})
    for cls in (made, int):
        with pytest.raises((OSError, TypeError)) as e:
            inspect.getsource(cls)
        with pytest.raises(e.type):
            syntax.source_of_class(cls)
