"""Every CUDA operation in a CUDA graph: what its launch code does a capture allows, and a replay computes from what its
arguments then hold. What a capture refuses is in programs/capture.cu."""

import contextlib
import ctypes
import dataclasses
import shutil
import subprocess

import pytest
import torch
from processes import fork

import forwardpass as fp
from forwardpass import dispatch
from forwardpass.ops.activation_quantize import cases as activation_quantize
from forwardpass.ops.append_kv import cases as append_kv
from forwardpass.ops.attention import cases as attention
from forwardpass.ops.attention_8bit import cases as attention_8bit
from forwardpass.ops.attention_decode import cases as attention_decode
from forwardpass.ops.dequant_activation import cases as dequant_activation
from forwardpass.ops.fp8_gemm import cases as fp8_gemm
from forwardpass.ops.fp8_grouped_gemm import cases as fp8_grouped_gemm
from forwardpass.ops.fp8_linear import cases as fp8_linear
from forwardpass.ops.int8_conv2d import cases as int8_conv2d
from forwardpass.ops.int8_gemm import cases as int8_gemm
from forwardpass.ops.int8_grouped_gemm import cases as int8_grouped_gemm
from forwardpass.ops.int8_linear import cases as int8_linear
from forwardpass.ops.norm_quantize import cases as norm_quantize
from forwardpass.ops.permute_quantize import cases as permute_quantize
from forwardpass.ops.quantize import cases as quantize
from forwardpass.ops.unpermute import cases as unpermute
from forwardpass.ops.w8a16_gemm import cases as w8a16_gemm
from forwardpass.ops.w8a16_grouped_gemm import cases as w8a16_grouped_gemm
from forwardpass.testing import assert_equal
from gpuless import core
from gpuless.memory.storage import add_function

pytestmark = pytest.mark.interpreted

STREAM = 2  # cudaStreamPerThread, where csrc/torch/library.h puts interpreted launches
GATED = dequant_activation.EpilogueCase(activation="silu_mul")
#: with a workspace: a split depth, operands that are quantised or padded on the way
CASES = [
    ("quantize", quantize.Case((5, 130), torch.float16, symmetric=False)),
    ("norm_quantize", norm_quantize.Case((5, 130), torch.float16)),
    ("norm_quantize", norm_quantize.Case((5, 130), torch.float16, residual=True)),
    ("activation_quantize", activation_quantize.Case((5, 256), "silu_mul", "halves", torch.bfloat16)),
    ("dequant_activation", dequant_activation.Case((5, 64), epilogue=GATED)),
    ("int8_gemm", int8_gemm.Case(2, 33, 4100, layouts=("apart", "apart"))),
    ("int8_gemm", int8_gemm.Case(70, 64, 1030)),
    ("int8_gemm", int8_gemm.Case(70, 64, 1030, quantized=True)),
    ("int8_gemm", int8_gemm.Case(20, 48, 130, dequant_activation.EpilogueCase(residual="contiguous"))),
    (
        "int8_conv2d",
        int8_conv2d.Case((2, 5, 7), 32, 33, groups=2, epilogue=dequant_activation.EpilogueCase(a_scale="tensor")),
    ),
    ("int8_grouped_gemm", int8_grouped_gemm.Case((3, 0, 70), 33, 130, layouts=("apart", "apart"))),
    ("fp8_grouped_gemm", fp8_grouped_gemm.Case((3, 0, 70), 33, 130, blocks=True)),
    ("int8_linear", int8_linear.Case((5,), 33, 130, symmetric=False)),
    ("w8a16_gemm", w8a16_gemm.Case((20,), 48, 600)),
    ("w8a16_grouped_gemm", w8a16_grouped_gemm.Case((3, 0, 70), 33, 130, layout="apart")),
    ("fp8_gemm", fp8_gemm.Case(20, 48, 600)),
    ("fp8_gemm", fp8_gemm.Case(20, 256, 300, quantized=True)),
    ("fp8_linear", fp8_linear.Case((5,), 33, 130)),
    ("attention", attention.Case((40, 70), causal=True)),
    ("attention", attention.Case((40, 70), causal=True, sinks="float32", lse=True, packed=True)),
    ("attention_8bit", attention_8bit.Case((40, 70), causal=True)),
    ("attention_8bit", attention_8bit.Case((40, 70), causal=True, sinks="float32", lse=True, packed=True)),
    ("attention_8bit", attention_8bit.Case((40, 70), causal=True, products="fp8")),
    ("attention_8bit", attention_8bit.QuantizeCase((40, 70))),
    ("attention_decode", attention_decode.Case((0, 300, 17), cache=torch.int8, leftpad=(0, 50, 20))),
    ("attention_decode", attention_decode.Case((0, 300, 17), 2, page=None, batch_invariant=True)),
    ("attention_decode", attention_decode.Case((0, 300, 17), 3, page=5, alibi="batch", value_dim=32, lse=True)),
    ("append_kv", append_kv.Case((0, 40, 17), 2, cache=torch.int8, rotary="whole", q_heads=4, norm="qk")),
    ("permute_quantize", permute_quantize.Case(700, 4, 60, 33, routing="sentinels")),
    ("permute_quantize", permute_quantize.Case(20, 4, 8, 300, group_size=128)),
    ("unpermute", unpermute.Case(20, 3, 40, left_out=0.3)),
]


@contextlib.contextmanager
def allocations_stay():
    """As in the memory pool of a torch.cuda.graph."""
    torch.ops.forwardpass._set_storage_hook(add_function())
    torch.ops.forwardpass._keep_storage(True)
    try:
        yield
    finally:
        torch.ops.forwardpass._keep_storage(False)
        torch.ops.forwardpass._set_storage_hook(0)


def captured(call):
    """What `call` returns, and its graph."""
    api, graph = core.load(), ctypes.c_void_p()
    assert api.gpuless_capture_begin(STREAM, 0, 1) == 0
    try:
        got = call()
    finally:
        error = api.gpuless_capture_end(STREAM, ctypes.byref(graph))
    assert error == 0
    return got, graph


def tensors(values):
    return [t for t in (values if isinstance(values, tuple) else (values,)) if isinstance(t, torch.Tensor)]


def bits(t):
    return t.view(torch.uint8) if t.dtype == torch.float8_e4m3fn else t


@pytest.mark.every(2)
@pytest.mark.parametrize("arch", ["sm_80", "sm_89", "sm_90a"])
@pytest.mark.parametrize(("name", "case"), CASES, ids=str)
def test_replay_is_a_call(name, case, arch):
    operation = dispatch.operations[getattr(case, "op", name)]
    on_device = {
        "attention_decode": ("lengths", "leftpad"),
        "append_kv": ("lengths",),
        "int8_grouped_gemm": ("counts",),
        "w8a16_grouped_gemm": ("counts",),
        "fp8_grouped_gemm": ("counts",),
    }.get(name, ())
    other = dataclasses.replace(case, **{field: getattr(case, field)[::-1] for field in on_device})
    args, others = case.arguments(seed=0), other.arguments(seed=1)
    run = operation.runs["cuda"]
    written = [a for a, name in zip(args, operation.parameters) if name in operation.writes]
    with fp.interpret(arch) as device:
        if operation.why_not("cuda", *args):
            pytest.skip("this GPU has no such kernel")
        with device.running() as scope, allocations_stay():
            for t in tensors((*args, *others)):
                scope.add_tensor(t, "argument", read_only=not any(t is w for w in written))
            values = [[bits(t).clone() for t in tensors(a)] for a in (args, others)]
            # what is written into the arguments every backend writes bit by bit
            result = operation.results if written else lambda run, a: run(*a)
            expected = [tensors(result(operation.runs["reference"] if written else run, a)) for a in (args, others)]
            launched = core.counters()["launches"]
            got, graph = captured(lambda: run(*args))
            assert core.counters()["launches"] == launched  # nothing has run
            for n in (1, 0, 1):
                for to, value in zip(tensors(args), values[n], strict=True):
                    bits(to).copy_(value)
                assert core.load().gpuless_graph_launch(graph) == 0
                for a, b in zip(tensors(tuple(written) or got), expected[n], strict=True):
                    assert_equal(a, b)
            core.load().gpuless_graph_release(graph)
    assert device.findings == []


def test_every_operation_is_captured():
    with_kernels = {name for name, op in dispatch.operations.items() if "cuda" in op.compiled}
    assert {getattr(case, "op", name) for name, case in CASES} == with_kernels | {"attention", "attention_with_lse"}


LIBRARY = """
static int mode = 0, at_launch = -1;
extern "C" int forwardpass_capture_mode(int to) { int before = mode; mode = to; return before; }
extern "C" int forwardpass_quantize(const void*, void*) { at_launch = mode; return 0; }
extern "C" int launched_in() { return at_launch; }
"""


def test_what_a_first_launch_does_besides_is_allowed_in_a_capture(tmp_path):
    """A kernel is loaded at its first launch, which allocates: the thread's mode is cudaStreamCaptureModeRelaxed meanwhile."""
    if shutil.which("g++") is None:
        pytest.skip("needs g++")
    source, library = tmp_path / "library.cpp", tmp_path / "library.so"
    source.write_text(LIBRARY)
    subprocess.run(["g++", "-shared", "-fPIC", "-o", library, source], check=True)
    script = f"""if True:
        import ctypes, torch
        from forwardpass.dispatch import operations
        torch.ops.forwardpass._set_library(1, {str(library)!r})
        operations["quantize"].runs["cuda"](torch.ones(2, 16), torch.int8, None, None, None, True, None)
        library = ctypes.CDLL({str(library)!r})
        print(library.launched_in(), library.forwardpass_capture_mode(0))
    """
    done = fork.run(script)
    assert done.stdout.split() == ["2", "0"], done.stderr
