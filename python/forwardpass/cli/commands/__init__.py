"""The commands, a file each (extra `cli`).

Exit codes: 0 all is well, 1 a check failed, 2 bad usage. With `--json -` stdout carries the JSON alone.
"""

from __future__ import annotations

from typing import Annotated

import typer

from ...version import __version__
from .doctor_command import doctor
from .kernels_command import kernels
from .parity_command import parity
from .plan_command import plan
from .profile_command import profile
from .size_batch_command import size_batch
from .swap_command import swap

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,  # plain errors and help: one line each, and the same in a log
    pretty_exceptions_enable=False,
    help="Faster inference of PyTorch models: what works here, where time goes, which precision and which batch to run.",
)


def print_version(version: bool) -> None:
    if version:
        print(f"forwardpass {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Options before the command."""


for command in (doctor, swap, plan, profile, parity, size_batch, kernels):
    app.command()(command)
