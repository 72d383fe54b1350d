"""`gpuless verify` of KernelBench's format: a file with a Model, and a candidate ModelNew in Triton or by `load_inline`."""

import json
import os
import pathlib
import re
import shutil

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

from gpuless import core  # noqa: E402
from gpuless.__main__ import main  # noqa: E402
from gpuless.verification import bounds, inputs  # noqa: E402
from gpuless.verification.models import ModelFile  # noqa: E402
from gpuless.verification.session import Verification  # noqa: E402
from gpuless.verification.specification import Additions, read_specification  # noqa: E402

pytestmark = pytest.mark.interpreted
FOLDER = pathlib.Path(__file__).parent / "kernelbench"
#: of the candidates' calls, beside what is halved; a column of blocks is masked in part
SMALL = {
    "softmax": {"batch_size": (9, 9), "dim": (300, 300)},
    "linear": {"batch_size": (9, 9)},
    "convolution": {"batch_size": (3, 3)},
}
#: (candidate's file, problem, class) -> why it is refused, None where it is right
CANDIDATES = {
    ("triton", "softmax", "RightSoftmax"): None,
    ("triton", "linear", "RightLinear"): None,
    ("triton", "linear", "RightTransposed"): None,
    ("triton", "softmax", "WrongOverrun"): "out_of_bounds",
    ("triton", "softmax", "WrongZeros"): "mismatch",
    ("triton", "softmax", "WrongReference"): "left_to_torch",
    ("triton", "softmax", "WrongThread"): "left_to_torch",
    ("triton", "softmax", "WrongRemembered"): "remembered",
    ("triton", "linear", "WrongBias"): "mismatch",
    ("triton", "linear", "WrongWeights"): "mismatch",
    ("cuda", "softmax", "RightSoftmax"): None,
    ("cuda", "linear", "RightLinear"): None,
    ("cuda", "convolution", "RightConvolution"): None,
    ("cuda", "softmax", "WrongRace"): "race",
    ("cuda", "softmax", "WrongOverrun"): "out_of_bounds",
    ("cuda", "softmax", "WrongReference"): "left_to_torch",
    ("cuda", "softmax", "WrongZeros"): "mismatch",
    ("cuda", "softmax", "WrongRemembered"): "remembered",
    ("cuda", "linear", "WrongStale"): "race",
}
FAST = {("triton", "linear", "RightLinear"), ("triton", "softmax", "WrongThread")}


def problem(name, **options):
    return read_specification(FOLDER / f"{name}_problem.py", Additions(**options))


@pytest.mark.parametrize(
    ("file", "name", "entry"),
    [pytest.param(*key, marks=[] if key in FAST else pytest.mark.slow) for key in CANDIDATES],
)
def test_candidates(file, name, entry, tmp_path_factory, monkeypatch):
    if file == "cuda":  # torch compiles them once, and finds them again
        pytest.importorskip("ninja")
        if shutil.which("nvcc") is None or not core.CUDART.exists():
            pytest.skip("there is no nvcc")
        if "TORCH_EXTENSIONS_DIR" not in os.environ:
            monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path_factory.getbasetemp() / "extensions"))
    allowed = ["convolution"] if name == "convolution" else []
    spec = problem(name, sizes=SMALL[name], allowed=allowed)
    report = Verification(FOLDER / f"{file}_candidates.py", spec, "sm_90a", entry, 3600).run()
    text = json.dumps(report.as_json(), indent=1)
    assert not report.incomplete and not report.errors, text
    reason = CANDIDATES[file, name, entry]
    if reason is None:
        assert report.verdict.value == "clean" and len(report.cases) >= 9, text
        assert all(case.error <= 0.7 for case in report.cases), text
    else:
        assert report.verdict.value == "finding", text
        (case,) = report.problems
        assert reason in {case.kind, *(f.kind for f in report.findings)}, text


def test_every_class_is_a_candidate():
    classes = {
        (file, entry)
        for file in ("triton", "cuda")
        for entry in re.findall(r"^class ((?:Right|Wrong)\w+)", (FOLDER / f"{file}_candidates.py").read_text(), re.M)
    }
    assert classes == {(file, entry) for file, _, entry in CANDIDATES}


def test_the_file_s_sizes_are_halved_until_a_cpu_can():
    spec = problem("softmax")
    assert spec.sizes == [{"batch_size": 128, "dim": 192}]
    assert "batch_size=4096, dim=393216, which were halved" in spec.not_covered[0]
    assert set(spec.without) == {"strided", "offset", "overlap"}
    # in_channels and out_channels stay multiples of groups
    (sizes,) = problem("convolution").sizes
    assert sizes["in_channels"] % sizes["groups"] == sizes["out_channels"] % sizes["groups"] == 0
    assert (sizes["kernel_size"], sizes["groups"]) == (3, 8)


CONSTANTS = """import torch
rows = 300 * 8
odd, vectors = 4095, 1000
height = width = 224
shape = (odd, 1, 4)
ratio, flag, unused = 0.5, True, 4096
both = rows + odd
class Model(torch.nn.Module):
    def __init__(self, shape, both):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.randn(shape))
        self.both = both
    def forward(self, x, y):
        return x * self.scale + torch.zeros(self.both).sum() * y.sum()
def helper():
    return torch.rand(height, width)
def get_inputs():
    return [torch.rand(rows, odd, vectors, 4), helper()]
def get_init_inputs():
    return [shape, both]
"""


def test_constants(tmp_path):
    """Those that are computed from others follow them: the model takes no scale of another shape than its input's."""
    (tmp_path / "problem.py").write_text(CONSTANTS)
    models = ModelFile(tmp_path / "problem.py")
    assert models.constants == {
        "rows": 2400, "odd": 4095, "vectors": 1000, "height": 224, "width": 224, "shape[1]": 1, "shape[2]": 4,
    }  # fmt: skip
    assert models.init_inputs({}) == "[(4095, 1, 4), 6495]"
    assert models.init_inputs({"odd": 9, "rows": 3, "shape[2]": 5}) == "[(9, 1, 5), 12]"
    x, y = models.inputs(rows=2, odd=3, vectors=5, width=6)
    assert list(x.shape) == [2, 3, 5, 4] and list(y.shape) == [224, 6]
    assert models.init_inputs({}) == "[(4095, 1, 4), 6495]"  # the file's own again


def test_halves_of_odd_sizes_are_odd(tmp_path):
    (tmp_path / "problem.py").write_text(CONSTANTS)
    models = ModelFile(tmp_path / "problem.py")
    sizes = models.halved(models.constants, [])
    assert sizes["odd"] % 2 == 1 and sizes["odd"] < 100, sizes
    assert sizes["rows"] % 8 == sizes["vectors"] % 8 == 0, sizes
    elements, _ = models.cost(sizes)
    assert elements <= 1 << 16


def test_sizes_that_have_to_agree_are_halved_together(tmp_path):
    text = PROBLEM % ("x * torch.ones(2 * m, device=x.device)", "None")
    text = text.replace("n = 40", "n = 4096\nm = 2048\nk = 4096").replace(
        "torch.rand(3, n)", "torch.rand(k, 8, n + 0 * m)"
    )
    (tmp_path / "problem.py").write_text(text)
    (sizes,) = read_specification(tmp_path / "problem.py").sizes
    assert sizes["n"] == 2 * sizes["m"] < 1000 and sizes["k"] < 1000


def test_constants_that_are_too_large_as_literals(tmp_path):
    """No option makes them smaller: up to a limit they are as they are, and beyond it the sentence says so."""
    text = PROBLEM % ("x + 0", "None")
    (tmp_path / "problem.py").write_text(text.replace("torch.rand(3, n)", "torch.rand(3, 1 << 19)"))
    assert read_specification(tmp_path / "problem.py").sizes == [{"n": 8}]
    (tmp_path / "problem.py").write_text(text.replace("torch.rand(3, n)", "torch.rand(3, 1 << 29)"))
    with pytest.raises(ValueError, match=r"3221225472 elements.*has to become a constant"):
        read_specification(tmp_path / "problem.py")


def test_sizes_that_are_given():
    spec = problem("softmax", sizes={"batch_size": (1, 9), "dim": (1, 300)})
    assert spec.sizes[:3] == [
        {"batch_size": 8, "dim": 256},
        {"batch_size": 7, "dim": 283},
        {"batch_size": 1, "dim": 1},
    ]
    assert not spec.not_covered
    # those that the model does not take are left out, and named
    spec = problem(
        "convolution", sizes={"in_channels": (16, 17), "batch_size": (2, 2), "height": (5, 5), "width": (6, 6)}
    )
    assert [s["in_channels"] for s in spec.sizes] == [16]
    assert any("in_channels=17" in line and "divisible by groups" in line for line in spec.not_covered)
    with pytest.raises(ValueError, match="has no rows; it has batch_size, dim"):
        problem("softmax", sizes={"rows": (1, 9)})


def test_weights_are_inputs_of_the_reference():
    """In float64 and perturbed they are part of the bound, and torch's own result is within half of it."""
    spec = problem("linear", sizes=SMALL["linear"])
    trial = next(iter(inputs.trials(spec)))
    assert [list(w.shape) for w in trial.weights] == [[trial.sizes["out_features"], trial.sizes["in_features"]],
                                                      [trial.sizes["out_features"]]]  # fmt: skip
    at = spec.at(trial.sizes)
    (e,) = bounds.expected(at, [*trial.args, *trial.weights])
    assert e.value.dtype == torch.float64 and e.dtype == torch.float32
    own = at.reference(*trial.args, *trial.weights)
    assert bounds.compare("y", own, e).share < 0.5
    x, weight, bias = *trial.args, *trial.weights
    assert bounds.compare("y", at.reference(x, weight, bias + 1e-4), e).share > 3


NORMALISED = """import torch
columns = 64
class Model(torch.nn.Module):
    def __init__(self, columns):
        super().__init__()
        self.linear = torch.nn.Linear(columns, columns)
        self.scale = torch.nn.Parameter(torch.randn(columns))
        self.norm = torch.nn.BatchNorm1d(columns)
    def forward(self, x):
        return self.norm(self.linear(x) * self.scale)
def get_inputs():
    return [torch.rand(128, columns)]
def get_init_inputs():
    return [columns]
"""


def test_a_right_result_where_all_but_rounding_cancels(tmp_path):
    """Zeros make all rows equal. A kernel that fuses scale and mean is off by the rounding of a product, times 316."""
    (tmp_path / "problem.py").write_text(NORMALISED)
    sizes = {"columns": 1024}
    spec = read_specification(tmp_path / "problem.py").at(sizes)
    weights = spec.models.weights(sizes)
    scale, bias = weights[0].double(), weights[2].double()
    fused = ((bias * scale - (bias * scale).float().double()) / 1e-5**0.5).float().expand(128, 1024)
    (e,) = bounds.expected(spec, [torch.zeros(128, 1024), *weights])
    assert bounds.compare("y", fused, e).share < 1
    assert bounds.compare("y", fused + 1e-3, e).share > 1


PROBLEM = """import torch
n = 40
class Model(torch.nn.Module):
    def __init__(self, n, options=None):
        super().__init__()
        self.n = n
    def forward(self, x):
        return %s
def get_inputs():
    return [torch.rand(3, n)]
def get_init_inputs():
    return [n, %s]
"""


@pytest.mark.parametrize(
    ("forward", "init", "words"),
    [
        ("torch.nn.functional.dropout(x)", "None", "cannot be verified at n=40: Model is random"),
        ("x @ x", "None", "fails on tensors without values.*RuntimeError"),
        ("x + 1 if x.sum() > 0 else x", "None", "fails on tensors without values"),
    ],
)
def test_problems_that_are_refused(forward, init, words, tmp_path):
    (tmp_path / "problem.py").write_text(PROBLEM % (forward, init))
    with pytest.raises(ValueError, match=words):
        read_specification(tmp_path / "problem.py")


def test_a_file_may_ask_for_layouts(tmp_path):
    (tmp_path / "problem.py").write_text(PROBLEM % ("x + 0", "None") + "WITHOUT = {}\n")
    families = {t.family for t in inputs.trials(read_specification(tmp_path / "problem.py"))}
    assert {"strided", "offset", "overlap", "nan"} <= families


def test_branches_on_values_need_sizes(tmp_path):
    (tmp_path / "problem.py").write_text(PROBLEM % ("x + 1 if x.sum() > 0 else x", "None"))
    assert read_specification(tmp_path / "problem.py", Additions({"n": (5, 5)})).sizes == [{"n": 5}]


def test_what_constructors_get(tmp_path):
    (tmp_path / "problem.py").write_text(PROBLEM % ("x + 0", "{'a': (1, 2.5)}"))
    models = read_specification(tmp_path / "problem.py").models
    assert models.init_inputs({"n": 7}) == "[7, {'a': (1, 2.5)}]"
    (tmp_path / "problem.py").write_text(PROBLEM % ("x + 0", "torch.ones(2)"))
    with pytest.raises(ValueError, match="numbers, texts, and lists of them, not"):
        read_specification(tmp_path / "problem.py").models.init_inputs({"n": 7})


KERNEL = """import torch, triton, triton.language as tl
@triton.jit
def logarithm(x, y, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(y + i, tl.log(tl.load(x + i, mask=i < n, other=1.0)), mask=i < n)
class ModelNew(torch.nn.Module):
    def __init__(self, *init):
        super().__init__()
    def forward(self, x):
        y = torch.empty_like(x)
        logarithm[(1,)](x, y, x.numel(), BLOCK=128)
        return y
"""


def test_the_command(tmp_path, capsys):
    """Without --entry. A reference that refuses hostile inputs is not called with them."""
    checked = "(torch._assert(bool((x >= 0).all()) and bool((x <= 2).all()), 'out of range'), x.log())[1]"
    (tmp_path / "problem.py").write_text(
        PROBLEM % (checked.replace("torch._assert(", "x.is_meta or torch._assert("), "None")
    )
    (tmp_path / "new.py").write_text(KERNEL)
    document = tmp_path / "verdict.json"
    words = ["verify", str(tmp_path / "new.py"), f"--reference={tmp_path / 'problem.py'}", f"--json={document}"]
    code = main([*words, "--precision=approximate", "--without=denormals=log of a denormal", "--size=n=31"])
    verdict = json.loads(document.read_text())
    assert code == 0, verdict
    families = [case["name"].partition(" ")[0] for case in verdict["cases"]]
    assert "random" in families and not {"shifted", "negative", "denormals"} & set(families)
    assert any("shifted inputs" in line and "out of range" in line for line in verdict["not_covered"])
    assert "denormals inputs: log of a denormal" in verdict["not_covered"]
    assert main([*words, "--size=n"]) == 2 and "--size is NAME=N" in capsys.readouterr().err
