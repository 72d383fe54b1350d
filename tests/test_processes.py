"""processes.py: a script in a fork ends as it would in a process of its own."""

import pytest
from processes import fork


@pytest.mark.every(2)
@pytest.mark.parametrize(
    ("script", "code", "said"),
    [
        ("import os, sys; print(sys.argv, os.environ['ONE'])", 0, "['-c', '1', 'a'] two\n"),
        ("import sys; print('torch' in sys.modules, 'forwardpass' in sys.modules)", 0, "True False\n"),
        ("import atexit; atexit.register(print, 'last'); print('first')", 0, "first\nlast\n"),
        ("import sys; sys.exit(3)", 3, ""),
        ("import os; os.kill(os.getpid(), 9)", -9, ""),
        ("import time; time.sleep(30)", -14, ""),  # SIGALRM
    ],
)
def test_what_a_script_returns(script, code, said):
    done = fork.run(script, 1, "a", env={"ONE": "two"}, timeout=2)
    assert (done.returncode, done.stdout, done.stderr) == (code, said, "")


def test_an_exception_is_the_end():
    done = fork.run("import sys\ndef f():\n    raise KeyError('lost')\nf()")
    assert done.returncode == 1 and done.stderr.splitlines()[-1] == "KeyError: 'lost'"
    assert fork.run("import sys; sys.exit('a sentence')").stderr == "a sentence\n"


@pytest.mark.every(3)
def test_what_scripts_cost_is_counted_once():
    fork.run("")
    before = fork.core_seconds()
    fork.run("import time\nwhile time.process_time() < 0.3: pass")
    assert fork.core_seconds() - before >= 0.2
    counted = fork.core_seconds()
    fork.close()
    assert 0 <= fork.core_seconds() - counted < 30  # and what the one that forks has cost
