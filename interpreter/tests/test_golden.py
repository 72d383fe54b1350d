"""The interpreter against what real GPUs gave; and the recorder, which needs one, tried in the interpreter."""

import ctypes
import re
import shutil
import subprocess

import numpy as np
import pytest
import torch
from golden import FOLDER, SCHEMA, Card, File, Interpreted, fits, record, replay
from golden_cases import CAPABILITIES, cases

import gpuless

pytestmark = pytest.mark.interpreted
FILES = sorted(FOLDER.glob("*.npz"))


@pytest.mark.skipif(not FILES, reason=f"nothing was recorded on a GPU yet: there is no file in {FOLDER.name}/")
@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_recorded_on_a_gpu(path):
    file = File(path)
    assert not file.about["interpreted"]
    assert replay(file) == {}


@pytest.fixture(scope="module", params=CAPABILITIES)
def trial(request, tmp_path_factory):
    """A file that the interpreter recorded."""
    path = tmp_path_factory.mktemp("golden") / f"{request.param}.npz"
    record(Interpreted(request.param), path)
    assert path.stat().st_size < 1 << 20
    return File(path)


def test_trial(trial):
    assert trial.about["schema"] == SCHEMA
    names = set(trial.entries)
    assert {"fma.rn.f32", "ex2.approx.f32", "redux.sync.add.s32", "atom.shared.add.f32"} <= names
    assert any(n.startswith("wgmma") for n in names) == (trial.arch == "sm_90a")
    assert any("e4m3" in n for n in names) == (trial.arch != "sm_80")
    assert replay(trial) == {}


def test_another_result_is_seen(trial):
    """In no case does the comparison take results with an exponent that is another."""
    unseen = []
    for case in cases(trial.arch):
        kept = trial.arguments(case.name)
        ours = trial.made(case.name)
        theirs = [x.copy() for x in ours]
        theirs[0].view(np.uint8).reshape(theirs[0].size, -1)[:, -1] ^= 0x41
        try:
            case.compare(kept, theirs, ours)
            unseen.append(case.name)
        except AssertionError:
            pass
    assert not unseen


def test_the_models_of_the_accumulators(trial):
    """`models` finds the one that made the bits, and none for sums of another kind."""
    known = {"sm_89": (16, 13, 13), "sm_90a": (32, 25, 23)}
    found = {}
    for case in cases(trial.arch):
        if case.name in ("mma.sync.aligned.m16n8k32.row.col.f32.e4m3.e4m3.f32",
                         "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32"):  # fmt: skip
            found[case.types[0]] = fits(case, trial.arguments(case.name), trial.made(case.name))
    assert found.pop("f16") == []
    assert found == ({"e4m3": [known[trial.arch]]} if trial.arch in known else {})


def test_ptxas_takes_every_kernel(tmp_path):
    """The driver on a card would refuse what ptxas refuses."""
    if not shutil.which("ptxas"):
        pytest.skip("there is no ptxas to ask")
    for arch in CAPABILITIES:
        kernels, header = [], ""
        for i, case in enumerate(cases(arch)):
            header, body = re.split(r"(?=\.extern|\.visible)", case.text, maxsplit=1)
            body = body.removeprefix(shared := ".extern .shared .align 1024 .b8 space[];\n")
            kernels.append(body.replace(".entry k(", f".entry k{i}("))
        header = re.sub(r"\.target \S+", f".target {arch}", header)
        (tmp_path / "all.ptx").write_text(header + shared + "\n".join(kernels))
        command = ["ptxas", "-O0", f"-arch={arch}", "-o", "/dev/null", tmp_path / "all.ptx"]
        made = subprocess.run(command, capture_output=True, text=True)
        assert made.returncode == 0, made.stderr[-3000:]


class Driver:
    """The CUDA driver's functions that Card calls, on the interpreter: what they are given is read as the driver would."""

    def __init__(self, arch):
        self.arch, self.modules, self.shared, self.tensors = arch, {}, 0, []

    def cuDriverGetVersion(self, version):
        version._obj.value = 13000
        return 0

    def cuGetErrorString(self, error, words):
        words._obj.value = b"invalid image"
        return 0

    def cuModuleLoadData(self, module, image):
        if not image.startswith(b".version"):
            return 200
        self.modules[7] = gpuless.Module(image.decode(), arch=self.arch)
        module._obj.value = 7
        return 0

    def cuModuleGetFunction(self, kernel, module, name):
        kernel._obj.value = module.value
        self.kernel = self.modules[module.value][name.decode()]
        return 0

    def cuFuncSetAttribute(self, kernel, attribute, value):
        assert attribute == 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        self.shared = value
        return 0

    def cuLaunchKernel(self, kernel, x, y, z, bx, by, bz, shared, stream, parameters, extra):
        assert shared == self.shared and stream is None and extra is None
        sizes = [size for _, size in self.kernel.parameters]
        assert len(parameters) == len(sizes)
        values = [ctypes.string_at(p, size) for p, size in zip(parameters, sizes)]
        with gpuless.gpu(self.arch, truncating=True) as device:
            for tensor in self.tensors:  # of their addresses the interpreter was not told
                device.register(tensor, "a tensor of the card")
            with device.running():
                self.kernel.launch_values(device, (x, y, z), (bx, by, bz), values, shared, (1, 1, 1), False)
        return 0

    def cuCtxSynchronize(self):
        return 0

    def cuModuleUnload(self, module):
        self.shared = 0
        return 0 if self.modules.pop(module.value) else 1


def test_card_passes_what_the_driver_expects(monkeypatch):
    driver = Driver("sm_90a")
    original = torch.Tensor.to

    def to(self, *args, **kwargs):
        driver.tensors.append(original(self, *args, **kwargs))
        return driver.tensors[-1]

    monkeypatch.setattr(torch.Tensor, "to", to)
    card = Card(driver, "cpu", (9, 0), {"device": "a stand-in", "arch": "sm_90a", "interpreted": True})
    assert card.about["driver"] == 13000 and card.arch == "sm_90a"
    interpreted = Interpreted("sm_90a")
    chosen = [c for c in cases("sm_90a") if c.name.startswith(("wgmma", "add.rn.f32", "atom.shared.add.f32"))][::3]
    for case in chosen:
        launch = {"grid": case.grid, "block": case.block, "shared": case.shared}
        got = card.run(case.text, case.arguments, case.results, options={}, **launch)
        expected = interpreted.run(case.text, case.arguments, case.results, options=case.options, **launch)
        assert all(np.array_equal(g.view(np.uint8), e.view(np.uint8)) for g, e in zip(got, expected))
    with pytest.raises(RuntimeError, match="cuModuleLoadData: CUDA error 200, invalid image"):
        card.run("nothing", [], [], 1, 32, 0, {})
    with pytest.raises(SystemExit, match=r"has 12\.0: record on one"):
        Card(driver, "cpu", (12, 0), {})
