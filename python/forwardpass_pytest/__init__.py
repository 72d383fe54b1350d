"""pytest's plugin: `FORWARDPASS_INTERPRET=sm_90a python -m pytest` interprets tests of projects that never import forwardpass.

A package of its own, as pytest imports it in every run, and whatever is within forwardpass brings torch along.
"""

import os

if os.environ.get("FORWARDPASS_INTERPRET"):
    import forwardpass  # noqa: F401
