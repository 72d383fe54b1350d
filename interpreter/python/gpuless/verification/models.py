"""Reference files in KernelBench's format: a class Model with get_inputs() and get_init_inputs(), and sizes that are constants.

The file stays as it is. Its constants become the sizes of a specification, and the parameters and buffers of a Model become
further arguments of the reference: they are converted to float64 and perturbed like the inputs.
"""

from __future__ import annotations

import ast
import copy
import itertools
import pathlib
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode

#: what a call may cost before constants are halved: elements of inputs, parameters and outputs; floating-point operations of
#: products and convolutions. A naive kernel takes some 0.3 s then
LARGEST_ELEMENTS, LARGEST_FLOPS = 1 << 16, 1 << 24
#: what is refused where no constant can be halved further. A naive kernel takes a minute for a call then
REFUSED_ELEMENTS, REFUSED_FLOPS = 1 << 24, 1 << 31
#: a smaller constant is a kernel size, a stride or a number of groups more often than a size
SMALLEST_HALVED = 16
#: of the weights, in both processes: KernelBench makes both models with one seed, too
SEED = 0


def is_model_file(module: types.ModuleType) -> bool:
    return all(callable(getattr(module, name, None)) for name in ("Model", "get_inputs", "get_init_inputs"))


class ModelFile:
    """Such a file, and its constants.

    Attributes:
        constants: positive integers of the file that get_inputs() or get_init_inputs() uses, directly or through others.
            `shape[1]` is an element of a tuple or list. A constant that is computed from others, such as
            `shape = (channels, 1)`, follows them.
    """

    def __init__(self, path: pathlib.Path):
        self._path = path
        self._tree = ast.parse(path.read_text(), str(path))
        self._tree.body = [single for statement in self._tree.body for single in _single(statement)]
        used = _used(self._tree)
        self.constants = {
            place.name: n for place in _places(self._tree) if place.statement in used and (n := _positive(place.node))
        }
        self._executed: tuple[dict[str, int], types.ModuleType] | None = None
        self._latest: tuple[dict[str, int], torch.nn.Module] | None = None

    def _module(self, sizes: Mapping[str, int]) -> types.ModuleType:
        """The file, executed with these constants in the places of its own."""
        if self._executed is None or self._executed[0] != sizes:
            tree = copy.deepcopy(self._tree)
            for place in _places(tree):
                if place.name in sizes and _positive(place.node):
                    place.put(ast.copy_location(ast.Constant(sizes[place.name]), place.node))
            module = types.ModuleType(f"_reference_{self._path.stem}")
            module.__file__ = str(self._path)
            exec(compile(tree, str(self._path), "exec", dont_inherit=True), vars(module))
            self._executed = dict(sizes), module
        return self._executed[1]

    def inputs(self, **sizes: int) -> list[Any]:
        return list(self._module(sizes).get_inputs())

    def init_inputs(self, sizes: Mapping[str, int]) -> str:
        """The arguments of the constructors as text, which the candidate's process reads without the file."""
        text = repr(list(self._module(sizes).get_init_inputs()))
        try:
            ast.literal_eval(text)
        except (ValueError, SyntaxError):
            raise ValueError(f"get_init_inputs() returns numbers, texts, and lists of them, not {text:.100}") from None
        return text

    def model(self, sizes: Mapping[str, int]) -> torch.nn.Module:
        if self._latest is None or self._latest[0] != sizes:
            module = self._module(sizes)
            torch.manual_seed(SEED)
            self._latest = dict(sizes), module.Model(*module.get_init_inputs())
        return self._latest[1]

    def weights(self, sizes: Mapping[str, int]) -> list[Tensor]:
        return [t.detach().clone() for t in _weights(self.model(sizes)).values()]

    def reference(self, sizes: Mapping[str, int], *args: Any) -> Any:
        """Model.forward of inputs, which the weights follow."""
        model = self.model(sizes)
        names = list(_weights(model))
        inputs, weights = args[: len(args) - len(names)], args[len(args) - len(names) :]
        return functional_call(model, dict(zip(names, weights)), inputs)

    # ---- which sizes ----

    def cost(self, sizes: Mapping[str, int]) -> tuple[int, int]:
        """Elements and floating-point operations of a call, by shapes alone: the file's own sizes fill a GPU."""
        module = self._module(sizes)
        with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as flops:
            inputs = module.get_inputs()
            model = module.Model(*module.get_init_inputs())
            outputs = model(*inputs)
        outputs = [outputs] if isinstance(outputs, Tensor) else outputs
        tensors = [t for t in (*inputs, *_weights(model).values(), *outputs) if isinstance(t, Tensor)]
        return sum(t.numel() for t in tensors), flops.get_total_flops()

    def halved(self, sizes: Mapping[str, int], fixed: Sequence[str]) -> dict[str, int]:
        """These sizes, each halved as often as it takes: the largest one first, and none that the model needs as it is. Two
        that the model needs to agree, such as the length of a row and of what is added to it, are halved together."""
        sizes = dict(sizes)
        names = [name for name in sizes if name not in fixed]
        groups = [(name,) for name in names] + list(itertools.combinations(names, 2))
        cost = self.cost(sizes)
        while groups and (cost[0] > LARGEST_ELEMENTS or cost[1] > LARGEST_FLOPS):
            group = min(groups, key=lambda g: (len(g), -max(sizes[name] for name in g)))
            smaller = {name: self._half(name, sizes[name]) for name in group}
            if any(n == sizes[name] for name, n in smaller.items()):
                groups.remove(group)
                continue
            try:
                cost = self.cost(sizes | smaller)
                sizes |= smaller
            except Exception:  # such as a number of channels that groups do not divide
                groups.remove(group)
        if cost[0] > REFUSED_ELEMENTS or cost[1] > REFUSED_FLOPS:
            raise ValueError(
                f"a call at {', '.join(f'{k}={n}' for k, n in sizes.items()) or 'its sizes'} has {cost[0]} elements and "
                f"{cost[1]} floating-point operations, more than {REFUSED_ELEMENTS} or {REFUSED_FLOPS}, and a CPU executes the "
                "kernel: choose smaller sizes (--size NAME=N). A number inside get_inputs() has to become a constant first"
            )
        return sizes

    def _half(self, name: str, n: int) -> int:
        """Half of a size. One that is odd in the file stays odd, others stay multiples of the powers of two, up to 8, that
        they are multiples of: kernels load vectors, and have tails, where the file's own sizes have them."""
        if n < SMALLEST_HALVED:
            return n
        power = min(8, self.constants[name] & -self.constants[name])
        return n // 2 | 1 if power == 1 else -(-(n // 2) // power) * power

    def why_not(self, sizes: Mapping[str, int]) -> str:
        """Why the model does not take these sizes, "" where it does."""
        results = []
        try:
            for seed in (0, 1):
                torch.manual_seed(0)
                args = [*self.inputs(**sizes), *self.weights(sizes)]
                torch.manual_seed(seed)
                with torch.no_grad():
                    results.append(self.reference(sizes, *args))
        except Exception as e:
            return f"{type(e).__name__}: {e}"
        first, second = ([r] if isinstance(r, Tensor) else list(r) for r in results)
        if any(not torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(first, second)):
            return "Model is random, as with a dropout in training mode: two calls with the same inputs differ"
        return ""


def _weights(model: torch.nn.Module) -> dict[str, Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


@dataclass
class _Place:
    """Where a constant stands: the node of its value, and what puts another one there."""

    name: str
    statement: str  # the name that is assigned
    node: ast.expr
    put: Callable[[ast.expr], None]


def _single(statement: ast.stmt) -> list[ast.stmt]:
    """An assignment for each name: of `height = width = 128`, and of `height, width = 128, 256`."""
    if not isinstance(statement, ast.Assign):
        return [statement]
    pairs: list[tuple[ast.expr, ast.expr]] = []
    for target in statement.targets:
        if not isinstance(target, ast.Tuple):
            pairs.append((target, statement.value))
        elif isinstance(statement.value, ast.Tuple) and len(target.elts) == len(statement.value.elts):
            pairs += zip(target.elts, statement.value.elts)
        else:
            return [statement]
    if len(pairs) == 1 or any(isinstance(node, (ast.Name, ast.Call)) for node in ast.walk(statement.value)):
        return [statement]
    return [ast.copy_location(ast.Assign([target], copy.deepcopy(value)), statement) for target, value in pairs]


def _places(tree: ast.Module) -> Iterator[_Place]:
    """Each name at the top level, and each element of tuples and lists."""
    for statement in tree.body:
        if not isinstance(statement, ast.Assign) or len(statement.targets) != 1:
            continue
        target, value = statement.targets[0], statement.value
        if not isinstance(target, ast.Name):
            continue
        name = target.id
        if isinstance(value, (ast.Tuple, ast.List)):
            for k, element in enumerate(value.elts):
                yield _Place(f"{name}[{k}]", name, element, partial(value.elts.__setitem__, k))
        else:
            yield _Place(name, name, value, partial(setattr, statement, "value"))


def _positive(node: ast.expr) -> int:
    """The value of an expression of numbers alone, such as 256 * 8, where it is a positive integer; 0 elsewhere."""
    if not all(isinstance(n, (ast.Constant, ast.BinOp, ast.operator)) for n in ast.walk(node)):
        return 0
    value = eval(compile(ast.Expression(node), "", "eval"))
    return value if type(value) is int and value > 0 else 0


def _used(tree: ast.Module) -> set[str]:
    """Names of the top level that get_inputs() and get_init_inputs() use, directly or through others."""
    reads: dict[str, set[str]] = {}
    for statement in tree.body:
        names = {node.id for node in ast.walk(statement) if isinstance(node, ast.Name)}
        if isinstance(statement, ast.FunctionDef):
            reads[statement.name] = names
        elif isinstance(statement, ast.Assign):
            for target in statement.targets:
                reads |= {node.id: names for node in ast.walk(target) if isinstance(node, ast.Name)}
    used, new = set[str](), {"get_inputs", "get_init_inputs"}
    while new:
        used |= new
        new = set().union(*(reads.get(name, set()) for name in new)) - used
    return used
