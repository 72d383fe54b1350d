"""A candidate in a process of its own: no other's threads spin beside its own, and none shares its allocator.

In one process, compiled steps of SmolLM2 with 512 tokens in the cache were 50 a second beside llama.cpp, CTranslate2 and OpenVINO,
and 80 without them (two cores of an EPYC, Zen 4).
"""

from __future__ import annotations

import contextlib
import multiprocessing
import sys
from multiprocessing.connection import Connection
from typing import Any

import torch
from torch import Tensor

from benchmarks import generate_peers
from benchmarks.generate_peers import Candidate, Failed, Subject
from benchmarks.peers import Missing
from forwardpass.common.memory import give_back_freed
from forwardpass.common.models.decoding import Decoding, Run
from forwardpass.common.timing import keep_freed_memory

#: Prompts of more tokens together leave gigabytes to an allocator that keeps what is freed: all candidates' do not fit into 24 GiB.
MOST_KEPT = 8192


def make(name: str, subject: Subject) -> Candidate:
    """As `generate_peers.make`, in a process that ends with this one. Raises what that raises, an error of its own as Failed."""
    spawn = multiprocessing.get_context("spawn")  # a fork would inherit the locks of threads that it does not have
    here, there = spawn.Pipe()
    process = spawn.Process(target=_serve, args=(there, name, subject, torch.get_num_threads()), daemon=True)
    process.start()
    there.close()

    def ask(*request: Any) -> Any:
        try:
            if request:
                here.send(request)
            answer = here.recv()
        except (EOFError, OSError):
            process.join()
            raise Failed(f"failed: its process ended with {process.exitcode}") from None
        if isinstance(answer, Exception):
            raise answer
        return answer

    def prepare(cell: Decoding) -> Run:
        ask("prepare", cell)
        return lambda ids, steps: ask("run", ids.tolist(), steps)  # type: ignore[no-any-return]

    def losses(rows: Tensor) -> Tensor:
        return torch.tensor(ask("losses", rows.tolist()))

    return Candidate(prepare, losses, *ask())


def _serve(connection: Connection, name: str, subject: Subject, threads: int) -> None:
    """Answers the requests of `make` until there are no more. Times are of one clock for all processes (CLOCK_MONOTONIC)."""
    torch.set_num_threads(threads)
    keep_freed_memory()
    with torch.inference_mode(), contextlib.redirect_stdout(sys.stderr):
        try:
            candidate = generate_peers.make(name, subject)
        except Exception as e:
            return connection.send(e if isinstance(e, Missing) else Failed(generate_peers.failure(e)))
        connection.send((candidate.weight_bytes, candidate.cache_itemsize))
        run: Run | None = None
        with contextlib.suppress(EOFError):
            while True:
                answer: Any = None
                request, *arguments = connection.recv()
                try:
                    if request == "prepare":
                        run = candidate.prepare(*arguments)
                    elif request == "losses":
                        answer = candidate.losses(torch.tensor(*arguments)).tolist()
                    elif run:
                        ids, steps = arguments
                        answer = run(torch.tensor(ids), steps)
                except Exception as e:
                    answer = Failed(generate_peers.failure(e))
                if request != "run" or sum(map(len, arguments[0])) > MOST_KEPT:
                    give_back_freed()
                connection.send(answer)
