"""Experts of a mixture in 8 bits: one by one in a file, in two stacks in the modules that transformers 5 has for them.

transformers' own converters stack them; each is copied for the tensors beside a weight, so that scales are stacked as weights are.
Then every expert is read as the Linears are that it stands for, and `fp.nn.Experts` takes the bytes over.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..dispatch import operations
from ..nn import Experts
from ..nn.quantized_experts import experts_operation, experts_sizes, weight_names
from ..ops.fp8_gemm import BLOCK
from ..proofs.activation import activation_within
from ..proofs.walker import ExpertsLeaf, Leaf, leaves
from .recipe import EightBits, Format, Header, Recipe, Refused

#: What transformers' names of stacks have behind them for tensors that are no weight's; "_scale_inv" is of `weight_scale_inv`.
_BESIDE = ("bias", "input_scale", "input_zero_point", "input_scale_ub", "activation_scale", "pre_quant_scale")
#: What a stack may be made by: experts one above the other, gate above up.
_STACKING = (["MergeModulelist"], ["MergeModulelist", "Concatenate"])


@dataclass(frozen=True)
class StoredExperts:
    """How a module of experts is read."""

    up: Recipe
    down: Recipe
    sizes: tuple[int, int, int]  #: experts, intermediate, hidden
    parts: int  #: of the up projection: gate and up are two
    activation: str | None  #: that the module computes in between

    def module(self, original: nn.Module, in_place: bool = False) -> Experts:
        """The experts that compute with copies of its tensors; in_place: with its own memory where that has the same form, and in
        which rows are arranged anew. Raises Refused."""
        up_name, down_name = weight_names(original)
        experts, intermediate, hidden = self.sizes
        kind, device = self._kind_of(original)
        bias = original._parameters.get(f"{up_name}_bias")
        new = Experts(experts, hidden, intermediate, kind=kind, gated=bool(vars(original)["has_gate"]), activation=self.activation,
                      bias=bias is not None, dtype=torch.float32 if bias is None else bias.dtype, device=device)  # fmt: skip
        as_they_come = True
        projections = ("up", up_name, self.up, self.parts), ("down", down_name, self.down, 1)
        for name, stack_name, recipe, parts in projections:
            empty = getattr(new, f"{name}_weight")
            if in_place and _is_alike(stack := original._parameters.get(stack_name), empty):
                setattr(new, f"{name}_weight", stack.detach())  # type: ignore[union-attr]
            for e in range(experts):
                tensors = _of_expert(original, stack_name, e, parts)
                stored = [recipe.read(t) for t in tensors]
                for of_part in stored:
                    of_part.check_size(f"expert {e}'s {stack_name}", empty.shape[1] // parts, empty.shape[2])
                if any(_kind(s) != kind or s.channel_scale is not None for s in stored):
                    raise Refused(
                        f"expert {e} is stored in another way than the first, or has a scale for each channel"
                    )
                as_they_come &= all(s.input_scale is None and s.symmetric for s in stored if s.multiplies_as_8_bits)
                biases = [of_part["bias"] for of_part in tensors if "bias" in of_part]
                weights = [(s.weight, s.scale_of(new.scales)) for s in stored]
                new.fill(e, name, weights, torch.cat(biases) if biases else None)
        if not as_they_come:
            warnings.warn("inputs of experts are quantised row by row, symmetric, and not as the file says, which is finer",
                          stacklevel=5)  # fmt: skip
        new.adopt(original)
        return new.train(original.training)

    def _kind_of(self, original: nn.Module) -> tuple[str, torch.device]:
        """The kind of experts that these become, and where."""
        first = self.up.read(_of_expert(original, weight_names(original)[0], 0, self.parts)[0])
        kind, intermediate = _kind(first), self.sizes[1]
        if (reason := operations[experts_operation(kind)].too_old(first.weight.device)) is not None:
            raise Refused(str(reason))
        if kind == "fp8_block" and self.parts == 2 and self.activation is None and intermediate % BLOCK:
            raise Refused(f"blocks of its gate end within {intermediate} rows, and it applies an activation of its own")
        return kind, first.weight.device


def read_experts(
    module: nn.Module, tensors: Mapping[str, Header], config: Mapping[str, Any], name: str, format: Format
) -> StoredExperts | None:
    """How experts of these tensors, by their names behind the module's, are read; None where they hold floats. Raises Refused."""
    up_name, down_name = weight_names(module)
    experts, intermediate, hidden = experts_sizes(module)
    gated = bool(vars(module)["has_gate"])
    parts = 2 if gated and vars(module)["is_concatenated"] else 1
    width = intermediate * (2 if gated else 1)
    recipes = []
    for stack, count, n, k in ((up_name, parts, width, hidden), (down_name, 1, hidden, intermediate)):
        headers = {}
        for tensor in names_of(stack, tensors):
            header = tensors[tensor]
            if header.shape[:1] != (experts,) or any(x % count for x in header.shape[1:2]):
                raise Refused(f"its {tensor} is {list(header.shape)}, of {experts} experts")
            shape = header.shape[1:] and (header.shape[1] // count, *header.shape[2:])
            headers[_behind(stack, tensor)] = Header(shape, header.dtype)
        recipe = format(headers, config, name)
        if recipe is not None and (weight := headers.get("weight")) is not None and weight.shape != (n // count, k):
            raise Refused(
                f"an expert's {stack} is {list(weight.shape)} in the file, and [{n // count}, {k}] in the model"
            )
        recipes.append(recipe)
    up, down = recipes
    if (up is None) != (down is None):
        raise Refused("one of its projections holds 8 bits, and the other floats")
    if up is None or down is None:
        return None
    if vars(module)["is_transposed"]:
        raise Refused("its weights are transposed")
    return StoredExperts(up, down, (experts, intermediate, hidden), parts, activation_within(module))


def put_tensors(module: nn.Module, tensors: Mapping[str, Header], recipe: StoredExperts) -> None:
    """Parameters of these names, shapes and dtypes, on the meta device, in the place of those that the module has."""
    for name in [*module._parameters]:
        if name not in tensors:
            module._parameters[name] = None
    for name, header in tensors.items():
        empty = torch.empty(header.shape, dtype=header.dtype, device="meta")
        module.register_parameter(name, nn.Parameter(empty, requires_grad=False))
    vars(module)[_RECIPE] = recipe
    vars(module)["_is_hf_initialized"] = True  # transformers would fill what has other names now


_RECIPE = "_stored_experts"


def stored_experts(model: nn.Module) -> Iterator[tuple[Leaf, StoredExperts]]:
    """The modules that `put_tensors` changed, and what it was given for each, once."""
    for leaf in leaves(model, lambda m: _RECIPE in vars(m), ExpertsLeaf):
        yield leaf, vars(leaf.module).pop(_RECIPE)


def names_of(stack: str, names: Iterable[str]) -> list[str]:
    """Those that are a stack's: its own, and what is beside it."""
    return [name for name in names if name == stack or name.startswith(f"{stack}_")]


def _behind(stack: str, name: str) -> str:
    """A stacked tensor's name as one of a Linear: "gate_up_proj_scale_inv" is "weight_scale_inv"."""
    beside = name.removeprefix(stack).removeprefix("_")
    return beside if beside in _BESIDE else f"weight{name.removeprefix(stack)}"


def _is_alike(stack: Tensor | None, empty: Tensor) -> bool:
    """Whether the memory of a stack can be that of a weight of experts."""
    form = (empty.shape, empty.dtype, empty.stride())
    return stack is not None and (stack.shape, stack.dtype, stack.stride()) == form and stack.data_ptr() % 16 == 0


def _of_expert(module: nn.Module, stack: str, e: int, parts: int) -> list[dict[str, Tensor]]:
    """One expert's tensors, by the names that a Linear's have; of gate and of up."""
    stacked = {_behind(stack, n): module._parameters[n] for n in names_of(stack, module._parameters)}
    tensors = {name: t.detach()[e] for name, t in stacked.items() if t is not None}
    chunks = {name: t.chunk(parts) if t.dim() else [t] * parts for name, t in tensors.items()}
    return [{name: chunk[i] for name, chunk in chunks.items()} for i in range(parts)]


def _kind(stored: EightBits) -> str:
    """The kind of `fp.nn.Experts` that computes with it."""
    in_groups = stored.kind in ("group", "block")
    if stored.multiplies_as_8_bits:
        if stored.weight.dtype == torch.int8:
            return "int8"
        return "fp8_block" if in_groups else "fp8"
    return f"w8a16{'' if stored.weight.dtype == torch.int8 else '_fp8'}{'_group' if in_groups else ''}"


def stacked(headers: list[Header], experts: int) -> Header:
    """What a stack of these is, as many of each expert, one above the other."""
    first, each = headers[0], len(headers) // experts
    if len(headers) % experts or any(h != first for h in headers):
        raise Refused(f"its {experts} experts have {len(headers)} tensors, or not all of one shape and dtype")
    rows, *columns = first.shape or (1,)
    return Header((experts, rows * each, *columns), first.dtype)


def with_scales(transforms: list[Any], tensors: Iterable[str]) -> list[Any]:
    """transformers' transforms of a model's names, and those that stack what these tensors of experts have beside weights."""
    beside = {name.rpartition(".")[2] for name in tensors} - {"weight", "bias"}
    return [*transforms, *(copy for t in transforms for copy in _copies(t, beside))]


def _copies(transform: Any, beside: Iterable[str]) -> Iterable[Any]:
    steps = [type(op).__name__ for op in getattr(transform, "operations", ())]
    sources = getattr(transform, "_original_source_patterns", ())
    if steps not in _STACKING or not all(source.endswith(".weight") for source in sources):
        return
    for name in sorted(beside):
        suffix = f"_{name}" if name in _BESIDE else name.removeprefix("weight")
        if not suffix.startswith("_"):
            continue
        yield transform.copy(
            [f"{source.removesuffix('weight')}{name}" for source in sources],
            [f"{target}{suffix}" for target in transform._original_target_patterns],
            operations=[_vectors()(), *transform.operations],
        )


@functools.cache
def _vectors() -> Any:
    from transformers.core_model_loading import ConversionOps

    class Vectors(ConversionOps):
        """Scalars with a dimension, along which they can be stacked."""

        def convert(self, input_dict: Any, source_patterns: Any, target_patterns: Any, **kwargs: Any) -> Any:
            return {
                name: [t.reshape(1) if t.dim() == 0 else t for t in (value if isinstance(value, list) else [value])]
                for name, value in input_dict.items()
            }

    return Vectors
