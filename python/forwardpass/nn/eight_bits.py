"""Attention of a model in 8 bits: which of its calls are computed so, and which stay in the model's dtype.

Quantising q, k and v takes time by their rows, and 8 bits save time by rows times keys: so each call is decided by its shape.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from operator import index
from typing import Any

import torch
from torch import Tensor

from ..common.environment import cpu_tier
from ..dispatch import Reason, gpu_capability, gpu_takes, interpreter
from ..dispatch.calls import take
from ..dispatch.operation import GPU_BACKENDS
from ..ops.attention import ATTENTION
from ..ops.attention_8bit import ATTENTION_8BIT, DTYPES, attention_8bit

#: Rows and keys from which 8 bits are faster on a CPU, times columns of a head, of which 64 count at most, by the tier and the
#: model's dtype: measured on one thread of an AMD EPYC 9005, held to these tiers (python -m benchmarks.attention_8bit --crossover;
#: docs/attention.md has the times). With AVX2 8 bits save a seventh at most. A CPU with AMX runs the kernel for VNNI, and 16 bits
#: on AMX, which was not measured. Without VNNI 8 bits gained from half as many keys on, before `attention` became faster.
ON_CPU = {
    "avx512": {torch.float32: 131072, torch.float16: 131072, torch.bfloat16: 131072},
    "avx512_vnni": {torch.float32: 16384, torch.float16: 16384, torch.bfloat16: 65536},
    "amx": {torch.float32: 16384},
}
#: On a GPU. Modelled: of 2048 rows and keys attention_8bit saves 14 us on an A100 and quantising takes 41; on an L40S 57, and as
#: many bytes are read and written there in 140. They come out even at 6000 and 5000.
ON_GPU = 8192


@dataclass(frozen=True)
class EightBits:
    """What a module's attention is computed in where that is faster.

    Raises:
        ValueError, TypeError: `attention_8bit` has no such dtype, or the crossover is no number of keys.
    """

    dtype: str  #: of `fp.ops.attention_8bit`
    #: keys, and rows of all query heads that share them, from which a call is computed so; None: `least_keys` of where it runs
    crossover: int | None = None

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ValueError(f"attention of 8 bits is {' or '.join(map(repr, DTYPES))}, not {self.dtype!r}")
        check_crossover(self.crossover)

    def takes(self, arguments: tuple[Any, ...]) -> bool:
        """Whether a call of `ATTENTION` with these arguments is computed in 8 bits."""
        q, k, v, ends = arguments[0], arguments[1], arguments[2], arguments[11]
        least = self.crossover
        if least is None:
            # a graph is of one head dim, and may be of any number of rows
            least = _least_keys(self.dtype, q.device, q.dtype, index(q.shape[-1]), index(v.shape[-1]))
        return least is not None and calls_size(q.shape, k.shape, None if ends is None else ends.shape) >= least

    def run(self, arguments: tuple[Any, ...]) -> Tensor:
        """Such a call in 8 bits, however small."""
        q, k, v, scale, causal, left, right, softcap, mask, slopes, sinks, ends_q, ends_k, invariant = arguments
        return attention_8bit(
            q, k, v, dtype=self.dtype, scale=scale, causal=causal, window=(left, right), softcap=softcap, mask=mask,
            alibi_slopes=slopes, sinks=sinks, cu_seqlens_q=ends_q, cu_seqlens_k=ends_k, batch_invariant=invariant,
        )  # fmt: skip

    def why_none(self, device: torch.device, dtype: torch.dtype, head_dim: int) -> Reason | None:
        """Why no call on this device is computed in 8 bits, whatever its shape."""
        return None if self.crossover is not None else why_not(self.dtype, device, dtype, head_dim, head_dim)

    def describe(self, device: torch.device, dtype: torch.dtype, head_dim: int) -> str:
        """For a report: what attention of a head dim on this device is computed in."""
        if self.why_none(device, dtype, head_dim) is not None:
            return str(dtype).removeprefix("torch.")
        least = self.crossover
        if least is None:
            least = least_keys(device, dtype, head_dim)
        return f"{self.dtype} from {least} keys on" if least else self.dtype


def calls_size(q: Sequence[int], k: Sequence[int], ends: Sequence[int] | None) -> int:
    """What a crossover is compared with: the keys of a call, or the rows of all query heads that share them, where those are fewer;
    of packed sequences as many as each has on average.

    Args:
        q, k, ends: shapes of q, k and cu_seqlens_q.
    """
    sequences = 1 if ends is None else max(ends[0] - 1, 1)
    return min(q[-3] * (q[-2] // k[-2]), k[-3]) // sequences


def check_crossover(crossover: object) -> None:
    if crossover is not None and (isinstance(crossover, bool) or not isinstance(crossover, int) or crossover < 0):
        raise ValueError(f"crossover is a number of keys, 0 for 8 bits everywhere, or None, not {crossover!r}")


def least_keys(device: torch.device, dtype: torch.dtype, head_dim: int) -> int:
    """Keys, and rows, from which 8 bits take less time than `attention` where `why_not` has nothing against them."""
    return ON_GPU if gpu_takes(device) else -(-ON_CPU[cpu_tier() or ""][dtype] // min(head_dim, 64))


def why_not(bits: str, device: torch.device, dtype: torch.dtype, head_dim: int, head_dim_of_v: int) -> Reason | None:
    """Why no call on this device is computed in 8 bits unless a crossover is given; None where long ones are."""
    if reason := why_no_kernel(bits, device, dtype, head_dim, head_dim_of_v):
        return reason
    fix = "pass crossover=0 for 8 bits all the same"
    if gpu_takes(device):
        if gpu_capability(device)[0] == 9:
            return Reason("crossover", "quantising and 8 bits take longer here than 16 bits (modelled)", fix)
        return None
    if dtype not in ON_CPU.get(cpu_tier() or "", {}):
        text = f"8 bits are not known to be faster in {str(dtype).removeprefix('torch.')} with {cpu_tier()}"
        return Reason("crossover", text, fix)
    return None


def why_no_kernel(
    bits: str, device: torch.device, dtype: torch.dtype, head_dim: int, head_dim_of_v: int
) -> Reason | None:
    """Why no kernel computes such attention on this device."""
    q, v = (torch.empty((0, 0, 0, n), dtype=dtype, device="meta") for n in (head_dim, head_dim_of_v))
    known = {"q": q, "k": q, "v": v, "dtype": bits}
    call = [known.get(name) for name in ATTENTION_8BIT.parameters]
    backends = GPU_BACKENDS if gpu_takes(device) else ("cpu",)
    reasons = [ATTENTION_8BIT.why_not_on(backend, device, *call) for backend in backends]
    return None if None in reasons else reasons[0]


def _least_keys(bits: str, device: torch.device, dtype: torch.dtype, head_dim: int, head_dim_of_v: int) -> int | None:
    """`least_keys`, None where `why_not` has a reason."""
    return _cached(getattr(interpreter(), "arch", None), bits, device, dtype, head_dim, head_dim_of_v)


# A graph has the number alone: what is asked for it, instructions and GPUs, is none of its business.
_least_keys._dynamo_marked_constant = True  # type: ignore[attr-defined]


@functools.lru_cache(maxsize=256)
def _cached(arch: str | None, *call: Any) -> int | None:
    return None if why_not(*call) else least_keys(*call[1:4])


#: What is called with each call of swapped attention: its module, and the arguments of `ATTENTION`.
Watcher = Callable[[object, tuple[Any, ...]], None]
_watcher: ContextVar[Watcher | None] = ContextVar("forwardpass_attention", default=None)


@contextlib.contextmanager
def watched(watcher: Watcher) -> Iterator[None]:
    """Within the block and this thread, each call of swapped attention is shown before it is computed."""
    token = _watcher.set(watcher)
    try:
        yield
    finally:
        _watcher.reset(token)


def attend(module: object, arguments: tuple[Any, ...], bits: EightBits | None, call: str) -> Tensor:
    """`ATTENTION(*arguments)`, in 8 bits where `bits` takes it, and counted.

    call: what it is counted as.
    """
    if not torch.compiler.is_compiling() and (watcher := _watcher.get()) is not None:
        watcher(module, arguments)
    if bits is None or not bits.takes(arguments):
        take(call)
        return ATTENTION(*arguments)
    take(f"{call} in {bits.dtype}")
    return bits.run(arguments)
