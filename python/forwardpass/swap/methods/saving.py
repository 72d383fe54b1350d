"""A swapped model's own `save_pretrained`, which would write integers under the names of float weights.

For models of transformers and sentence-transformers the method writes the folder of `fp.save_pretrained` instead, so that
`push_to_hub`, which calls it, uploads that; for others (diffusers) it refuses. What is called is an attribute of each module
that has such a method and holds quantised layers. It goes with the module into copies and pickles, and a restore takes it away.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Iterator
from typing import Any, Protocol

from torch import nn

from ...common.models.modules import head_of
from ...integrations import sentence_transformers as sentences
from ...integrations.peft import BASE
from ...integrations.transformers import model_config
from ...nn import QuantizedModule

#: Those of sentence-transformers save and upload through `save`.
_METHODS = ("save_pretrained", "save")
#: Arguments that are honoured, and those that change nothing here: the name is of the library's own card.
_HONOURED = ("save_directory", "path", "max_shard_size", "is_main_process", "create_model_card")
_WITHOUT_EFFECT = ("model_name",)


class Saves(Protocol):
    """`fp.save_pretrained`."""

    def __call__(
        self, model: nn.Module, folder: Any, *, overwrite: bool, model_card: bool, max_shard_size: int | str = ...
    ) -> None: ...


_save: Saves


def register_save(save: Saves) -> None:
    """`fp.save_pretrained`, which stands above this: what the methods call."""
    global _save
    _save = save


class SavesFolder:
    """What is called in place of the method `name` of a module; `before` has what the module itself held under it, if anything."""

    def __init__(self, module: nn.Module | None, name: str, before: tuple[Any, ...]) -> None:
        self._module = (
            (lambda: None) if module is None else weakref.ref(module)
        )  # a module that is dropped goes at once
        self.name, self.before = name, before

    def __reduce__(self) -> tuple[Any, ...]:
        return SavesFolder, (self._module(), self.name, self.before)

    def __call__(self, *args: Any, **options: Any) -> None:
        module = self._module()
        if module is None:
            raise RuntimeError(f"the model of this {self.name} is gone, as nothing held it: keep it in a variable, "
                               f"model = …, and call model.{self.name}(folder)")  # fmt: skip
        owner = f"{type(module).__name__}.{self.name}"
        if not _is_known(module):
            raise RuntimeError(f"{owner} would write the 8-bit values of swapped layers as if they were float weights: use "
                               "fp.save_pretrained(model, folder), or call fp.restore(model) first")  # fmt: skip
        overwrite = options.pop("overwrite", False)
        asked = _arguments(getattr(type(module), self.name), module, args, options, owner)
        if not asked.get("is_main_process", True):  # of several, one writes
            return
        folder = asked["save_directory"] if "save_directory" in asked else asked["path"]
        size = asked.get("max_shard_size")
        size_of_files: dict[str, Any] = {} if size is None else {"max_shard_size": size}
        _save(module, folder, overwrite=overwrite, model_card=asked.get("create_model_card", True), **size_of_files)


_FIXES = {
    "push_to_hub": "call model.push_to_hub(repository) after it",
    "state_dict": "the values are those of the model itself",
    "safe_serialization": "nothing else than safetensors is written",
}


def _arguments(
    method: Any, module: nn.Module, args: tuple[Any, ...], options: dict[str, Any], owner: str
) -> dict[str, Any]:
    """The arguments that are honoured, as the module's own method has them. ValueError where another one is asked for."""
    signature = inspect.signature(method)
    bound = signature.bind(module, *args, **options)
    bound.apply_defaults()
    honoured: dict[str, Any] = {}
    for name, value in [*bound.arguments.items()][1:]:
        parameter = signature.parameters[name]
        others = value if parameter.kind is parameter.VAR_KEYWORD else {name: value}
        for name, value in others.items():
            is_default = type(value) is type(parameter.default) and value == parameter.default
            if name in _HONOURED:
                honoured[name] = value
            elif not (is_default or name in _WITHOUT_EFFECT or (name == "safe_serialization" and value is True)):
                raise ValueError(f"{owner} of a swapped model writes the folder of fp.save_pretrained, and takes no "
                                 f"{name}={str(value)[:40]}: {_FIXES.get(name, 'drop it')}")  # fmt: skip
    return honoured


def _is_known(module: nn.Module) -> bool:
    """Whether a folder of this model says which class it is of, which has all of its modules."""
    if any(BASE in m._modules for m in module.modules()):  # adapters that peft has put into it
        return False
    return model_config.model_class(type(module).__name__) is type(module) or sentences.class_of(module) is not None


def _methods(module: nn.Module) -> Iterator[str]:
    known = sentences.class_of(module) is not None
    yield from (name for name in _METHODS if hasattr(type(module), name) and (known or name == _METHODS[0]))


def _writes_adapters_alone(module: nn.Module) -> bool:
    """Whether it is peft's, which writes no more, but for a head that was resized."""
    if getattr(type(module), _METHODS[0]).__module__.partition(".")[0] != "peft":
        return False
    return not isinstance(head_of(module), QuantizedModule)


def put(model: nn.Module) -> None:
    for module in model.modules():
        for name in _methods(module):
            before = vars(module).get(name)
            if isinstance(before, SavesFolder) or _writes_adapters_alone(module):
                continue
            if any(isinstance(m, QuantizedModule) for m in module.modules()):
                vars(module)[name] = SavesFolder(module, name, () if before is None else (before,))
