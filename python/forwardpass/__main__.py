"""`forwardpass …` and `python -m forwardpass …`."""

from __future__ import annotations

import sys


def main() -> None:
    try:
        import rich  # noqa: F401
        import typer  # noqa: F401
    except ImportError as e:
        from .common.extras import pip_install

        print(f"forwardpass: the command line needs {e.name}: {pip_install('cli')}", file=sys.stderr)
        sys.exit(2)
    from .cli.commands import app

    app()


if __name__ == "__main__":
    main()
