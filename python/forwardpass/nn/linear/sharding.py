"""Tensor parallelism of a quantised layer: which rows or columns of its weight a process holds, and what crosses processes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor

from ...ops.common.activations import is_gated
from ...ops.common.quantized_rows import pad_rows
from ...ops.fp8_gemm import BLOCK

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor.placement_types import Placement

    from .quantized_linear import QuantizedLinear

OUTPUTS, INPUTS = 0, 1  #: dimensions of a weight [N, K]
#: What `divide` knows how to divide.
_BUFFERS = {"qweight", "weight_scale", "weight_sum", "bias", "channel_scale", "input_scale", "input_zero_point"}


@dataclass(frozen=True, eq=False)
class Sharding:
    """One rank's part of a layer: rows of its weight (column-wise: each rank computes some of the outputs), or columns (row-wise:
    each rank takes some of the inputs, and the outputs are sums over ranks).

    A layer is quantised whole and then divided, so that the ranks hold the integers and the scales of one process. Activations
    are quantised by each rank as they come to it. Column-wise they are those of one process. Row-wise a rank sees a slice of each
    row, and multiplies its own sum by the scale of that slice, before sums are added: where activations are quantised row by row,
    such a layer rounds them by a finer scale than one process, and agrees with it within the error of that rounding. Every other
    layer computes what one process does, but for the order of sums. The bias of a row-wise layer is rank 0's.

    Args:
        mesh: one-dimensional.
        dim: of the weight [N, K], that is divided: 0, column-wise, or 1, row-wise.
        input_layout, output_layout: how the whole input and the whole output lie on the ranks.
        local_output: whether the layer gives a plain tensor, in place of a DTensor.
        packed: matrices that the layer holds one after another, each of which is divided by itself.
        size: of the whole layer's divided dimension, once a layer is divided.
    """

    mesh: DeviceMesh
    dim: int
    input_layout: Placement
    output_layout: Placement
    local_output: bool = True
    packed: int = 1
    size: int = 0

    @property
    def takes_local(self) -> bool:
        """Whether plain tensors come as the layer multiplies them."""
        return self.input_layout.is_replicate() if self.dim == OUTPUTS else _is_last(self.input_layout)

    @property
    def is_local(self) -> bool:
        """Whether nothing is done to plain tensors before and behind the product."""
        return self.dim == OUTPUTS and self.takes_local and _is_last(self.output_layout) and self.local_output

    def input(self, x: Any) -> Any:
        """What the layer multiplies, of what it is called with."""
        from torch.distributed.tensor import DTensor, Replicate, Shard

        if not isinstance(x, DTensor):
            if self.takes_local or not isinstance(x, Tensor):  # what was before has quantised it
                return x
            x = DTensor.from_local(x, self.mesh, [self.input_layout], run_check=False)
        return x.redistribute(placements=[Replicate() if self.dim == OUTPUTS else Shard(-1)]).to_local()

    def output(self, y: Tensor) -> Tensor:
        """What the layer gives, of its own product."""
        from torch.distributed import all_reduce
        from torch.distributed.tensor import DTensor, Partial, Shard

        if self.is_local:
            return y
        if self.dim == INPUTS and self.output_layout.is_replicate() and self.local_output:
            y = y.contiguous()
            all_reduce(y, group=self.mesh.get_group())
            return y
        shape = y.shape if self.dim == INPUTS else torch.Size((*y.shape[:-1], self.size))
        stride = torch.empty(shape, device="meta").stride()
        parts = Partial() if self.dim == INPUTS else Shard(-1)
        whole = DTensor.from_local(y, self.mesh, [parts], run_check=False, shape=shape, stride=stride)
        whole = whole.redistribute(placements=[self.output_layout])
        return whole.to_local() if self.local_output else whole

    def divide(self, layer: QuantizedLinear) -> None:
        """Leaves this rank's part of a whole layer in it.

        Raises:
            ValueError: the layer cannot be divided so, and why; it is as it was.
        """
        size = self.checked_size(layer)
        index, rank = self._index(size, layer.qweight.device), self.mesh.get_local_rank()
        parts = {name: self._part(layer, name, t, index) for name, t in layer._buffers.items() if t is not None}
        if self.dim == OUTPUTS:
            layer.out_features = index.numel()
        else:
            layer.in_features = index.numel()
            if "weight_sum" in parts:
                parts["weight_sum"] = parts["qweight"].sum(1, dtype=torch.int32)
        layer._buffers.update(parts)
        if self.dim == INPUTS and rank != 0:
            layer.bias = None
        layer.sharding = replace(self, size=size)
        layer.settle(alone=layer.joined is None)

    def checked_size(self, layer: QuantizedLinear) -> int:
        """Outputs or inputs of a layer that `divide` takes; what it raises is the same on all ranks."""
        size = layer.out_features if self.dim == OUTPUTS else layer.in_features
        if reason := self._why_not(layer, size):
            whole = f"{type(layer).__name__}(in_features={layer.in_features}, out_features={layer.out_features})"
            raise ValueError(f"{whole} cannot be divided between {self.mesh.size()} processes: {reason}")
        return size

    def _why_not(self, layer: QuantizedLinear, size: int) -> str | None:
        ranks, each = self.mesh.size(), size // self.packed
        if layer.sharding is not None:
            return "it is a part already"
        if unknown := [name for name, t in layer._buffers.items() if t is not None and name not in _BUFFERS]:
            return f"whether its {unknown[0]} is of outputs or of inputs is not known"
        if self.dim == INPUTS and layer.activation is not None:
            return (f"row-wise its outputs are sums over processes, and it computes {layer.activation} before they are added; "
                    "divide the model before fp.swap, which then leaves the activation where it is")  # fmt: skip
        chunk = -(-each // ranks)
        if size % self.packed or chunk * (ranks - 1) >= each:
            return (
                f"{each} {'outputs' if self.dim == OUTPUTS else 'inputs'} give some of them none; use fewer processes"
            )
        scale = layer._buffers["weight_scale"]
        blocks = scale is not None and scale.dim() >= 2 and scale.shape[self.dim] != size
        if blocks and (chunk % BLOCK or (self.packed > 1 and each % BLOCK)):
            return (f"parts of {chunk} are no multiple of {BLOCK}, for which its weight has one scale; use scales of rows, or "
                    "fewer processes")  # fmt: skip
        if self.dim == INPUTS and layer.rotate is not None and chunk % layer.rotate:
            return (f"parts of {chunk} inputs are no multiple of the {layer.rotate} that are rotated together; use fewer "
                    "processes, or a smaller rotate")  # fmt: skip
        if self.dim == OUTPUTS and is_gated(layer.activation) and (size % (16 * ranks) or blocks):
            return "its rows are 8 of gate and 8 of up by turns; make gate and up multiples of 8 for each, with scales of rows"
        return None

    def _index(self, size: int, device: torch.device) -> Tensor:
        """Numbers of the outputs or inputs that are this rank's, divided as torch divides."""
        whole = torch.arange(size, device=device).reshape(self.packed, -1)
        return whole.chunk(self.mesh.size(), dim=1)[self.mesh.get_local_rank()].flatten()

    def _part(self, layer: QuantizedLinear, name: str, t: Tensor, index: Tensor) -> Tensor:
        """This rank's part of one buffer."""
        if name == "qweight":
            if t.itemsize > 1:
                return t.index_select(self.dim, index)
            return pad_rows(t.view(torch.uint8).index_select(self.dim, index).view(t.dtype))
        if name == "weight_scale" and t.dim() == 2:
            size = layer.qweight.shape[self.dim]
            return t.index_select(self.dim, index if t.shape[self.dim] == size else index[::BLOCK] // BLOCK)
        per_output = name in layer.output_buffers and t.numel() == layer.out_features
        if (self.dim == OUTPUTS and per_output) or (self.dim == INPUTS and name == "channel_scale"):
            return t.index_select(0, index)
        return t

    def __deepcopy__(self, memo: Any) -> Sharding:
        return self  # of processes there are no copies

    def __reduce__(self) -> NoReturn:
        raise TypeError("a layer that is divided between processes cannot be pickled, as it is a part and of this process: "
                        "store the whole model, before it is divided")  # fmt: skip


def _is_last(layout: Placement) -> bool:
    return layout.is_shard() and layout.dim == -1  # type: ignore[attr-defined]
