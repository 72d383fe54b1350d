"""gpuless is a package of its own: nothing in it names the other product of this repository, or needs it."""

import pathlib
import re

ROOT = pathlib.Path(__file__).parents[1]
OTHER = re.compile("forward" + "pass", re.I)  # so that this file does not name it either


def test_nothing_names_the_other_product():
    suffixes = (".py", ".cpp", ".h", ".cu", ".cuh", ".md", ".toml", ".map")
    files = [p for d in ("csrc", "python", "tests", "docs") for p in (ROOT / d).rglob("*") if p.suffix in suffixes]
    files += [p for p in ROOT.iterdir() if p.is_file()]
    assert len(files) > 300
    named = [
        (str(p.relative_to(ROOT)), line) for p in files for line in p.read_text().splitlines() if OTHER.search(line)
    ]
    assert not named
