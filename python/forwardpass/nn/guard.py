"""Guards of what a swap rewrites: whether the code that was proven is still the code that would run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import FunctionType
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from ..common.models.modules import are_watched_by_others, forward_replaced
from ..common.printing.quiet import warn_once
from ..common.syntax import mentioned


class CodeGuard:
    """Functions of classes as they were: the forward, and the methods that it names, and those that they name.

    Libraries (Liger, Unsloth) and users put others in their places, in a class or, by another `__code__`, in the function.

    `code_guard` makes them.
    """

    def __init__(self, *classes: type[nn.Module]) -> None:
        self.classes = classes
        self.calls: tuple[tuple[type[nn.Module], Any], ...] = tuple((cls, cls.__call__) for cls in classes)
        self.functions = tuple((cls, name, f, f.__code__) for cls in classes for name, f in _closure(cls))

    def is_as_proven(self, module: nn.Module, then: str = "its layers are called one by one") -> bool:
        """Whether a module of the first class still runs that code; says once, of each function, that it does not, and what happens
        then. Not asked while a model is compiled."""
        replaced = None
        for cls, call in self.calls:
            if cls.__call__ is not call and not _is_of_a_trace(cls.__call__):
                replaced = f"{cls.__name__}.__call__"
        for cls, name, function, code in self.functions:
            now = getattr(cls, name, None)
            if (now is not function and _below_ours(now) is not function) or function.__code__ is not code:
                replaced = f"{cls.__name__}.{name}"
        if "forward" in module.__dict__ and forward_replaced(module):
            replaced = f"the forward of a {type(module).__name__}"
        if replaced is None:
            return True
        warn_once(f"{replaced} is another function than at the swap: {then} from here on")
        return False

    def __deepcopy__(self, _: Any) -> CodeGuard:
        return self  # a copied module has the same class

    def __reduce__(self) -> Any:
        """Code is not pickled: what is unpickled is guarded from then on. If the code is another one already, it is not
        proven there either."""
        now = CodeGuard(*self.classes)
        is_other = (self.functions, self.calls) != (now.functions, now.calls)
        return (_never_as_proven if is_other else code_guard), self.classes


_guards: WeakValueDictionary[tuple[type[nn.Module], ...], CodeGuard] = WeakValueDictionary()


def code_guard(*classes: type[nn.Module]) -> CodeGuard:
    """The guard of classes as their code is now: one for all units of that code, so that thirty layers ask what is in cache."""
    guard, shared = CodeGuard(*classes), _guards.get(classes)
    if shared is not None and (shared.functions, shared.calls) == (guard.functions, guard.calls):
        return shared
    _guards[classes] = guard
    return guard


def _never_as_proven(*classes: type[nn.Module]) -> CodeGuard:
    guard = CodeGuard(*classes)
    guard.calls = tuple((cls, None) for cls in classes)
    return guard


def _closure(cls: type[nn.Module]) -> Iterator[tuple[str, FunctionType]]:
    todo, visited = ["forward"], set()
    while todo:
        name = todo.pop()
        function = _below_ours(getattr(cls, name, None))
        if name in visited or not isinstance(function, FunctionType):
            continue
        visited.add(name)
        yield name, function
        todo += (n for n in sorted(mentioned(function.__code__)) if not hasattr(nn.Module, n))


def _below_ours(function: Any) -> Any:
    """The function that one of ours stands for, as a cache's in a norm's class: it does the same where it is not asked for more."""
    while isinstance(function, FunctionType) and function.__globals__.get("__name__", "").startswith("forwardpass."):
        below = function.__dict__.get("__wrapped__")
        if below is None:
            break
        function = below
    return function


def _is_of_a_trace(call: Any) -> bool:
    """torch.fx's, while it traces: it calls what was there."""
    return isinstance(call, FunctionType) and call.__globals__.get("__name__") == "torch.fx._symbolic_trace"


class Beginning:
    """Base of what the first call of a layer within its holder's forward starts, and no other call of that layer does.

    Where that forward raises before the call, its end takes the beginning back. Else a later call of the layer alone would be taken
    for it.
    """

    _begun = False

    def watch(self, holder: nn.Module) -> tuple[RemovableHandle, RemovableHandle]:
        """Hooks around the forward of the module that calls the layers."""
        after = holder.register_forward_hook(self.end, always_call=True)
        return holder.register_forward_pre_hook(self.begin, with_kwargs=True), after

    def begin(self, holder: nn.Module, *_: Any) -> None:
        """Before the forward: the next call of the first layer is its."""
        self._begun = True

    def end(self, *_: Any) -> None:
        """After the forward, though it may have raised."""
        self._begun = False


class InEpilogue(nn.Identity):
    """In the place of an activation that the layer before it computes in its epilogue.

    Where something has come between the two since (a hook on one of them, another module in its place, another forward of the
    module that calls them), the layer leaves the activation out and this one applies it.

    Args:
        activation: the module that it stands for.
        layer: the one that computes it.
        names: of the layer and of this one in the module that holds both.
        holder: the class of the module whose code calls them, which is guarded; None: an MLP that is one unit asks itself.
        path: from that module to the one that holds both, which may be an nn.Sequential in it.
    """

    def __init__(
        self,
        activation: nn.Module,
        layer: nn.Module,
        names: tuple[str, str],
        holder: type[nn.Module] | None = None,
        path: tuple[str, ...] = (),
    ) -> None:
        super().__init__()
        self.training = activation.training
        self.is_apart = False
        self._of = (activation, layer)  # in a tuple, which holds no children
        self._guards = (code_guard(type(activation)), None if holder is None else code_guard(holder))
        self._names, self._path = names, path
        self._attach(layer)

    def _attach(self, layer: nn.Module) -> None:
        """Tells the layer of itself."""
        layer.applied = (self,)  # type: ignore[assignment]

    def give(self, y: torch.Tensor) -> None:
        """What the layer has applied the activation to."""

    def is_between(self, modules: Mapping[str, nn.Module | None]) -> bool:
        """Whether something is between the two, but for their holder's code. modules: those of what holds them."""
        (activation, layer), (name, own_name) = self._of, self._names
        if modules.get(own_name) is not self:
            return True
        if (other := modules.get(name)) is not layer:  # unless it is a layer of ours that computes the same
            return getattr(other, "activation", None) != layer.activation
        if are_watched_by_others(layer, self):
            return True
        return not self._guards[0].is_as_proven(activation)

    def begin(self, holder: nn.Module, *_: Any) -> None:
        """A hook before the forward of the module that calls the two."""
        if torch.compiler.is_compiling():
            return
        guard, modules = self._guards[1], holder._modules
        for name in self._path:
            modules = getattr(modules.get(name), "_modules", {})
        self.is_apart = self.is_between(modules) or (guard is not None and not guard.is_as_proven(holder))

    def forward(self, input: Any) -> Any:
        return self._of[0](input) if self.is_apart else input

    def extra_repr(self) -> str:
        return f"{type(self._of[0]).__name__}, by the layer before it"
