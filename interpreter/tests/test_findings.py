"""What becomes of a finding: it is raised, or collected and the launch goes on, or ignored by a rule."""

import os
import pathlib
import pickle
import subprocess
import sys

import pytest
import torch
from ptx import integers, kernel
from shadow_launches import WARPS

import gpuless
from gpuless.rules import Rule, read_rules

pytestmark = pytest.mark.interpreted

# A race of warps 0 and 1, and of lanes of one warp, at one store; then what happens after it is a matter of goings-on.
RACES = "and.b32 %r2, %r1, 16;\nadd.u32 %r2, %r2, %s;\nst.shared.u32 [%r2], %t;\nxor.b32 %r3, %r2, 16;\nld.shared.u32 %r4, [%r3];\n"
DEADLOCK = "@%p0 bar.sync 0, 64;\n@%p1 bar.sync 1, 64;\n"


def collect(body, *args, seed=0, block=64, grid=1, threads=0, name="k", **options):
    """The device, after a launch that must not raise."""
    text = kernel(WARPS + body, args, block=block).replace("entry k(", f"entry {name}(")
    with gpuless.gpu("sm_90a", seed=seed, threads=threads, **{"findings": "collect", **options}) as device:
        gpuless.Module(text)[name].launch(grid, block, args)
    return device


def kinds(findings):
    return sorted(f.kind for f in findings)


@pytest.mark.parametrize("seed", range(4))
def test_lanes_do_not_hide_warps(seed):
    device = collect(RACES, seed=seed)
    ends = {(f.within_warp, f.other_ptx_line == f.ptx_line) for f in device.findings}
    assert ends >= {(True, False), (False, True), (False, False)}, device.findings
    assert set(kinds(device.findings)) == {"race"} and not device.ignored


def test_each_once_with_a_count():
    body = "mov.u32 %r5, 0;\nAGAIN:\n" + RACES + "add.u32 %r5, %r5, 1;\nsetp.lt.u32 %p4, %r5, 50;\n@%p4 bra AGAIN;\n"
    device = collect(body, grid=20, threads=2)
    keys = {(f.kind, f.ptx_line, f.other_ptx_line, f.within_warp) for f in device.findings}
    assert len(keys) == len(device.findings) and all(f.block == (0, 0, 0) for f in device.findings)
    lanes = [f for f in device.findings if f.within_warp and f.other_ptx_line < f.ptx_line]
    assert sum(f.count for f in lanes) > 1000 and f"{lanes[0].count} times" not in lanes[0].message
    again = collect(body, grid=20, threads=1)
    assert [f.count for f in device.findings] == [f.count for f in again.findings]


def test_the_next_launch_runs():
    y = torch.zeros(64, dtype=torch.int32)
    store = "cvt.u64.u32 %rd1, %t;\nmad.lo.u64 %rd1, %rd1, 4, %a0;\nst.global.u32 [%rd1], %t;\n"
    for end, kind in [(DEADLOCK, "deadlock"), ("trap;\n", "illegal"), ("tcgen05.fence;\n", "unsupported")]:
        texts = [kernel(WARPS + body, [y], block=64) for body in (end, store)]
        with gpuless.gpu("sm_90a", findings="collect") as device:
            for text in texts:
                y.zero_()
                gpuless.Module(text)["k"].launch(1, 64, [y])
        assert (y == torch.arange(64)).all()
        assert kinds(device.findings) == [kind] and device.findings[0].kernel == "k"


@pytest.mark.parametrize("width", [1, 2, 4, 8, 16])
def test_out_of_bounds_in_global_memory(width):
    """Loads give poison, stores are dropped, and the other lanes do as they should."""
    bits = {1: "u8", 2: "u16", 4: "u32", 8: "u64", 16: "v2.u64"}[width]
    register = {1: "%h1", 2: "%h1", 4: "%r5", 8: "%rd5", 16: "{%rd5, %rd6}"}[width]
    # x ends pages of its own: what is behind it is never in y
    x = torch.zeros(1 << 26, dtype=torch.uint8)[-32 * width // 2 :]
    x.copy_(integers(32 * width // 2, dtype=torch.uint8, low=0, high=255))
    y = torch.zeros(64 * width, dtype=torch.uint8)
    body = f"""cvt.u64.u32 %rd1, %t;
mul.lo.u64 %rd1, %rd1, {width};
add.u64 %rd2, %rd1, %a0;
add.u64 %rd3, %rd1, %a1;
ld.global.{bits} {register}, [%rd2];
st.global.{bits} [%rd3], {register};
add.u64 %rd4, %rd3, {48 * width};
st.global.{bits} [%rd4], {register};"""
    device = collect(body, x, y, block=32)
    expected = torch.full((32 * width,), 255, dtype=torch.uint8)
    expected[: len(x)] = x
    assert torch.equal(y[: 32 * width], expected) and not y[32 * width : 48 * width].any()
    assert torch.equal(y[48 * width :], expected[: 16 * width])
    assert kinds(device.findings) == ["out_of_bounds"] * 2
    assert sorted(f.lane for f in device.findings) == [16, 16]


@pytest.mark.parametrize("seed", range(3))
def test_out_of_bounds_in_shared_memory(seed):
    """What the lanes within bounds have written is known to be written; an atomic gives poison and changes nothing."""
    y = torch.zeros(3, 32, dtype=torch.int32)
    body = """shl.b32 %r2, %t, 8;
add.u32 %r2, %r2, %s;
st.shared.u32 [%r2], %t;
ld.shared.u32 %r3, [%r2];
atom.shared.add.u32 %r4, [%r2], 1;
ld.shared.u32 %r5, [%r2];
cvt.u64.u32 %rd1, %t;
mad.lo.u64 %rd1, %rd1, 4, %a0;
st.global.u32 [%rd1], %r3;
st.global.u32 [%rd1+128], %r4;
st.global.u32 [%rd1+256], %r5;"""
    device = collect(body, y, block=32, seed=seed)
    inside = torch.arange(32) < 16  # of 4096 bytes
    lanes = torch.arange(32, dtype=torch.int32)
    for row, expected in zip(y, (lanes, lanes, lanes + 1)):
        assert torch.equal(row, torch.where(inside, expected, -1))
    assert kinds(device.findings) == ["out_of_bounds"] * 4


def test_misaligned():
    x, y = integers(64), torch.zeros(32, dtype=torch.int32)
    body = """setp.eq.u32 %p4, %t, 5;
selp.b32 %r2, 2, 0, %p4;
cvt.u64.u32 %rd2, %r2;
cvt.u64.u32 %rd1, %t;
mad.lo.u64 %rd3, %rd1, 4, %a0;
add.u64 %rd3, %rd3, %rd2;
ld.global.u32 %r3, [%rd3];
mad.lo.u64 %rd4, %rd1, 4, %a1;
st.global.u32 [%rd4], %r3;"""
    device = collect(body, x, y, block=32)
    expected = x[:32].clone()
    expected[5] = -1
    assert torch.equal(y, expected)
    assert kinds(device.findings) == ["misaligned"] and device.findings[0].lane == 5


def test_what_is_uninitialised_is_poison():
    y = torch.zeros(1, dtype=torch.int32)
    device = collect("ld.shared.u32 %r2, [%s];\n@%p0 st.global.u32 [%a0], %r2;", y)
    assert kinds(device.findings) == ["uninitialised"] and y.item() == -1
    (f,) = device.findings
    assert f.other_ptx_line == f.ptx_line + 1  # what depends on it


def test_raised_by_default():
    with pytest.raises(gpuless.Finding), gpuless.gpu("sm_90a") as device:
        gpuless.Module(kernel(WARPS + RACES, [], block=64))["k"].launch(1, 64, [])
    assert kinds(device.findings) == ["race"]


def test_a_finding_survives_pickling():
    finding = collect(RACES).findings[0]
    copy = pickle.loads(pickle.dumps(finding))
    assert copy.__dict__ == finding.__dict__ and str(copy) == str(finding) and copy.is_same(finding)


def test_demangled():
    device = collect(RACES, name="_Z7softmaxILi4EEvPKfi")
    assert {f.kernel for f in device.findings} == {"void softmax<4>(float const*, int)"}
    assert {f.mangled for f in device.findings} == {"_Z7softmaxILi4EEvPKfi"}
    assert "kernel void softmax<4>(float const*, int)" in str(device.findings[0])


# ---- Rules ----

RULES = [
    "race",
    "race *",
    "* ptx:*",
    "race * softmax",
    "race * softmax<?>(float const*, int)",
    "* * *max*int)  # a reason",
    "race * _Z7softmaxILi4EEvPKfi",
]
OTHERS = [
    "in_flight",
    "race kernel.cu",
    "race kernel.cu:3",
    "race * soft?ax<5>",
    "race ptx:1",
    "race * max(",
    "race * [a-z]oftmax",
]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("findings", ["raise", "collect"])
def test_rules_that_match(rule, findings):
    if rule == "race":
        with pytest.raises(ValueError, match="place"):
            Rule.parse(rule)
        return
    device = collect(RACES, name="_Z7softmaxILi4EEvPKfi", findings=findings, ignore=[OTHERS[2], rule])
    assert not device.findings and len(device.ignored) >= 3
    assert {f.rule for f in device.ignored} == {1}
    assert list(map(str, device.unused_rules)) == [str(Rule.parse(OTHERS[2]))]


@pytest.mark.parametrize("rule", OTHERS[1:])
def test_rules_that_do_not(rule):
    device = collect(RACES, name="_Z7softmaxILi4EEvPKfi", ignore=rule)
    assert len(device.findings) >= 3 and not device.ignored and len(device.unused_rules) == 1
    with pytest.raises(gpuless.Finding):
        collect(RACES, name="_Z7softmaxILi4EEvPKfi", ignore=rule, findings="raise")


def test_either_end_may_be_named():
    line = next(f for f in collect(RACES).findings if f.other_ptx_line != f.ptx_line).other_ptx_line
    device = collect(RACES, ignore=[f"race ptx:{line}"])
    assert not [f for f in device.findings if line in (f.ptx_line, f.other_ptx_line)] and device.ignored


def test_what_cannot_go_on_is_ignored_too():
    device = collect(DEADLOCK, findings="raise", ignore=Rule("deadlock", reason="known"))
    assert not device.findings and kinds(device.ignored) == ["deadlock"]


def test_a_baseline(tmp_path):
    path = tmp_path / "baseline.txt"
    device = collect(RACES)
    device.save_baseline(path)
    rules = read_rules(path)
    assert rules and all(r.kind == "race" and r.place.startswith("ptx:") and r.kernel == "k" for r in rules)
    for seed in range(6):
        again = collect(RACES, findings="raise", ignore=path, seed=seed)
        assert not again.findings and again.ignored
    path.write_text(path.read_text() + "\n  # nothing\nillegal * other  # not there\n")
    again = collect(RACES, findings="raise", ignore=path)
    assert Rule("illegal", "*", "other", "not there") in again.unused_rules
    again.save_baseline(path)
    assert "other" not in path.read_text() and "ptx:" in path.read_text()


@pytest.mark.parametrize(
    ("rule", "why"),
    [("rice * k", "rice"), ("race", "place"), ("", "kind"), ("baseline.txt", "pathlib.Path")],
)
def test_what_is_no_rule(rule, why):
    with pytest.raises(ValueError, match=why), gpuless.gpu("sm_90a", ignore=rule):
        pass


def test_options_that_are_none():
    for options in ({"findings": "keep"}, {"isa": "raise"}, {"isa": "ignore", "strict": True}):
        with pytest.raises(ValueError, match=list(options)[-1]), gpuless.gpu("sm_90a", **options):
            pass


# ---- The environment ----

PROGRAM = """
from gpuless import Module, current
Module({text!r})["k"].launch(1, 64, [])
device = current.device()
print(len(device.findings), len(device.ignored))
"""


def test_a_whole_process(tmp_path):
    rules = tmp_path / "rules"
    rules.write_text("race * k  # known\n")
    script = PROGRAM.format(text=kernel(WARPS + RACES, [], block=64))

    def execute(**more):
        environment = {**os.environ, "GPULESS_ARCH": "sm_90a", **more}
        return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment)

    assert "Finding: race" in execute().stderr
    first, second = execute(GPULESS_FINDINGS="collect").stdout.split()
    assert int(first) >= 3 and second == "0"
    assert execute(GPULESS_IGNORE=str(rules)).stdout.split()[0] == "0"
    assert "no_such_file" in execute(GPULESS_IGNORE=str(pathlib.Path(tmp_path) / "no_such_file")).stderr


@pytest.mark.parametrize("seed", range(3))
def test_rows_out_of_bounds(seed):
    """ldmatrix of one row that is there, and of seven that are not; of none; and stmatrix, which drops them."""
    y = torch.zeros(3, 32, dtype=torch.int32)
    body = """shl.b32 %r2, %t, 4;
add.u32 %r2, %r2, %s;
st.shared.v4.u32 [%r2], {7, 7, 7, 7};
bar.warp.sync 0xffffffff;
mul.lo.u32 %r3, %t, 4096;
add.u32 %r3, %r3, %s;
ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r4}, [%r3];
add.u32 %r5, %r3, 4096;
ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r5}, [%r5];
bar.warp.sync 0xffffffff;
mov.u32 %r6, 9;
stmatrix.sync.aligned.m8n8.x1.shared.b16 [%r3], {%r6};
bar.warp.sync 0xffffffff;
ld.shared.u32 %r7, [%r2];
cvt.u64.u32 %rd1, %t;
mad.lo.u64 %rd1, %rd1, 4, %a0;
st.global.u32 [%rd1], %r4;
st.global.u32 [%rd1+128], %r5;
st.global.u32 [%rd1+256], %r7;"""
    device = collect(body, y, block=32, seed=seed)
    first = torch.arange(32) < 4
    assert torch.equal(y[0], torch.where(first, 7, -1).int()) and (y[1] == -1).all()
    assert torch.equal(y[2], torch.where(torch.arange(32) == 0, 9, 7).int())
    assert kinds(device.findings) == ["out_of_bounds"] * 3
