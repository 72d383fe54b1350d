"""Between the process that judges and the one that runs the candidate: lengths, JSON, and the bytes of tensors.

Nothing is unpickled: what the candidate's process sends is numbers, whatever it has made of its Python.
"""

from __future__ import annotations

import ctypes
import json
import os
import struct
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

DTYPES = {str(d).removeprefix("torch."): d for d in (
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2, torch.int64,
    torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool,
)}  # fmt: skip


class Ended(RuntimeError):
    """The other process is gone."""


class Wire:
    def __init__(self, reading: int, writing: int):
        self._reading, self._writing = os.fdopen(reading, "rb"), os.fdopen(writing, "wb")

    def send(self, message: dict[str, Any], blobs: Sequence[bytes] = ()) -> None:
        text = json.dumps({**message, "blobs": [len(b) for b in blobs]}).encode()
        try:
            self._writing.write(struct.pack("<q", len(text)) + text)
            for blob in blobs:
                self._writing.write(blob)
            self._writing.flush()
        except BrokenPipeError:
            raise Ended from None

    def receive(self) -> tuple[dict[str, Any], list[bytes]]:
        (length,) = struct.unpack("<q", self._read(8))
        message = json.loads(self._read(length))
        return message, [self._read(n) for n in message.pop("blobs")]

    def _read(self, n: int) -> bytes:
        data = self._reading.read(n)
        if len(data) < n:
            raise Ended
        return data


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def as_bytes(t: Tensor) -> bytes:
    """The bytes of a tensor's elements, in order."""
    t = t.detach().contiguous()
    return ctypes.string_at(t.data_ptr(), t.nbytes)  # numpy need not be there


def from_bytes(data: bytes, dtype: torch.dtype, shape: Sequence[int]) -> Tensor:
    if not data:
        return torch.empty(list(shape), dtype=dtype)
    return torch.frombuffer(bytearray(data), dtype=dtype).view(list(shape))


def packed(args: Sequence[Any]) -> tuple[dict[str, Any], list[bytes]]:
    """Arguments as descriptions, and the storages that they are views of, each once."""
    storages: dict[int, int] = {}
    blobs: list[bytes] = []
    descriptions: list[dict[str, Any]] = []
    for a in args:
        if not isinstance(a, Tensor):
            descriptions.append({"value": a})
            continue
        storage = a.untyped_storage()
        if storage.data_ptr() not in storages:
            storages[storage.data_ptr()] = len(blobs)
            blobs.append(ctypes.string_at(storage.data_ptr(), storage.nbytes()))
        descriptions.append({
            "storage": storages[storage.data_ptr()], "dtype": name_of(a.dtype), "shape": list(a.shape),
            "strides": list(a.stride()), "offset": a.storage_offset(),
        })  # fmt: skip
    return {"args": descriptions}, blobs
