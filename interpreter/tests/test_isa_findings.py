"""What is against the letter of the ISA alone: an error where one is strict, else a warning, and the launch computes what GPUs
do."""

import warnings

import numpy as np
import pytest
import tensor_cores as tc
import torch
from ptx import MBARRIER, ONE, kernel
from shadow_launches import WARPS
from wgmma_flight import IMAGE, LEFT, ONE_REGISTERS, RIGHT, A, B, C
from wgmma_flight import ONE as PRODUCT
from wgmma_flight import run as multiply
from wgmma_rows import FENCE, WAIT

import gpuless

pytestmark = pytest.mark.interpreted
SEEDS = range(6)
LEFT.place(IMAGE)
RIGHT.place(IMAGE)


@pytest.fixture
def lenient(monkeypatch):
    """As users have it."""
    monkeypatch.delenv("GPULESS_STRICT")


def launch(body, *args, block=64, seed=0, **options):
    with gpuless.gpu("sm_90a", seed=seed, **options) as device:
        gpuless.Module(kernel(WARPS + body, args, block=block))["k"].launch(1, block, args)
    return device


PARITY = MBARRIER + "@%p0 mbarrier.arrive.shared::cta.b64 _, [%s];\n" + "wait:\n" + (
    "mbarrier.try_wait.parity.shared::cta.b64 %p1, [%s], {};\n@!%p1 bra wait;\n" + "@%p0 st.global.u32 [%a0], 7;\n"
)  # fmt: skip
# A bulk store that nothing waits for.
STORED = ONE + "st.shared.u32 [%s], 7;\nst.shared.u32 [%s+4], 7;\nst.shared.u32 [%s+8], 7;\nst.shared.u32 [%s+12], 7;\n" + (
    "fence.proxy.async;\nbar.sync 0;\n@%p0 cp.async.bulk.global.shared::cta.bulk_group [%a0], [%s], 16;\n"
    "@%p0 cp.async.bulk.commit_group;\n{}"
)  # fmt: skip
# One warp's atomics, and another's loads of what they change.
FRESH = "@%p0 atom.global.exch.b32 %r2, [%a0], 7;\n@%p1 ld.global.{}u32 %r3, [%a0];\n"
# A loop of compare-and-swap begins with a load of any kind.
SWAP = """@!%p1 bra second;
ld.{}global.u32 %r2, [%a0];
again:
add.u32 %r3, %r2, 0;
atom.global.cas.b32 %r4, [%a0], %r2, %r3;
setp.ne.u32 %p2, %r2, %r4;
mov.u32 %r2, %r4;
@%p2 bra again;
second:
@%p0 atom.global.exch.b32 %r5, [%a0], 7;
"""
ONE_OF_A_VECTOR = SWAP.replace("u32 %r2, [%a0]", "b32 {{ %r2 }}, [%a0]")
FAULTS = {
    "a parity of -1": ("illegal", PARITY.format(-2), PARITY.format(0)),
    "a store at exit": ("in_flight", STORED.format(""), STORED.format("@%p0 cp.async.bulk.wait_group.read 0;")),
    "a load that is compared": ("race", SWAP.format(""), SWAP.format("relaxed.gpu.")),
    "a load of Triton's that is compared": ("race", ONE_OF_A_VECTOR.format(""), ONE_OF_A_VECTOR.format("relaxed.gpu.")),
    "a load of L2": ("race", FRESH.format("cg."), FRESH.format("relaxed.gpu.")),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_strict_or_not(fault, lenient):
    kind, wrong, right = FAULTS[fault]
    reports = 0
    for seed in SEEDS:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert not launch(right, torch.zeros(4, dtype=torch.int32), seed=seed, strict=True).findings
            y = torch.zeros(4, dtype=torch.int32)
            assert not launch(wrong, y, seed=seed, isa="ignore").findings and y[0] == 7
        y = torch.zeros(4, dtype=torch.int32)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            device = launch(wrong, y, seed=seed)
        assert y[0] == 7
        if not device.findings:
            assert fault.startswith("a load")  # the load came first, and loads leave no trace
            continue
        (finding,) = device.findings
        assert (finding.kind, finding.breaks) == (kind, "isa") and len(said) == 1
        assert said[0].category is gpuless.FindingWarning and str(finding) in str(said[0].message)
        with pytest.raises(gpuless.Finding) as raised:
            launch(wrong, torch.zeros(4, dtype=torch.int32), seed=seed, strict=True)
        assert raised.value.is_same(finding)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert launch(wrong, y, seed=seed, ignore=f"{kind} *").ignored
        reports += 1
    assert reports


def test_warns_once(lenient):
    module = gpuless.Module(kernel(WARPS + PARITY.format(2), [torch.zeros(1)], block=64))
    with warnings.catch_warnings(record=True) as said, gpuless.gpu("sm_90a") as device:
        warnings.simplefilter("always")
        for _ in range(3):
            module["k"].launch(1, 64, [torch.zeros(1)])
    assert len(said) == len(device.findings) == 1 and device.findings[0].count >= 3


@pytest.mark.parametrize("swap", ["[%a0+4], %r2", "[%a0], %r7"])
def test_loads_that_no_swap_compares(swap, lenient):
    """It is of another address, or of another value."""
    body = SWAP.format("").replace("[%a0], %r2", swap)
    kinds = set()
    for seed in range(20):
        try:
            launch("mov.u32 %r7, 0;\n" + body, torch.zeros(4, dtype=torch.int32), seed=seed)
        except gpuless.Finding as f:
            kinds.add((f.kind, f.breaks))
    assert kinds == {("race", "hardware")}


@pytest.mark.parametrize("access", ["ld.global.", "ld.global.ca.", "ld.global.nc.", "ld.global.cg.v4."])
def test_loads_that_an_l1_may_serve(access, lenient):
    """Or that are wider than what GPUs read at once."""
    vector = "{%r3, %r4, %r5, %r6}" if "v4" in access else "%r3"
    body = f"@%p0 atom.global.add.u32 %r2, [%a0], 7;\n@%p1 {access}u32 {vector}, [%a0];\n"
    found = []
    for seed in SEEDS:
        try:
            launch(body, torch.zeros(4, dtype=torch.int32), seed=seed)
        except gpuless.Finding as f:
            found.append(f)
    assert found and all(f.breaks == "hardware" for f in found)


def test_a_plain_store_is_no_atomic(lenient):
    body = "@%p0 st.global.u32 [%a0], 7;\n@%p1 ld.global.cg.u32 %r3, [%a0];\n"
    outcomes = set()
    for seed in SEEDS:
        try:
            launch(body, torch.zeros(4, dtype=torch.int32), seed=seed)
        except gpuless.Finding as f:
            outcomes.add(f.breaks)
    assert outcomes == {"hardware"}


@pytest.mark.parametrize("seed", SEEDS)
def test_registers_that_are_read_too_early(seed, lenient):
    """The read waits, as ptxas has it: values are as if the wait had come before it."""
    expected = tc.decode(A, "f16") @ tc.decode(B, "f16") + tc.decode(C, "f32")
    for issue in (PRODUCT, ONE_REGISTERS):
        doubled = " ".join(f"add.f32 %acc{i}, %acc{i}, %acc{i};" for i in range(4))
        with pytest.warns(gpuless.FindingWarning, match="reads an accumulator"):
            assert np.array_equal(multiply(f"{FENCE} {issue} {doubled} {WAIT}", seed), 2 * expected)
        partly = "setp.lt.u32 %p, %r0, 7; @%p mov.b32 %r5, %acc1;"
        with pytest.warns(gpuless.FindingWarning, match="reads an accumulator"):
            multiply(f"{FENCE} {issue} {partly} {WAIT}", seed)
    with pytest.warns(gpuless.FindingWarning, match="reads a register of A"):
        multiply(f"{FENCE} {ONE_REGISTERS} add.u32 %r5, %a2, 1; {WAIT}", seed)
    with pytest.raises(gpuless.Finding, match="writes an accumulator"):
        multiply(f"{FENCE} {PRODUCT} mov.b32 %acc2, 0; {WAIT}", seed)
