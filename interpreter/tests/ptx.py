"""Small PTX kernels for the tests of instructions: a body, run by one block on the interpreted GPU."""

import pytest
import torch

import gpuless

REGISTERS = {"pred": "p", "b16": "h", "b32": "r", "b64": "rd", "f32": "f"}


def kernel(body, args, arch="sm_90a", block=32, shared=4096):
    """The text: %a0, %a1... hold the arguments (addresses of global memory, of a tensor map in the param space, or numbers),
    %t is the thread, %s the address of `shared` bytes of shared memory."""
    parameters, loads = [], []
    for i, a in enumerate(args):
        if isinstance(a, gpuless.TensorMap):
            parameters.append(f".param .align 64 .b8 a{i}[128]")
            loads.append(f"mov.b64 %a{i}, a{i};\ncvta.param.u64 %a{i}, %a{i};")
        else:
            parameters.append(f".param .u64 a{i}")
            loads.append(f"ld.param.u64 %a{i}, [a{i}];")
    registers = "\n".join(f".reg .{t} %{name}<40>;" for t, name in REGISTERS.items())
    return f"""
.version 8.7
.target {arch}
.address_size 64
.shared .align 1024 .b8 memory[{shared}];
.visible .entry k({", ".join(parameters)})
.reqntid {block}
{{
{registers}
.reg .b64 %a<{len(args) + 1}>;
.reg .b32 %t, %s;
{chr(10).join(loads)}
mov.u32 %t, %tid.x;
mov.u32 %s, memory;
{body}
ret;
}}
"""


def run(body, *args, arch="sm_90a", block=32, shared=4096, seed=0, checks=True):
    """Raises the Finding, if there is one."""
    text = kernel(body, args, arch, block, shared)
    with gpuless.gpu(arch, seed=seed, checks=checks):
        gpuless.Module(text)["k"].launch(1, block, args)


def finding(body, *args, **options):
    """The one that the kernel must end in."""
    with pytest.raises(gpuless.Finding) as caught:
        run(body, *args, **options)
    return caught.value


def assert_refused(body, *args, **options):
    """What it says; a refusal names the line that it is about."""
    f = finding(body, *args, **options)
    assert f.kind == "unsupported" and f.ptx_line > 0 and f.instruction, f
    return f.message


def outcome(body, *args, **options):
    """The kind of the finding, if there is one."""
    try:
        run(body, *args, **options)
    except gpuless.Finding as f:
        return f.kind
    return ""


def integers(*shape, dtype=torch.int32, low=1, high=1 << 20):
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(0)).to(dtype)


# ---- parts of kernels ----

ONE = "setp.eq.u32 %p0, %t, 0;\n"
MBARRIER = ONE + "@%p0 mbarrier.init.shared::cta.b64 [%s], 1;\nfence.mbarrier_init.release.cluster;\nbar.sync 0;\n"
WAIT = "wait:\nmbarrier.try_wait.parity.shared::cta.b64 %p1, [%s], {};\n@!%p1 bra wait;\n"


def copied(source, target, words, label):
    """Thread by thread, 32 of them."""
    load, store = ("shared", "global") if source.startswith("%s") else ("global", "shared")
    width = {"shared": "r", "global": "rd"}
    convert = "cvt.u64.u32 %rd20, %r21;" if "global" in (load, store) else ""
    address = {"shared": "add.u32 %r22, {}, %r21;", "global": "add.u64 %rd22, {}, %rd20;"}
    return f"""
    mov.u32 %r20, %t;
    {label}:
    setp.ge.u32 %p9, %r20, {words};
    @%p9 bra {label}_end;
    shl.b32 %r21, %r20, 2;
    {convert}
    {address[load].format(source.split("+")[0])}
    {address[store].format(target.split("+")[0])}
    ld.{load}.b32 %r23, [%{width[load]}22+{source.partition("+")[2] or 0}];
    st.{store}.b32 [%{width[store]}22+{target.partition("+")[2] or 0}], %r23;
    add.u32 %r20, %r20, 32;
    bra {label};
    {label}_end:
    """
