"""Reference files in KernelBench's format: a class Model with get_inputs() and get_init_inputs(), and sizes that are constants.

The file stays as it is. Its constants become the sizes of a specification, and the parameters and buffers of a Model become
further arguments of the reference: they are converted to float64 and perturbed like the inputs.
"""

from __future__ import annotations

import ast
import re
import types
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode

#: what a call may cost before constants are halved: elements of inputs, parameters and outputs; floating-point operations of
#: products and convolutions. A naive kernel takes some 0.3 s then
LARGEST_ELEMENTS, LARGEST_FLOPS = 1 << 16, 1 << 24
#: a smaller constant is a kernel size, a stride or a number of groups more often than a size
SMALLEST_HALVED = 16
#: of the weights, in both processes: KernelBench makes both models with one seed, too
SEED = 0
_ELEMENT = re.compile(r"(\w+)(?:\[(\d+)\])?")


def is_model_file(module: types.ModuleType) -> bool:
    return all(callable(getattr(module, name, None)) for name in ("Model", "get_inputs", "get_init_inputs"))


class ModelFile:
    """Such a file, and its constants.

    Attributes:
        constants: positive integers that get_inputs() or get_init_inputs() reads, as the file has them. `shape[1]` is an
            element of a tuple or list.
    """

    def __init__(self, module: types.ModuleType):
        self._module = module
        used = _names(module.get_inputs.__code__) | _names(module.get_init_inputs.__code__)
        self.constants: dict[str, int] = {}
        for name, value in vars(module).items():
            if name in used and type(value) is int and value > 0:
                self.constants[name] = value
            elif name in used and isinstance(value, (tuple, list)) and all(type(v) is int and v > 0 for v in value):
                self.constants |= {f"{name}[{k}]": v for k, v in enumerate(value)}
        self._latest: tuple[dict[str, int], torch.nn.Module] | None = None

    def _set(self, sizes: Mapping[str, int]) -> None:
        for name, n in sizes.items():
            match = _ELEMENT.fullmatch(name)
            assert match is not None
            value = n
            if match[2]:
                old = getattr(self._module, match[1])
                value = type(old)([n if k == int(match[2]) else v for k, v in enumerate(old)])
            setattr(self._module, match[1], value)

    def inputs(self, **sizes: int) -> list[Any]:
        self._set(sizes)
        return list(self._module.get_inputs())

    def init_inputs(self, sizes: Mapping[str, int]) -> str:
        """The arguments of the constructors as text, which the candidate's process reads without the file."""
        self._set(sizes)
        text = repr(list(self._module.get_init_inputs()))
        try:
            ast.literal_eval(text)
        except (ValueError, SyntaxError):
            raise ValueError(f"get_init_inputs() returns numbers, texts, and lists of them, not {text:.100}") from None
        return text

    def model(self, sizes: Mapping[str, int]) -> torch.nn.Module:
        if self._latest is None or self._latest[0] != sizes:
            self._set(sizes)
            torch.manual_seed(SEED)
            self._latest = dict(sizes), self._module.Model(*self._module.get_init_inputs())
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
        self._set(sizes)
        with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as flops:
            inputs = self._module.get_inputs()
            model = self._module.Model(*self._module.get_init_inputs())
            outputs = model(*inputs)
        outputs = [outputs] if isinstance(outputs, Tensor) else outputs
        tensors = [t for t in (*inputs, *_weights(model).values(), *outputs) if isinstance(t, Tensor)]
        return sum(t.numel() for t in tensors), flops.get_total_flops()

    def halved(self, sizes: Mapping[str, int], fixed: Sequence[str]) -> dict[str, int]:
        """These sizes, each halved as often as it takes: the largest one first, and none that the model needs as it is."""
        sizes, stuck = dict(sizes), set(fixed)
        cost = self.cost(sizes)
        while cost[0] > LARGEST_ELEMENTS or cost[1] > LARGEST_FLOPS:
            able = [name for name, n in sizes.items() if name not in stuck and n >= SMALLEST_HALVED and n % 2 == 0]
            if not able:
                raise ValueError(
                    f"a call at {', '.join(f'{k}={n}' for k, n in sizes.items()) or 'its sizes'} has {cost[0]} elements and "
                    f"{cost[1]} floating-point operations, and a CPU executes the kernel: choose smaller sizes (--size NAME=N)"
                )
            largest = max(able, key=lambda name: sizes[name])
            smaller = sizes | {largest: sizes[largest] // 2}
            try:
                cost = self.cost(smaller)
                sizes = smaller
            except Exception:  # such as a number of channels that groups do not divide
                stuck.add(largest)
        return sizes

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


def _names(code: types.CodeType) -> set[str]:
    """Global names that a function reads, those of its comprehensions and lambdas included."""
    inner = (constant for constant in code.co_consts if isinstance(constant, types.CodeType))
    return set(code.co_names).union(*map(_names, inner))
