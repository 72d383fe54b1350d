"""Programs whose warps wait for ever in some order, and right ones beside them: found without luck, at whatever seed.

Each is a body of PTX that one lane of each warp runs. `orders` says how many orders differ in a right one. In a broken one,
`broken` says whether every order is wrong ("any"), which each seed then finds by itself, or only some are ("some").
"""

import dataclasses
import time

import pytest
import torch
from ptx import kernel

import gpuless

pytestmark = pytest.mark.interpreted

BOUND = 2000
LANE = "and.b32 %r1, %t, 31;\nshr.u32 %r0, %t, 5;\nsetp.ne.u32 %p0, %r1, 0;\n"
FIRST = LANE + "@%p0 bra END;\nmov.u32 %r2, %ctaid.x;\n"
END = "\nEND:\n"


def only(warp, body):
    """The part of one warp, or block."""
    return f"setp.ne.u32 %p2, %r0, {warp};\n@%p2 bra SKIP{warp};\n{body}\nSKIP{warp}:\n"


def lock(n, name):
    return (
        f"{name}: atom.global.acquire.gpu.cas.b32 %r9, [%a0+{4 * n}], 0, 1;\n"
        f"setp.ne.u32 %p1, %r9, 0;\n@%p1 bra {name};\n"
    )


def unlock(n):
    return f"atom.global.release.gpu.exch.b32 %r9, [%a0+{4 * n}], 0;\n"


def until_set(address, name):
    return f"{name}: ld.acquire.gpu.global.u32 %r9, [{address}];\nsetp.eq.u32 %p1, %r9, 0;\n@%p1 bra {name};\n"


def both(warp, first, second):
    body = lock(first, f"A{warp}") + lock(second, f"B{warp}") + unlock(second) + unlock(first)
    return only(warp, body)


def mbarriers(*counts):
    """Of these counts, 8 bytes apart, known to all warps; then one lane of each goes on."""
    inits = "".join(f"mbarrier.init.shared::cta.b64 [%s+{8 * k}], {n};\n" for k, n in enumerate(counts))
    return LANE + f"setp.eq.u32 %p3, %t, 0;\n@!%p3 bra INIT;\n{inits}INIT:\nbar.sync 0;\n@%p0 bra END;\n"


def arrive(n):
    return f"mbarrier.arrive.shared::cta.b64 _, [%s+{8 * n}];\n"


def wait(n, parity, name):
    return f"{name}: mbarrier.try_wait.parity.shared::cta.b64 %p1, [%s+{8 * n}], {parity};\n@!%p1 bra {name};\n"


TICKET = "atom.global.relaxed.gpu.add.u32 %r3, [%a0], 1;\n"
#: warp 1 goes to sleep if there is no work; warp 0 makes some, and wakes it if it sees it asleep
ASLEEP = "st.relaxed.gpu.global.u32 [%a0+4], 1;\n"
LOOK = "ld.relaxed.gpu.global.u32 %r3, [%a0];\nsetp.ne.u32 %p4, %r3, 0;\n@%p4 bra END;\n"
WORK = (
    "st.relaxed.gpu.global.u32 [%a0], 1;\nld.relaxed.gpu.global.u32 %r4, [%a0+4];\n"
    "setp.eq.u32 %p5, %r4, 0;\n@%p5 bra END;\n" + arrive(0)
)


@dataclasses.dataclass
class Program:
    body: str
    warps: int = 2
    grid: int = 1
    orders: int = 1
    broken: str = ""
    multiprocessors: int = 0

    def run(self, **options):
        flags = torch.zeros(256, dtype=torch.int32)
        text = kernel(self.body + END, [flags], "sm_90a", 32 * self.warps)
        with gpuless.gpu("sm_90a", multiprocessors=self.multiprocessors, **options) as device:
            gpuless.Module(text)["k"].launch(self.grid, 32 * self.warps, [flags])
        return device.explored


def ring(first):
    """Block n waits for the flag of block n - 1, the first one maybe not, and sets its own."""
    skip = "setp.eq.u32 %p4, %r2, 0;\n@%p4 bra GO;\n" if first else ""
    before = "add.u32 %r5, %r2, 63;\nand.b32 %r5, %r5, 63;\nmul.wide.u32 %rd0, %r5, 4;\nadd.u64 %rd0, %rd0, %a0;\n"
    own = "mul.wide.u32 %rd1, %r2, 4;\nadd.u64 %rd1, %rd1, %a0;\nst.release.gpu.global.u32 [%rd1], 1;\n"
    return FIRST + before + skip + until_set("%rd0", "W") + "GO:\n" + own


def grid_barrier(blocks):
    return FIRST + only(
        0,
        "atom.global.acq_rel.gpu.add.u32 %r3, [%a0], 1;\n"
        f"W: ld.acquire.gpu.global.u32 %r9, [%a0];\nsetp.lt.u32 %p1, %r9, {blocks};\n@%p1 bra W;\n",
    )


def unlucky(warps):
    """The barrier lacks an arrival where a certain warp is the first to take a ticket."""
    skip = f"setp.eq.u32 %p4, %r0, {warps // 2};\nsetp.eq.and.u32 %p4, %r3, 0, %p4;\n@%p4 bra NOT;\n"
    return mbarriers(warps) + TICKET + skip + arrive(0) + "NOT:\n" + wait(0, 0, "W")


def stages(ordered):
    """A producer fills two stages three times; `ordered`: it waits until they are free."""
    make, use = "", ""
    for k in range(6):
        full, free, parity = k % 2, 2 + k % 2, k // 2 % 2
        make += (wait(free, 1 - parity, f"P{k}") if ordered else "") + arrive(full)
        use += wait(full, parity, f"C{k}") + arrive(free)
    return mbarriers(1, 1, 1, 1) + only(0, make) + only(1, use)


PROGRAMS = {
    "flag_never_set": Program(FIRST + only(0, until_set("%a0", "W")), broken="any"),
    "flag_set": Program(FIRST + only(0, until_set("%a0", "W")) + only(1, "st.release.gpu.global.u32 [%a0], 1;")),
    "locks_opposite": Program(FIRST + both(0, 0, 1) + both(1, 1, 0), broken="some"),
    "locks_ordered": Program(FIRST + both(0, 0, 1) + both(1, 0, 1), orders=2),
    "philosophers": Program(FIRST + both(0, 0, 1) + both(1, 1, 2) + both(2, 2, 0), warps=3, broken="some"),
    "philosophers_ordered": Program(FIRST + both(0, 0, 1) + both(1, 1, 2) + both(2, 0, 2), warps=3, orders=6),
    "ring": Program(ring(False), 1, grid=64, broken="any"),
    "ring_begun": Program(ring(True), 1, grid=64),
    "grid_barrier_no_room": Program(grid_barrier(40), 32, grid=40, broken="any", multiprocessors=2),
    "grid_barrier": Program(grid_barrier(3), 1, grid=3, orders=6, multiprocessors=2),
    "named_barriers_opposite": Program(
        LANE + "setp.eq.u32 %p4, %r0, 0;\nselp.u32 %r5, 1, 2, %p4;\nselp.u32 %r6, 2, 1, %p4;\n"
        "bar.sync %r5, 64;\nbar.sync %r6, 64;\n",
        broken="any",
    ),
    "named_barriers": Program(LANE + "bar.sync 1, 64;\nbar.sync 2, 64;\n"),
    "count_too_high": Program(mbarriers(3) + arrive(0) + wait(0, 0, "W"), broken="any"),
    "count_right": Program(mbarriers(2) + arrive(0) + wait(0, 0, "W")),
    "parity_lapped": Program(stages(False), broken="some"),
    "parity_in_step": Program(stages(True)),
    "wake_up_lost": Program(mbarriers(1) + only(0, WORK) + only(1, LOOK + ASLEEP + wait(0, 0, "W")), broken="some"),
    "wake_up": Program(mbarriers(1) + only(0, WORK) + only(1, ASLEEP + LOOK + wait(0, 0, "W")), orders=3),
    "rare_of_4": Program(unlucky(4), 4, broken="some"),
    "rare_of_8": Program(unlucky(8), 8, broken="some"),
}
BROKEN = [name for name, p in PROGRAMS.items() if p.broken]
RIGHT = [name for name, p in PROGRAMS.items() if not p.broken]


@pytest.mark.parametrize("name", BROKEN)
def test_found(name):
    """In whatever seed: by exploration, shrunk to a schedule that repeats it; and where every order is wrong, without."""
    program = PROGRAMS[name]
    for seed in range(3):
        begin = time.monotonic()
        if program.broken == "any":
            with pytest.raises(gpuless.Finding) as raised:
                program.run(seed=seed)
            assert raised.value.kind == "deadlock"
            assert time.monotonic() - begin < 10, f"seed {seed}"
        with pytest.raises(gpuless.Finding) as raised:
            program.run(seed=seed, explore=BOUND)
        finding = raised.value
        assert finding.kind == "deadlock" and finding.schedule and finding.schedule in str(finding)
        with pytest.raises(gpuless.Finding) as raised:
            program.run(seed=seed, schedule=finding.schedule)
        assert (raised.value.kind, raised.value.schedule) == ("deadlock", finding.schedule)


@pytest.mark.parametrize("name", RIGHT)
def test_right(name):
    program = PROGRAMS[name]
    for seed in range(3):
        program.run(seed=seed)
    (explored,) = program.run(explore=BOUND)
    assert (explored.complete, explored.orders) == (True, program.orders), explored


def test_memory_is_put_back():
    """Each order begins with what the launch finds; then the launch runs."""
    x = torch.zeros(4, dtype=torch.int32)
    text = kernel(FIRST + "atom.global.add.u32 %r3, [%a0], 1;\n" + END, [x], "sm_90a", 96)
    with gpuless.gpu("sm_90a", explore=BOUND) as device:
        gpuless.Module(text)["k"].launch(1, 96, [x])
    (explored,) = device.explored
    assert explored.orders == 6 and explored.complete and explored.runs >= 6  # 3 tickets in every order
    assert x.tolist() == [3, 0, 0, 0]
    assert "explored all 6 orders" in str(explored)


def test_bound():
    x = torch.zeros(4, dtype=torch.int32)
    text = kernel(FIRST + "atom.global.add.u32 %r3, [%a0], 1;\n" + END, [x], "sm_90a", 256)
    with gpuless.gpu("sm_90a", explore=10) as device:
        gpuless.Module(text)["k"].launch(1, 256, [x])
    (explored,) = device.explored
    assert not explored.complete and explored.runs == 10 and "bound" in explored.limit
    assert "10 orders of more" in str(explored) or explored.orders < 10


def test_sums_have_no_order():
    """What nobody looks at may come in any order; blocks that do not synchronise are explored one by one."""
    x = torch.zeros(4, dtype=torch.int32)
    text = kernel(FIRST + "red.global.add.u32 [%a0], 1;\n" + END, [x], "sm_90a", 96)
    with gpuless.gpu("sm_90a", explore=BOUND) as device:
        gpuless.Module(text)["k"].launch(5, 96, [x])
    (explored,) = device.explored
    assert explored.complete and explored.orders == 5
    assert x[0] == 15


def test_collected():
    """The launch runs behind a finding of an order."""
    flags = torch.zeros(256, dtype=torch.int32)
    program = PROGRAMS["locks_opposite"]
    text = kernel(program.body + END, [flags], "sm_90a", 64)
    for seed in range(3):
        with gpuless.gpu("sm_90a", explore=BOUND, findings="collect", seed=seed) as device:
            gpuless.Module(text)["k"].launch(1, 64, [flags])
        assert {f.kind for f in device.findings} == {"deadlock"} and any(f.schedule for f in device.findings)
        (explored,) = device.explored
        assert not explored.complete and explored.limit == "a finding"


@pytest.mark.parametrize("schedule", ["1", "1.0", "1.0:x", "1.0:2=", "1.0:2=1,", "1.0:2=1+", "1.0:2=1;3=4"])
def test_wrong_schedule(schedule):
    with pytest.raises(ValueError, match="a schedule reads"), gpuless.gpu("sm_90a", schedule=schedule):
        pass


def test_schedule_of_another_launch():
    program = PROGRAMS["locks_opposite"]
    with pytest.raises(gpuless.Finding) as raised:
        program.run(explore=BOUND)
    other = "7" + raised.value.schedule[1:]
    assert raised.value.schedule.startswith("1.0:")
    PROGRAMS["flag_set"].run(schedule=other)
