"""The rules that make the tree findable, and those that keep its layers apart."""

import ast
import collections
import inspect
import pathlib
import re

import pytest
from cpp_functions import functions

import forwardpass as fp
from forwardpass.dispatch import operations

ROOT = pathlib.Path(__file__).parents[1]
CSRC, PYTHON = ROOT / "csrc", ROOT / "python/forwardpass"
#: gpuless, a distribution of its own in this repository
INTERPRETER = ROOT / "interpreter"
#: the folders of csrc whose files those of a folder may include
INCLUDES = {
    "params": {"params"},
    "device": {"params", "device"},
    "schedule": {"params", "device", "schedule"},
    "kernels": {"params", "schedule", "device", "kernels"},
    "cpu": {"params", "cpu", "torch"},
    "torch": {"params", "cpu", "torch"},
}
#: what includes torch's headers, and CUDA's
TORCH, CUDA = {"torch", "cpu"}, {"device", "kernels"}

#: operations that call the kernels of others
COMPOSED = ("int8_linear", "fp8_linear")
#: operations that are rows of one table of kernels (csrc/kernels/gemm), of which each has those of its kind
GEMMS = {f"{kind}{form}_gemm": kind for kind in ("int8", "fp8", "w8a16") for form in ("", "_grouped")}
GEMMS["int8_conv2d"] = "int8_conv2d"


def family(op):
    """The name that an operation's files have: its own, or that of the family it shares a kernel with."""
    return operations[op].package.rpartition(".")[2]


@pytest.mark.parametrize("op", operations)
def test_an_operation_has_its_files_at_every_layer(op):
    name, compiled = family(op), operations[op].compiled
    files = ["__init__.py", "reference.py", "cases.py"] + ["triton_kernel.py"] * ("triton" in compiled)
    assert not [f for f in files if not (PYTHON / "ops" / name / f).exists()]
    assert (CSRC / "torch" / f"{name}.cpp").exists()
    if name in GEMMS:
        tables = [p.read_text() for p in (CSRC / "kernels/gemm").glob(f"table_{GEMMS[name]}*_sm*.cu")]
        assert any("grouped<" in t if "grouped" in name else "one<" in t or "row<" in t for t in tables)
    elif "cuda" in compiled and name not in COMPOSED:
        assert (CSRC / "params" / f"{name}.h").exists()
        assert list((CSRC / "kernels" / name).glob("*_sm*.cu"))
    if "cuda" in compiled and name not in COMPOSED:
        assert (CSRC / "cpu" / f"{name}_cpu.cpp").exists() or "cpu" not in compiled
    assert (ROOT / "benchmarks" / f"{name}.py").exists()
    assert any(re.search(rf"\b{op}\b", p.read_text()) for p in (ROOT / "tests/ops").glob("test_*.py"))


def folders():
    """(folder of csrc, file of it) of each file that is compiled."""
    return [(p.relative_to(CSRC).parts[0], p) for p in CSRC.rglob("*") if p.suffix in (".cpp", ".h", ".cu", ".cuh")]


def test_layers_are_kept_apart():
    files = folders()
    assert {folder for folder, _ in files} == INCLUDES.keys()
    included = {
        (folder, top, str(p.relative_to(CSRC)))
        for folder, p in files
        for top in re.findall(r'#include "(?:(\w+)/)?', p.read_text())
    }
    assert not {(top, p) for folder, top, p in included if top not in INCLUDES[folder]}


def test_kernels_see_no_torch_and_the_torch_side_no_cuda():
    files = folders()
    torch = {folder for folder, p in files if re.search(r"#include <(torch|ATen|c10)/", p.read_text())}
    cuda = {folder for folder, p in files if re.search(r"#include <cuda", p.read_text())}
    assert (torch, cuda) == (TORCH, CUDA)


def test_params_name_a_launcher_of_their_own():
    struct = r'struct (\w+)(?: : \w+)? \{\n  static constexpr const char\* kLauncher = "(\w+)";'
    declared = r"KERNEL_LIBRARY int (\w+)\(const forwardpass::(\w+)\* p, void\* stream\);"
    headers = "".join(p.read_text() for p in (CSRC / "params").glob("*.h"))
    launchers = re.findall(declared, headers)
    assert sorted(launchers) == sorted((name, params) for params, name in re.findall(struct, headers))
    assert len({name for name, _ in launchers}) == len(launchers) == headers.count("kLauncher = ")


def test_assembly_is_of_shared_device_code():
    """And of the CPU kernels."""
    assert not [
        p for folder, p in folders() if folder not in ("device", "cpu") and re.search(r"\basm\b", p.read_text())
    ]


#: Of python/forwardpass: what a package may import, beside the version. Who stands later may import who stands earlier.
LAYERS = ("common", "dispatch", "testing", "ops", "nn", "integrations", "proofs", "formats", "calibration", "swap", "checkpoints",
          "planning", "serving", "profiling", "cli")  # fmt: skip


def imports_of_other_packages():
    """(file, its package, the package that it imports)."""
    for path in PYTHON.rglob("*.py"):
        parts = path.relative_to(PYTHON).with_suffix("").parts
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.level:
                target = [*parts[: len(parts) - node.level], *(node.module.split(".") if node.module else [])]
                for name in [target[0]] if target else [alias.name for alias in node.names]:
                    if name != parts[0] and name not in ("__version__", "version"):
                        yield path, parts[0], name


def test_packages_import_what_stands_before_them():
    found = list(imports_of_other_packages())
    assert {package for _, package, _ in found} <= {*LAYERS, "__init__", "__main__", "types"}
    against = [
        (str(path), name)
        for path, package, name in found
        if package in LAYERS and LAYERS.index(package) < LAYERS.index(name)
    ]
    assert not against
    assert len(found) > 100


@pytest.mark.parametrize("package", [PYTHON, INTERPRETER / "python/gpuless"], ids=lambda p: p.name)
def test_folders_of_a_package_are_small(package):
    """A newcomer has a folder's names on one screen."""
    folders = [d for d in (package, *package.rglob("*/")) if any(d.glob("*.py"))]
    assert len(folders) >= 6
    assert not [(str(d), n) for d in folders if (n := len([*d.glob("[!_]*.py")])) > 12]


def test_a_file_is_found_by_its_name_alone():
    """Except the files that each operation has: there its folder is its name."""
    each_has = {"__init__.py", "reference.py", "cases.py", "triton_kernel.py"}
    counts = collections.Counter(p.name for p in PYTHON.rglob("*.py") if p.name not in each_has)
    assert len(counts) > 150
    assert not [name for name, n in counts.items() if n > 1]


def test_the_public_names_are_all_there_is():
    """Packages are where names come from; `fp.<Tab>` shows none of them but the two that are public."""
    assert {*dir(fp)} == {*fp.__all__, "__version__"}
    assert {name for name in dir(fp) if inspect.ismodule(getattr(fp, name))} == {"nn", "ops", "types"}


def test_no_test_imports_another():
    modules = [p.read_text() for p in (ROOT / "tests").rglob("*.py")]
    assert len(modules) > 50 and not [
        line for m in modules for line in re.findall(r"^\s*(?:from|import) test_\w+", m, re.M)
    ]


#: What readers of the field do not know, or know under another name: varlen, swap-AB, split-K, softcap, staging buffer, unmasked.
GONE = ("one behind the other", "change places", "capped scores", r"\bslabs?\b", r"\bclean_(begin|end)", "begin_turn", "kTurns",
        "let go", "told apart", "in earnest", "one scale an? ", "made least", "depth is split", "split depth",
        r"\blane [/%] 4\b", '"""Of ')  # fmt: skip


def test_words_that_must_not_come_back():
    files = [p for d in ("csrc", "python", "benchmarks", "examples", "docs", "interpreter/csrc", "interpreter/python",
                         "interpreter/docs") if (ROOT / d).exists() for p in (ROOT / d).rglob("*")
             if p.suffix in (".py", ".cpp", ".h", ".cu", ".cuh", ".md")]  # fmt: skip
    files.append(ROOT / "README.md")
    assert len(files) > 300
    found = [(str(p.relative_to(ROOT)), word) for p in files for word in GONE if re.search(word, p.read_text(), re.I)]
    assert not found


#: What variables are not called, as it does not say what they hold.
NAMELESS = {
    "at",
    "chosen",
    "found",
    "given",
    "held",
    "kept",
    "made",
    "mine",
    "of",
    "own",
    "said",
    "taken",
    "theirs",
    "wanted",
}


def names_in_cpp(path):
    """Of variables, parameters and members; of functions and containers' methods `at` and `of` are usual."""
    code = re.sub(r"""'(\\.|[^'\\])'|"(\\.|[^"\\])*"|//.*""", "", path.read_text())
    return set(re.findall(r"(?<![\w.])(?<!->)([a-z]\w*?)_?\b(?![\w(]|<\w)", code))


def names_in_python(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.arg):
            yield node.arg
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.attr


def test_names_are_nouns():
    files = {
        p: names_in_cpp(p)
        for p in (CSRC, INTERPRETER / "csrc")
        for p in p.rglob("*")
        if p.suffix in (".cpp", ".h", ".cu", ".cuh")
    }
    files |= {p: set(names_in_python(p)) for p in (*PYTHON.rglob("*.py"), *(INTERPRETER / "python").rglob("*.py"))}
    assert len(files) > 300 and {"stage", "backend"} <= set().union(*files.values())
    assert not [(str(p.relative_to(ROOT)), name) for p, names in files.items() for name in names & NAMELESS]


def test_paths_in_the_documentation_exist():
    """A file by its path from the root, from csrc, from the document or within a folder named before it; a folder likewise. But the
    reports to other projects name files of theirs."""
    sources = {
        str(p.relative_to(ROOT))
        for d in ("csrc", "python", "tests", "benchmarks", "examples", "docs", "interpreter")
        for p in (ROOT / d).rglob("*")
    }
    documents = [ROOT / "README.md", CSRC / "README.md", INTERPRETER / "README.md", INTERPRETER / "csrc/README.md",
                 *(ROOT / "docs").glob("*.md"), *(INTERPRETER / "docs").glob("*.md")]  # fmt: skip
    documents.remove(INTERPRETER / "docs/upstream_reports.md")
    paths = [
        (str(document.relative_to(ROOT)), path.replace("<op>", "quantize").rstrip("/"))
        for document in documents
        for path in re.findall(r"`([\w./<>-]+(?:\.(?:py|cpp|h|cu|cuh|md)|/))`", document.read_text())
        if not re.search(r"<(?!op>)|^(build|dist)/", path)
    ]
    assert len(paths) > 100
    by_the_reader = ("double.py", "kernel.py", "kernel.cu", "tests/golden", "interpreter/tests/golden")
    assert not [
        (doc, path)
        for doc, path in paths
        if path not in by_the_reader and not any(f"/{s}".endswith(f"/{path}") for s in sources)
    ]


def test_files_do_one_job():
    sources = [p for d in ("csrc", "python", "tests", "benchmarks", "examples", "interpreter/csrc", "interpreter/python",
                           "interpreter/tests") for p in (ROOT / d).rglob("*") if p.suffix in
               (".py", ".cpp", ".h", ".cu", ".cuh")]  # fmt: skip
    assert not [p for p in sources if len(p.read_text().splitlines()) > 600]


def test_functions_of_the_compiled_side_are_short():
    sources = [p for p in CSRC.rglob("*") if p.suffix in (".cpp", ".h", ".cu", ".cuh")]
    lengths = {p: functions(p.read_text()) for p in sources}
    assert sum(map(len, lengths.values())) > 1000  # they are found
    assert not [(p.name, *longest[0]) for p, longest in lengths.items() if longest and longest[0][0] > 60]
