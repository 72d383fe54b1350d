"""Triton's own fused attention, python/tutorials/06-fused-attention.py of its repository, as a peer on an interpreted GPU.

The file is the user's: it is in no package, and importing it runs it. It takes as many rows as keys, as many heads of k as of
q, and fp16.
"""

from __future__ import annotations

import contextlib
import importlib.util
import pathlib
from collections.abc import Iterator
from unittest import mock

import torch

from benchmarks import interpreted
from benchmarks.interpreted import Interpreted
from forwardpass import interpret
from forwardpass.ops.attention.cases import Case


class Tutorial:
    def __init__(self, path: str, arch: str):
        """Raises RuntimeError where the file is another one."""
        self.arch = arch
        spec = importlib.util.spec_from_file_location("triton_tutorial_06", path)
        if spec is None or spec.loader is None or not pathlib.Path(path).is_file():
            raise RuntimeError(
                f"{path} is no Python file: pass python/tutorials/06-fused-attention.py of a Triton checkout"
            )
        self.module = importlib.util.module_from_spec(spec)
        with interpret(arch), self._capability():
            spec.loader.exec_module(self.module)
        if not {"attention", "_attn_fwd"} <= vars(self.module).keys():
            raise RuntimeError(
                f"{path} has no attention and _attn_fwd: pass python/tutorials/06-fused-attention.py of Triton"
            )
        self.configs = list(self.module._attn_fwd.configs)

    @contextlib.contextmanager
    def _capability(self) -> Iterator[None]:
        """It asks torch, which sees no GPU here."""
        capability = (int(self.arch[3]), int(self.arch[4]))
        with mock.patch.object(torch.cuda, "get_device_capability", return_value=capability):
            yield

    def takes(self, case: Case) -> bool:
        return case == Case(
            (case.sizes[0],) * 2, (case.dims[0],) * 2, torch.float16, case.batch, (case.heads[0],) * 2,
            causal=case.causal, awkward=False,
        ) and case.dims[0] in (64, 128, 256)  # fmt: skip

    def run(self, case: Case) -> tuple[Interpreted, str]:
        """With the one of its own configurations that is modelled to be the fastest; and which one that is."""
        q, k, v = (x.transpose(1, 2).contiguous() for x in case.arguments()[:3])
        scale, tuner = case.dims[0] ** -0.5, self.module._attn_fwd
        runs: list[tuple[Interpreted, str]] = []
        reasons = set()
        for config in self.configs:
            if config.kwargs["BLOCK_M"] < config.kwargs["BLOCK_N"] and case.causal:
                continue  # it prunes them itself
            tuner.configs = [config]
            tuner.cache.clear()
            try:
                with self._capability():
                    result = interpreted.run_call(
                        lambda: self.module.attention(q, k, v, case.causal, scale, False), self.arch
                    )
            except Exception as e:  # shared memory that the GPU has not, what Triton cannot compile
                reasons.add(f"{type(e).__name__}: {str(e).splitlines()[0] if str(e) else ''}")
                continue
            runs.append((result, str(config)))
        if not runs:
            raise RuntimeError("; ".join(sorted(reasons)))
        return min(runs, key=lambda x: x[0].seconds)
