"""pytest's plugin: `pytest --gpu=sm_90a` runs tests that say device="cuda" on the interpreted GPU, and checks their kernels.

pytest imports it in every run: torch comes once it is asked for. GPULESS_ARCH=sm_90a (`import gpuless`) is the way in for tests
on CPU tensors.
"""

from __future__ import annotations

from typing import Any

import pytest

MARKS = (
    "gpu_expects(kind, kernel='', reason=...): the test's kernels must have such a finding of the interpreted GPU",
    "gpu_ignores(kind, kernel='', reason=...): such findings of the interpreted GPU do not fail the test",
)


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("gpuless", "GPU kernels without a GPU (gpuless)")
    group.addoption(
        "--gpu", metavar="ARCH[,ARCH]",
        help="make torch's cuda device an interpreted A100 (sm_80), L40S (sm_89), H100 (sm_90a), ...; of several, one after the "
        "other. What the kernels do wrong fails the test that launched them",
    )  # fmt: skip
    group.addoption(
        "--gpu-seeds", metavar="N", type=int, default=2,
        help="run each test with so many schedules of the GPU (default: %(default)s: blocks begin in order, and in reverse)",
    )  # fmt: skip
    group.addoption("--gpu-seed", metavar="SEED", type=int, default=0, help="the first of them: repeats a finding")
    group.addoption(
        "--gpu-budget", metavar="SECONDS", type=float, default=0.0,
        help="skip tests whose kernels take longer on the interpreted GPU; a run without a failure then ends with 6",
    )  # fmt: skip
    group.addoption("--gpu-guard", action="store_true", help="give kernels padded, poisoned copies of their arguments")
    group.addoption(
        "--gpu-ignore", metavar="FILE", action="append", default=[],
        help="rules of findings that are known, a line each: kind place kernel # reason",
    )  # fmt: skip
    group.addoption("--gpu-save-baseline", metavar="FILE", help="write such a file of all that is found")
    group.addoption(
        "--gpu-strict", action="store_true",
        help="fail for what is against the letter of the PTX ISA alone and no GPU is known to mind, too",
    )  # fmt: skip


def pytest_configure(config: pytest.Config) -> None:
    for mark in MARKS:
        config.addinivalue_line("markers", mark)


@pytest.hookimpl(tryfirst=True)
def pytest_load_initial_conftests(early_config: pytest.Config, args: list[str]) -> None:
    """Before any file of the project's is imported: those may ask for the GPU at once."""
    options: Any = early_config.known_args_namespace
    if not options.gpu:
        return
    from .runs import run_each
    from .session import Session

    architectures = options.gpu.split(",")
    if len(architectures) > 1:
        raise SystemExit(run_each(architectures, args))
    early_config.pluginmanager.register(Session(options), "gpuless-session")
