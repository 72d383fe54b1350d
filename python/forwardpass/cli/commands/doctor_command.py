"""`forwardpass doctor`."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console

from ..console import print_examination
from ..doctor import examine
from ..options import write_json


def doctor(json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False) -> None:
    """Shows versions, build, driver, and every kernel with the reason where it cannot run; exits 1 on a problem."""
    examination = examine()
    if json:
        write_json(examination, "-")
    else:
        print_examination(examination, Console())
    raise typer.Exit(1 if examination["problems"] else 0)
