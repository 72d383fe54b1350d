"""`fp.Pipeline`: preprocess, transfer, forward and postprocess of consecutive items at the same time, in order."""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import CancelledError, Future
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..batches import Forward, device_of, eval_mode, map_tensors, run, tensors
from ..swap.walker import plain_module
from ..thread_state import captured, release_openmp_threads
from .transfer import named, transfer_for


class ItemError(RuntimeError):
    """An item that failed; `__cause__` is what was raised.

    Attributes:
        index: of the item among those that its pipeline was given, from 0.
        stage: "preprocess", "forward" or "postprocess".
    """

    def __init__(self, index: int, stage: str, cause: BaseException):
        super().__init__(f"item {index} failed in {stage}: {type(cause).__name__}: {cause}")
        self.index, self.stage, self.__cause__ = index, stage, cause


class Pipeline:
    """Runs a model over a stream of items, its stages at the same time, each in its own threads.

    An item goes through `preprocess(item)`, which makes a batch; on a GPU through pinned memory and a copy on a stream of
    its own; through the model; back to the host in the same way; and through `postprocess(result)`. Results come in the
    order of the items. On a CPU the same threads overlap what waits (files, sockets, other devices) with the model, and
    share the cores for what computes: `fp.profile` predicts how much that gives.

        pipeline = fp.Pipeline(model, preprocess=tokenize, postprocess=pool)
        for result in pipeline(items):  # its threads end with the loop, however that ends
            ...
        with fp.Pipeline(model, tokenize, rank, max_batch=16, max_wait_ms=5, collate=pad) as pipeline:
            future = pipeline.submit(item)  # a server: single items, gathered into batches

    Args:
        model: runs in eval and inference mode; its flags are put back when the last thread has ended. What holds in the
            thread that begins (`fp.use_backend`, `fp.sdpa`, autocast, …) holds for all stages.
        preprocess: item -> batch (see `forwardpass.batches`), or None: items are batches. Called by `workers` threads.
        postprocess: result on the host -> what is returned, or None.
        forward, output: forward(model, batch), where the convention does not fit; output(result), on the device: what is
            copied to the host (default: all of the result).
        workers: threads that preprocess; more than one is for a preprocess that waits.
        depth: batches that may be ready before the model, and results that may be ready behind it.
        max_batch: None: an item is a batch. Else items are single: when the model is free it takes up to max_batch items,
            waiting for more until the first of them is max_wait_ms old. postprocess gets an item's own row.
        max_wait_ms: see max_batch; 0 takes what is there.
        collate: [preprocess(item), …] -> batch, with max_batch; default: tensors of equal shape are stacked.
        max_pending: items that may be between `submit` and their result; `submit` waits while there are as many.

    Raises:
        TypeError, ValueError: what was required, what was given, what to do.
    """

    def __init__(
        self,
        model: nn.Module,
        preprocess: Callable[[Any], Any] | None = None,
        postprocess: Callable[[Any], Any] | None = None,
        *,
        forward: Forward | None = None,
        output: Callable[[Any], Any] | None = None,
        workers: int = 1,
        depth: int = 2,
        max_batch: int | None = None,
        max_wait_ms: float = 0.0,
        collate: Callable[[list[Any]], Any] | None = None,
        max_pending: int = 1024,
    ):
        plain_module("Pipeline", model)
        for name, function in (("preprocess", preprocess), ("postprocess", postprocess), ("forward", forward),
                               ("output", output), ("collate", collate)):  # fmt: skip
            if function is not None and not callable(function):
                raise TypeError(f"{name} is a function or None, not {type(function).__name__}")
        for name, number in (("workers", workers), ("depth", depth), ("max_pending", max_pending),
                             ("max_batch", 1 if max_batch is None else max_batch)):  # fmt: skip
            if not isinstance(number, int) or isinstance(number, bool) or number < 1:
                raise ValueError(f"{name} is a number of 1 or more, not {number!r}")
        if not 0 <= max_wait_ms < float("inf"):
            raise ValueError(f"max_wait_ms is a time in milliseconds, 0 or more, not {max_wait_ms!r}")
        if max_batch is None and (max_wait_ms or collate):
            raise ValueError("max_wait_ms and collate are for single items: pass max_batch= too, or leave them out")
        self.model, self.preprocess, self.postprocess = model, preprocess, postprocess
        self.forward, self.output, self.collate = forward, output, collate or _stack
        self.workers, self.depth, self.max_pending = workers, depth, max_pending
        self.max_batch, self.max_wait_ms = max_batch, max_wait_ms
        self._lock = threading.Lock()
        self._stages: _Stages | None = None
        self._users = 0

    def __call__(self, items: Iterable[Any], *, return_errors: bool = False) -> Iterator[Any]:
        """The results of the items, in their order, as they are asked for; items are read a few ahead.

        An item that fails raises its ItemError when its turn comes, which ends the iteration; with return_errors=True the
        error is yielded in the place of its result, and the others go on.
        """
        if not isinstance(items, Iterable):
            raise TypeError(f"a pipeline takes an iterable of items, not {type(items).__name__}: pass [item] for one")
        return self._iterate(items, return_errors)

    def _iterate(self, items: Iterable[Any], return_errors: bool) -> Iterator[Any]:
        pending: deque[Future[Any]] = deque()
        # as many as keep every stage and both of its queues full
        window = self.workers + (2 * self.depth + 2) * (self.max_batch or 1)

        def first() -> Any:
            future = pending.popleft()
            if return_errors and (error := future.exception()):
                return error
            return future.result()

        with self._open() as stages:
            try:
                for index, item in enumerate(items):
                    pending.append(stages.submit(item, index=index))
                    while pending and (len(pending) > window or pending[0].done()):
                        yield first()
                while pending:
                    yield first()
            finally:  # a loop that was left, an error, a KeyboardInterrupt: what has not begun need not
                for future in pending:
                    future.cancel()

    def submit(self, item: Any, timeout: float | None = None) -> Future[Any]:
        """Within `with pipeline:`, from any thread: the future of one item's result.

        It waits while max_pending items are under way, at most `timeout` seconds: TimeoutError. The future raises an
        ItemError where the item failed; `cancel()` works until its preprocess begins.
        """
        stages = self._stages
        if stages is None:
            raise RuntimeError("the pipeline is not open: submit within `with pipeline:`")
        return stages.submit(item, timeout=timeout)

    def __enter__(self) -> Pipeline:
        self._begin()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Waits for the items under way; after an error, only for those that a stage is working on."""
        self._end(drop=kind is not None)

    @contextmanager
    def _open(self) -> Iterator[_Stages]:
        stages = self._begin()
        try:
            yield stages
        except BaseException:
            self._end(drop=True)
            raise
        self._end(drop=False)

    def _begin(self) -> _Stages:
        with self._lock:
            if self._stages is None:
                self._stages = _Stages(self)
            self._users += 1
            return self._stages

    def _end(self, drop: bool) -> None:
        with self._lock:
            self._users -= 1
            if self._users or self._stages is None:
                return
            stages, self._stages = self._stages, None
            stages.close(drop)


class _Entry:
    """An item on its way."""

    def __init__(self, item: Any, index: int, result: Future[Any]):
        self.item, self.index, self.result = item, index, result
        self.prepared: Future[Any] = Future()
        self.submitted = time.monotonic()

    def fail(self, stage: str, error: BaseException) -> None:
        if isinstance(error, CancelledError):
            if not self.result.cancelled():
                self.result.set_exception(error)
        else:
            self.result.set_exception(ItemError(self.index, stage, error))


class _Stages:
    """The threads of an open pipeline, and the queues between them.

    inbox -> `workers` threads prepare -> `ordered`, the same entries in the order of submission -> one thread runs the
    model -> `done` -> one thread finishes. `ahead` bounds what is prepared and `done` what is finished; `pending` bounds
    everything.
    """

    def __init__(self, pipeline: Pipeline):
        self.pipeline = pipeline
        self.device = device_of(pipeline.model)
        self.transfer = transfer_for(self.device)
        self.inbox: queue.SimpleQueue[_Entry | None] = queue.SimpleQueue()
        self.ordered: queue.SimpleQueue[_Entry | None] = queue.SimpleQueue()
        self.done: queue.Queue[tuple[list[_Entry], Any] | None] = queue.Queue(pipeline.depth)
        self.ahead = threading.Semaphore(max(pipeline.depth * (pipeline.max_batch or 1), pipeline.workers))
        self.pending = threading.Semaphore(pipeline.max_pending)
        self.lock = threading.Lock()  # both queues have the same order
        self.submitted = 0
        self.closed = self.dropped = False
        self.carried = captured()
        self.flags = eval_mode(pipeline.model)
        self.flags.__enter__()
        release_openmp_threads()  # the model runs in another thread now
        loops = [*[self._prepare] * pipeline.workers, self._compute, self._finish]
        self.threads = [
            threading.Thread(target=self._thread, args=(loop,), name=f"forwardpass{loop.__name__}", daemon=True)
            for loop in loops
        ]
        for thread in self.threads:
            thread.start()

    def _thread(self, loop: Callable[[], None]) -> None:
        with self.carried(), torch.inference_mode():
            loop()

    def submit(self, item: Any, *, index: int | None = None, timeout: float | None = None) -> Future[Any]:
        if not self.pending.acquire(timeout=timeout):
            raise TimeoutError(f"{self.pipeline.max_pending} items are under way, and none ended within {timeout} s: "
                               f"submit less, or raise max_pending")  # fmt: skip
        result: Future[Any] = Future()
        result.add_done_callback(lambda _: self.pending.release())
        with self.lock:
            if self.closed:
                result.cancel()
                raise RuntimeError("the pipeline is closed: submit within `with pipeline:`")
            entry = _Entry(item, self.submitted if index is None else index, result)
            self.submitted += 1
            self.ordered.put(entry)
            self.inbox.put(entry)
        return result

    def close(self, drop: bool) -> None:
        """Ends the threads: with `drop` without beginning anything more."""
        with self.lock:
            self.closed, self.dropped = True, drop
            self.ordered.put(None)
            for _ in range(self.pipeline.workers):
                self.inbox.put(None)
        try:
            for thread in self.threads:
                thread.join()
        finally:
            self.flags.__exit__(None, None, None)

    def _prepare(self) -> None:
        while True:
            self.ahead.acquire()  # before the entry is taken: the first entries always have a place
            entry = self.inbox.get()
            if entry is None:
                self.ahead.release()
                return
            if self.dropped:
                entry.result.cancel()
            if not entry.result.set_running_or_notify_cancel():
                entry.prepared.set_exception(CancelledError())
                continue
            try:
                with named("input", self.device):
                    batch = entry.item if self.pipeline.preprocess is None else self.pipeline.preprocess(entry.item)
                    entry.prepared.set_result(batch if self.pipeline.max_batch else self.transfer.stage(batch))
            except BaseException as e:
                entry.prepared.set_exception(e)

    def _compute(self) -> None:
        more = True
        while more:
            entries, more = self._gather()
            ready = []
            for entry in entries:
                try:
                    ready.append((entry, entry.prepared.result()))
                except BaseException as e:
                    entry.fail("preprocess", e)
                self.ahead.release()
            if ready:
                self._forward(ready)
        self.done.put(None)

    def _gather(self) -> tuple[list[_Entry], bool]:
        """The entries of the next batch, and whether there are more to come."""
        entry = self.ordered.get()
        if entry is None:
            return [], False
        entries, until = [entry], entry.submitted + self.pipeline.max_wait_ms / 1e3
        while len(entries) < (self.pipeline.max_batch or 1):
            left = until - time.monotonic()
            try:
                entry = self.ordered.get(timeout=left) if left > 0 else self.ordered.get_nowait()
            except queue.Empty:
                break
            if entry is None:
                return entries, False
            entries.append(entry)
        return entries, True

    def _forward(self, ready: list[tuple[_Entry, Any]]) -> None:
        entries = [entry for entry, _ in ready]
        p = self.pipeline
        try:
            if self.dropped:
                raise CancelledError
            batch = ready[0][1]
            if p.max_batch:
                batch = self.transfer.stage(p.collate([b for _, b in ready]))
            with named("transfer", self.device):
                batch = self.transfer.to_device(batch)
            with named("forward", self.device):
                result = run(p.model, batch, p.forward)
                result = result if p.output is None else p.output(result)
                moved = self.transfer.to_host(result)
        except BaseException as e:
            if len(ready) == 1 or self.dropped or isinstance(e, _Unlike):
                for entry in entries:
                    entry.fail("forward", e)
            else:  # one item must not fail another: each on its own
                for one in ready:
                    self._forward([one])
        else:
            self.done.put((entries, moved))

    def _finish(self) -> None:
        while (group := self.done.get()) is not None:
            entries, moved = group
            with named("output", self.device):
                try:
                    result = self.transfer.wait(moved)
                    rows = _rows(result, len(entries)) if self.pipeline.max_batch else [result]
                except BaseException as e:
                    for entry in entries:
                        entry.fail("forward", e)
                    continue
                for entry, row in zip(entries, rows):
                    try:
                        value = row if self.pipeline.postprocess is None else self.pipeline.postprocess(row)
                    except BaseException as e:
                        entry.fail("postprocess", e)
                    else:
                        entry.result.set_result(value)


class _Unlike(ValueError):
    """Samples that do not stack: it is the pipeline that wants another collate, whichever items meet."""


def _stack(samples: list[Any]) -> Any:
    """A batch of samples that are alike: tensors of one shape are stacked, mappings and sequences member by member."""
    first = samples[0]
    if isinstance(first, Tensor):
        if any(not isinstance(s, Tensor) or s.shape != first.shape for s in samples):
            raise _Unlike("the samples of a batch have tensors of different shapes: pass collate= that pads them")
        return torch.stack(samples)
    if isinstance(first, Mapping):
        return {name: _stack([s[name] for s in samples]) for name in first}
    if isinstance(first, tuple | list):
        return tuple(_stack(list(members)) for members in zip(*samples, strict=True))
    raise TypeError(f"a sample is a tensor, a mapping or a sequence of them, not {type(first).__name__}: pass collate=")


def _rows(result: Any, n: int) -> list[Any]:
    """The rows of a batch's result: of each tensor the first dimension."""
    for t in tensors(result):
        if t.dim() == 0 or len(t) != n:
            raise ValueError(
                f"a result of shape {tuple(t.shape)} has no row for each of {n} items: pass output=fn(result) that has"
            )

    def row(i: int) -> Any:
        return map_tensors(result, lambda t: t[i])

    return [row(i) for i in range(n)]
