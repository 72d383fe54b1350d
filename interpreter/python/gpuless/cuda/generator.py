"""torch's generator of random numbers on cuda: its state is a seed and an offset, as CUDA's is, and its numbers are the CPU's.

Libraries read the seed and the offset, give both to kernels that draw by Philox themselves, and write back an offset that lies
further on. The CPU's generator has another state, and one generator for both devices would let draws on one change the other's.
"""

from __future__ import annotations

import os
import threading
import weakref
from typing import Any

import torch

_Torch = torch.Generator
_lock = threading.Lock()
#: torch's own default for CUDA
_SEED = 67280421310721
#: how far an operation moves the offset, which CUDA counts in fours
_STEP = 4


class Generator(_Torch):
    """torch.Generator, which takes device="cuda" too."""

    def __new__(cls, device: Any = "cpu") -> Generator:
        device = torch.device(device)
        if device.type != "cuda":
            return super().__new__(cls, device)  # type: ignore[call-arg]
        if device.index not in (None, 0):
            raise RuntimeError(f"CUDA error: invalid device ordinal: the interpreted GPU is cuda:0, not {device}")
        return _on_cuda()


class CudaGenerator(Generator):
    _seed: int
    _offset: int

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return torch.device("cuda", 0)

    def manual_seed(self, seed: int) -> CudaGenerator:
        self._seed, self._offset = int(seed) % 2**64, 0
        return self

    def seed(self) -> int:
        self.manual_seed(int.from_bytes(os.urandom(8), "little"))
        return self._seed

    def initial_seed(self) -> int:
        return self._seed

    def get_offset(self) -> int:
        return self._offset

    def set_offset(self, offset: int) -> CudaGenerator:
        if offset % _STEP:
            raise RuntimeError(f"offset must be a multiple of {_STEP}, not {offset}")
        self._offset = int(offset)
        return self

    def get_state(self) -> torch.Tensor:
        words = self._seed.to_bytes(8, "little") + self._offset.to_bytes(8, "little")
        return torch.tensor(list(words), dtype=torch.uint8, device="cpu")

    def set_state(self, state: torch.Tensor) -> CudaGenerator:
        if state.dtype != torch.uint8 or state.device.type != "cpu" or state.numel() != 16:
            raise TypeError("a generator's state on cuda is a CPU tensor of 16 bytes (uint8): a seed and an offset")
        words = bytes(state.tolist())
        self.set_offset(int.from_bytes(words[8:], "little"))
        self._seed = int.from_bytes(words[:8], "little")
        return self

    def clone_state(self) -> CudaGenerator:
        return _on_cuda().set_state(self.get_state())

    def advance(self) -> int:
        """A seed for the numbers of one operation. At offset 0 it is the generator's, and the numbers are the CPU's then."""
        seed = self._seed + 0x9E3779B1 * (self._offset // _STEP)  # the CPU's generator takes its low 32 bits
        self._offset += _STEP
        return seed % 2**64


#: torch hands operations another Python object for the same generator in C++
_by_address: weakref.WeakValueDictionary[int, CudaGenerator] = weakref.WeakValueDictionary()


def _address(generator: _Torch) -> int:
    address: int = generator._cdata  # type: ignore[attr-defined]
    return address


def _on_cuda() -> CudaGenerator:
    generator = _Torch.__new__(CudaGenerator, "cpu")  # type: ignore[call-arg]
    _by_address[_address(generator)] = generator
    return generator.manual_seed(_SEED)


default = _on_cuda()


def draw(op: Any, *args: Any, **kwargs: Any) -> Any:
    """Runs an operation of the CPU that draws random numbers for cuda. The CPU's own numbers stay as they were."""
    generator: CudaGenerator | None = default
    for a in (*args, *kwargs.values()):
        if isinstance(a, _Torch):
            generator = _by_address.get(_address(a))
    if generator is None:
        raise RuntimeError("Expected a 'cuda' device type for generator but found 'cpu'")
    args = tuple(None if isinstance(a, _Torch) else a for a in args)
    kwargs = {name: None if isinstance(a, _Torch) else a for name, a in kwargs.items()}
    host = torch.default_generator
    with _lock:
        before = host.get_state()
        host.manual_seed(generator.advance())
        try:
            return op(*args, **kwargs)
        finally:
            host.set_state(before)
