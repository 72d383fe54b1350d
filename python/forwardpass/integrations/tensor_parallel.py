"""Models that torch's `parallelize_module` or transformers' `tp_plan` has divided between processes: how each layer is, read from
what they put around it."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..common.models.modules import has_hooks
from ..nn.linear.quantized_linear import is_linear
from ..nn.linear.sharding import INPUTS, OUTPUTS, Sharding

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

_TORCH, _TRANSFORMERS = "torch.distributed.tensor.parallel.style", "transformers.distributed.tensor_parallel"
#: Names of styles, with the dimension of the weight that they divide.
_STYLES = {"ColwiseParallel": OUTPUTS, "PackedColwiseParallel": OUTPUTS, "RowwiseParallel": INPUTS}


def sharding_of(module: nn.Module) -> Sharding | None:
    """How a Linear is divided; None where it is not, or with something else around it."""
    if not is_linear(module):
        return None
    if "forward" in vars(module):
        return None if has_hooks(module) else _of_transformers(module)
    return _of_torch(module) if getattr(module, "_distribute_module_applied", False) else None


def refuse_divided(caller: str, model: nn.Module, fix: str) -> None:
    """ValueError where processes hold parts of the model's layers."""
    for fqn, module in model.named_modules():
        if sharding_of(module) or getattr(module, "sharding", None):
            raise ValueError(f"{caller} takes whole layers, and {fqn} is divided between processes: {fix}")


def is_row_wise(module: nn.Module) -> bool:
    """Whether its outputs are sums over processes."""
    sharding = sharding_of(module)
    return sharding is not None and sharding.dim == INPUTS


def whole(module: nn.Module) -> nn.Linear:
    """A Linear that is divided, as it was: gathered, so all processes ask for it together."""
    from torch.distributed.tensor import DTensor

    parameters = {name: p for name, p in module._parameters.items() if p is not None}
    linear = nn.Linear(module.in_features, module.out_features, "bias" in parameters, device="meta")  # type: ignore[arg-type]
    with torch.inference_mode(False), torch.no_grad():
        for name, p in parameters.items():
            values = _gathered(p) if isinstance(p, DTensor) else p
            linear.register_parameter(name, nn.Parameter(values, requires_grad=False))
    return linear.train(module.training)


def _gathered(p: DTensor) -> Tensor:
    """All of a parameter. Of one whose processes have parts of several blocks each, as of a gate and an up in one layer, the parts
    are gathered here: full_tensor() of torch 2.11 refuses such a placement."""
    placement, mesh = p.placements[0], p.device_mesh
    blocks = getattr(placement, "split_factor", 1)
    if blocks == 1:
        return p.full_tensor()
    local = p.to_local().contiguous()
    shards = [torch.empty_like(local) for _ in range(mesh.size())]
    torch.distributed.all_gather(shards, local, group=mesh.get_group())
    dim = placement.dim  # type: ignore[attr-defined]
    parts = [shard.chunk(blocks, dim) for shard in shards]
    return torch.cat([part for of_block in zip(*parts) for part in of_block], dim)


def take_over(layers: Mapping[str, Any]) -> None:
    """Divides whole layers as transformers has prepared them to be, by name, in place of what it put around them. ValueError where
    one cannot be."""
    for fqn, layer in layers.items():
        style = _closure(vars(layer).get("forward")).get("self")
        if type(style).__module__.partition(".")[0] != "transformers":
            continue
        if (sharding := _of_transformers(layer)) is None:
            raise ValueError(f"{fqn} is a quantised {type(layer).__name__}, which transformers' {type(style).__name__} cannot "
                             "divide: load it without tp_plan, or swap it without this layer")  # fmt: skip
        del vars(layer)["forward"]
        try:
            sharding.divide(layer)
        except ValueError as e:
            raise ValueError(f"{fqn}: {e}") from None


def _of_transformers(module: nn.Module) -> Sharding | None:
    """By the style whose `install_forward` made the module's forward."""
    around = _closure(vars(module)["forward"])
    style, inner = around.get("self"), around.get("original_forward")
    if type(style).__module__ != _TRANSFORMERS or getattr(inner, "__func__", None) is not type(module).forward:
        return None
    dim = _STYLES.get(type(style).__name__)
    if dim is None:
        return None
    from torch.distributed.tensor import Shard

    inputs = style.input_layouts[0] if isinstance(style.input_layouts, tuple) else style.input_layouts  # type: ignore[union-attr]
    outputs = getattr(style, "output_layouts", Shard(-1))
    packed = getattr(style, "split_factor", 1)
    return _checked(Sharding(around["mesh"], dim, inputs, outputs, style.use_local_output, packed))  # type: ignore[union-attr]


def _of_torch(module: nn.Module) -> Sharding | None:
    """By the two hooks that `distribute_module` registers for a style."""
    hooks = [*module._forward_pre_hooks.values()], [*module._forward_hooks.values()]
    if [*map(len, hooks)] != [1, 1] or module._backward_hooks or module._backward_pre_hooks:
        return None
    before, behind = _closure(hooks[0][0]), _closure(hooks[1][0])
    take, give = before.get("input_fn"), behind.get("output_fn")
    if not isinstance(take, functools.partial) or not isinstance(give, functools.partial):
        return None
    if take.func.__module__ != _TORCH or give.func.__module__ != _TORCH:
        return None
    dim = _STYLES.get(take.func.__qualname__.partition(".")[0])
    if dim is None or take.func.__name__ != "_prepare_input_fn" or give.func.__name__ != "_prepare_output_fn":
        return None
    (inputs,), (outputs,), local = take.args[0], give.args[0], give.args[1]
    return _checked(Sharding(before["device_mesh"], dim, inputs, outputs, local))


def _checked(sharding: Sharding) -> Sharding | None:
    return sharding if sharding.mesh.ndim == 1 else None


def _closure(function: Any) -> dict[str, Any]:
    """The variables that a function has from where it was made, by name."""
    code, cells = getattr(function, "__code__", None), getattr(function, "__closure__", None)
    return dict(zip(code.co_freevars, (cell.cell_contents for cell in cells))) if code and cells else {}
