"""What the interpreted GPU does not have, refused with its name."""

from __future__ import annotations

from typing import Any, NoReturn


class Refuses:
    def __call__(self, name: str) -> NoReturn:
        raise NotImplementedError(f"{name} is not there on forwardpass's interpreted GPU, which has no driver")

    def function(self, name: str) -> Any:
        """In its place: a class, as some of what is refused is instantiated, subclassed or asked about by isinstance."""

        def __new__(cls: type, *_: Any, **__: Any) -> NoReturn:
            self(name)

        return type(name.rpartition(".")[2], (), {"__new__": __new__})


refuses = Refuses()
