"""Tensor parallelism of models that are swapped already: styles for torch's `parallelize_module`."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import parallel

from .quantized_linear import QuantizedLinear, QuantizedModule
from .sharding import INPUTS, OUTPUTS, Sharding

__all__ = ["ColwiseParallel", "RowwiseParallel"]


class ColwiseParallel(parallel.ColwiseParallel):
    """torch's ColwiseParallel, for quantised layers too: each process computes a part of the outputs.

    Arguments, and what it does to other modules, are those of `torch.distributed.tensor.parallel.ColwiseParallel`.

    Raises:
        ValueError: a layer cannot be divided between so many processes, and why. TypeError: it is a quantised module of several
            layers, each of which takes a style of its own.

    Example:
        >>> from torch.distributed.device_mesh import init_device_mesh
        >>> from torch.distributed.tensor.parallel import parallelize_module
        >>> store = torch.distributed.HashStore()  # of one process; torchrun makes it of several
        >>> torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
        >>> mesh = init_device_mesh("cpu", (1,))
        >>> up = fp.nn.Int8Linear.from_torch(torch.nn.Linear(64, 256), activation="gelu")
        >>> model = torch.nn.Sequential(up, fp.nn.Int8Linear.from_torch(torch.nn.Linear(256, 64)))
        >>> styles = {"0": fp.nn.ColwiseParallel(), "1": fp.nn.RowwiseParallel()}
        >>> parallelize_module(model, mesh, styles)(torch.randn(4, 64)).shape
        torch.Size([4, 64])
        >>> torch.distributed.destroy_process_group()
    """

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        return module if _divided(self, OUTPUTS, module, device_mesh) else super()._apply(module, device_mesh)


class RowwiseParallel(parallel.RowwiseParallel):
    """torch's RowwiseParallel, for quantised layers too: each process takes a part of the inputs, and outputs are summed.

    Arguments, and what it does to other modules, are those of `torch.distributed.tensor.parallel.RowwiseParallel`.

    Raises:
        ValueError: a layer cannot be divided between so many processes, and why. TypeError: it is a quantised module of several
            layers, each of which takes a style of its own.

    Example:
        >>> from torch.distributed.device_mesh import init_device_mesh
        >>> from torch.distributed.tensor.parallel import parallelize_module
        >>> store = torch.distributed.HashStore()  # of one process; torchrun makes it of several
        >>> torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
        >>> mesh = init_device_mesh("cpu", (1,))
        >>> layer = fp.nn.Int8Linear.from_torch(torch.nn.Linear(256, 64))
        >>> layer = parallelize_module(layer, mesh, fp.nn.RowwiseParallel())  # of 256 inputs each process takes a part
        >>> layer(torch.randn(4, layer.in_features)).shape
        torch.Size([4, 64])
        >>> torch.distributed.destroy_process_group()
    """

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        return module if _divided(self, INPUTS, module, device_mesh) else super()._apply(module, device_mesh)


def _divided(style: Any, dim: int, module: nn.Module, mesh: DeviceMesh) -> bool:
    """Whether it is a quantised layer, which is then divided."""
    if not isinstance(module, QuantizedModule):
        return False
    if not isinstance(module, QuantizedLinear):
        names = ", ".join(name for name, _ in module.named_children())
        raise TypeError(f"{type(style).__name__} divides single layers and not a {type(module).__name__}: "
                        + (f"name each of its layers, {names}" if names else "leave it whole in each process"))  # fmt: skip
    if mesh.ndim != 1:
        raise ValueError(
            f'{type(style).__name__} takes a mesh of one dimension, not of {mesh.ndim}: pass a part, mesh["tp"]'
        )
    (inputs,), (outputs,) = style.input_layouts, style.output_layouts
    sharding = Sharding(mesh, dim, inputs, outputs, style.use_local_output)
    sharding.checked_size(module)
    if style.src_data_rank is not None:
        for t in module._buffers.values():
            if t is not None:
                values = t.contiguous()
                dist.broadcast(values.view(torch.uint8), group=mesh.get_group(), group_src=style.src_data_rank)
                t.copy_(values)
    sharding.divide(module)
    return True
