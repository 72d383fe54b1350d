"""int8_conv2d's kernels as compiled, CUDA and Triton, on each architecture: every option, windows of every geometry, and which
kernel they get. `make test` runs a part of the cases, on each architecture another one."""

import dataclasses
import re

import pytest
import torch
from every_backend import OF_TRITON, on_each

import forwardpass as fp
from forwardpass import dispatch
from forwardpass.ops.dequant_activation.cases import EpilogueCase
from forwardpass.ops.int8_conv2d import cases as int8_conv2d
from forwardpass.testing import assert_equal

pytestmark = [pytest.mark.interpreted, pytest.mark.usefixtures("poisoned")]

ARCHITECTURES = ("sm_80", "sm_89", "sm_90a", "sm_120")
OPERATION = dispatch.operations["int8_conv2d"]
CASES = list(int8_conv2d.cases())
Case = int8_conv2d.Case
HALF = EpilogueCase(bias=torch.float16, out_dtype=torch.bfloat16)

#: what a kernel is called by, of those that multiply
KERNELS = {
    "gemm": r"gem[mv].*(?<!Window)(Mainloop|gemv)",
    "cp.async": "gemm_mma_kernel.*WindowMainloop",
    "tma": "gemm_wgmma_kernel.*WindowMainloop",
}


def run(case, implementation, arch, seed=0, counters=False):
    """Compares a result. The code of the reason for which there is none; with counters the kernels that were launched."""
    args = case.arguments(seed=seed)
    with fp.interpret(arch, seed=seed, guard=True, counters=counters) as device, fp.use_backend(implementation):
        if reason := dispatch.interpreter().why_not(implementation):
            pytest.skip(str(reason))
        if reason := OPERATION.why_not(implementation, *args):
            with pytest.raises(fp.Unsupported, match=re.escape(str(reason))):
                OPERATION(*args)
            return reason.code
        got = OPERATION(*args)
    int8_conv2d.assert_matches(got, args)
    assert device.findings == []
    assert (device.counters["launches"] > 0) == (args[0].numel() > 0)
    return [k.kernel for k in device.kernels()] if counters else None


@pytest.mark.parametrize(("case", "arch"), on_each(ARCHITECTURES, CASES, 12))
def test_cuda(case, arch, seed):
    run(case, "cuda", arch, seed)


@pytest.mark.parametrize(("case", "arch"), on_each(ARCHITECTURES, CASES, OF_TRITON // 2, slow=("sm_89", "sm_120")))
def test_triton(case, arch, seed):
    run(case, "triton", arch, seed)


#: beside what pairs of options have: every way through the sources of windows
GEOMETRIES = {
    "an awkward image": Case((1, 113, 203), 16, 16),
    "one pixel": Case((1, 1, 1), 128, 32),
    "images of one pixel": Case((5, 1, 1), 128, 8, padding=(2, 1)),
    "steps of 2": Case((2, 15, 14), 128, 16, stride=(2, 2)),
    "steps of 2, of 1 x 1": Case((2, 15, 14), 128, 16, (1, 1), (2, 2), (0, 0)),
    "dilated": Case((2, 13, 11), 128, 16, padding=(2, 2), dilation=(2, 2)),
    "padded unequally": Case((2, 9, 12), 64, 16, (3, 5), padding=(0, 2)),
    "padded by more than the kernel": Case((1, 4, 5), 128, 8, (2, 3), padding=(5, 4)),
    "steps and taps beyond each other": Case((1, 20, 21), 160, 8, (3, 2), (3, 2), (4, 0), (5, 7)),
    "channels that are no whole stage": Case((1, 9, 9), 192, 8),
    "taps shorter than a slice": Case((1, 9, 9), 16, 8, (7, 7), padding=(3, 3)),
    "a slice and a half": Case((1, 9, 9), 48, 24),
    "the largest kernel": Case((1, 17, 18), 16, 8, (15, 15), padding=(7, 7)),
    "as tall as there are bits": Case((1, 18, 9), 16, 8, (15, 1), padding=(7, 0)),
    "groups": Case((2, 9, 10), 64, 72, groups=2),
    "groups of whole stages": Case((1, 9, 10), 128, 128, groups=3, epilogue=HALF),
    "more rows of tiles than a cluster": Case((3, 30, 31), 64, 200, epilogue=HALF),
    "tiles of 256 columns": Case((9, 30, 31), 64, 512, (1, 2), padding=(0, 1), epilogue=HALF),
    "sums of parts": Case((1, 7, 7), 512, 40),
}


@pytest.mark.every(2)
@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("name", GEOMETRIES)
def test_geometry(name, arch, seed):
    run(GEOMETRIES[name], "cuda", arch, seed)


@pytest.mark.every(2)
@pytest.mark.parametrize(
    ("case", "of_90a"),
    [
        (Case((1, 8, 8), 128, 16), "tma"),
        (Case((1, 8, 8), 64, 16), "tma"),  # half of its products are with zeros
        (Case((1, 8, 8), 48, 16), "cp.async"),
        (Case((1, 8, 8), 128, 16, stride=(8, 8)), "tma"),
        (Case((1, 18, 18), 128, 16, stride=(9, 1)), "cp.async"),
        (Case((1, 2, 2), 128, 16, (1, 2), (1, 8), (0, 127), (1, 2)), "tma"),
        (Case((1, 2, 2), 128, 16, (1, 2), (1, 8), (0, 128), (1, 2)), "cp.async"),
        (Case((1, 2, 130), 128, 16, (1, 2), (1, 8), (0, 0), (1, 127)), "tma"),
        (Case((1, 2, 130), 128, 16, (1, 2), (1, 8), (0, 0), (1, 128)), "cp.async"),
        (Case((1, 2, 130), 128, 16, (1, 3), (1, 8), (0, 127), (1, 127)), "tma"),
        (Case((1, 2, 130), 128, 16, (1, 3), (1, 8), (0, 127), (1, 128)), "cp.async"),  # a tap 256 pixels away
    ],
)
@pytest.mark.parametrize("arch", ["sm_80", "sm_90a"])
def test_which_source_windows_have(case, of_90a, arch):
    expected = of_90a if arch == "sm_90a" else "cp.async"
    assert any(re.search(KERNELS[expected], kernel) for kernel in run(case, "cuda", arch, counters=True))


@pytest.mark.parametrize("arch", ["sm_80", "sm_90a"])
def test_single_pixels_are_a_gemm(arch):
    single = Case((2, 5, 7), 64, 40, (1, 1), padding=(0, 0))
    for case in (single, dataclasses.replace(single, layout="apart"), dataclasses.replace(single, channels=33)):
        kernels = run(case, "cuda", arch, counters=True)
        assert not any("WindowMainloop" in kernel for kernel in kernels)
    crop = dataclasses.replace(single, layout="crop")  # whose rows lie further apart than its pixels
    assert any("WindowMainloop" in kernel for kernel in run(crop, "cuda", arch, counters=True))


@pytest.mark.parametrize("arch", ["sm_80", "sm_90a"])
def test_equal_to_fp64(arch):
    """Sums of int32 are exact: fp32 outputs of unit scales are those of torch's own convolution in fp64."""
    g = torch.Generator().manual_seed(1)
    x, w = (
        torch.randint(-128, 128, shape, generator=g, dtype=torch.int8).contiguous(memory_format=torch.channels_last)
        for shape in ((2, 64, 9, 11), (24, 64, 3, 3))
    )
    one = torch.ones(1)
    exact = torch.nn.functional.conv2d(x.double(), w.double(), padding=(1, 2), stride=(2, 1))
    assert exact.abs().max() < 2**24
    with fp.interpret(arch), fp.use_backend("cuda"):
        y = fp.ops.int8_conv2d(x, w, one, one, stride=(2, 1), padding=(1, 2), out_dtype=torch.float32)
    assert_equal(y, exact.float().contiguous(memory_format=torch.channels_last))


def test_a_kernel_with_more_rows_than_bits():
    assert run(Case((1, 20, 20), 16, 8, (16, 1)), "cuda", "sm_80") == "large_kernel"
