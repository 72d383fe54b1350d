"""Other processes of a test."""

import os
import pickle
import subprocess
import sys
import traceback
import types
import warnings

import torch
from rotation import VARIABLE, number


def two_threads(variables):
    """Their environment: `variables`, the part of rotation.py, and what `import forwardpass` needs.

    Threads of GNU OpenMP spin where they wait, which beside another process of tests on the same cores is twice the time and more.
    """
    waits = {"OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "PASSIVE"}
    return {"PATH": "", "PYTHONPATH": ":".join(sys.path), VARIABLE: str(number()), **waits, **variables}


def by_threads(run):
    """What `run` returns with 1, 2, 3 and 7 threads of torch."""
    threads = torch.get_num_threads()
    try:
        for n in (1, 2, 3, 7):
            torch.set_num_threads(n)
            yield run()
    finally:
        torch.set_num_threads(threads)


class Fork:
    """A process that has imported torch and nothing else, and forks for each script: to import torch takes 1.6 core-seconds.

    What `env` says to forwardpass holds, because a fork imports it. What torch and OpenMP read as they are loaded does not: a
    script that is about that takes a process of its own.
    """

    def __init__(self):
        self._process, self._counted = None, 0.0

    def run(self, script, *arguments, env=None, timeout=120):
        """As `subprocess.run([sys.executable, "-W", "ignore", "-c", script, *arguments], env=env)` gives it, with its output."""
        if self._process is None:
            command = [sys.executable, "-c", "import processes; processes.serve()"]
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
            self._process = subprocess.Popen(command, env={**os.environ, **two_threads({})}, **pipes)
        environment = {**os.environ, "PYTHONPATH": ":".join(sys.path)} if env is None else env
        pickle.dump((script, [str(a) for a in arguments], environment, timeout), self._process.stdin)
        self._process.stdin.flush()
        returncode, stdout, stderr, seconds = pickle.load(self._process.stdout)
        self._counted += seconds
        return subprocess.CompletedProcess(script, returncode, stdout, stderr)

    def close(self):
        if self._process:
            self._process.stdin.close()
            self._process.wait()
        self._process, self._counted = None, 0.0

    def core_seconds(self):
        """Of this process, of those that have ended, and of the scripts, which os.times() counts only after close()."""
        return sum(os.times()[:4]) + self._counted


fork = Fork()


def serve():
    """Runs the scripts that come from stdin, one after the other."""
    import torch  # noqa: F401  for all of them

    requests, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    while True:
        try:
            script, arguments, environment, timeout = pickle.load(requests)
        except EOFError:
            return
        files = [os.memfd_create(name) for name in ("stdout", "stderr")]
        if not (pid := os.fork()):
            answers.close()
            _script(script, arguments, environment, timeout, files)
        status, usage = os.wait4(pid, 0)[1:]
        said = []
        for file in files:
            os.lseek(file, 0, os.SEEK_SET)
            with os.fdopen(file, "rb") as f:
                said.append(f.read().decode())
        seconds = usage.ru_utime + usage.ru_stime
        pickle.dump((os.waitstatus_to_exitcode(status), *said, seconds), answers)
        answers.flush()


def _script(script, arguments, environment, timeout, files):
    """Ends as the interpreter does: its threads are waited for, then what is registered with atexit runs."""
    import atexit
    import signal
    import threading

    signal.alarm(timeout)
    for fd, file in zip((1, 2), files):
        os.dup2(file, fd)
    os.environ.clear()
    os.environ.update(environment)
    sys.path[:0] = [p for p in environment.get("PYTHONPATH", "").split(":") if p not in sys.path]
    sys.argv = ["-c", *arguments]
    warnings.simplefilter("ignore")
    main = sys.modules["__main__"] = types.ModuleType("__main__")
    code = 0
    try:
        exec(compile(script, "<string>", "exec"), main.__dict__)
    except SystemExit as e:
        code = e.code or 0
        if isinstance(code, str):
            print(code, file=sys.stderr)
            code = 1
    except BaseException:
        traceback.print_exc()
        code = 1
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
