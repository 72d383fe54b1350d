"""What is to be done as soon as an optional package is imported."""

from __future__ import annotations

import importlib.util
import sys
import warnings
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from typing import Any


def when_imported(name: str, action: Callable[[], None]) -> None:
    """Calls `action` after the module of this name has run, or now where it has."""
    if name in sys.modules:
        action()
        return
    _finder.actions[name] = action
    if _finder not in sys.meta_path:
        sys.meta_path.insert(0, _finder)


class _Finder:
    """Calls each action after its module is run, and finds nothing itself."""

    def __init__(self) -> None:
        self.actions: dict[str, Callable[[], None]] = {}
        self._asking: str | None = None

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name not in self.actions or name == self._asking:
            return None
        self._asking = name
        try:
            spec = importlib.util.find_spec(name)
        finally:
            self._asking = None
        if spec is not None and spec.loader is not None:
            loader: Any = spec.loader
            run: Callable[[Any], None] = loader.exec_module

            def run_and_act(module: Any) -> None:
                run(module)
                if (action := self.actions.pop(name, None)) is not None:
                    if not self.actions and self in sys.meta_path:
                        sys.meta_path.remove(self)
                    try:
                        action()
                    except Exception as e:  # somebody imports, and what we do besides may not stop that
                        warnings.warn(f"forwardpass: this version of {name} is another one than it knows, and what it does for "
                                      f"that package stays undone ({type(e).__name__}: {e})", stacklevel=2)  # fmt: skip

            loader.exec_module = run_and_act
        return spec


_finder = _Finder()
