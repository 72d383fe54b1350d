"""Two processes that run a function together, as ranks of one group (gloo)."""

import contextlib
import copy
import importlib
import multiprocessing
import os
import re
import signal
import socket
import traceback
import warnings
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

import forwardpass as fp
from forwardpass.swap import rules

SIZE = 2
#: A rank that fails leaves the other one waiting.
WAIT = timedelta(seconds=20)


class Ranks:
    """Processes that stay for the next call, which is most of what a call costs. The second is a fork of the first, once that has
    imported what the function needs: of a model of transformers that is 5 core-seconds."""

    def __init__(self):
        self._process, self._pipes = None, []

    def run(self, function, *args):
        """function(*args) on every rank; it is of a module, and its arguments pickle. AssertionError with the first traceback."""
        if not self._process:
            self._start(function.__module__)
        for pipe in self._pipes:
            pipe.send((function, args))
        errors = [error for error in [pipe.recv() for pipe in self._pipes] if error]
        if errors:
            self.close()
            raise AssertionError("\n".join(errors))

    def _start(self, module):
        context = multiprocessing.get_context("spawn")
        with socket.socket() as s:
            s.bind(("localhost", 0))
            port = s.getsockname()[1]
        self._pipes, ends = zip(*(context.Pipe() for _ in range(SIZE)))
        self._process = context.Process(target=_serve, args=(module, port, ends), daemon=True)
        self._process.start()
        for end in ends:
            end.close()

    def close(self):
        if not self._process:
            return
        for pipe in self._pipes:
            pipe.close()
        self._process.join(WAIT.seconds)
        if self._process.is_alive():  # one waits for another, which has failed
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.join()
        self._process, self._pipes = None, []


def _serve(module, port, pipes):
    """All ranks: the first forks the others and waits for them, so that what they cost is counted."""
    os.setpgid(0, 0)
    torch.set_num_threads(1)
    for name in (module, "torch._dynamo"):  # the latter is imported by the first DTensor
        importlib.import_module(name)
    others = []
    for rank in range(1, SIZE):
        others.append(os.fork())
        if not others[-1]:
            _work(rank, port, pipes)
            os._exit(0)
    _work(0, port, pipes)
    for pid in others:
        os.waitpid(pid, 0)


def _work(rank, port, pipes):
    pipe = pipes[rank]
    for other in pipes:
        if other is not pipe:
            other.close()
    os.environ.update(
        MASTER_ADDR="localhost", MASTER_PORT=str(port), RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(SIZE)
    )
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo", rank=rank, world_size=SIZE, timeout=WAIT)
    rules.LEAST_SIZES_ON_CPU = {}
    with contextlib.suppress(EOFError):
        while True:
            function, args = pipe.recv()
            torch.manual_seed(0)
            try:
                function(*args)
                pipe.send(None)
            except Exception:
                pipe.send(f"rank {rank}:\n{traceback.format_exc()}")


def mesh():
    return dist.device_mesh.init_device_mesh("cpu", (SIZE,))


def refused(call, error, text):
    """What a call raises says."""
    with pytest.raises(error, match=re.escape(text)):
        call()


def weight_bytes(model):
    """Of quantised weights."""
    return sum(m.qweight.numel() * m.qweight.itemsize for m in model.modules() if isinstance(m, fp.nn.QuantizedLinear))


def slices(layer, x):
    """In float64, what a row-wise layer gives by definition: each slice of x is rounded by itself, as `layer` rounds rows, and sums
    are added. And the sum of magnitudes, of which errors of kernels are fractions."""
    weight, scale = layer._dequantized_weight(), layer._buffers.get("channel_scale")
    total, magnitude = 0, 0
    for columns in torch.arange(x.shape[-1]).chunk(SIZE):
        part = copy.copy(layer)
        part._buffers = dict(layer._buffers)
        if scale is not None:
            part._buffers["channel_scale"] = scale[columns]
        if layer._buffers["weight_scale"] is not None and layer._buffers["weight_scale"].dim() == 2:
            part._buffers["weight_scale"] = layer.weight_scale[:, columns[::128] // 128]
        a = part._quantized(x[..., columns].contiguous())
        total = total + a @ weight[:, columns].t()
        magnitude = magnitude + a.abs() @ weight[:, columns].abs().t()
    return total + (0 if layer.bias is None else layer.bias.double()), magnitude
