"""What `run` and `report` take as a program."""

from __future__ import annotations

import os
import pathlib


def check_program(program: pathlib.Path) -> None:
    """Raises ValueError unless it is a Python script, a file of counts, or can be executed."""
    if not program.is_file():
        raise ValueError(f"there is no {program}")
    if program.suffix not in (".py", ".json") and not os.access(program, os.X_OK):
        raise ValueError(
            f"{program} is no Python script (.py) and no program that can be executed: "
            f"`python -m gpuless build {program} -o PROG` makes one of CUDA source"
        )
