"""Tensors in one or several files of safetensors: how they are shared out, and read as if they were in one."""

from __future__ import annotations

import contextlib
import importlib.util
import pathlib
import re
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from ..extras import pip_install

_SIZE = re.compile(r"(\d+)\s*([kmgt]?)(i?)b", re.IGNORECASE)


def safetensors_module() -> Any:
    """With its functions for torch. ImportError, in a sentence, where it is missing."""
    if importlib.util.find_spec("safetensors") is None:
        raise ImportError(f"checkpoints need safetensors: {pip_install('hf')}")
    import safetensors.torch

    return safetensors


def shard_bytes(max_shard_size: int | str) -> int:
    """Bytes, from 5_000_000, "5GB" or "5GiB". ValueError where it is no size."""
    size = max_shard_size
    if isinstance(size, str) and (parts := _SIZE.fullmatch(size.strip())):
        number, unit, binary = parts.groups()
        size = int(number) * (1024 if binary else 1000) ** " kmgt".index(unit.lower() or " ")
    if type(size) is not int or size < 1:
        raise ValueError(
            f'max_shard_size is a number of bytes, 1 or more, or a text such as "5GB", not {max_shard_size!r}'
        )
    return size


def split(tensors: Mapping[str, Tensor], max_shard_size: int | str) -> list[dict[str, Tensor]]:
    """The tensors of each file, in their order; one that is larger by itself has a file of its own."""
    most, room = shard_bytes(max_shard_size), 0
    shards: list[dict[str, Tensor]] = []
    for name, tensor in tensors.items():
        if not shards or tensor.nbytes > room:
            shards.append({})
            room = most
        shards[-1][name] = tensor
        room -= tensor.nbytes
    return shards or [{}]


class TensorFiles:
    """Open files of safetensors. A context manager, which closes them.

    Raises:
        FileNotFoundError, ValueError: one is not there or is damaged, or a tensor is in two of them; `fix` ends the sentence.
    """

    def __init__(self, paths: Iterable[pathlib.Path], fix: str) -> None:
        safetensors = safetensors_module()
        self._file_of: dict[str, Any] = {}
        with contextlib.ExitStack() as stack:
            for path in paths:
                if not path.is_file():
                    raise FileNotFoundError(f"there is no {path.name} in {path.parent}: {fix}")
                try:
                    file = stack.enter_context(safetensors.safe_open(path, framework="pt"))
                except (safetensors.SafetensorError, OSError) as e:
                    raise ValueError(f"{path} is damaged or no safetensors file ({e}): {fix}") from None
                names = file.keys()
                if twice := [name for name in names if name in self._file_of]:
                    raise ValueError(
                        f"{path} has {twice[0][:80]!r}, which is in another file of {path.parent} too: {fix}"
                    )
                self._file_of.update(dict.fromkeys(names, file))
            self._stack = stack.pop_all()

    def __enter__(self) -> TensorFiles:
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(file.get_slice(name).get_shape()) for name, file in self._file_of.items()}

    def dtypes(self) -> dict[str, str]:
        """As safetensors calls them."""
        return {name: file.get_slice(name).get_dtype() for name, file in self._file_of.items()}

    def header(self, name: str) -> tuple[tuple[int, ...], str]:
        """The shape and the dtype of a tensor, as `shapes` and `dtypes` have them."""
        about = self._file_of[name].get_slice(name)
        return tuple(about.get_shape()), about.get_dtype()

    def metadata(self) -> dict[str, str]:
        """What the files say besides."""
        return {name: text for file in {*self._file_of.values()} for name, text in (file.metadata() or {}).items()}

    def read(self, name: str) -> Tensor:
        tensor: Tensor = self._file_of[name].get_tensor(name)
        return tensor
