"""What the grouped GEMMs share: which rows are an expert's, the checks of what experts have each, the rule in plain torch.

Rows are sorted by expert, a [S, K] beside `offs`, or each expert has room for as many, a [E, max_m, K] beside its count.

Only the device knows these numbers, and no backend waits for them. Where they are wrong, the rows that they concern are NaN::

    sorted by expert   The first end is wrong that is below the one before it (the first expert's: below 0), or above S. It is
                       unknown whose the rows are from that end on, or from the one before it if that is less: all of them are
                       NaN, those beyond offs[-1] included.
    room for each      A count is wrong that is below 0 or above max_m: all max_m rows of that expert are NaN.

int8 has no NaN: such rows hold -127, what the epilogue gives for a NaN (`epilogue.py`). All other rows are right.
FORWARDPASS_DEBUG=1 in the environment refuses such a call instead, naming the expert.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ...dispatch import DEBUG
from .activations import is_gated
from .epilogue import fake_output
from .quantized_rows import FLOATS, check_rows
from .values import may_look

#: Kernels have a list of as many in shared memory.
MOST_EXPERTS = 512
#: Rows of a, of all experts together: the most with which every kernel is tested.
MOST_ROWS = 2**22


def row_ranges(a: Tensor, ends: Tensor) -> tuple[list[tuple[int, int]], Tensor]:
    """The first row of each expert and the one behind its last, in a's rows one after the other; and for each row whether it is
    unknown whose it is, as an end or a count is wrong (bool [rows]). An expert whose rows are unknown has none."""
    numbers: list[int] = ends.tolist()
    if a.dim() == 3:
        room = a.shape[1]
        counts = [n if 0 <= n <= room else 0 for n in numbers]
        wrong = torch.tensor([n != count for n, count in zip(numbers, counts)])
        return [(e * room, e * room + n) for e, n in enumerate(counts)], wrong.repeat_interleave(room)
    rows = known = a.shape[0]
    for begin, end in zip([0, *numbers], numbers):
        if not begin <= end <= rows:
            known = max(min(begin, end), 0)
            break
    ranges: list[tuple[int, int]] = []
    begin = 0
    for end in numbers:
        ranges.append((begin, max(begin, min(end, known))))
        begin = ranges[-1][1]
    return ranges, torch.arange(rows) >= known


def fill_unknown(out: Tensor, unknown: Tensor) -> None:
    """Writes NaN to those rows of out [..., N], of int8 what a NaN becomes."""
    value = -127 if out.dtype == torch.int8 else float("nan")
    row = torch.full((1, out.shape[-1]), value, device=out.device).to(out.dtype)
    out.flatten(0, -2).view(torch.uint8)[unknown.to(out.device)] = row.view(torch.uint8)


def rows_of_choices(index: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """index [T, k], the experts that tokens chose -> (the token of each row, by expert, stably; offs [E]; position [T, k]).

    A choice that is no expert has the position -1, and its row is one of those behind offs[-1]."""
    choices = index.shape[1]
    expert = index.reshape(-1).long()
    valid = (expert >= 0) & (expert < num_experts)
    expert = torch.where(valid, expert, num_experts)  # behind all that are experts
    counts = torch.zeros(num_experts + 1, dtype=torch.int64, device=index.device)
    offs = counts.scatter_add(0, expert, torch.ones_like(expert))[:num_experts].cumsum(0).int()
    order = torch.sort(expert, stable=True).indices  # the choice that each row is of
    row = torch.empty_like(order)
    row[order] = torch.arange(len(order), device=index.device)
    position = torch.where(valid, row, -1).int().reshape(index.shape)
    return torch.div(order, max(choices, 1), rounding_mode="floor"), offs, position


def by_expert(
    a: Tensor, ends: Tensor, activation: str | None, out_dtype: torch.dtype, columns: int,
    product: Callable[[int, slice, Tensor], Tensor],
) -> Tensor:  # fmt: skip
    """product(expert, its rows, a's rows), [rows, N], for each expert that has some; zeros in rows that none has, and NaN in
    those of which that is unknown."""
    out = fake_output(a, (*a.shape[:-1], columns), activation, out_dtype)
    out.view(torch.uint8).zero_()
    rows, results = a.flatten(0, -2), out.flatten(0, -2)
    ranges, unknown = row_ranges(a, ends)
    fill_unknown(out, unknown)
    for e, (begin, end) in enumerate(ranges):
        if begin < end:
            y = product(e, slice(begin, end), rows[begin:end])
            results[begin:end].view(torch.uint8).copy_(y.view(torch.uint8))
    return out


def of_rows(v: Tensor | None, rows: slice) -> Tensor | None:
    """What the rows have of one value, or of one a row."""
    return v if v is None or v.numel() == 1 else v.flatten()[rows]


def of_expert(v: Tensor | None, expert: int) -> Tensor | None:
    return None if v is None else v[expert]


def check_expert_weight(op: str, name: str, b: Tensor, x_name: str, x: Tensor) -> None:
    """b is [E, N, K] for an x [S, K] or [E, max_m, K], on its device."""
    check_rows(op, name, b)
    check_rows(op, x_name, x)
    if x.dim() not in (2, 3):
        raise ValueError(f"{op}: {x_name} must be [S, K] or [E, max_m, K], and has shape {tuple(x.shape)}")
    if b.dim() != 3 or b.shape[2] != x.shape[-1] or (x.dim() == 3 and b.shape[0] != x.shape[0]):
        first = "E" if x.dim() == 2 else x.shape[0]
        raise ValueError(
            f"{op}: {name} must be [{first}, N, {x.shape[-1]}] for {x_name} {tuple(x.shape)}, and has shape {tuple(b.shape)}"
        )
    if x.numel() > MOST_ROWS * x.shape[-1]:
        raise ValueError(
            f"{op}: {x_name} must have at most {MOST_ROWS} rows, and has shape {tuple(x.shape)}: split them"
        )
    if not 1 <= b.shape[0] <= MOST_EXPERTS:
        raise ValueError(f"{op}: {name} must have 1 to {MOST_EXPERTS} experts, and has {b.shape[0]}: split them")
    if b.device != x.device:
        raise ValueError(f"{op}: {name} is on {b.device} and {x_name} on {x.device}: move one of them")


def check_of_experts(
    op: str, name: str, v: Tensor | None, shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...], x: Tensor
) -> None:
    """An optional contiguous tensor of that shape on x's device, of one of the dtypes."""
    if v is None:
        return
    if not isinstance(v, Tensor) or v.dtype not in dtypes:
        dtype_names = " or ".join(map(str, dtypes))
        raise TypeError(f"{op}: {name} must be a tensor of {dtype_names}, not {getattr(v, 'dtype', type(v).__name__)}")
    if tuple(v.shape) != shape or not v.is_contiguous():
        raise ValueError(f"{op}: {name} must be contiguous {list(shape)}, and has shape {tuple(v.shape)}")
    if v.device != x.device:
        raise ValueError(f"{op}: {name} is on {v.device} and the input on {x.device}: move one of them")


def check_experts_epilogue(
    op: str,
    x: Tensor,
    experts: int,
    columns: int,
    b_scale: Tensor,
    bias: Tensor | None,
    b_sum: Tensor | None,
    scale_shape: tuple[int, ...] | None = None,
) -> None:
    """What of the epilogue each expert has for itself; scale_shape: of b_scale, if not one a column."""
    if not isinstance(b_scale, Tensor):
        raise TypeError(f"{op}: b_scale must be a float32 tensor, not {type(b_scale).__name__}")
    shape = experts, columns
    check_of_experts(op, "b_scale", b_scale, scale_shape or shape, (torch.float32,), x)
    check_of_experts(op, "bias", bias, shape, FLOATS, x)
    check_of_experts(op, "b_sum", b_sum, shape, (torch.int32,), x)


def check_ends(op: str, ends: Tensor, experts: int, x_name: str, x: Tensor) -> None:
    """offs or, where x has three dimensions, counts; what they say under FORWARDPASS_DEBUG alone."""
    name = "offs" if x.dim() == 2 else "offs, the counts of the experts,"
    if ends is None:
        raise TypeError(f"{op}: {name} must be a tensor of torch.int32, not None")
    check_of_experts(op, name, ends, (experts,), (torch.int32,), x)
    if not DEBUG or not may_look(op, ends):
        return
    if x.dim() == 3:
        wrong = (ends < 0) | (ends > x.shape[1])
        sentence = f"from 0 to {x.shape[1]}, the rows that {x_name} has for each"
    else:
        before = torch.cat([ends.new_zeros(1), ends[:-1]])
        wrong = (ends < before) | (ends > x.shape[0])
        sentence = f"ends that never fall, from 0 to {x.shape[0]}, the rows of {x_name}"
    if wrong.any():
        e = int(wrong.nonzero()[0])
        raise ValueError(f"{op}: {name} must be {sentence}, and of expert {e} is {int(ends[e])}")


def fake_grouped_gemm(
    a: Tensor, b: Tensor, a_scale: Tensor, b_scale: Tensor, offs: Tensor, bias: Tensor | None, activation: str | None,
    out_dtype: torch.dtype, *options: object,
) -> Tensor:  # fmt: skip
    """Shape and dtype of what a product of a [..., K] and b [E, N, K] returns."""
    return fake_output(a, (*a.shape[:-1], b.shape[1]), activation, out_dtype)


def outputs(columns: int, activation: str | None) -> int:
    """Columns of the output for so many of the accumulators."""
    return columns // 2 if is_gated(activation) else columns
