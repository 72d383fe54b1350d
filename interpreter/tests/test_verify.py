"""`gpuless verify`: right kernels are accepted, and wrong and cheating ones are refused, each for its own reason."""

import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

from gpuless import core  # noqa: E402
from gpuless.__main__ import main  # noqa: E402
from gpuless.commands.verify import compiled  # noqa: E402
from gpuless.verification import bounds, inputs  # noqa: E402
from gpuless.verification.session import Process, Verification  # noqa: E402
from gpuless.verification.specification import Specification, chosen_sizes, read_specification  # noqa: E402

pytestmark = pytest.mark.interpreted
FOLDER = pathlib.Path(__file__).parent / "candidates"
needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None or not core.CUDART.exists(), reason="there is no nvcc")

#: wrong candidate -> why it is refused: a kind of case, or of finding
REASONS = json.loads((FOLDER / "reasons.json").read_text())
#: of each kind one, in `make test`
FAST = {
    "softmax_triton.py": ["right_at_once", "wrong_strides", "wrong_reference", "wrong_remembered", "wrong_on_the_host"],
    "row_sums.cu": ["right_tree", "wrong_first_barrier", "wrong_host"],
}


def entries():
    for file in sorted([*FOLDER.glob("*_triton.py"), *FOLDER.glob("*.cu")]):
        for entry in re.findall(r"^(?:def|void) ((?:right|wrong)_\w+)", file.read_text(), re.M):
            fast = entry in FAST.get(file.name, ())
            yield pytest.param(file, entry, id=f"{file.stem}-{entry}", marks=[] if fast else pytest.mark.slow)


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """A file of CUDA is compiled once for all of its candidates."""
    libraries = {}

    def library_of(file):
        if file.suffix != ".cu":
            return ""
        if file not in libraries:
            libraries[file] = compiled(file, "sm_90a", str(tmp_path_factory.mktemp(file.stem)), ["-O1"])
        return libraries[file]

    return library_of


@pytest.mark.parametrize(("file", "entry"), list(entries()))
def test_candidates(file, entry, library):
    if file.suffix == ".cu" and (shutil.which("nvcc") is None or not core.CUDART.exists()):
        pytest.skip("there is no nvcc")
    spec = read_specification(FOLDER / f"{file.stem.removesuffix('_triton')}_reference.py")
    report = Verification(file, spec, "sm_90a", entry, 600, library=library(file)).run()
    text = json.dumps(report.as_json(), indent=1)
    assert not report.incomplete and not report.errors, text
    if entry.startswith("right_"):
        assert report.verdict.value == "clean" and len(report.cases) >= 6, text
        assert all(case.error <= 0.7 for case in report.cases), text  # and not by a hair
    else:
        assert report.verdict.value == "finding", text
        (case,) = report.problems
        kinds = {case.kind, *(f.kind for f in report.findings)}
        assert REASONS[file.name][entry] in kinds, text


def test_every_wrong_candidate_has_its_reason():
    wrong = {}
    for p in entries():
        file, entry = p.values
        if entry.startswith("wrong_"):
            wrong.setdefault(file.name, []).append(entry)
    assert {f: sorted(e) for f, e in wrong.items()} == {f: sorted(e) for f, e in REASONS.items()}


# ---- The command ----

REFERENCE = """import torch
SIZES = {"n": (1, 100)}
def inputs(n):
    return torch.randn(n)
def reference(x):
    return %s
"""
COPY = """import torch, triton, triton.language as tl
@triton.jit
def copy(x, y, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(y + i, tl.load(x + i, mask=i < n), mask=i < n)
def candidate(x):
    x = x.contiguous()
    y = torch.empty_like(x)
    copy[(1,)](x, y, len(x), BLOCK=128)
    return y
"""


def verify(folder, candidate, reference=REFERENCE % "x + 0", *options):
    """(exit code, the JSON document)."""
    (folder / "kernel.py").write_text(candidate)
    (folder / "reference.py").write_text(reference)
    document = folder / "verdict.json"
    files = [str(folder / "kernel.py"), f"--reference={folder / 'reference.py'}", f"--json={document}"]
    code = main(["verify", *files, *options])
    return code, json.loads(document.read_text()) if document.exists() else None


def test_the_command(tmp_path, capfd):
    code, document = verify(tmp_path, COPY, REFERENCE % "x + 0", "--coverage")
    assert code == 0 and document["verdict"] == "clean" and document["launches"] == len(document["cases"])
    assert [c["kernel"] for c in document["coverage"]] == ["copy"]
    schema = json.loads((pathlib.Path(__file__).parents[1] / "docs/verdict.schema.json").read_text())
    pytest.importorskip("jsonschema").validate(document, schema)
    lines = capfd.readouterr().out.splitlines()
    assert lines[0].startswith("ok   random inputs, n=64, seed 0  ")


def test_what_proves_nothing_is_incomplete(tmp_path):
    """A reference whose result zeros would pass for."""
    code, document = verify(
        tmp_path, COPY.replace("tl.load(x + i, mask=i < n)", "0.0"), REFERENCE % "torch.zeros_like(x)"
    )
    assert code == 4 and "zeros would pass" in document["incomplete"][0]


@pytest.mark.parametrize(
    ("candidate", "words"),
    [
        ("import nowhere", "No module named 'nowhere'"),
        ("def other(x): pass", "has no function candidate"),
        ("import os\ndef candidate(x): os._exit(0)", "ended its process in call 1"),
    ],
)
def test_a_candidate_that_cannot_be_called_is_an_error(candidate, words, tmp_path):
    code, document = verify(tmp_path, candidate)
    assert code == 2 and words in document["errors"][0]


def test_what_the_interpreter_does_not_know_is_incomplete(tmp_path):
    """The output is wrong then, and that says nothing about the kernel."""
    unknown = (
        'tl.inline_asm_elementwise("nonsense.b32 $0, $1;", "=r,r", [tl.load(x + i, mask=i < n)], tl.float32, True, 1)'
    )
    code, document = verify(tmp_path, COPY.replace("tl.load(x + i, mask=i < n)", unknown))
    assert code == 4 and "nonsense.b32" in " ".join(document["incomplete"])
    assert [c["kind"] for c in document["cases"]] == ["refused"]


def test_a_candidate_that_does_not_end_is_incomplete(tmp_path):
    code, document = verify(tmp_path, "while True: pass", REFERENCE % "x", "--time-limit=3")
    assert code == 4 and "3 s were over before the candidate was loaded" in document["incomplete"][0]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("def inputs(): pass", "needs a function reference"),
        ("import nowhere", "fails with ModuleNotFoundError"),
        (REFERENCE % "x.softmin(-1)", "fails with AttributeError"),
        (REFERENCE % "x" + "WITHOUT = {'nans': 'why'}", "WITHOUT names nans"),
        (REFERENCE % "x" + "WITHOUT = {'nan': ''}", "gives a reason"),
        (REFERENCE % "x" + "PRECISION = 'int4'", "PRECISION is a number"),
        (REFERENCE % "x" + "SIZES = {'n': (9, 1)}", "n is a range"),
    ],
)
def test_reference_files_that_are_refused(text, words, tmp_path, capsys):
    assert verify(tmp_path, "def candidate(x): pass", text) == (2, None)
    assert words in capsys.readouterr().err


NO_NUMPY = """
import sys; sys.modules["numpy"] = None
import torch; from gpuless.verification.wire import as_bytes, from_bytes, packed
x = torch.randn(3, 4)[:, 1:]
assert torch.equal(from_bytes(as_bytes(x), x.dtype, x.shape), x) and not as_bytes(x[:0])
message, (blob,) = packed([x, 2, x.t()])
assert len(blob) == 48 and [a.get("offset") for a in message["args"]] == [1, None, 1]
"""


def test_numpy_is_not_needed():
    """torch for CPUs comes without it."""
    subprocess.run([sys.executable, "-W", "ignore", "-c", NO_NUMPY], check=True)


# ---- Inputs and bounds ----


def specification(reference, *args, **fields):
    return Specification(
        pathlib.Path("reference.py"), reference, lambda: tuple(a.clone() for a in args), [{}], **fields
    )


def test_sizes_from_ranges():
    chosen = chosen_sizes({"rows": (1, 9), "cols": (2, 300)})
    assert chosen[:3] == [{"rows": 8, "cols": 256}, {"rows": 7, "cols": 283}, {"rows": 1, "cols": 2}]
    assert chosen[3:] == [{"rows": 1, "cols": 300}, {"rows": 8, "cols": 2}]
    assert chosen_sizes([{"n": 5}]) == [{"n": 5}] and chosen_sizes({"n": 5}) == [{"n": 5}]


def test_families_do_what_they_are_called():
    x, y = torch.randn(6, 5), torch.randn(6, 5)
    trials = {t.family: t for t in inputs.trials(specification(torch.add, x, y, without={"zeros": "why"}))}
    assert "zeros" not in trials and trials["again"].reuses and {t.seed for t in trials.values()} == {0, 1}
    strided, offset, overlap, nan = (trials[f].args for f in ("strided", "offset", "overlap", "nan"))
    assert not strided[0].is_contiguous() and torch.equal(strided[0], trials["strided"].args[0].clone())
    gap = torch.as_strided(strided[0], (1,), (1,), 5)
    assert gap.isnan().all()  # the poison between rows
    assert offset[0].is_contiguous() and offset[0].storage_offset() == 1
    assert overlap[0] is overlap[1]
    assert nan[0].isnan().sum() == 1 and nan[0][-1, -1].isnan()
    assert trials["shifted"].args[0].mean() > 900 and trials["denormals"].args[0].abs().max() < 1e-37


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_torch_s_own_results_are_within_half_of_the_bound(dtype):
    """Of what kernels do: sums in another order, softmax, products; and another operation is far beyond."""
    x, w = torch.randn(7, 300).to(dtype), torch.randn(300, 11).to(dtype)
    for reference, other in (
        (lambda x, w: torch.softmax(x, -1), lambda x, w: torch.softmax(x * 1.3, -1)),
        (lambda x, w: x @ w, lambda x, w: x[:, :-1] @ w[:-1]),
        (lambda x, w: x.sum(-1), lambda x, w: x.abs().sum(-1)),
    ):
        (e,) = bounds.expected(specification(reference, x, w), (x, w))
        own = reference(x.float(), w.float()).to(dtype)
        assert bounds.compare("y", own, e).share < 0.5
        assert bounds.compare("y", other(x.float(), w.float()).to(dtype), e).share > 3


def test_not_numbers_have_their_places():
    x = torch.tensor([1.0, float("nan"), float("inf"), 3.0])
    (e,) = bounds.expected(specification(lambda x: x * 2, x), (x,))
    right = x * 2
    assert not bounds.compare("y", right, e).problem
    for place, value in ((0, float("nan")), (1, 0.0), (2, -float("inf")), (3, float("inf"))):
        wrong = right.clone()
        wrong[place] = value
        assert bounds.compare("y", wrong, e).problem


def test_integers_have_to_be_equal():
    x = torch.tensor([[1.0, 5.0, 2.0]])
    (e,) = bounds.expected(specification(lambda x: x.argmax(-1), x), (x,))
    assert not bounds.compare("y", torch.tensor([1]), e).problem
    assert (
        bounds.compare("y", torch.tensor([2]), e).problem == "y[0] is 2 instead of 1 (allowed: 0 off); 1 of 1 are wrong"
    )


BUILDING = """import pathlib, subprocess, time
lock = pathlib.Path(__file__).with_name("lock")
try:
    compiler = subprocess.Popen(["sleep", "3600"])
    lock.write_text(str(compiler.pid))
    time.sleep(3600)
finally:
    lock.unlink()
"""


@pytest.mark.parametrize("in_background", [False, True])
def test_what_a_candidate_starts_ends_with_it(tmp_path, in_background):
    """Torch builds extensions under a lock, and whoever comes later waits until its file is gone. A shell has what it starts with
    an & ignore interrupts."""
    (tmp_path / "kernel.py").write_text(BUILDING)
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN if in_background else signal.default_int_handler)
    process = Process("sm_90a", dict(os.environ), time.monotonic() + 3600, 3600)
    signal.signal(signal.SIGINT, handler)
    process.wire.send({"do": "load", "path": str(tmp_path / "kernel.py"), "library": "", "entry": "candidate"})
    lock = tmp_path / "lock"
    while not (lock.exists() and lock.read_text()):
        time.sleep(0.05)
    compiler = int(lock.read_text())
    process.kill()
    assert not lock.exists()
    status = pathlib.Path(f"/proc/{compiler}/stat")
    assert not status.exists() or status.read_text().split()[2] == "Z"
