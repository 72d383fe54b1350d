"""One run of pytest with one interpreted GPU: what its tests' kernels did wrong fails them, and is summed up at the end."""

from __future__ import annotations

import fnmatch
import json
import pathlib
from collections.abc import Iterator
from typing import Any

import pytest
from _pytest.runner import call_and_report

from gpuless import Finding, Rule, TimeLimit, cuda, device
from gpuless.rules import write_rules

from .runs import INCOMPLETE_STATUS

#: properties of reports, which JUnit shows and pytest-xdist carries over
FINDING, LAUNCHES, INCOMPLETE = "gpu_finding", "gpu_launches", "gpu_incomplete"
#: what a worker of pytest-xdist found outside of its tests
OUTSIDE = "gpu_outside"


class Session:
    def __init__(self, options: Any):
        try:
            self.device = device.make(
                options.gpu, seed=options.gpu_seed, guard=options.gpu_guard, findings="collect",
                ignore=[pathlib.Path(file) for file in options.gpu_ignore],
            )  # fmt: skip
            cuda.present(self.device)
        except (ValueError, RuntimeError, OSError) as e:
            raise pytest.UsageError(f"--gpu={options.gpu}: {e}") from None
        self.seeds = range(options.gpu_seed, options.gpu_seed + max(1, options.gpu_seeds))
        self.budget = options.gpu_budget
        self.arch, self.strict, self.baseline = options.gpu, options.gpu_strict, options.gpu_save_baseline
        self.known: dict[str, list[str]] = {}  # finding -> tests, for the summary
        self.by_letter: dict[str, list[str]] = {}  # those that no GPU is known to mind
        self.rules: list[Rule] = []
        self.launches = 0
        self.incomplete: dict[str, None] = {}  # tests that the budget ended
        self.over_budget = False
        self.faults_outside = False

    # ---- a test ----

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item, nextitem: pytest.Item | None) -> bool:
        """A test with each schedule, until one fails it: to whoever selects and counts tests it is one."""
        item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
        self.of_all_seeds: list[Finding] = []
        reports: list[pytest.TestReport] = []
        for seed in self.seeds:
            latest, another = self._run(item, nextitem, seed)
            if not any(report.failed for report in reports):
                reports = latest
            if not another:
                break
        for report in reports:
            if _is_decisive(report):
                report.user_properties = list(item.user_properties)  # of every schedule and phase
            item.ihook.pytest_runtest_logreport(report=report)
        item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
        return True

    def _run(self, item: pytest.Item, nextitem: pytest.Item | None, seed: int) -> tuple[list[pytest.TestReport], bool]:
        """The reports of its phases with this schedule, and whether another one follows: as pytest's own runtestprotocol."""
        self.seed, self.last = seed, seed == self.seeds[-1]
        self.device.reseed(seed)
        self.device.time_limit(self.budget)
        self.findings: list[Finding] = []
        self.launched = self.counted = self.device.counters["launches"]
        function: Any = item
        if hasattr(item, "_request") and not function._request:
            function._initrequest()
        try:
            reports = [call_and_report(item, "setup", log=False)]
            if reports[0].passed and not item.config.getoption("setuponly", False):
                reports.append(call_and_report(item, "call", log=False))
            goes_on = reports[-1].passed or bool(self.baseline)  # which has what every schedule shows
            another = not self.last and goes_on and self.device.counters["launches"] > self.launched
            following: Any = item.parent if another else nextitem  # fixtures of the module and so on are made once
            reports.append(call_and_report(item, "teardown", log=False, nextitem=following))
        finally:
            self.device.time_limit(0)
        if hasattr(item, "_request"):
            function._request, function.funcargs = False, None
        if another and not reports[-1].passed:
            item.session._setupstate.teardown_exact(nextitem)  # of what has been kept for the next schedule
            another = False
        return reports, another

    @pytest.fixture
    def gpu_seed(self) -> int:
        """The schedule's seed that the test runs with."""
        return self.seed

    # Within pytest's own wrappers: their teardown takes away what their set-up has made.
    @pytest.hookimpl(wrapper=True, trylast=True)
    def pytest_runtest_setup(self, item: pytest.Item) -> Iterator[None]:
        return (yield from self._phase())

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_teardown(self, item: pytest.Item) -> Iterator[None]:
        return (yield from self._phase())

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item: pytest.Item) -> Iterator[None]:
        return (yield from self._phase())

    def _phase(self) -> Iterator[None]:
        try:
            return (yield)
        except TimeLimit:
            self.over_budget = True
            pytest.skip(f"its kernels take more than {self.budget:g} s on the interpreted GPU (--gpu-budget)")
        finally:
            self.findings += self._new_findings()

    def _new_findings(self) -> list[Finding]:
        """What came since this was asked last, of launches that the tests' libraries made by themselves too."""
        findings = [*self.device.findings]
        self.device.findings.clear()
        return findings

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
        report: Any = yield
        if self.over_budget:
            self.over_budget = False
            item.user_properties.append((INCOMPLETE, item.nodeid))
            report.user_properties.append((INCOMPLETE, item.nodeid))
        if call.when == "setup" and report.passed:
            return report  # its findings are the call's
        launches = self.device.counters["launches"] - self.counted
        self.counted += launches
        self.of_all_seeds += self.findings
        unexpected = self._unexpected(item)
        self.findings = []
        properties: list[tuple[str, object]] = [(LAUNCHES, launches)]
        properties += [(FINDING, _as_json(f)) for f in unexpected]
        report.user_properties += properties
        item.user_properties += properties  # JUnit writes those of the teardown's report
        faults = [f for f in unexpected if self._is_fault(f)]
        missing: list[pytest.Mark] = []
        if call.when == "call" and (self.last or not launches):
            marks = item.iter_markers("gpu_expects")
            missing = [m for m in marks if not any(_matches(m, f) for f in self.of_all_seeds)]
        if report.skipped:
            return report
        if faults:
            report.sections.append(("interpreted GPU", "\n\n".join(map(self._text, faults))))
        if report.passed and (faults or missing):
            report.outcome = "failed"
            report.longrepr = "\n\n".join([*map(self._text, faults), *(f"no such finding came: {m}" for m in missing)])
        return report

    def _is_fault(self, finding: Finding) -> bool:
        return self.strict or finding.breaks == "hardware"

    def _unexpected(self, item: pytest.Item) -> list[Finding]:
        marks = [*item.iter_markers("gpu_expects"), *item.iter_markers("gpu_ignores")]
        return [f for f in self.findings if not any(_matches(m, f) for m in marks)]

    def _text(self, finding: Finding) -> str:
        """In full the first time."""
        earlier = self.known.get(_place(finding))
        return f"{_place(finding)}: as in {earlier[0]}" if earlier else str(finding)

    # ---- outside of tests ----

    @pytest.hookimpl(wrapper=True)
    def pytest_make_collect_report(self, collector: pytest.Collector) -> Iterator[None]:
        """A file that launches a wrong kernel when it is imported is no better than one that does not import."""
        report: Any = yield
        findings = self._new_findings()
        for finding in findings:
            self._add(_as_json(finding), report.nodeid or "conftest.py")
        faults = [f for f in findings if self._is_fault(f)]
        if report.passed and faults and not self.baseline:
            report.outcome, report.longrepr = "failed", "\n\n".join(map(str, faults))
        return report

    @pytest.hookimpl(wrapper=True, trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session, exitstatus: int) -> Iterator[None]:
        result = yield
        texts = [_as_json(finding) for finding in self._new_findings()]
        if hasattr(session.config, "workeroutput"):
            session.config.workeroutput[OUTSIDE] = texts
        self._outside(texts)
        if session.exitstatus == pytest.ExitCode.OK and self.incomplete:
            session.exitstatus = INCOMPLETE_STATUS
        if session.exitstatus in (pytest.ExitCode.OK, INCOMPLETE_STATUS) and self.faults_outside:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED
        return result

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any, error: object) -> None:
        self._outside(getattr(node, "workeroutput", {}).get(OUTSIDE, []))

    def _outside(self, texts: list[str]) -> None:
        for text in texts:
            self._add(text, "no test: a hook, or a thread")
            self.faults_outside |= self.strict or json.loads(text)["breaks"] == "hardware"

    # ---- the summary ----

    def _add(self, text: str, where: str) -> None:
        finding = json.loads(text)
        known = self.known if self.strict or finding["breaks"] == "hardware" else self.by_letter
        known.setdefault(finding["place"], []).append(where)
        self.rules.append(Rule.parse(finding["rule"]))

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.incomplete |= {str(test): None for name, test in report.user_properties if name == INCOMPLETE}
        for name, value in report.user_properties if _is_decisive(report) else ():
            if name == LAUNCHES:
                self.launches += int(str(value))
            elif name == FINDING:
                self._add(str(value), report.nodeid)

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        write = terminalreporter.write_line
        terminalreporter.section(f"interpreted GPU {self.arch}")
        plural = "es" * (self.launches != 1), "s" * (len(self.known) != 1)
        write(f"{self.launches} launch{plural[0]} with {self._seeds()}, {len(self.known)} finding{plural[1]}")
        write(f"not covered: machine code, other schedules than {'these' if len(self.seeds) > 1 else 'this one'}, fences that are "
              "missing but harmless here, what the tests do not launch")  # fmt: skip
        if self.incomplete:
            write(f"incomplete: {_several([*self.incomplete])} took more than {self.budget:g} s (--gpu-budget)")
        for place, tests in self.known.items():
            write(place)
            write(f"  in {_several(tests)}")
        if self.by_letter:
            tolerated = f"{len(self.by_letter)} against the letter of the PTX ISA, which no GPU is known to mind"
            write(f"{tolerated} (--gpu-strict fails for them)")
            for place, tests in self.by_letter.items():
                write(f"  {place}, in {_several(tests)}")
        for rule in self.device.unused_rules:
            write(f"nothing was found that a rule ignores: {rule}")
        if self.baseline:
            write_rules(self.baseline, self.rules)
            write(f"{self.baseline} has {len(dict.fromkeys(self.rules))} rules, for --gpu-ignore: give each its reason")

    def pytest_report_header(self) -> str:
        return f"gpu: cuda is {self.device!r}, {self._seeds()}"

    def _seeds(self) -> str:
        """Odd seeds begin blocks in reverse: of a race between two blocks one order may show nothing."""
        if len(self.seeds) > 1:
            return f"{len(self.seeds)} schedules (seeds {self.seeds[0]} to {self.seeds[-1]})"
        order = "in reverse" if self.seeds[0] % 2 else "in order"
        return f"1 schedule (seed {self.seeds[0]}: blocks begin {order} only)"


def _is_decisive(report: pytest.TestReport) -> bool:
    """The one of a test's reports that the summary counts: of its call, or of a set-up without a call."""
    return report.when == "call" or (report.when == "setup" and not report.passed)


def _place(f: Finding) -> str:
    where = f"{f.file}:{f.line}" if f.file else f"PTX line {f.ptx_line}"
    return f"{f.kind} in {f.kernel} at {where}"


def _as_json(f: Finding) -> str:
    return json.dumps({"place": _place(f), "breaks": f.breaks, "rule": str(Rule.of_finding(f)), "text": str(f)})


def _several(tests: list[str]) -> str:
    return tests[0] + (f" and {len(tests) - 1} more" if len(tests) > 1 else "")


def _matches(mark: pytest.Mark, f: Finding) -> bool:
    kind = mark.args[0] if mark.args else mark.kwargs.get("kind", "*")
    kernel = mark.args[1] if len(mark.args) > 1 else mark.kwargs.get("kernel", "")
    if not mark.kwargs.get("reason"):
        raise pytest.UsageError(f"{mark.name} needs a reason: @pytest.mark.{mark.name}({kind!r}, reason='...')")
    return fnmatch.fnmatch(f.kind, kind) and fnmatch.fnmatch(f.kernel, f"*{kernel}*")
