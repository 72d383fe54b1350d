"""The interpreted GPU: what `gpuless.gpu` yields, and the one way in which calls get to the core."""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import itertools
import json
import os
import pathlib
import re
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import Tensor

from . import core
from .capture import prohibit_in_capture
from .current import device_or_none, use_everywhere, using
from .finding import Explored, Finding, FindingWarning, TimeLimit
from .latencies import as_text, machine
from .memory.guard import Guard
from .memory.storage import Scope, add_function
from .operators import Operator
from .rules import Ignore, Rule, collected, write_rules
from .timing.model import Modelled, modelled
from .timing.profile import KernelProfile, LineProfile, by_line
from .timing.timeline import KernelTimeline, Timeline

#: the core has one device, one set of options and one set of intervals: a call at a time
_lock = threading.RLock()
_scopes: list[Scope] = []
_installed: Device | None = None
#: the core's counters when they were read last, and of that reading
_counted = dict.fromkeys(core.COUNTERS, 0)
_reading = threading.RLock()
#: gpuless_options::findings and ::isa, as csrc/gpuless.h numbers them
FINDINGS, ISA = ("raise", "collect"), ("report", "ignore", "raise")
#: warp instructions of a CTA where a launch is sampled
_SAMPLED_STEPS = 1 << 24
#: under which the core counts, one a device
_names = itertools.count(1)


class Device:
    """An interpreted GPU.

    Attributes:
        arch, seed: what `gpuless.gpu` was given.
        counters: of its launches so far: launches, warp_instructions, matrix_ns and matrix_macs (time and
            multiply-accumulates within mma and wgmma).
        findings: every Finding so far, in order, but for those that are ignored; what launches went on behind is
            there once, with a count.
        ignored: those that a rule of `ignore=` matches.
        explored: an `Explored` for each launch, where `explore=` asked for it.
    """

    def __init__(
        self,
        arch: str,
        options: core.Options,
        guard: bool,
        multiprocessors: int = 0,
        rules: Sequence[Rule] = (),
        explore: int = 0,
        schedule: str = "",
    ):
        self.arch, self.seed, self.guard = arch, int(options.seed), guard
        self._name = f"{arch}/{multiprocessors}" if multiprocessors else arch
        self._counters = dict.fromkeys(core.COUNTERS, 0)
        self._findings: list[Finding] = []
        self._ignored: list[Finding] = []
        self._explorations: list[Explored] = []
        self._explore, self._schedule = explore, schedule
        self._rules = list(rules)
        self._collects = options.findings == FINDINGS.index("collect")
        self._options = options
        self._registered: list[tuple[Tensor, str]] = []
        #: of the tensors that kernels take: "cuda" once torch's cuda device is this one (cuda/__init__.py)
        self.memory = "cpu"
        if options.counters:
            weakref.finalize(self, core.load().gpuless_profile_forget, options.counters)
        if options.timeline:
            weakref.finalize(self, core.load().gpuless_timeline_forget, options.counters)

    def __repr__(self) -> str:
        return f"<interpreted {core.ARCHITECTURES[self.arch]} ({self.arch}), seed {self.seed}>"

    @property
    def counters(self) -> dict[str, int]:
        _read()
        return self._counters

    @property
    def findings(self) -> list[Finding]:
        _read()
        return self._findings

    @property
    def ignored(self) -> list[Finding]:
        _read()
        return self._ignored

    @property
    def explored(self) -> list[Explored]:
        _read()
        return self._explorations

    def register(self, tensor: Tensor, name: str) -> None:
        """Lets every kernel touch this tensor's storage: for addresses that kernels read from memory (tables of pointers)."""
        self._registered.append((tensor, name))

    @contextlib.contextmanager
    def running(self) -> Iterator[Scope]:
        """Within the block, what is launched runs on this device, and may touch what is added to the scope."""
        prohibit_in_capture("a launch of compiled code, or of an autotuner's")
        with _lock:
            api = core.load()
            _install(self)
            api.gpuless_storage_enter()
            _scopes.append(scope := Scope(_scopes[-1] if _scopes else None, self.memory))
            for tensor, name in self._registered:
                scope.add_tensor(tensor, name)
            try:
                with using(self):
                    yield scope
            finally:
                _scopes.pop()
                api.gpuless_storage_leave()
                _read()

    def kernels(self, kernel: str = "") -> list[KernelProfile]:
        """What each kernel whose name contains this has done so far, apart by the shape of its launches."""
        if not self._options.counters:
            raise ValueError("this device counts nothing: it takes gpuless.gpu(..., counters=True)")
        read = json.loads(core.load().gpuless_profile_json(self._options.counters).decode(errors="replace"))
        return [k for k in map(KernelProfile.read, read) if kernel in k.kernel]

    def profile(self, kernel: str = "", inlined: bool = False) -> list[LineProfile]:
        """The same by source line, in order. What was inlined counts for the line of the kernel, or for its own."""
        return by_line(self.kernels(kernel), inlined)

    def model(self, kernel: str = "") -> list[Modelled]:
        """The time that each of `kernels` would take, modelled from its counts and the machine's rates: see model.py."""
        return [modelled(k) for k in self.kernels(kernel)]

    def timeline(self, kernel: str = "", *, clock: float | None = None, resident: int = 0) -> Timeline:
        """The time that each kernel whose name contains this would take, modelled instruction by instruction on one
        multiprocessor, and what its warps wait for: docs/interpreter.md says what is in it.

        Args:
            clock: MHz, in place of what rates.py has.
            resident: clusters (most often of one CTA) that a multiprocessor has at once, in place of what the assumed
                registers allow.
        """
        if not self._options.timeline:
            raise ValueError("this device records nothing to time: it takes gpuless.gpu(..., timeline=True)")
        if resident < 0 or (clock is not None and clock <= 0):
            raise ValueError(f"resident is 0 or more clusters and clock is in MHz, not {resident} and {clock}")
        every = machine(self.arch, clock)
        api = core.load()
        api.gpuless_finding_clear()
        answer = api.gpuless_timeline_json(self._options.counters, kernel.encode(), as_text(every).encode(), resident)
        if not answer:
            raise core.finding() or RuntimeError("the timeline gave no answer, and no reason")
        return Timeline([KernelTimeline.read(k, every) for k in json.loads(answer.decode(errors="replace"))])

    def reseed(self, seed: int) -> None:
        """From the next launch on as if it were made with this seed."""
        self.seed = self._options.seed = seed
        with _lock:
            if _installed is self:
                core.load().gpuless_set_options(ctypes.byref(self._options))

    @contextlib.contextmanager
    def sampled(self, clusters: int) -> Iterator[None]:
        """Within the block launches are counted apart, for `kernels`, `profile` and `model`, and of each only so many clusters
        run (0: all), which count for all of them. What a kernel writes is not whole then."""
        options = core.Options.from_buffer_copy(self._options)
        self._options.counters, self._options.timeline, self._options.sample = next(_names), 0, clusters
        if clusters:  # a CTA that waits for one that is left out is a deadlock soon
            self._options.step_limit = _SAMPLED_STEPS
        self.reseed(self.seed)
        try:
            yield
        finally:
            core.load().gpuless_profile_forget(self._options.counters)
            self._options = options
            self.reseed(self.seed)

    def time_limit(self, seconds: float) -> None:
        """Launches of this process, together, may take so long from now on; 0: as long as they need."""
        core.load().gpuless_set_time_limit(seconds)

    @property
    def unused_rules(self) -> list[Rule]:
        """Those of `ignore=` that nothing has matched so far."""
        used = {f.rule for f in self.ignored}
        return [rule for n, rule in enumerate(self._rules) if n not in used]

    def save_baseline(self, path: str | os.PathLike[str]) -> None:
        """Writes a file for `ignore=`: the rules that have been used, and one for each finding so far."""
        used = {f.rule for f in self.ignored}
        useful = [rule for n, rule in enumerate(self._rules) if n in used]
        write_rules(path, [*useful, *map(Rule.of_finding, self.findings)])

    def record(self, finding: Finding) -> Finding:
        self._findings.append(finding)
        return finding

    def _keep(self, findings: list[Finding]) -> None:
        """Takes what launches went on behind, and what was explored."""
        if self._explore:
            self._explorations += core.explored()
        for finding in findings:
            place = self._findings if finding.rule < 0 else self._ignored
            if same := next(filter(finding.is_same, place), None):
                same.count += finding.count
                continue
            place.append(finding)
            if finding.breaks == "isa" and finding.rule < 0 and not self._collects:
                warnings.warn(FindingWarning(str(finding)), stacklevel=2)

    def check(self, error: int, action: str) -> None:
        """Raises the finding, or the CUDA error, with which a launch ended."""
        _read()
        if error == core.LAUNCH_TIMEOUT:
            raise TimeLimit(f"{action}: the time limit of the interpreted GPU is over")
        if error:
            finding = core.finding()
            why = core.load().gpuless_take_refusal(error).decode()
            raise (
                self.record(finding)
                if finding
                else RuntimeError(f"{action}: CUDA error {error} on {self!r}{': ' if why else ''}{why}")
            )

    def finish(self, guard: Guard, kernel: str) -> None:
        """Raises what guard mode finds after a launch."""
        if self.guard and (problem := guard.finish()):
            finding = self.record(Finding("out_of_bounds", problem, kernel=kernel, arch=self.arch, seed=self.seed))
            core.log("finding", **finding.fields())
            if not self._collects:
                raise finding

    def call(self, operator: Operator, run: Callable[..., Any], args: Sequence[Any]) -> Any:
        """Runs an operator, as `run(*args)`, on tensors of the CPU, or of torch's cuda device where that is this one."""
        with self.running() as scope:
            names = [f"argument {n} of {operator.name}" for n in operator.parameters]
            tensors = {n: a for n, a in zip(names, args) if isinstance(a, Tensor)}
            for name, tensor in tensors.items():
                if tensor.numel() and tensor.device.type != self.memory:
                    raise ValueError(
                        f"{name} is on {tensor.device}, and not on {self.memory} as its kernel: move it there"
                    )
            written = {f"argument {n} of {operator.name}" for n in operator.written}
            guards = {read_only: Guard(scope, read_only) for read_only in (False, True)}
            for read_only, guard in guards.items():
                some = {n: t for n, t in tensors.items() if (n not in written) == read_only}
                if self.guard:
                    copies = guard.rehome(some)
                    args = tuple(copies.get(n, a) for n, a in zip(names, args))
                else:
                    for name, tensor in some.items():
                        scope.add_tensor(tensor, name, read_only)
            core.load().gpuless_finding_clear()
            operator.report_storage(add_function())
            try:
                result = run(*args)
            except Finding:  # from Triton's driver
                raise
            except RuntimeError:
                _read()
                if finding := core.finding():
                    raise self.record(finding) from None
                raise
            finally:
                operator.report_storage(0)
            for guard in guards.values():
                self.finish(guard, operator.name)
            return result


def _read() -> None:
    """Gives the core's device what its launches did since the last reading, whoever made them: a library may launch by itself,
    outside of any `running` block."""
    global _counted
    with _reading:
        counted, findings = core.counters(), core.findings()
        if _installed is not None:
            for name, n in counted.items():
                _installed._counters[name] += n - _counted[name]
            _installed._keep(findings)
        _counted = counted


def _install(device: Device | None) -> None:
    """Makes it the core's device, None for no device."""
    global _installed
    if device is _installed:
        return
    api = core.load()
    _read()
    if api.gpuless_set_device(device._name.encode() if device else None) and device:
        raise ValueError(f"an {core.ARCHITECTURES[device.arch]} has not as many multiprocessors as {device._name} says")
    if device:
        api.gpuless_set_options(ctypes.byref(device._options))
        if complaint := api.gpuless_ignore("\n".join(map(str, device._rules)).encode()):
            raise ValueError(complaint.decode())
        api.gpuless_explore(device._explore, device._schedule.encode())
    _installed = device


def _choice(name: str, value: str, words: tuple[str, ...]) -> int:
    if value not in words:
        raise ValueError(f"{name} is {' or '.join(map(repr, words))}, not {value!r}")
    return words.index(value)


def _bytes(name: str, value: int | str) -> int:
    """The number of bytes that a number or "32GB" stands for."""
    match = re.fullmatch(r"(\d+) ?([KMGT]?)B?", str(value))
    if not match or (n := int(match[1]) << 10 * " KMGT".index(match[2] or " ")) >= 2**63:
        raise ValueError(f"{name} is a number of bytes, such as 34359738368 or '32GB', not {value!r}")
    return n


def make(
    arch: str,
    *,
    seed: int = 0,
    checks: bool = True,
    truncating: bool = False,
    approximate: bool = True,
    guard: bool = False,
    counters: bool = False,
    timeline: bool = False,
    threads: int = 0,
    multiprocessors: int = 0,
    findings: str = "raise",
    ignore: Ignore = (),
    isa: str | None = None,
    strict: bool | None = None,
    largest: int | str = 0,
    explore: int = 0,
    schedule: str = "",
) -> Device:
    """A device, once everything that it needs is known to be there."""
    if arch not in core.ARCHITECTURES:
        raise ValueError(f"the interpreter knows {', '.join(core.ARCHITECTURES)}, not {arch!r}")
    if timeline and arch == "sm_100a":
        raise ValueError("timeline=True knows no tcgen05 and no tensor memory: take another GPU than sm_100a")
    if not isinstance(seed, int) or not 0 <= seed < 2**64:
        raise ValueError(f"seed is an integer from 0 to 2**64 - 1, not {seed!r}")
    if not isinstance(threads, int) or threads < 0:
        raise ValueError(f"threads is a number of threads, or 0 for one a core, not {threads!r}")
    if not isinstance(multiprocessors, int) or multiprocessors < 0:
        raise ValueError(f"multiprocessors is how many a slice of the GPU has, or 0 for all, not {multiprocessors!r}")
    if not isinstance(explore, int) or explore < 0:
        raise ValueError(f"explore is a number of orders, or 0 for none but the seed's, not {explore!r}")
    if isa is None:
        isa = "report" if strict else os.environ.get("GPULESS_ISA_FINDINGS") or "report"
    if strict is None:
        strict = os.environ.get("GPULESS_STRICT", "0") not in ("", "0") and isa == "report"
    if strict and isa == "ignore":
        raise ValueError('strict=True raises what isa="ignore" forgets: choose one of them')
    rules = collected(ignore)
    api = core.load()
    if complaint := api.gpuless_wrong_schedule(schedule.encode()):
        raise ValueError(f"{complaint.decode()}, not {schedule!r}")
    options = core.Options(
        seed=seed, checks=checks, truncating=truncating, approximate=approximate, threads=threads, step_limit=0,
        counters=next(_names) if counters or timeline else 0, timeline=timeline,
        findings=_choice("findings", findings, FINDINGS), isa=ISA.index("raise") if strict else _choice("isa", isa, ISA[:2]),
        largest=_bytes("largest", largest),
    )  # fmt: skip
    return Device(arch, options, guard, multiprocessors, rules, explore, schedule)


@contextlib.contextmanager
def gpu(
    arch: str = "sm_90a",
    *,
    seed: int = 0,
    checks: bool = True,
    truncating: bool = False,
    approximate: bool = True,
    guard: bool = False,
    counters: bool = False,
    timeline: bool = False,
    threads: int = 0,
    multiprocessors: int = 0,
    findings: str = "raise",
    ignore: Ignore = (),
    isa: str | None = None,
    strict: bool | None = None,
    largest: int | str = 0,
    explore: int = 0,
    schedule: str = "",
) -> Iterator[Device]:
    """Within the block and this thread, CUDA and Triton kernels take CPU tensors, and are executed and checked without a GPU.

    Triton's launches do, modules of PTX (`gpuless.Module`), and the operators of libraries that say so (`gpuless.operators`).
    Blocks nest. The environment does the same for a whole process that imports gpuless: GPULESS_ARCH=sm_90a, and
    GPULESS_SEED.

    Args:
        arch: the GPU: "sm_80" (A100), "sm_89" (L40S), "sm_90a" (H100), "sm_100a" (B200) or "sm_120" (RTX PRO 6000).
        seed: of the schedule, of when asynchronous operations complete, and of what .approx instructions give.
        checks: races, data in flight, uninitialised shared memory; without them it is faster. Bounds and alignment are
            always checked.
        truncating: FP8 products accumulate as Hopper's and Ada's tensor cores do, with 13 fractional bits.
        approximate: .approx instructions err within the bound of the PTX ISA; False gives the exact results.
        guard: kernels get padded, poisoned copies of their arguments, and nothing but the elements may be touched.
        counters: instructions, bytes, conflicts and waits are counted by source line (`Device.profile`, `Device.model`),
            which takes time.
        timeline: what the CTAs of one multiprocessor do is recorded (`Device.timeline`); it counts too.
        threads: of the interpreter, 0 for one a core.
        multiprocessors: of the GPU, as a MIG slice has; 0 for all.
        findings: "raise": the first ends its launch, as an exception of it. "collect": each goes into `Device.findings`, once,
            with a count, and the launch goes on; where it cannot (a deadlock, an unknown instruction, ...) it ends without an
            exception. A load out of bounds then gives poison (all bits set), and what is stored there is dropped.
        ignore: findings that are known: they go into `Device.ignored`, and launches go on. A rule, or several: a `Rule`, a line
            of text ("race softmax.cu:120 softmax_forward4  # both write the same"), or the `pathlib.Path` of a file of such
            lines (`Device.save_baseline`).
        isa: what becomes of findings that break no hardware, only the letter of the PTX ISA (`Finding.breaks`):
            "report" warns, once, and goes on, "ignore" forgets them. None: as GPULESS_ISA_FINDINGS has it, else "report".
        strict: they are raised as all others are. By default GPULESS_STRICT=1 says so.
        largest: how large the largest tensor may become, as "32GB" or in bytes: a 32-bit offset that is right in a launch's tensors
            and overflows in tensors that are so much larger is a finding.
        explore: before each launch, at most so many orders of its warps' synchronisation are tried, and `Device.explored` says
            whether these are all. Memory is put back after each, and the launch then runs as it would without.
        schedule: the launch that it names runs in the order that it names, as `Finding.schedule` has it.

    Yields:
        The `Device`: its counters, and its findings.

    Raises:
        Finding: out of the block, by the call that launched the kernel.
        Unavailable: this installation or this CPU cannot interpret.
        ValueError: an unknown architecture, seed, number of threads or of multiprocessors; a rule that is none.
    """
    device = make(
        arch, seed=seed, checks=checks, truncating=truncating, approximate=approximate, guard=guard,
        counters=counters, timeline=timeline, threads=threads, multiprocessors=multiprocessors, findings=findings,
        ignore=ignore, isa=isa, strict=strict, largest=largest, explore=explore, schedule=schedule,
    )  # fmt: skip
    before = device_or_none()
    _take_triton()
    try:
        with _lock:
            _install(device)
        with using(device):
            yield device
    finally:
        _give_triton_back()
        with _lock:
            _install(before)


def interpret_process() -> None:
    """What the environment asks for, from now on and in every thread; for `import gpuless`."""
    seed = os.environ.get("GPULESS_SEED", "0")
    if not seed.isdecimal():
        raise ValueError(f"GPULESS_SEED is an integer from 0 to 2**64 - 1, not {seed!r}")
    explore = os.environ.get("GPULESS_EXPLORE", "0")
    if not explore.isdecimal():
        raise ValueError(f"GPULESS_EXPLORE is a number of orders, not {explore!r}")
    findings = os.environ.get("GPULESS_FINDINGS") or "raise"
    path = os.environ.get("GPULESS_IGNORE")
    try:
        device = make(
            os.environ["GPULESS_ARCH"],
            seed=int(seed),
            findings=findings,
            ignore=pathlib.Path(path) if path else (),
            largest=os.environ.get("GPULESS_LARGEST") or 0,
            explore=int(explore),
            schedule=os.environ.get("GPULESS_SCHEDULE", ""),
        )
    except (ValueError, OSError) as e:
        raise ValueError(f"GPULESS_ARCH: {e}") from None
    install_process(device)


def install_process(device: Device) -> None:
    """From now on this process's, in every thread."""
    _take_triton()
    with _lock:
        _install(device)
    use_everywhere(device)


def _take_triton() -> None:
    if importlib.util.find_spec("triton"):
        from . import triton_driver

        triton_driver.install()


def _give_triton_back() -> None:
    if importlib.util.find_spec("triton"):
        from . import triton_driver

        triton_driver.uninstall()
