"""Libraries of one file of tests. Each process of a run collects all files, and runs some: keras, peft and diffusers take two
core-seconds each to import, which a process that only collects their tests need not spend."""

import importlib
import importlib.util

import pytest


class Later:
    """A module that is imported as soon as something of it is used."""

    def __init__(self, name):
        self._name = name

    def __getattr__(self, attribute):
        if attribute.startswith("_"):  # pytest asks whatever it finds in a file of tests for some
            raise AttributeError(attribute)
        return getattr(importlib.import_module(self._name), attribute)


def later(name):
    """As pytest.importorskip(name)."""
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"{name} is not installed", allow_module_level=True)
    return Later(name)
