"""What forwardpass puts into the modules and classes of other packages, all of it through `put`, and how it comes out again.

While models are swapped, and gone with the last of them: transformers' rotary embedding and norms (rotary.py, head_norms.py).
From when a package is imported, or a model's config first names our attention, and for good, as copies of swapped models are known
to nobody: peft's `inject_adapter`, which then refuses swapped layers (peft.py), what transformers' continuous batching takes for
flash attention (continuous_batching.py), what accelerate's hooks do as they are put on a module (accelerate.py), and which modules
torch.fx's traces take for leaves (torch_fx.py). Each does what was there before where no swapped model is concerned.
Besides, transformers' own registries have entries of ours: attention and masks, and the quantizer of our folders.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

_lock = threading.Lock()
_patches: dict[tuple[int, str], Patch] = {}


class Patch:
    """One function in the place of another, for as many swaps as ask for it."""

    def __init__(self, owner: Any, name: str, function: Callable[..., Any]) -> None:
        self.owner, self.name, self.function, self.swaps = owner, name, function, 0
        self.original = vars(owner)[name]

    def remove(self) -> None:
        """For one of these swaps. After the last one the original comes back, unless something else stands there by then."""
        with _lock:
            self.swaps -= 1
            if self.swaps or _patches.pop((id(self.owner), self.name), None) is not self:
                return
            if vars(self.owner)[self.name] is self.function:
                setattr(self.owner, self.name, self.original)


def put(owner: Any, name: str, wrap: Callable[[Any], Callable[..., Any]]) -> Patch:
    """Puts wrap(what is there) in the place of a function of a module or class, if it is not there yet; `remove` takes it out."""
    with _lock:
        patch = _patches.get((id(owner), name))
        if patch is None or vars(owner)[name] is not patch.function:
            patch = _patches[id(owner), name] = Patch(owner, name, wrap(vars(owner)[name]))
            setattr(owner, name, patch.function)
        patch.swaps += 1
        return patch


def is_there(owner: Any, name: str) -> bool:
    """Whether ours is what is called now: somebody may have put another function there since."""
    patch = _patches.get((id(owner), name))
    return patch is not None and vars(owner)[name] is patch.function


def below(owner: Any, name: str) -> Any:
    """The function that is there, or that ours stands for."""
    return _patches[id(owner), name].original if is_there(owner, name) else vars(owner).get(name)
