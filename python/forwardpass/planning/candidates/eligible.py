"""Which candidates of a plan are tried on a layer at all."""

from __future__ import annotations

from typing import Any

import torch

from ...dispatch import Reason, gpu_takes, only_reference_on
from ...dispatch.operation import GPU_BACKENDS
from ...nn.conv2d_classes import is_pointwise, padding_of
from ...ops.int8_conv2d import OPERATION as INT8_CONV2D
from ...proofs.walker import ConvolutionLeaf, Leaf
from ...swap.precision import LayerPrecision
from ...swap.rules import Context, why_skip

#: What a swap leaves alone by default, and a plan measures.
MEASURED = ("too_small", "lm_head", "unmeasured", "uncalibrated", "depthwise", "narrow")
#: Of convolutions that no kernel takes. The figure is of docs/convolution.md.
_STAYS = ("it stays in floats, where early layers of this kind belong: alone in int8 the first depthwise one of EfficientNet-Lite0 "
          "changes the logits by .13, the most of its 49 layers")  # fmt: skip


def _why_no_kernel(leaf: ConvolutionLeaf) -> Reason | None:
    """Why no kernel takes this convolution in int8; that it is slow in it is measured."""
    m: Any = leaf.module
    if is_pointwise(m):
        return None
    x, w = (
        torch.empty(shape, dtype=torch.int8, device="meta") for shape in ((1, m.in_channels, 15, 15), m.weight.shape)
    )
    x, w = (t.contiguous(memory_format=torch.channels_last) for t in (x, w))
    scale = torch.empty(1, device="meta")
    call = x, w, scale, scale, m.stride, padding_of(m), m.dilation, m.groups, None, None, m.weight.dtype, None
    device = m.weight.device
    backends = GPU_BACKENDS if gpu_takes(device) else ("cpu",)
    reasons = [INT8_CONV2D.why_not_on(backend, device, *call) for backend in backends]
    return (
        None if None in reasons or reasons[0] is None else Reason(reasons[0].code, f"{reasons[0].text}: {_STAYS}", "")
    )


def eligible(leaf: Leaf, context: Context, planned: LayerPrecision) -> Reason | None:
    """Why a candidate is not tried on a layer. Small layers, heads and stems are: their gain and their cost are measured."""
    candidate = planned.precision
    if leaf.is_experts and planned.calibrated:
        return Reason("not_calibrated", f"experts take no calibration: {candidate.name} is the same for them", "")
    reason = why_skip(leaf, context, candidate, defaults=True)
    if reason and reason.code in MEASURED:
        reason = why_skip(leaf, context, candidate, defaults=False)
        if reason is None and isinstance(leaf, ConvolutionLeaf):
            reason = _why_no_kernel(leaf)
    operation, w = candidate.operation(leaf), leaf.weight
    if reason is None and operation and only_reference_on(operation, w.device, w.dtype):
        return Reason("reference", f"{operation} has no kernel for {str(w.dtype).removeprefix('torch.')} on "
                      f"{w.device}, and its reference is slower than what it replaces", "")  # fmt: skip
    return reason
