"""Where a wgmma.fence is missing, PTX ISA 9.7.15.7.1, each beside its right twin; what compilers write counts as right."""

import pytest
from wgmma_flight import ONE, ONE_REGISTERS, OP, finding, run
from wgmma_kernels import instruction
from wgmma_rows import FENCE, WAIT

pytestmark = pytest.mark.interpreted

STORE = "st.global.b32 [%d2], %acc3;"
COPY = instruction(OP, d="copy")
#: tf32 has fp32 accumulators and a K of its own: D of another shape, or A of what was D
TF32 = OP.replace("k16", "k8").replace("f16.f16", "tf32.tf32")
OTHER = instruction(TF32)
FROM_D = instruction(TF32, register_a=True, d="copy").replace("%a", "%acc")


def zeros(name):
    return f"mov.b32 %{name}0, 0; " + " ".join(f"mov.b32 %{name}{i}, %{name}0;" for i in (1, 2, 3))


def copies(to, source):
    return " ".join(f"mov.b32 %{to}{i}, %{source}{i};" for i in range(4))


def loop(body):
    return f"mov.u32 %r5, 0; AGAIN: {body} add.u32 %r5, %r5, 1; setp.lt.u32 %p, %r5, 3; @%p bra AGAIN;"


@pytest.mark.parametrize(
    "body",
    [
        f"{FENCE} {ONE} {WAIT}",
        # D of one shape in a row, waited for or not
        f"{FENCE} {ONE} {ONE} {WAIT} {ONE} {WAIT}",
        f"{FENCE} {loop(ONE)} {WAIT}",
        f"{FENCE} {loop(f'{ONE} {WAIT}')}",
        # A in registers for two operations
        f"{FENCE} {ONE_REGISTERS} {ONE_REGISTERS} {WAIT}",
        # constants and copies behind the fence, as nvcc and Triton write them; what they replace does not matter either
        f"{FENCE} {zeros('acc')} {ONE} {WAIT}",
        f"{FENCE} mov.b32 %acc2, 0f3F800000; {ONE} {WAIT}",
        f"{FENCE} {copies('copy', 'acc')} {COPY} {WAIT} {STORE}",
        f"{FENCE} {ONE} {copies('copy', 'acc')} {COPY} {WAIT}",
        f"{FENCE} {ONE} {zeros('copy')} {COPY} {WAIT}",
        # each access with its fence
        f"{FENCE} {ONE} {WAIT} add.f32 %acc3, %acc3, %acc3; {FENCE} {ONE} {WAIT}",
        loop(f"{FENCE} {ONE} {WAIT} {STORE}"),
        f"{FENCE} {ONE} {WAIT} {FENCE} {OTHER} {WAIT}",
        f"{FENCE} {ONE} {WAIT} {FENCE} {FROM_D} {WAIT}",
        f"add.u32 %a1, %a1, %a2; {FENCE} {ONE_REGISTERS} {WAIT}",
        # of registers that the operation does not use, the descriptors' and the predicate's among them
        f"{FENCE} add.u32 %a1, %a1, %a2; add.u64 %a_desc, %a_desc, 0; setp.eq.u32 %scale, 0, 0; {ONE} {WAIT}",
        # on both paths
        f"setp.lt.u32 %p, %r2, 1; @%p bra OTHER; {FENCE} bra END; OTHER: {FENCE} END: {ONE} {WAIT}",
        # reached by no path
        f"{FENCE} bra END; add.f32 %acc0, %acc0, %acc1; END: {ONE} {WAIT}",
    ],
)
def test_ordered(body):
    run(body)


NEVER = "no wgmma.fence stands before the first"


@pytest.mark.parametrize(
    ("body", "what"),
    [
        (f"{ONE} {WAIT}", NEVER),
        (f"{zeros('acc')} {ONE} {WAIT}", NEVER),
        (f"{copies('copy', 'acc')} {COPY} {WAIT}", NEVER),
        (f"{COPY} {WAIT}", NEVER),
        (f"{FENCE} add.f32 %acc2, %acc2, %acc3; {ONE} {WAIT}", "register 2 of D is accessed by add.f32"),
        (f"{FENCE} {STORE} {ONE} {WAIT}", "register 3 of D is accessed by st.global.b32"),
        (f"{FENCE} setp.lt.u32 %p, %r0, 7; @%p add.f32 %acc1, %acc1, %acc3; {ONE} {WAIT}", "register 1 of D"),
        (f"{FENCE} add.u32 %a1, %a1, 1; {ONE_REGISTERS} {WAIT}", "register 1 of A is accessed by add.u32"),
        (f"{FENCE} add.u32 %r5, %a2, 1; {ONE_REGISTERS} {WAIT}", "register 2 of A is accessed by add.u32"),
        (f"{FENCE} {ONE} {WAIT} {STORE} {ONE} {WAIT}", "register 3 of D is accessed by st.global.b32"),
        # what a copy copies, and a constant does not hide what came before it
        (f"{FENCE} add.f32 %acc1, %acc1, %acc1; {copies('copy', 'acc')} {COPY} {WAIT}", "register 1 of D"),
        (f"{FENCE} {STORE} {zeros('acc')} {ONE} {WAIT}", "register 3 of D is accessed by st.global.b32"),
        # another shape; what was D as A
        (f"{FENCE} {ONE} {WAIT} {OTHER} {WAIT}", f"register 0 of D is accessed by {OP}"),
        (f"{FENCE} {ONE} {WAIT} {FROM_D} {WAIT}", f"register 0 of A is accessed by {OP}"),
        # on one path of two; round a loop, of two blocks as well; a fence that is not for everyone
        (f"setp.lt.u32 %p, %r2, 1; @%p bra END; {FENCE} END: {ONE} {WAIT}", "on one path"),
        (f"{FENCE} {loop(f'{ONE} {WAIT} {STORE}')}", "register 3 of D is accessed by st.global.b32"),
        (f"{FENCE} {loop(f'bra ON; ON: {ONE} {WAIT} {STORE}')}", "register 3 of D is accessed by st.global.b32"),
        (f"setp.lt.u32 %p, %r2, 9999; @%p {FENCE} {ONE} {WAIT}", "on one path"),
    ],
)
def test_missing(body, what):
    error = finding(body)
    assert error.kind == "race" and what in error.message and "put wgmma.fence" in error.message, error
    assert "wgmma.mma_async" in error.instruction
    run(body, checks=False)
