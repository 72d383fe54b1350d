"""What holds in one thread only, carried into another that works for it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager

import torch
from torch.overrides import _get_current_function_mode_stack

from . import backend
from .declined import counted, counting


def captured() -> Callable[[], AbstractContextManager[None]]:
    """A block for other threads, within which holds what holds here and now.

    That is `fp.use_backend`, `fp.interpret`, `fp.sdpa` and other function modes of torch (a default device is one), the
    calls that are counted, autocast, and the current CUDA device. Grad mode is not among them: who works for a pipeline is
    in inference mode.
    """
    chosen, counts, modes = backend.choice(), counting(), _get_current_function_mode_stack()
    autocasts = [(kind, torch.get_autocast_dtype(kind)) for kind in ("cpu", "cuda") if torch.is_autocast_enabled(kind)]
    gpu = torch.cuda.current_device() if torch.cuda.is_initialized() else None

    @contextmanager
    def carried() -> Iterator[None]:
        with ExitStack() as stack:
            if gpu is not None:
                stack.enter_context(torch.cuda.device(gpu))
            stack.enter_context(backend.choosing(chosen))
            for calls in counts:
                stack.enter_context(counted(calls))
            for kind, dtype in autocasts:
                stack.enter_context(torch.autocast(kind, dtype))
            for mode in modes:
                stack.enter_context(copy.copy(mode))  # some keep what they found, and this one is in use
            yield

    return carried
