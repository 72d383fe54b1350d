"""Launches, recorded while code runs as it always does, and repeated with other PTX, on memory of their own."""

import contextlib
import ctypes
import functools

import torch

from forwardpass.dispatch import interpreted_by
from gpuless import Finding, Module, core
from gpuless.device import make

PADDING, ALIGNMENT, POISON = 512, 256, 0xFF
#: of an unmutated run's warp instructions
STEPS = 10


class Memory:
    """A copy of a region as it was before the launch, poison around it; addresses keep their remainders."""

    def __init__(self, begin, size):
        self.size = size
        self.before = torch.full((size + 2 * PADDING + ALIGNMENT,), POISON, dtype=torch.uint8)
        self.now = self.before.clone()
        self.start = PADDING + (begin - self.now.data_ptr() - PADDING) % ALIGNMENT
        self.address = self.now.data_ptr() + self.start
        ctypes.memmove(self.before.data_ptr() + self.start, begin, size)


class Launch:
    """One launch of a kernel: its PTX, its configuration, its parameters, the memory that they point to."""

    def __init__(self, record):
        self.ptx, self.kernel = record.ptx.decode(), record.kernel.decode()
        c = record.config
        self.config = tuple(c.grid), tuple(c.block), tuple(c.cluster), c.dynamic_shared, bool(c.programmatic)
        self.parameters = bytearray(ctypes.string_at(record.parameters, record.parameter_bytes))
        self.memories, regions = [], {}
        for at in range(0, len(self.parameters) - 7, 8):  # pointers, also those within tensor maps
            value = int.from_bytes(self.parameters[at : at + 8], "little")
            begin, size = ctypes.c_uint64(), ctypes.c_int64()
            if core.load().gpuless_storage_region(value, ctypes.byref(begin), ctypes.byref(size)):
                if begin.value not in regions:
                    self.memories.append(Memory(begin.value, size.value))
                    regions[begin.value] = self.memories[-1]
                moved = regions[begin.value].address + value - begin.value
                self.parameters[at : at + 8] = moved.to_bytes(8, "little")
        self.expected = self.steps = None

    def run(self, module, arch, seed, step_limit=0, checks=True, also=()):
        """The finding, or None; what was computed is in self.memories. `also`: further tensors that may be touched."""
        for memory in self.memories:
            memory.now.copy_(memory.before)
        device = device_of(arch, seed, step_limit, checks)
        grid, block, cluster, shared, programmatic = self.config
        try:
            with interpreted_by(device), device.running() as scope:
                for i, memory in enumerate(self.memories):
                    scope.add(memory.address, memory.size, f"memory {i}")
                for tensor in also:
                    scope.add_tensor(tensor, "more")
                kernel = module[self.kernel]
                values = [bytes(self.parameters[offset : offset + size]) for offset, size in kernel.parameters]
                before = core.counters()["warp_instructions"]
                kernel.launch_values(device, grid, block, values, shared, cluster, programmatic)
                self.steps = self.steps or core.counters()["warp_instructions"] - before
        except Finding as finding:
            device.findings.clear()  # with their tracebacks they keep every mutated module: 20 GB after all mutants
            return finding.with_traceback(None)
        return None

    def learn(self, module, arch, seeds):
        """What the unmutated kernel computes: the same at each seed, padding included."""
        for seed in seeds:
            if finding := self.run(module, arch, seed):
                raise AssertionError(f"the unmutated kernel has a finding: {finding}")
            result = [memory.now.clone() for memory in self.memories]
            if self.expected is not None and not all(map(torch.equal, result, self.expected)):
                raise AssertionError(f"{self.kernel} on {arch} computes something else at seed {seed}")
            self.expected = result

    def detects(self, module, arch, seed):
        """By what this launch tells the mutated module from the other: a kind of finding, "result", or None."""
        if finding := self.run(module, arch, seed, STEPS * self.steps):
            return "no end" if "has not ended" in finding.message else finding.kind
        if not all(torch.equal(memory.now, expected) for memory, expected in zip(self.memories, self.expected)):
            return "result"
        return None


@functools.lru_cache(maxsize=64)
def device_of(arch, seed, step_limit, checks):
    # approximate: one result at all seeds, so that whatever differs is the mutant's doing
    device = make(arch, seed=seed, approximate=False, truncating=True, threads=1, checks=checks)
    device._options.step_limit = step_limit
    return device


@contextlib.contextmanager
def recording():
    """A list, to which each launch within the block is appended."""
    launches, problems = [], []

    def append(record):
        try:
            launches.append(Launch(record.contents))
        except Exception as e:  # ctypes would print it and go on
            problems.append(e)

    recorder = core.Recorder(append)
    core.load().gpuless_on_launch(recorder)
    try:
        yield launches
    finally:
        core.load().gpuless_on_launch(core.Recorder())
    if problems:
        raise problems[0]


def reached(launches, text, arch, lines):
    """For each launch, which of these lines (indices) of the PTX it executes: a store in front of each tells."""
    flags = torch.zeros(max(lines, default=0) + 1, dtype=torch.uint8)
    made = text.split("\n")
    for i in lines:
        made[i] = f"st.global.u8 [{flags.data_ptr() + i}], 1; {made[i]}"
    module = Module("\n".join(made))
    for launch in launches:
        if finding := launch.run(module, arch, 0, checks=False, also=[flags]):
            raise AssertionError(f"with stores in front of its statements {launch.kernel} has a finding: {finding}")
        yield set(flags.nonzero().flatten().tolist())
        flags.zero_()
