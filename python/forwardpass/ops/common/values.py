"""Whether a check may look at what tensors hold."""

from __future__ import annotations

import torch
from torch import Tensor

from ...dispatch import DEBUG, gpu_takes, is_of_subclass


def may_look(op: str, *tensors: Tensor | None) -> bool:
    """Whether values are at hand: those of a CPU, and under FORWARDPASS_DEBUG those of a GPU, which has to be waited for."""
    there = [x for x in tensors if x is not None]
    if torch.compiler.is_compiling() or any(x.device.type == "meta" or is_of_subclass(x) for x in there):
        return False
    if not DEBUG:
        return all(x.device.type == "cpu" and not gpu_takes(x.device) for x in there)
    if any(x.is_cuda for x in there) and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            f"{op}: FORWARDPASS_DEBUG=1 reads lengths on the host, which a graph that is captured cannot: capture without it"
        )
    return True
