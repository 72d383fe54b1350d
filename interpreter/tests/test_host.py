"""The interpreter's host-only objects in Python (the optional _host): formats against torch's, the tree against its text."""

import pathlib
import runpy

import numpy as np
import pytest
import torch
from api_kernels import COPY

host = pytest.importorskip("gpuless._host", reason="built with GPULESS_BUILD_HOST=1 only")
pytestmark = pytest.mark.interpreted

FORMATS = {"f16": torch.float16, "bf16": torch.bfloat16, "e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}
INTEGERS = {1: torch.uint8, 2: torch.uint16}


def codes_of(t):
    return t.view(INTEGERS[t.element_size()]).to(torch.int64)


@pytest.mark.parametrize("name", FORMATS)
def test_every_code_means_what_it_means_to_torch(name):
    dtype = FORMATS[name]
    codes = torch.arange(256**dtype.itemsize)
    expected = codes.to(INTEGERS[dtype.itemsize]).view(dtype).float()
    got = torch.from_numpy(host.decode(codes.numpy(), name))
    assert got.shape == codes.shape
    assert torch.equal(got.nan_to_num(nan=12345.0), expected.nan_to_num(nan=12345.0))
    finite = expected.isfinite()
    assert torch.equal(torch.from_numpy(host.encode(got.numpy(), name).astype(np.int64))[finite], codes[finite])


@pytest.mark.parametrize("name", FORMATS)
def test_nearest_is_torchs(name):
    dtype = FORMATS[name]
    most = torch.finfo(dtype).max
    x = torch.randn(200_000) * torch.exp2(torch.randint(-30, 18, (200_000,)).float())
    x = x.clamp(-most, most)
    got = torch.from_numpy(host.encode(x.view(400, 500).numpy(), name).astype(np.int64))
    assert torch.equal(got.flatten(), codes_of(x.to(dtype)))


@pytest.mark.parametrize("name", [*FORMATS, "tf32"])
def test_directed_roundings_enclose(name):
    x = (torch.randn(50_000) * 8).numpy()
    down, up, zero, away = (
        host.decode(host.encode(x, name, mode), name)
        for mode in (host.Rounding.rm, host.Rounding.rp, host.Rounding.rz, host.Rounding.rna)
    )
    assert (down <= x).all() and (x <= up).all() and (down < up).any()
    assert np.array_equal(zero, np.where(x < 0, up, down))
    assert (np.abs(away - x) <= np.minimum(x - down, up - x)).all()


def test_saturation_and_relu():
    x = np.array([1e9, -1e9, np.inf, -1.0], np.float32)
    assert host.decode(host.encode(x, "e4m3", saturate=True), "e4m3").tolist() == [448, -448, 448, -1]
    assert host.decode(host.encode(x, "e5m2"), "e5m2").tolist() == [np.inf, -np.inf, np.inf, -1]
    assert host.decode(host.encode(x, "f16", saturate=True, relu=True), "f16").tolist() == [65504, 0, 65504, 0]
    with pytest.raises(ValueError, match="not e3m4"):
        host.encode(x, "e3m4")


def test_the_tree_has_the_text():
    tree = host.parse(COPY)
    assert (tree.version, tree.target) == ("8.0", "sm_80")
    (kernel,) = tree.functions
    assert (kernel.name, kernel.entry) == ("copy", True)
    assert [(p.name, p.bytes) for p in kernel.parameters] == [("x", 8), ("y", 8), ("shift", 4)]
    lines = COPY.splitlines()
    *body, last = kernel.body
    for s in body:
        assert lines[s.line - 1].split()[0].rstrip(";") == s.opcode
        assert s.operands == lines[s.line - 1].count(",") + (s.opcode != "ret")
        assert not s.predicated
    assert (len(body), last.opcode) == (12, "ret")  # the end of a body returns
    with pytest.raises(ValueError, match="PTX line 3"):
        host.parse(".version 8.0\n.target sm_80\n.nonsense 5\n")


def test_a_python_without_headers_is_one_sentence(tmp_path, monkeypatch):
    pytest.importorskip("setuptools")
    monkeypatch.setenv("GPULESS_BUILD_HOST", "1")
    monkeypatch.setattr("setuptools.setup", lambda **_: None)
    setup = runpy.run_path(str(pathlib.Path(__file__).parents[1] / "setup.py"))
    assert "_host" in setup["rules"](tmp_path, None, "0")[0]
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    with pytest.raises(SystemExit, match=f"Python's headers, and {tmp_path} has no Python.h: .*python3-dev"):
        setup["rules"](tmp_path, None, "0")
