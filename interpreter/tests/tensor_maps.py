"""What the tests of tensor copies share: matrices of random bits, and how boxes of them lie in shared memory."""

import numpy as np
import torch


def in_shared_memory(rows, base, swizzle):
    """The bytes of a box as they lie in memory at address `base`: 16-byte chunk j of 128-byte line i goes to j ^ i within
    the span of the swizzle; by atoms, atom j of line i goes to j ^ i within it."""
    swizzle, atom = swizzle if isinstance(swizzle, tuple) else (swizzle, 16)
    rows = np.ascontiguousarray(rows).reshape(-1).view(np.uint8).reshape(-1, 16)
    memory = np.zeros_like(rows)
    for k, chunk in enumerate(rows):
        address = base // 16 + k
        line, within = address // 8, address % max(swizzle // 16, 1)
        moved = within ^ line % max(swizzle // atom, 1) * (atom // 16)
        memory[address - within + moved - base // 16] = chunk
    return memory.reshape(-1)


def raw(tensor):
    """As unsigned integers, NaNs and all."""
    types = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.contiguous().view(types[tensor.element_size()]).numpy()


def noise(shape, dtype, pitch=0):
    """Random bits; rows of whole 16 bytes."""
    size = dtype.itemsize
    width = -(-shape[-1] * size // 16) * 16 + 16 * pitch
    data = torch.randint(0, 256, (*shape[:-1], width), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return data.view(dtype)[..., : shape[-1]]
