"""JSON files, read with suspicion and written whole."""

from __future__ import annotations

import json
import os
import pathlib
from typing import Any

#: A plan of 100 000 layers is 30 MB; nothing that is larger is one.
MAX_JSON_BYTES = 64 << 20


def read_json(path: str | os.PathLike[str], what: str, fix: str) -> dict[str, Any]:
    """A JSON object from a file. `what` and `fix` complete the one-sentence errors: FileNotFoundError, ValueError."""
    path = pathlib.Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no {what} at {path}: {fix}")
    if path.stat().st_size > MAX_JSON_BYTES:
        raise ValueError(
            f"{path} is larger than any {what} ({path.stat().st_size} bytes, at most {MAX_JSON_BYTES}): {fix}"
        )
    try:
        content = json.loads(path.read_text(encoding="utf-8"), parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as e:  # RecursionError: a million brackets
        raise ValueError(f"{path} is not a {what} ({type(e).__name__}: {str(e)[:80]}): {fix}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} is not a {what} (a JSON {type(content).__name__}, not an object): {fix}")
    return content


def _refuse_constant(text: str) -> None:
    raise ValueError(f"{text} is not JSON")


def write_json(path: str | os.PathLike[str], content: dict[str, Any]) -> None:
    """Whole or not at all: a reader never sees half a file."""
    path = pathlib.Path(path)
    beside = path.with_name(path.name + ".partial")
    beside.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    beside.replace(path)
