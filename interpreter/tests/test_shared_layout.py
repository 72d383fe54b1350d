"""Which static shared variables a kernel has: those that it refers to, or a function that it may call, as ptxas counts them."""

import json
import os
import re
import shutil
import subprocess

import pytest
import torch

import gpuless
from gpuless import core

pytestmark = pytest.mark.interpreted

PTXAS = shutil.which(f"{os.environ['CUDA_HOME']}/bin/ptxas" if "CUDA_HOME" in os.environ else "ptxas")

TEXT = """
.version 8.7
.target sm_80
.address_size 64
.shared .align 4 .b8 first[1024];
.shared .align 16 .b8 second[2048];
.shared .align 4 .b8 unused[512];
.extern .shared .align 16 .b8 dynamic[];

// Thread t writes its number at word t of `second`, and returns the word there of thread 31 - t.
.func (.param .b32 result) leaf(.param .b32 t)
{
.reg .b32 %r<8>;
.shared .align 4 .b8 own[256];
ld.param.u32 %r0, [t];
mov.u32 %r1, second;
shl.b32 %r2, %r0, 2;
add.u32 %r3, %r1, %r2;
st.shared.u32 [%r3], %r0;
mov.u32 %r4, own;
add.u32 %r4, %r4, %r2;
st.shared.u32 [%r4], %r0;
bar.sync 0;
sub.u32 %r5, 124, %r2;
add.u32 %r5, %r1, %r5;
ld.shared.u32 %r6, [%r5];
bar.sync 0;
st.param.u32 [result], %r6;
ret;
}
.func (.param .b32 result) middle(.param .b32 t)
{
.reg .b32 %r<2>;
ld.param.u32 %r0, [t];
.param .b32 to; .param .b32 from;
st.param.b32 [to], %r0;
call.uni (from), leaf, (to);
ld.param.b32 %r1, [from];
st.param.b32 [result], %r1;
ret;
}
"""
KERNEL = """
.visible .entry {name}(.param .u64 y)
.reqntid 32
{{
.reg .b32 %r<8>; .reg .b64 %rd<4>;
ld.param.u64 %rd0, [y];
mov.u32 %r0, %tid.x;
mul.wide.u32 %rd1, %r0, 4;
add.u64 %rd1, %rd0, %rd1;
mov.u32 %r1, 0;
shl.b32 %r7, %r0, 2;
{body}
st.global.u32 [%rd1], %r1;
ret;
}}
"""
CALL = """.param .b32 to; .param .b32 from;
st.param.b32 [to], %r0;
call.uni (from), {function}, (to);
ld.param.b32 %r1, [from];"""
BY_ADDRESS = """mov.u64 %rd2, leaf;
.param .b32 to; .param .b32 from;
st.param.b32 [to], %r0;
shape: .callprototype (.param .b32 _) _ (.param .b32 _);
call (from), %rd2, (to), shape;
ld.param.b32 %r1, [from];"""
# `first` is full before the call, and added to what comes back from it: the function's variables lie elsewhere
FILL = """mov.u32 %r2, first;
add.u32 %r2, %r2, %r7;
st.shared.u32 [%r2], 1000;
st.shared.u32 [%r2+896], 1000;"""
ADD = """ld.shared.u32 %r3, [%r2];
ld.shared.u32 %r4, [%r2+896];
add.u32 %r1, %r1, %r3;
add.u32 %r1, %r1, %r4;"""
DYNAMIC = "mov.u32 %r5, dynamic;\nadd.u32 %r5, %r5, %r7;\nst.shared.u32 [%r5], 5;\n"

# name -> (body, the bytes of shared memory, what thread t gets)
KERNELS = {
    "nothing": ("", 0, lambda t: 0 * t),
    "one": (FILL + ADD, 1024, lambda t: 2000 + 0 * t),
    "calls": (CALL.format(function="leaf"), 2048 + 256, lambda t: 31 - t),
    "calls_deeper": (FILL + CALL.format(function="middle") + ADD, 1024 + 2048 + 256, lambda t: 2031 - t),
    "calls_by_address": (BY_ADDRESS, 2048 + 256, lambda t: 31 - t),
    "beside_dynamic": (FILL + DYNAMIC + CALL.format(function="leaf") + ADD, 1024 + 2048 + 256, lambda t: 2031 - t),
}  # fmt: skip
MODULE = TEXT + "".join(KERNEL.format(name=name, body=body) for name, (body, *_) in KERNELS.items())


@pytest.mark.parametrize("name", KERNELS)
def test_bytes_and_places(name):
    _, size, expected = KERNELS[name]
    y = torch.full((32,), -1, dtype=torch.int32)
    for seed in range(3):
        with gpuless.gpu("sm_80", seed=seed):
            module = gpuless.Module(MODULE)
            entries = json.loads(core.load().gpuless_module_json(module.handle))["entries"]
            assert {e["name"]: e["shared_bytes"] for e in entries}[name] == size
            module[name].launch(1, 32, (y,), shared=128)
        assert torch.equal(y, expected(torch.arange(32, dtype=torch.int32)))


@pytest.mark.skipif(PTXAS is None, reason="there is no ptxas")
def test_ptxas_counts_the_same(tmp_path):
    (tmp_path / "module.ptx").write_text(MODULE)
    command = [PTXAS, "-v", "-arch=sm_80", "module.ptx", "-o", "module.cubin"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    counted = {
        name: int(m[1]) if (m := re.search(r"(\d+) bytes smem", used)) else 0
        for name, used in re.findall(r"Compiling entry function '(\w+)'.*?\n(.*?Used .*?)\n", done.stderr, re.S)
    }
    assert counted == {name: size for name, (_, size, _) in KERNELS.items()}
