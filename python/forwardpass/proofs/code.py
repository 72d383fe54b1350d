"""What a model's own code can get hold of, for proofs that a module is used in one way alone.

A module is reached by its name (`self.fc`, `block.fc`), by a second reference to it in an attribute, a list, a closure or a global,
or by means that say no name (`children()`, `getattr` of a variable). The first and the last are read from the code of every class
and function that the model's objects lead to, the second from the objects.
"""

from __future__ import annotations

import ast
import gc
import linecache
import re
import sys
import weakref
from collections import Counter, OrderedDict
from collections.abc import Collection, Iterable, Iterator
from functools import cached_property, lru_cache
from types import CodeType, FunctionType, ModuleType
from typing import Any

import torch
from torch import nn

from ..common.syntax import mentioned, tree_of
from ..integrations.tensor_parallel import sharding_of

#: Methods that make a module and set its weights: what they leave behind is seen in the objects.
SETUP = ("__init__", "_init_weights", "init_weights", "reset_parameters", "load_pretrained", "fix_init_weight")
#: Ways to get at modules without their names.
_NAMELESS = frozenset({
    "children", "modules", "named_children", "named_modules", "get_submodule", "_modules", "__dict__", "vars", "attrgetter",
    "__getattr__", "__getattribute__", "eval", "exec",
})  # fmt: skip
#: Packages that transformers, peft and torch import, and that know nothing of modules. Peft's code leads to sympy, and to look
#: through that took a second of a swap.
_KNOW_NO_MODULES = frozenset({
    "httpx", "httpx2", "huggingface_hub", "jinja2", "mpmath", "networkx", "numpy", "packaging", "PIL", "regex", "requests",
    "safetensors", "scipy", "sympy", "tokenizers", "tqdm", "yaml",
})  # fmt: skip
#: Of the standard library: what holds others' objects. Others (loggers, locks) hold none of a model's.
_HOLDERS = {"builtins", "collections", "functools", "types"}
#: Attributes of modules of these types lead nowhere, and of the second where they are empty: most of a model's attributes.
_VALUES, _HOLD = {type(None), bool, int, float, str}, {dict, OrderedDict, set, list, tuple}
#: Objects that are looked at before a model counts as too large to prove anything about.
_MOST = 300_000

#: They have ways of their own to what they hold.
CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
#: What is told nothing but the type or an attribute of its argument.
_ASK = ("super", "isinstance", "type", "hasattr", "getattr")

#: Attributes by which our own modules know what is around them.
_OF_OURS = ("applied", "_of", "_written", "_uncalled", "_in_epilogue", "norm", "normed", "shared")

Function = ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda


def _module_of(function: FunctionType) -> str:
    """Where its code is from; `__module__` is what a decorator copied."""
    return str(function.__globals__.get("__name__"))


def generic(module: str) -> bool:
    """Whether a module of transformers or timm is written for all models, and so knows the parts of none by name."""
    return (
        re.match(r"transformers(\.(?!models\.[\w.]+\.modeling_)|$)|timm\.models\._(?!efficientnet_blocks)", module)
        is not None
    )


def _only_calls(module: str) -> bool:
    """Whether a library uses modules as their users do, by calling them."""
    package = module.partition(".")[0]
    return (
        generic(module)
        or package in ("torch", "forwardpass", "sentence_transformers")
        or package in _KNOW_NO_MODULES
        or package in sys.stdlib_module_names
    )


class Reach:
    """Looks through a model, the first time that it is asked."""

    def __init__(self, model: nn.Module):
        self.model = model
        self._methods: dict[type, tuple[Function, ...] | None] = {}

    @cached_property
    def _places(self) -> Counter[int]:
        return Counter(id(child) for m in self.model.modules() for child in m._modules.values())

    def has_one_place(self, module: nn.Module) -> bool:
        """Whether it is one module's child, once, and nothing else refers to it."""
        return self._places[id(module)] <= (module is not self.model) and id(module) not in self._references[0]

    def only_named_by(self, holder: nn.Module, names: Iterable[str], in_forward: bool = False) -> bool:
        """Whether code that is not the holder's own takes no attribute of these names, but of a `self`, and no module without
        its name. in_forward: methods of modules that no forward leads to, which users call by hand, are not looked at.
        """
        bases, name_set = type(holder).__mro__, frozenset(names)
        return self._references[2] and all(
            owner in bases
            or _leaves_alone(function.__code__, name_set, _is_method(function, owner))
            or (in_forward and self._is_by_hand(function, owner))
            for function, owner in self._references[1]
        )

    def _is_by_hand(self, function: FunctionType, owner: type | None) -> bool:
        is_of_module = owner is not None and issubclass(owner, nn.Module) and not function.__name__.startswith("__")
        return is_of_module and function.__name__ not in self._called

    @cached_property
    def _called(self) -> set[str]:
        """Names of methods that a forward calls, or what that calls, and of those that torch does."""
        methods: dict[str, list[FunctionType]] = {}
        called, todo = {"forward", "extra_repr", "train", "_apply"}, ["forward"]
        for function, owner in self._references[1]:
            if owner is not None and issubclass(owner, nn.Module):
                methods.setdefault(function.__name__, []).append(function)
            else:
                todo += mentioned(function.__code__)
        called.update(todo)
        while todo:
            for function in methods.get(todo.pop(), ()):
                names = mentioned(function.__code__) - called
                called |= names
                todo += names
        return called

    def methods(self, cls: type[nn.Module]) -> tuple[Function, ...] | None:
        """As written, but for those that set a module up; of what it derives from those that it does not override, or all where
        one calls another's through super(). None where they do not say what is done with the module's own: one is not at hand,
        gets at modules without their names, or hands the module itself to other code.
        """
        if cls not in self._methods:
            self._methods[cls] = None if issubclass(cls, CONTAINERS) else _methods(cls)
        return self._methods[cls]

    @cached_property
    def _references(self) -> tuple[set[int], list[tuple[FunctionType, type | None]], bool]:
        """(ids of modules that something besides their parent refers to, functions and the class each is a method of, whether
        that is all).
        """
        inside = {id(m) for m in self.model.modules()}
        todo: list[tuple[Any, type | None]] = []
        for m in self.model.modules():
            # torchao has each layer print itself in another way, and the forward that transformers divides refers to its module
            apart = ["_modules", "_parameters", "_buffers", "extra_repr"]
            if sharding_of(m):
                apart.append("forward")
            if type(m).__module__.startswith("forwardpass."):
                apart += _OF_OURS
            todo += (
                (value, None)
                for name, value in vars(m).items()
                if name not in apart and type(value) not in _VALUES and (type(value) not in _HOLD or value)
            )
            todo.append((type(m), None))
        visited: set[tuple[int, type | None]] = set()
        referred: set[int] = set()
        functions: list[tuple[FunctionType, type | None]] = []
        while todo and len(visited) < _MOST:
            x, owner = todo.pop()
            key, cls = (id(x), owner), type(x)
            if key in visited:
                continue
            visited.add(key)
            if issubclass(cls, nn.Module):
                referred.add(id(x))
                if id(x) not in inside:
                    todo += ((y, None) for y in (vars(x), cls))
            elif issubclass(cls, type):
                todo += (
                    (y, base) for base in x.__mro__ if not _only_calls(base.__module__) for y in vars(base).values()
                )
            elif cls is FunctionType:
                todo += ((y, owner) for y in (x.__closure__, x.__defaults__, x.__kwdefaults__, x.__dict__) if y)
                if not _only_calls(_module_of(x)) and not (owner and x.__name__ in SETUP):
                    functions.append((x, owner))
                    todo += ((y, None) for y in _globals(x))
            elif issubclass(cls, weakref.ref):
                todo.append((x(), None))
            elif cls is staticmethod:
                todo.append((x.__func__, None))
            elif not issubclass(cls, ModuleType | torch.Tensor | str | bytes | int | float | complex | CodeType):
                is_library = _only_calls(cls.__module__)
                if not is_library or cls.__module__ in _HOLDERS:
                    todo += ((y, owner if is_library else None) for y in gc.get_referents(x) if y is not cls)
                if not is_library:
                    todo.append((cls, None))
        return referred, functions, not todo


def _methods(cls: type[nn.Module]) -> tuple[Function, ...] | None:
    bases = [base for base in cls.__mro__[: cls.__mro__.index(nn.Module)] if not generic(base.__module__)]
    members = [(n, functions_in(x, base)) for base in bases for n, x in vars(base).items() if n not in SETUP]
    functions = [f for _, methods_of_name in members for f in methods_of_name]
    if not any("super" in mentioned(f.__code__) for f in functions):
        functions = [f for methods_of_name in dict(reversed(members)).values() for f in methods_of_name]
    methods = [definition(f.__code__) for f in functions]
    sound = tuple(m for m in methods if m is not None and names_modules(m) and not hands_over(m))
    return sound if len(sound) == len(methods) else None


def hands_over(method: Function, but: Collection[int] = ()) -> bool:
    """Whether its `self` goes anywhere but to what only asks for its type or for an attribute, or into a text; but: nodes that are
    not looked at, by id."""
    self_name = self_of(method)
    harmless = {
        id(argument)
        for node in ast.walk(method)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in _ASK
        for argument in node.args
    } | {id(node.value) for node in ast.walk(method) if isinstance(node, ast.Attribute | ast.FormattedValue)}
    names = (node for node in ast.walk(method) if isinstance(node, ast.Name))
    return any(node.id == (self_name or "self") and id(node) not in harmless.union(but) for node in names)


def _is_method(function: FunctionType, owner: type | None) -> bool:
    """Or what a decorator made of one; not another function that it holds."""
    return owner is not None and function.__qualname__ == f"{owner.__qualname__}.{function.__name__}"


def _globals(function: FunctionType) -> Iterator[Any]:
    """What a function names of its module, and of the modules that it imports: other packages' left out."""
    package, names = _module_of(function).partition(".")[0], mentioned(function.__code__)
    for value in [function.__globals__[name] for name in names if name in function.__globals__]:
        within = [value]
        if isinstance(value, ModuleType):
            within = [vars(value)[name] for name in names if name in vars(value)]
        for x in within:
            if not isinstance(x, type | FunctionType) or (x.__module__ or "").partition(".")[0] == package:
                yield x


@lru_cache(maxsize=4096)
def _leaves_alone(code: CodeType, names: frozenset[str], is_method: bool) -> bool:
    """Whether a function takes nothing of these names, but of its own `self`, and nothing without a name."""
    if mentioned(code).isdisjoint(names | _NAMELESS | {"getattr", "apply"}):
        return True
    node = definition(code)
    if node is None or not names_modules(node, names):
        return False
    self_name = self_of(node) if is_method else None
    return all(
        is_attribute_of(x, self_name) for x in ast.walk(node) if isinstance(x, ast.Attribute) and x.attr in names
    )


def names_modules(node: ast.AST, names: Collection[str] = ()) -> bool:
    """Whether code gets at modules by their names alone, `getattr` of constants included, and by none of these so."""
    for x in ast.walk(node):
        name = x.id if isinstance(x, ast.Name) else x.attr if isinstance(x, ast.Attribute) else None
        if name in _NAMELESS or (name == "apply" and isinstance(x, ast.Attribute) and is_attribute_of(x, "self")):
            return False
        if name == "getattr" and x not in _constant_gets(node, names):
            return False
    return True


def _constant_gets(node: ast.AST, names: Collection[str]) -> list[ast.expr]:
    """The `getattr` in calls that have a constant for a name, or a constant at its end, and get none of `names`."""
    return [
        x.func for x in ast.walk(node) if isinstance(x, ast.Call) and len(x.args) > 1 and _is_another(x.args[1], names)
    ]


def _is_another(name: ast.expr, names: Collection[str]) -> bool:
    match name:
        case ast.Constant(value=value):
            return str(value) not in names
        case ast.JoinedStr(values=[*_, ast.Constant(value=end)]):  # f"{layer_type}_inv_freq"
            return bool(names) and not any(x.endswith(str(end)) for x in names)
    return False


@lru_cache(maxsize=4096)  # asked of each statement of a method, it looks through all of them
def self_of(node: Function) -> str | None:
    """The name of a method's first parameter, where it is never bound to something else."""
    arguments = [*node.args.posonlyargs, *node.args.args]
    name = arguments[0].arg if arguments else None
    bound = (x for x in ast.walk(node) if isinstance(x, ast.Name) and not isinstance(x.ctx, ast.Load))
    again = (x for x in ast.walk(node) if isinstance(x, ast.arg) and x is not next(iter(arguments), None))
    return None if any(x.id == name for x in bound) or any(x.arg == name for x in again) else name


def is_attribute_of(x: ast.AST, name: str | None) -> bool:
    """Whether it is an attribute of that variable."""
    return isinstance(x, ast.Attribute) and isinstance(x.value, ast.Name) and x.value.id == name


def functions_in(value: Any, base: type) -> list[FunctionType]:
    """The functions that a member of a class is made of: itself, or what a property or a decorator holds; of libraries' decorators
    what they decorate.
    """
    functions, todo, visited = [], [value], set()
    while todo:
        x = todo.pop()
        if id(x) in visited or isinstance(x, type | ModuleType | nn.Module | torch.Tensor):
            continue
        visited.add(id(x))
        if isinstance(x, FunctionType):
            if not _only_calls(_module_of(x)) or _module_of(x) == base.__module__:
                functions.append(x)
            todo += (y for y in (x.__closure__, x.__dict__) if y)
        elif type(x).__module__ in _HOLDERS:
            todo += gc.get_referents(x)
    return functions


def definition(code: CodeType) -> Function | None:
    """A function as it is written; None where its text is not at hand or not what runs, being edited since."""
    return _definitions("".join(linecache.getlines(code.co_filename)), code.co_filename).get(code)


@lru_cache(maxsize=64)
def _definitions(source: str, filename: str) -> dict[CodeType, Function]:
    try:
        tree, compiled = tree_of(source), compile(source, filename, "exec", dont_inherit=True)
    except SyntaxError:
        return {}
    nodes: dict[tuple[int, str], list[Function]] = {}
    for node in ast.walk(tree):
        if isinstance(node, Function):
            decorators = [] if isinstance(node, ast.Lambda) else node.decorator_list
            first = min(x.lineno for x in (node, *decorators))
            nodes.setdefault((first, getattr(node, "name", "<lambda>")), []).append(node)
    functions: dict[CodeType, Function] = {}
    todo = [compiled]
    while todo:
        code = todo.pop()
        todo += (c for c in code.co_consts if isinstance(c, CodeType))
        definitions = nodes.get((code.co_firstlineno, code.co_name), [])
        if len(definitions) == 1:  # and not two lambdas of a line
            functions[code] = definitions[0]
    return functions
