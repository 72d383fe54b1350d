"""The activations of every op that has one: their names, the formulas in plain torch, how exact kernels are; and the
layouts of a gate beside its up projection.

In C++: csrc/cpu/activation.h and csrc/device/activation.cuh; in Triton: triton_activations.py.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

PLAIN = ("relu", "gelu", "gelu_tanh", "silu", "relu6", "hard_swish")
#: Those of which no value is rounded: every backend has the reference's bits.
EXACT = (None, "relu", "relu6")
#: activation(gate) * up
GATED = ("silu_mul", "gelu_mul", "gelu_tanh_mul")
LAYOUTS = ("halves", "interleaved8")

_FORMULAS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": functools.partial(F.gelu, approximate="tanh"),
    "silu": F.silu,
    "relu6": F.relu6,
    "hard_swish": F.hardswish,
}

#: The steepest slope of each (GELU's at sqrt 2, hard swish's below 3): an error of the input grows by this at most.
LIPSCHITZ = {**dict.fromkeys(EXACT, 1.0), "gelu": 1.13, "gelu_tanh": 1.13, "silu": 1.13, "hard_swish": 1.5001}


def is_gated(name: str | None) -> bool:
    return name in GATED


def check_activation(op: str, name: str | None, allowed: Sequence[str | None] = (None, *PLAIN, *GATED)) -> None:
    if name not in allowed:
        raise ValueError(f"{op}: activation must be one of {', '.join(map(str, allowed))}, not {name!r}")


def activate(name: str | None, x: Tensor, up: Tensor | None = None) -> Tensor:
    """The activation of x, times `up` where it is gated, in x's dtype: fp64 makes it the reference."""
    y = x if name is None else _FORMULAS[name.removesuffix("_mul")](x)
    return y if up is None else y * up


def element_bound(
    name: str | None,
    x: Tensor,
    up: Tensor | None = None,
    x_error: Tensor | float = 0.0,
    up_error: Tensor | float = 0.0,
) -> Tensor:
    """How far a kernel's fp32 activation may be from the fp64 one, element by element, its inputs off by these errors.

    2^-21 |x| is above the bounds that csrc/device/activation.cuh states, product and final rounding included; those of
    EXACT round nothing of their own.
    """
    x, plain = x.double(), name in EXACT
    slope = LIPSCHITZ[name and name.removesuffix("_mul")]
    error = slope * x_error + (0.0 if plain else 2.0**-21) * x.abs() + 2.0**-149
    if up is None:
        return error
    up = up.double()
    return error * (up.abs() + up_error) + activate(name, x).abs() * up_error


def interleave_gate_up(gate: Tensor, up: Tensor, dim: int = 0) -> Tensor:
    """The layout "interleaved8" along `dim`: 8 slices of gate, 8 of up, and so on.

    The gated epilogue of a GEMM wants the rows of its weight (and bias, scales, row sums) this way: a thread that holds
    an element of gate then holds the same element of up.

    Args:
        gate, up: of one shape, device and dtype, which may be any; `dim` is a multiple of 8.
        dim: of rows, in a weight [N, K], a bias [N] or scales [N].

    Returns:
        A new tensor, twice as long along `dim`. `separate_gate_up` is the inverse.

    Raises:
        TypeError: gate or up is no tensor.
        ValueError: they differ in shape, dtype or device, or dim is none of theirs or no multiple of 8.

    Example:
        >>> gate, up = torch.zeros(16, 64), torch.ones(16, 64)
        >>> fp.ops.interleave_gate_up(gate, up)[::4, 0].tolist()
        [0.0, 0.0, 1.0, 1.0, 0.0, 0.0, 1.0, 1.0]
    """
    op = "interleave_gate_up"
    dim = _checked_dim(op, "gate", gate, dim, 8, "pad both")
    if not isinstance(up, Tensor):
        raise TypeError(f"{op}: up must be a tensor, not {type(up).__name__}")
    if (gate.shape, gate.dtype, gate.device) != (up.shape, up.dtype, up.device):
        raise ValueError(f"{op}: gate and up must have one shape, dtype and device, not {tuple(gate.shape)} {gate.dtype} on "
                         f"{gate.device} and {tuple(up.shape)} {up.dtype} on {up.device}")  # fmt: skip
    blocks = [t.unflatten(dim, (t.shape[dim] // 8, 8)) for t in (gate, up)]
    return torch.stack(blocks, dim + 1).flatten(dim, dim + 2)


def separate_gate_up(x: Tensor, dim: int = 0, layout: str = "interleaved8") -> tuple[Tensor, Tensor]:
    """The gate and the up projection that one tensor holds: the inverse of `interleave_gate_up`.

    Args:
        x: of any dtype.
        dim: of gate and up, twice as long in x as in the results.
        layout: along dim: "interleaved8", 8 slices of gate, 8 of up, and so on, dim a multiple of 16; "halves", all of gate, then
            all of up, dim even.

    Returns:
        (gate, up): new tensors, or, of halves, views of x.

    Raises:
        TypeError: x is no tensor.
        ValueError: its shape does not fit dim and layout, or there is no such layout.

    Example:
        >>> gate, up = torch.randn(16, 64), torch.randn(16, 64)
        >>> both = fp.ops.separate_gate_up(fp.ops.interleave_gate_up(gate, up))
        >>> torch.equal(both[0], gate), torch.equal(both[1], up)
        (True, True)
    """
    multiples = {"interleaved8": 16, "halves": 2}
    if layout not in LAYOUTS:
        raise ValueError(f"separate_gate_up: layout must be one of {', '.join(LAYOUTS)}, not {layout!r}")
    dim = _checked_dim("separate_gate_up", "x", x, dim, multiples[layout], f"{layout!r} has gate and up in it")
    if layout == "halves":
        gate, up = x.chunk(2, dim)
        return gate, up
    gate, up = x.unflatten(dim, (x.shape[dim] // 16, 2, 8)).unbind(dim + 1)
    return gate.flatten(dim, dim + 1), up.flatten(dim, dim + 1)


def _checked_dim(op: str, name: str, x: Tensor, dim: int, multiple: int, hint: str) -> int:
    """dim, from 0 on, of a tensor which is a multiple long there."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{op}: {name} must be a tensor, not {type(x).__name__}")
    if isinstance(dim, bool) or not isinstance(dim, int):
        raise TypeError(f"{op}: dim must be an integer, not {dim!r}")
    if not -x.dim() <= dim < x.dim():
        raise ValueError(f"{op}: dim must be one of the {x.dim()} dimensions of {name}, and is {dim}: {name} has shape "
                         f"{tuple(x.shape)}")  # fmt: skip
    if x.shape[dim] % multiple:
        raise ValueError(f"{op}: dimension {dim} must be a multiple of {multiple}, and {name} has shape {tuple(x.shape)}: "
                         f"{hint}")  # fmt: skip
    return dim % x.dim()
