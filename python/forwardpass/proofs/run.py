"""What is read from a model's code is run, before it is believed.

An activation that a layer computes itself, an MLP as one unit, layers of one input as one product: each is found by reading. Here
the model runs on made-up inputs as it is, and then so rewritten, in its own floats: the same operations on the same values, in the
order that the rewriting has. Where the two differ, code does something that was not seen, and that rewriting is not made. Models
that no inputs can be made up for are believed as they were read.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..common.batches import device_of, evaluating, main_output
from ..common.compare import relative_error
from ..common.modules import is_compressed
from ..dispatch import Reason
from ..integrations.tensor_parallel import sharding_of
from .mlp import Block
from .siblings import siblings
from .walker import Leaf

#: Relative errors up to which results are those of the same operations.
_TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
ROWS, TOKENS = 2, 7


@dataclass(frozen=True)
class Rewriting:
    """One place that would be rewritten: its first layer's name, what is alike in others, and what stands where meanwhile."""

    fqn: str
    key: tuple[Any, ...]
    modules: tuple[tuple[nn.Module, str, nn.Module], ...]  #: (holder, name, module)


class _WithActivation(nn.Module):
    """A layer and the activation behind it."""

    def __init__(self, layer: nn.Module, activation: nn.Module) -> None:
        super().__init__()
        self.layer, self.activation = layer, activation

    def forward(self, x: Any) -> Any:
        return self.activation(self.layer(x))

    def __getattr__(self, name: str) -> Any:
        return super().__getattr__(name) if name in ("layer", "activation") else getattr(self.layer, name)


class _OneUnit(nn.Module):
    """The formula of an MLP, of the members that it has."""

    def __init__(self, block: Block) -> None:
        super().__init__()
        self._block = block

    def forward(self, x: Any) -> Any:
        f, modules = self._block.formula, self._block.module._modules

        def applied(names: Sequence[str], x: Any) -> Any:
            for name in names:
                x = modules[name](x)  # type: ignore[misc]
            return x

        first = [modules[name](x) for name in f.layers[:-1]]  # type: ignore[misc]
        if not f.gated:
            h = applied([f.activation], first[0])
        else:
            gate, up = first if len(first) == 2 else first[0].chunk(2, -1)
            h = applied([f.activation], gate) * up
        return applied((*f.between, f.layers[-1], *f.behind), h)

    def __getattr__(self, name: str) -> Any:
        return super().__getattr__(name) if name == "_block" else getattr(vars(self)["_block"].module, name)


class _Product:
    """Layers of one input: the first call computes for all."""

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        self.layers = tuple(layers)
        self.result: tuple[Any, list[Any]] | None = None

    def __call__(self, i: int, x: Any) -> Any:
        if i == 0:
            self.result = x, [layer(x) for layer in self.layers]
        if self.result is None or self.result[0] is not x:
            return self.layers[i](x)
        return self.result[1][i]


class _OfProduct(nn.Module):
    def __init__(self, product: _Product, i: int) -> None:
        super().__init__()
        self._product, self._i = product, i

    def forward(self, x: Any) -> Any:
        return self._product(self._i, x)

    def __getattr__(self, name: str) -> Any:
        attributes = vars(self)
        return getattr(attributes["_product"].layers[attributes["_i"]], name)


def rewritings(leaves: Sequence[Leaf]) -> Iterator[Rewriting]:
    """Those of layers that are swapped together."""
    units = [leaf for leaf in leaves if isinstance(leaf.block, Block)]
    within = {name for leaf in units if isinstance(leaf.block, Block) for name in leaf.block.names}
    for leaf in units:
        block, (_, holder) = leaf.block, leaf.ancestors[-2]
        assert isinstance(block, Block)
        name = leaf.ancestors[-1][0]
        yield Rewriting(leaf.fqn, ("mlp", type(block.module), block.formula), ((holder, name, _OneUnit(block)),))
    alone = [leaf for leaf in leaves if leaf.fqn not in within]
    for leaf in alone:
        if leaf.activation is not None and not leaf.is_experts:
            act = leaf.activation
            fused = (leaf.parent, leaf.name, _WithActivation(leaf.module, act.module))
            identity = (leaf.parent, act.fqn.rpartition(".")[2], nn.Identity())
            yield Rewriting(leaf.fqn, ("activation", type(leaf.parent), leaf.name), (fused, identity))
    for run in siblings(alone):
        product = _Product([leaf.module for leaf in run])
        members = tuple((leaf.parent, leaf.name, _OfProduct(product, i)) for i, leaf in enumerate(run))
        yield Rewriting(run[0].fqn, ("product", type(run[0].parent), tuple(leaf.name for leaf in run)), members)


def disproved(model: nn.Module, candidates: Sequence[Rewriting]) -> dict[str, Reason]:
    """The rewritings, by the names of their first layers, with which the model computes something else."""
    inputs = made_up(model) if candidates and not any(_stays_as_it_is(m) for m in model.modules()) else None
    if inputs is None:
        return {}
    with evaluating(model):
        try:
            before = _result(model, inputs)
            if _error(_run(model, inputs, candidates), before) <= _TOLERANCE.get(before.dtype, 1e-4):
                return {}
            if _error(_result(model, inputs), before) > 0 or not before.isfinite().all():
                return {}  # it computes something else each time
        except Exception:  # whatever its code raises for made-up inputs
            return {}
        kinds: dict[tuple[Any, ...], list[Rewriting]] = {}
        for rewriting in candidates:
            kinds.setdefault(rewriting.key, []).append(rewriting)
        return {
            x.fqn: reason
            for alike in kinds.values()
            if (reason := _why_not(model, inputs, alike, before))
            for x in alike
        }


def _stays_as_it_is(module: nn.Module) -> bool:
    """Whether a run would change it, or is one of several processes together."""
    return is_compressed(module) or sharding_of(module) is not None


def _why_not(
    model: nn.Module, inputs: Mapping[str, Tensor], alike: Sequence[Rewriting], before: Tensor
) -> Reason | None:
    try:
        error = _error(_run(model, inputs, alike), before)
    except Exception as e:
        return Reason("disproved", f"run so, its code raises {type(e).__name__}", "leave it")
    if error <= _TOLERANCE.get(before.dtype, 1e-4):
        return None
    return Reason(
        "disproved",
        f"run so, the model gives something else (off by {error:.2g}): its code does more than was read",
        "leave it",
    )


def _error(y: Tensor, expected: Tensor) -> float:
    return relative_error(y.double(), expected.double()) if y.shape == expected.shape else float("inf")


def _result(model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
    return main_output(model(**inputs)).clone()


def _run(model: nn.Module, inputs: Mapping[str, Tensor], alike: Iterable[Rewriting]) -> Tensor:
    with _in_place(itertools.chain.from_iterable(x.modules for x in alike)):
        return _result(model, inputs)


@contextmanager
def _in_place(modules: Iterable[tuple[nn.Module, str, nn.Module]]) -> Iterator[None]:
    with ExitStack() as stack:
        for holder, name, module in modules:
            stack.callback(holder._modules.__setitem__, name, holder._modules[name])
            holder._modules[name] = module.eval()
        yield


def made_up(model: Any) -> dict[str, Tensor] | None:
    """Inputs of a model of transformers, of tokens or pictures; None for another."""
    config, name = getattr(model, "config", None), getattr(model, "main_input_name", None)
    if config is None or not hasattr(config, "get_text_config"):
        return None
    device = device_of(model)
    if device.type == "meta":
        return None
    if name == "input_ids":
        vocabulary = getattr(config.get_text_config(), "vocab_size", None)
        if not isinstance(vocabulary, int) or vocabulary < 2:
            return None
        ids = torch.arange(1, ROWS * TOKENS + 1, device=device).view(ROWS, TOKENS) % vocabulary
        return {"input_ids": ids, **({"decoder_input_ids": ids} if config.is_encoder_decoder else {})}
    size, channels = getattr(config, "image_size", None), getattr(config, "num_channels", 3)
    if name == "pixel_values" and isinstance(size, int):
        dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
        pixels = torch.linspace(-1, 1, channels * size * size, device=device).view(1, channels, size, size)
        return {"pixel_values": pixels.to(dtype)}
    return None
