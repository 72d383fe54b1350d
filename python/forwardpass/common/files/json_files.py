"""JSON files, read with suspicion and written whole."""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import secrets
import shutil
import stat
import tempfile
from collections.abc import Iterator
from typing import Any

#: A plan of 100 000 layers is 30 MB; nothing that is larger is one.
MAX_JSON_BYTES = 64 << 20


def read_json(path: str | os.PathLike[str], kind: str, fix: str) -> dict[str, Any]:
    """A JSON object from a file. `kind` and `fix` complete the one-sentence errors: FileNotFoundError, ValueError."""
    path = pathlib.Path(path)
    if not path.exists():
        raise FileNotFoundError(f"there is no {kind} at {path}: {fix}")
    try:
        text = _read_regular(path)
        content = json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError, OSError) as e:  # RecursionError: a million brackets
        raise ValueError(f"{path} is not a {kind} ({type(e).__name__}: {str(e)[:80]}): {fix}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} is not a {kind} (a JSON {type(content).__name__}, not an object): {fix}")
    return content


def _read_regular(path: pathlib.Path) -> str:
    """Never waits and always ends: pipes, devices and what /proc shows (files of no size) are refused unread."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    try:
        about = os.fstat(descriptor)
        if not stat.S_ISREG(about.st_mode) or about.st_size == 0:
            raise ValueError("it is empty or no regular file")
        if about.st_size > MAX_JSON_BYTES:
            raise ValueError(f"it has {about.st_size} bytes, and at most {MAX_JSON_BYTES} are read")
        with open(descriptor, encoding="utf-8", closefd=False) as file:
            return file.read(MAX_JSON_BYTES)
    finally:
        os.close(descriptor)


def _refuse_constant(text: str) -> None:
    raise ValueError(f"{text} is not JSON")


@contextlib.contextmanager
def beside(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """The name of a file that is not there yet, in the folder of `path`, to be written and renamed; gone at the end.

    It cannot be guessed: no link that waits under it is followed.
    """
    partial = _partial(path)
    try:
        yield partial
    finally:
        partial.unlink(missing_ok=True)


@contextlib.contextmanager
def room_beside(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """The same as a folder, for libraries that write temporary files of their own names beside what they write, as safetensors does
    (0.8): where the process is killed, they are known by the folder's name."""
    room = _partial(path)
    room.mkdir()
    try:
        yield room
    finally:
        shutil.rmtree(room, ignore_errors=True)


def _partial(path: pathlib.Path) -> pathlib.Path:
    return path.with_name(f".{path.name}.{secrets.token_hex(8)}.partial")


def json_text(content: dict[str, Any]) -> str:
    return json.dumps(content, indent=1, allow_nan=False) + "\n"


def why_not_writable(path: pathlib.Path) -> str | None:
    """Why nothing can be written to a file, or into a folder, None where it can. It is tried, and leaves nothing behind: what the
    permissions say is not true in /proc, nor for a superuser.
    """
    try:
        if path.is_file():
            with path.open("ab"):
                pass
        elif path.exists() and not path.is_dir():  # a device, a pipe: opening it may wait
            return None if os.access(path, os.W_OK) else "Permission denied"
        else:
            with tempfile.TemporaryFile(dir=path if path.is_dir() else path.parent):
                pass
    except OSError as e:
        return e.strerror or type(e).__name__
    return None


def write_json(path: str | os.PathLike[str], content: dict[str, Any]) -> None:
    write_text(path, json_text(content))


def flush(path: pathlib.Path) -> None:
    """Waits until the disk has a file's content, so that a rename after it survives a loss of power."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Whole or not at all: a reader never sees half a file, nor does one who comes after a loss of power."""
    path = pathlib.Path(path)
    with beside(path) as partial:
        with open(partial, "x", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
