"""Other processes of a test."""

import sys

from rotation import VARIABLE, number


def two_threads(variables):
    """Their environment: `variables`, the part of rotation.py, and what `import forwardpass` needs.

    Threads of GNU OpenMP spin where they wait, which beside another process of tests on the same cores is twice the time and more.
    """
    waits = {"OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "PASSIVE"}
    return {"PATH": "", "PYTHONPATH": ":".join(sys.path), VARIABLE: str(number()), **waits, **variables}
