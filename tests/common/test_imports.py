"""What is done as soon as a package is imported."""

import importlib
import importlib.util
import sys

import pytest

from forwardpass.common.imports import when_imported


@pytest.fixture
def module(tmp_path, monkeypatch):
    """The name of a module that is not imported yet."""
    (tmp_path / "imported_later.py").write_text("x = 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield "imported_later"
    sys.modules.pop("imported_later", None)


def test_the_action_comes_after_the_module_has_run(module):
    seen = []
    when_imported(module, lambda: seen.append(sys.modules[module].x))
    assert importlib.util.find_spec(module) is not None and not seen  # asking whether it is there imports nothing
    importlib.import_module(module)
    assert seen == [1]
    importlib.reload(sys.modules[module])
    assert seen == [1]


def test_it_comes_at_once_where_the_module_is_there():
    seen = []
    when_imported("sys", lambda: seen.append(1))
    assert seen == [1]


def test_a_module_that_is_not_there_is_not_found():
    when_imported("no_such_module_at_all", lambda: pytest.fail("there is none"))
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("no_such_module_at_all")


def test_an_action_that_fails_stops_no_import(module):
    """`import peft` failed where its tuners were elsewhere, because forwardpass was imported."""
    when_imported(module, lambda: importlib.import_module("imported_later.tuners"))
    with pytest.warns(UserWarning, match="imported_later is another one than it knows"):
        assert importlib.import_module(module).x == 1
