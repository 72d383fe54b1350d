"""The Triton kernels without a GPU: run by Triton's interpreter, and compiled for every architecture.

Each in a process of its own: TRITON_INTERPRET is read when triton is first imported, and what only compiles gives Triton another
driver. The interpreter computes with numpy: sums go in another order than on a GPU, and it does not round to bf16 as a GPU does, so
no case here needs that.
"""

import dataclasses
import importlib.util
import multiprocessing
import os
import pathlib
import random
import re
import subprocess
import tempfile
from concurrent.futures import ProcessPoolExecutor

import numpy
import pytest
import torch
from every_backend import not_in_turn, on_each
from rotation import in_parts
from triton_version import triton_version

from forwardpass import dispatch
from forwardpass.ops.activation_quantize import cases as activation_quantize
from forwardpass.ops.attention import BUCKETS
from forwardpass.ops.attention import cases as attention
from forwardpass.ops.attention_8bit import cases as attention_8bit
from forwardpass.ops.common.quantized_rows import E4M3
from forwardpass.ops.dequant_activation import cases as dequant_activation
from forwardpass.ops.fp8_gemm import cases as fp8_gemm
from forwardpass.ops.fp8_grouped_gemm import cases as fp8_grouped_gemm
from forwardpass.ops.int8_conv2d import cases as int8_conv2d
from forwardpass.ops.int8_gemm import cases as int8_gemm
from forwardpass.ops.int8_grouped_gemm import cases as int8_grouped_gemm
from forwardpass.ops.norm_quantize import cases as norm_quantize
from forwardpass.ops.permute_quantize import cases as permute_quantize
from forwardpass.ops.quantize import cases as quantize
from forwardpass.ops.unpermute import cases as unpermute
from forwardpass.ops.w8a16_gemm import cases as w8a16_gemm
from forwardpass.ops.w8a16_grouped_gemm import cases as w8a16_grouped_gemm

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")

TRITON = triton_version()
CASES = {
    "activation_quantize": activation_quantize,
    "dequant_activation": dequant_activation,
    "norm_quantize": norm_quantize,
    "quantize": quantize,
}
INTERPRETED = ("activation_quantize", "norm_quantize", "quantize")  # its fma rounds twice: not dequant_activation
ARCHITECTURES = (80, 89, 90)


def few_rows(case):
    """A program takes a row: nine of them show what 799 do."""
    return dataclasses.replace(case, shape=(*(min(n, 9) for n in case.shape[:-1]), case.shape[-1]))


def rounds_to_bf16(case):
    return case.x_dtype is torch.bfloat16 and getattr(case, "residual", False)


SAMPLE = [
    (name, few_rows(case))
    for name in INTERPRETED
    for case in random.Random(0).sample([c for c in CASES[name].cases() if not rounds_to_bf16(c)], 20)
]


def run(name, case, args):
    with dispatch.use_backend("triton"):
        return dispatch.operations[getattr(case, "op", name)](*args)


# What runs in the other processes.


class Triton:
    """The seam's other end: CPU tensors get to the Triton kernels, and no more is done."""

    memory = "cpu"

    def __init__(self, arch="sm_80"):
        self.arch = arch

    def why_not(self, name):
        return None

    def bind(self, operation, run):
        return run


def start_interpreting():
    os.environ["TRITON_INTERPRET"] = "1"
    dispatch.interpret_everywhere(Triton())
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)  # fills what torch.empty returns with NaN: what no kernel wrote shows


def interpret(name, case):
    args = case.arguments()
    CASES[name].assert_matches(run(name, case, args), args)


def start_compiling():
    """Launches compile for the chosen architecture, to PTX, and start nothing. The interpreter's compiler makes the PTX, so that
    whoever of the tests compiles a kernel first, here or to run it, compiles it for all."""
    from triton.backends import Backend, backends
    from triton.backends.compiler import GPUTarget
    from triton.runtime import JITFunction
    from triton.runtime.driver import driver

    from gpuless.triton_driver import PROPERTIES, PtxCompiler

    class Utils:
        def get_device_properties(self, device):
            shared, multiprocessors = PROPERTIES["sm_90a" if device == 90 else f"sm_{device}"]
            return {"max_shared_mem": shared, "multiprocessor_count": multiprocessors, "warpSize": 32}

        def load_binary(self, name, kernel, shared, device):
            return object(), object(), 0, 0, 1024  # module, function, registers, spills, threads

    class Launcher:
        def __init__(self, src, metadata):
            pass

        def __call__(self, *args):
            pass

    class Driver:
        architecture, utils, launcher_cls = 80, Utils(), Launcher

        def get_current_target(self):
            return GPUTarget("cuda", self.architecture, 32)

        def get_current_device(self):  # what the caches of compiled kernels go by
            return self.architecture

        def get_current_stream(self, device):
            return 0

    def launch(self, *args, **kwargs):
        compiled.append(original(self, *args, **kwargs))
        return compiled[-1]

    torch.set_num_threads(1)  # a fork has none of the threads that OpenMP waits for
    original, JITFunction.run = JITFunction.run, launch
    backends["nvidia"] = Backend(PtxCompiler, backends["nvidia"].driver)
    driver.set_active(Driver())


compiled = []


def compile_for(architecture, name, case, launch=0):
    """(PTX, stack frame in bytes) of a kernel that the case launches, by default the first one, on rows that are contiguous."""
    import triton
    from triton.backends.nvidia.compiler import CUDABackend
    from triton.runtime.driver import driver

    driver.active.architecture = architecture
    dispatch.interpret_everywhere(Triton(f"sm_{architecture}"))
    compiled.clear()
    own_layout = getattr(case, "blocks", False) or name == "int8_conv2d"  # of scales of groups, of images
    args = case.arguments()
    run(name, case, args if own_layout else [a.contiguous() if isinstance(a, torch.Tensor) else a for a in args])
    kernel, assembler = compiled[launch], CUDABackend(driver.active.get_current_target())
    ptx, metadata = kernel.asm["ptx"], kernel.metadata._asdict()
    tool = pathlib.Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(assembler.make_cubin(ptx, metadata, assembler.parse_options(metadata), architecture))
        cubin.flush()
        usage = subprocess.run(
            [tool, "--dump-resource-usage", cubin.name], capture_output=True, text=True, check=True
        ).stdout
    return ptx, int(re.search(r"STACK:(\d+)", usage)[1])


def process(start, method):
    return ProcessPoolExecutor(1, mp_context=multiprocessing.get_context(method), initializer=start)


@pytest.fixture(scope="module")
def interpreter():
    with process(start_interpreting, "spawn") as pool:
        yield pool


@pytest.fixture(scope="module")
def compiler():
    with process(start_compiling, "fork") as pool:  # which has imported what it needs
        yield pool


@pytest.mark.every(2)
@pytest.mark.skipif(
    TRITON == "3.6" and tuple(int(n) for n in numpy.__version__.split(".")[:2]) >= (2, 4),
    reason="Triton 3.6's interpreter breaks on numpy 2.4",
)
@pytest.mark.parametrize(
    ("case", "name"), [p for name in INTERPRETED for p in in_parts([c for n, c in SAMPLE if n == name], 4, name)]
)
def test_interpreted(interpreter, case, name):
    interpreter.submit(interpret, name, case).result()


#: Bytes of stack, which is what ptxas spills, by the version of Triton that brings it. Tiles were chosen with 3.6.
#: {kernel and architecture: bytes}; attention's also with its head dims, and whether a mask is added to scores.
STACK = {
    "3.6": {
        "fp8_grouped_gemm silu_mul sm_89": 16,
        "attention_8bit (128, 128) masked sm_80": 40, "attention_8bit (192, 192) masked sm_80": 96,
        "attention_8bit (256, 256) sm_80": 112, "attention_8bit (256, 256) masked sm_80": 24,
        "attention_8bit (192, 128) masked sm_80": 48, "attention_8bit (128, 128) masked sm_89": 64,
        "attention_8bit (192, 192) masked sm_89": 112, "attention_8bit (256, 256) sm_89": 88,
        "attention_8bit (256, 256) masked sm_89": 40, "attention_8bit (192, 128) masked sm_89": 72,
        "attention_8bit (128, 128) masked sm_90": 24, "attention_8bit (192, 192) masked sm_90": 56,
        "attention_8bit (192, 128) masked sm_90": 16, "attention_8bit (128, 128) fp8 masked sm_89": 48,
        "attention_8bit (192, 192) fp8 sm_89": 8, "attention_8bit (192, 192) fp8 masked sm_89": 80,
        "attention_8bit (256, 256) fp8 sm_89": 200, "attention_8bit (256, 256) fp8 masked sm_89": 160,
        "attention_8bit (192, 128) fp8 masked sm_89": 64, "attention_8bit (128, 128) fp8 masked sm_90": 24,
        "attention_8bit (192, 192) fp8 masked sm_90": 48, "attention_8bit (192, 128) fp8 masked sm_90": 8,
        "attention_8bit (64, 64) masked sm_80": 16, "attention_8bit (96, 96) masked sm_80": 24,
        "attention_8bit (96, 96) masked sm_89": 24, "attention_8bit (64, 64) masked sm_90": 8,
        "attention_8bit (96, 96) masked sm_90": 16, "attention_8bit (96, 96) fp8 masked sm_89": 24,
        "attention_8bit (64, 64) fp8 masked sm_90": 8,
    },
    "3.7": {
        "norm_quantize (2, 16384) sm_90": 8, "attention (128, 128) masked sm_90": 224, "attention (192, 192) sm_80": 24,
        "attention (192, 192) sm_89": 8, "attention (256, 256) masked sm_80": 56, "attention (256, 256) masked sm_89": 56,
        "attention_8bit (192, 192) masked sm_80": 40, "attention_8bit (256, 256) sm_80": 328,
        "attention_8bit (256, 256) masked sm_80": 8, "attention_8bit (192, 128) masked sm_80": 8,
        "attention_8bit (128, 128) masked sm_89": 16, "attention_8bit (128, 128) fp8 masked sm_89": 16,
        "attention_8bit (192, 192) sm_89": 40, "attention_8bit (192, 192) fp8 sm_89": 8,
        "attention_8bit (192, 192) masked sm_89": 40, "attention_8bit (192, 192) fp8 masked sm_89": 40,
        "attention_8bit (256, 256) sm_89": 24, "attention_8bit (256, 256) fp8 sm_89": 208,
        "attention_8bit (256, 256) masked sm_89": 40, "attention_8bit (256, 256) fp8 masked sm_89": 128,
        "attention_8bit (192, 128) masked sm_89": 8, "attention_8bit (192, 128) fp8 masked sm_89": 24,
        "attention_8bit (256, 256) masked sm_90": 80, "attention_8bit (256, 256) fp8 masked sm_90": 72,
    },
    "3.9": {
        "attention (64, 64) sm_80": 8, "attention (64, 64) sm_89": 8, "attention (128, 128) masked sm_90": 288,
        "attention (192, 192) sm_80": 24, "attention (192, 192) sm_89": 8, "attention (192, 192) masked sm_80": 40,
        "attention (192, 192) masked sm_89": 56, "attention (256, 256) masked sm_80": 352,
        "attention (256, 256) masked sm_89": 376,
        "attention_8bit (128, 128) masked sm_80": 32, "attention_8bit (192, 128) masked sm_80": 24,
        "attention_8bit (192, 192) masked sm_80": 104, "attention_8bit (192, 192) sm_80": 8,
        "attention_8bit (256, 256) masked sm_80": 248, "attention_8bit (256, 256) sm_80": 16,
        "attention_8bit (128, 128) fp8 masked sm_89": 32, "attention_8bit (128, 128) masked sm_89": 16,
        "attention_8bit (192, 128) fp8 masked sm_89": 24, "attention_8bit (192, 128) masked sm_89": 40,
        "attention_8bit (192, 192) fp8 masked sm_89": 80, "attention_8bit (192, 192) fp8 sm_89": 40,
        "attention_8bit (192, 192) masked sm_89": 88, "attention_8bit (192, 192) sm_89": 40,
        "attention_8bit (256, 256) fp8 masked sm_89": 216, "attention_8bit (256, 256) fp8 sm_89": 208,
        "attention_8bit (256, 256) masked sm_89": 232, "attention_8bit (256, 256) sm_89": 280,
        "attention_8bit (192, 192) masked sm_90": 24, "attention_8bit (192, 192) sm_90": 32,
        "attention_8bit (256, 256) fp8 masked sm_90": 56, "attention_8bit (256, 256) masked sm_90": 64,
    },
}  # fmt: skip


def expected_stack(kernel, architecture):
    if TRITON not in STACK:
        pytest.fail(f"nobody has looked at what Triton {TRITON} spills: add a row of STACK")
    return STACK[TRITON].get(f"{kernel} sm_{architecture}", 0)


COMPILED = {
    "quantize": [
        quantize.Case((2, 384), torch.bfloat16),
        quantize.Case((2, 203), torch.float16, symmetric=False, channel_scale=True),
        quantize.Case((2, 384), torch.float32, torch.float8_e4m3fn, group_size=128),
        quantize.Case((2, 32768), torch.bfloat16, symmetric=False, static=True),
    ],
    "norm_quantize": [
        norm_quantize.Case((2, 384), torch.bfloat16, kind="layer", bias=torch.bfloat16, residual=True),
        norm_quantize.Case((2, 203), torch.float16, torch.float8_e4m3fn, channel_scale=True),
        norm_quantize.Case((2, 16384), torch.float32, symmetric=False, kind="layer", bias=torch.float32, residual=True),
        norm_quantize.Case((2, 32768), torch.bfloat16, weight=None),
    ],
    "activation_quantize": [
        activation_quantize.Case((2, 384), "silu_mul", "halves", torch.bfloat16),
        activation_quantize.Case(
            (2, 1024), "gelu_mul", "interleaved8", torch.float16, torch.float8_e4m3fn, group_size=128
        ),
        activation_quantize.Case((2, 203), "relu", "halves", torch.float32, symmetric=False, channel_scale=True),
        activation_quantize.Case((2, 32768), "gelu", "halves", torch.bfloat16, symmetric=False),
    ],
    "dequant_activation": [
        dequant_activation.Case((2, 384)),
        dequant_activation.Case(
            (2, 4096), epilogue=dequant_activation.EpilogueCase(activation="gelu", zero_point="row")
        ),
        dequant_activation.Case((2, 416), torch.float32, dequant_activation.EpilogueCase(activation="silu_mul")),
    ],
    "permute_quantize": [permute_quantize.Case(40, 4, 60, 33)],  # the kernel that finds positions
    "unpermute": [unpermute.Case(9, 4, 4096, layout="contiguous"), unpermute.Case(9, 4, 203, torch.float32)],
}


def in_turn_for(architectures, cases, parts, *values, all_of=()):
    """Of sm_89 all is slow, whose PTX is sm_80's but for what has e4m3, and of sm_80 or sm_90, whichever the commit says."""
    slow = [arch for arch in (80, 90) if not_in_turn(arch, (80, 90))]
    return on_each(architectures, cases, parts, *values, slow=(*slow, *({89} - {*all_of})))


@pytest.mark.every(2)
@pytest.mark.parametrize(
    ("case", "name", "architecture"),
    [p for name, cases in COMPILED.items() for p in in_turn_for(ARCHITECTURES, cases, len(cases), name)],
)
def test_compiles_without_more_spills(compiler, case, name, architecture):
    ptx, stack = compiler.submit(compile_for, architecture, name, case).result()
    assert f".target sm_{architecture}" in ptx
    assert stack == expected_stack(f"{name} {case.shape}", architecture)
    if case.shape[-1] % 16 == 0:  # moved 16 bytes at a time, but for the scale, the zero point, a layer norm's pivots
        assert len(re.findall(r"(?:ld|st)\.global\.b(?:8|16|32)\b", ptx)) <= 4


GATED = dequant_activation.EpilogueCase(activation="silu_mul")
COMPILED_GEMMS = [
    ("int8_gemm", int8_gemm.Case(1, 4096, 4096)),  # K in parts
    ("int8_gemm", int8_gemm.Case(64, 6912, 256)),
    ("int8_gemm", int8_gemm.Case(256, 6912, 256)),
    ("int8_gemm", int8_gemm.Case(256, 6912, 256, GATED)),
    ("int8_conv2d", int8_conv2d.Case((1, 7, 7), 512, 64)),  # K in parts
    ("int8_conv2d", int8_conv2d.Case((8, 28, 28), 128, 256, stride=(2, 1))),
    ("int8_conv2d", int8_conv2d.Case((8, 56, 56), 64, 128)),
    ("int8_grouped_gemm", int8_grouped_gemm.Case((1, 3, 0, 5), 512, 256)),
    ("int8_grouped_gemm", int8_grouped_gemm.Case((100, 90, 200), 512, 256, GATED)),
    ("fp8_gemm", fp8_gemm.Case(256, 6912, 256)),
    ("fp8_gemm", fp8_gemm.Case(256, 6912, 256, GATED, blocks=True)),
    ("fp8_gemm", fp8_gemm.Case(256, 6912, 256, blocks=True, quantized=True)),
    ("fp8_gemm", fp8_gemm.Case(256, 6912, 256, GATED, blocks=True, quantized=True)),
    ("fp8_grouped_gemm", fp8_grouped_gemm.Case((1, 3, 0, 5), 512, 256)),
    ("fp8_grouped_gemm", fp8_grouped_gemm.Case((100, 90, 200), 512, 256, GATED, blocks=True)),
    ("w8a16_gemm", w8a16_gemm.Case((16,), 6912, 256)),
    ("w8a16_gemm", w8a16_gemm.Case((256,), 6912, 256, torch.float16, E4M3, scales="block")),
    ("w8a16_grouped_gemm", w8a16_grouped_gemm.Case((100, 90, 200), 512, 256)),
]


GEMMS = list(dict.fromkeys(name for name, _ in COMPILED_GEMMS))


@pytest.mark.every(2)
@pytest.mark.parametrize(
    ("case", "name", "architecture"),
    [
        p
        for name in GEMMS
        for p in in_turn_for(
            ARCHITECTURES,
            [case for n, case in COMPILED_GEMMS if n == name],
            4,
            name,
            all_of=(89,) if name.startswith("fp8") else (),
        )
    ],
)
def test_gemms_compile_for_tensor_cores_without_spills(compiler, case, name, architecture):
    if name.startswith("fp8") and architecture == 80:
        pytest.skip("tensor cores of sm_80 multiply no e4m3")
    ptx, stack = compiler.submit(compile_for, architecture, name, case).result()
    assert f".target sm_{architecture}" in ptx
    activation = getattr(case, "epilogue", case).activation
    assert stack in (0, expected_stack(f"{name} {activation}", architecture))
    types = {
        "int8_conv2d": "s32.s8.s8",
        "int8_gemm": "s32.s8.s8",
        "int8_grouped_gemm": "s32.s8.s8",
        "fp8_gemm": "f32.e4m3.e4m3",
        "fp8_grouped_gemm": "f32.e4m3.e4m3",
        "w8a16_gemm": r"f32.b?f16.b?f16",
        "w8a16_grouped_gemm": r"f32.b?f16.b?f16",
    }[name]
    # few rows of 16 bits are the first operand, and a wgmma has 64
    wgmma = architecture == 90 and not (name == "w8a16_gemm" and case.lead == (16,))
    assert re.search(rf"wgmma\.mma_async.*{types}" if wgmma else rf"mma\.sync.*{types}", ptx)
    if architecture == 90 and name != "int8_conv2d":
        assert "cp.async.bulk.tensor.2d" in ptx
    else:
        assert "cp.async.cg.shared.global [ %r" in ptx  # 16 bytes each


def attention_cases():
    """Every bucket, with and without what is added to scores."""
    for i, dims in enumerate(BUCKETS):
        for mask in (None, "dtype bij"):
            dtype = (torch.float16, torch.bfloat16)[i // 2 % 2]
            yield attention.Case((256, 512), dims, dtype, causal=True, lse=True, mask=mask, sinks="float32")


@pytest.mark.every(3)
@pytest.mark.parametrize(("case", "architecture"), in_turn_for(ARCHITECTURES, attention_cases(), 7))
def test_attention_compiles_for_tensor_cores_without_more_spills(compiler, case, architecture):
    ptx, stack = compiler.submit(compile_for, architecture, "attention", case).result()
    assert f".target sm_{architecture}" in ptx
    kernel = f"attention {case.dims}{' masked' if case.mask else ''}"
    assert stack == expected_stack(kernel, architecture)
    assert re.search(r"wgmma\.mma_async.*f32.b?f16.b?f16" if architecture == 90 else r"mma\.sync.*f32.b?f16.b?f16", ptx)
    assert ("cp.async.bulk.tensor.4d" in ptx) == (architecture == 90)
    assert "cp.async.cg.shared.global [ %r" in ptx  # 16 bytes each
    if case.mask is None:
        assert "cp.async.ca" not in ptx
        # nor are others moved singly: where sequences begin and end 7, where a tile's does 4, a sink of three dtypes 3, the lse 1
        assert len(re.findall(r"(?:ld|st)\.global\.b(?:8|16|32)\b", ptx)) <= 15


def attention_8bit_cases():
    """Those of attention, in int8 and in fp8."""
    for case in attention_cases():
        for products in ("int8", "fp8"):
            yield attention_8bit.of_attention(case, True, products)


@pytest.mark.every(4)
@pytest.mark.parametrize(("case", "architecture"), in_turn_for(ARCHITECTURES, attention_8bit_cases(), 12))
def test_attention_8bit_compiles_for_tensor_cores_without_more_spills(compiler, case, architecture):
    if case.products == "fp8" and architecture == 80:
        pytest.skip("tensor cores of sm_80 multiply no e4m3")
    ptx, stack = compiler.submit(compile_for, architecture, "attention_8bit", case, -1).result()
    assert f".target sm_{architecture}" in ptx
    fp8 = " fp8" * (case.products == "fp8")
    assert stack == expected_stack(f"attention_8bit {case.dims}{fp8}{' masked' if case.mask else ''}", architecture)
    for types in ("s32.s8.s8", "f32.e4m3.e4m3" if fp8 else "s32.s8.s8"):
        assert re.search(rf"wgmma\.mma_async.*{types}" if architecture == 90 else rf"mma\.sync.*{types}", ptx)
    assert ("cp.async.bulk.tensor.4d" in ptx) == (architecture == 90)
    for launch in range(3):  # those that quantise
        ptx, stack = compiler.submit(compile_for, architecture, "attention_8bit", case, launch).result()
        assert not stack
