"""The process in which `python -m gpuless run` runs a Python script: torch's cuda device is the interpreted GPU."""

from __future__ import annotations

import json
import pathlib
import runpy
import sys

from .. import cuda, device


def main(text: str, script: str, arguments: list[str]) -> None:
    options = json.loads(text)
    ignore = [pathlib.Path(file) for file in options["ignore"]]
    gpu = device.make(
        options["arch"],
        seed=options["seed"],
        guard=options["guard"],
        findings="collect",
        ignore=ignore,
        largest=options["largest"],
        explore=options["explore"],
        schedule=options["schedule"],
    )
    cuda.present(gpu)
    gpu.time_limit(options["time_limit"])
    sys.argv = [script, *arguments]
    sys.path[0] = str(pathlib.Path(script).absolute().parent)
    runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3:])
