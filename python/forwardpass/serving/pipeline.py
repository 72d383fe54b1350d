"""`fp.Pipeline`: preprocess, transfer, forward and postprocess of consecutive items at the same time, in order."""

from __future__ import annotations

import atexit
import os
import queue
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import CancelledError, Future
from contextlib import contextmanager
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from ..common.batches import Forward, device_of, eval_mode, map_tensors, run, tensors
from ..common.models.modules import plain_module
from .thread_state import captured, release_openmp_threads
from .transfer import named, transfer_for

#: the longest that the interpreter's exit waits for what a stage is working on
EXIT_WAIT_S = 10.0


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

    Errors. Whatever a stage raises, SystemExit and KeyboardInterrupt included, is its item's ItemError and touches no other
    item. An exception of `items` itself is no item's: the results of the items before it come first, then it is raised, with
    return_errors=True too. A KeyboardInterrupt in the loop or in `items`, a `break` and the iterator's `close()` end the loop
    at once, and drop what no stage has begun. What a future's done-callback raises is reported, and fails nothing.

    Threads. Several may submit and iterate at the same time, each with an iterator of its own. `with` blocks and iterators
    share one set of threads, which ends with the last of them. A stage may submit to its own pipeline, but not wait for itself:
    RuntimeError from a `submit` without a timeout while max_pending items are under way, where the stage works on an item of
    this pipeline or on what such an item submitted to another one; and from a wait without a timeout for a result that comes
    after the item it works on. Two pipelines whose stages wait for each other's results are not found out. Where the last block
    or iterator ends in a stage (a garbage collection can do that), the threads end after it.

    Processes. Threads do not survive a fork. In the child of a process that had the pipeline open, RuntimeError from `submit`,
    from iterating, and from waiting for a result that was not there, until the inherited blocks are left, which waits for
    nothing; the parent goes on. A Pipeline does not pickle: TypeError. One that is open at the interpreter's exit is closed as
    after an error; what a stage is working on then has 10 seconds.

    Args:
        model: runs in eval and inference mode; its flags are put back when the last thread has ended. What holds in the
            thread that begins (`fp.use_backend`, `fp.sdpa`, autocast, …) holds for all stages.
        preprocess: item -> batch (see `forwardpass.common.batches`), or None: items are batches. Called by `workers` threads.
        postprocess: result on the host -> what is returned, or None.
        forward, output: forward(model, batch), where the convention does not fit; output(result), on the device: what is
            copied to the host (default: all of the result).
        workers: threads that preprocess; more than one is for a preprocess that waits.
        depth: batches that may be ready before the model, and results that may be ready behind it.
        max_batch: None: an item is a batch. Else items are single: when the model is free it takes up to max_batch items,
            waiting for more until the first of them is max_wait_ms old. postprocess gets an item's own row.
        max_wait_ms: see max_batch; 0 takes what is there.
        collate: [preprocess(item), …] -> batch, with max_batch; default: tensors of one shape and dtype are stacked.
        max_pending: items that may be between `submit` and their result; `submit` waits while there are as many.

    Raises:
        TypeError: `model` is no nn.Module, or a stage cannot be called. ValueError: a number is out of its bounds.
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
        self._lock = threading.RLock()  # a garbage collection within it may end an iterator of this pipeline
        self._stages: _Stages | None = None
        self._users = 0
        _pipelines.add(self)

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "a Pipeline has threads, which do not pickle or copy: construct it where it runs, from its model and functions"
        )

    def __call__(self, items: Iterable[Any], *, return_errors: bool = False) -> Iterator[Any]:
        """The results of the items, in their order, as they are asked for; items are read a few ahead.

        An item that fails raises its ItemError when its turn comes, which ends the iteration; with return_errors=True the
        error is yielded in the place of its result, and the others go on. What `items` raises is raised after all results.
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
                source = enumerate(items)
                while True:
                    try:
                        index, item = next(source)
                    except StopIteration:
                        break
                    except Exception:
                        while pending:
                            yield first()
                        raise
                    pending.append(stages.submit(item, index=index))
                    while pending and (len(pending) > window or pending[0].done()):
                        yield first()
                while pending:
                    yield first()
            finally:  # a loop that was left, an error, a KeyboardInterrupt: what has not begun need not
                for future in () if stages.forked else pending:
                    future.cancel()

    def submit(self, item: Any, timeout: float | None = None) -> Future[Any]:
        """Within `with pipeline:`, from any thread: the future of one item's result.

        It waits while max_pending items are under way, at most `timeout` seconds: TimeoutError. The future raises an
        ItemError where the item failed; `cancel()` works until its preprocess begins. RuntimeError where the pipeline is not
        open, is another process's, or where the wait would be a stage's for itself.
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
        while True:
            with self._lock:
                stages = self._stages
                if stages is None or (stages.closed and stages.ended):
                    stages = self._stages = _Stages(self)
                if not stages.closed:
                    if stages.forked:
                        raise RuntimeError(_FORKED)
                    self._users += 1
                    return stages
            stages.join()

    def _end(self, drop: bool) -> None:
        with self._lock:
            if not self._users or self._stages is None:
                raise RuntimeError("the pipeline is not open: leave each `with pipeline:` once")
            self._users -= 1
            stages = self._stages
            if self._users or not stages.close(drop):
                return
        if stages.has_this_thread():
            return
        try:
            stages.join()
        except BaseException:  # a KeyboardInterrupt: nobody waits for the rest
            stages.close(drop=True)
            raise
        with self._lock:
            if self._stages is stages:
                self._stages = None


#: all there are: a fork and the interpreter's exit concern those that are open
_pipelines: weakref.WeakSet[Pipeline] = weakref.WeakSet()

_FORKED = (
    "this process was forked while the pipeline was open, and threads do not survive a fork: construct a Pipeline in this "
    "process, or fork before it is opened"
)


def _after_fork() -> None:
    for pipeline in list(_pipelines):
        pipeline._lock = threading.RLock()  # a thread that is not here may hold it
        if pipeline._stages is not None:
            pipeline._stages.lock, pipeline._stages.forked = threading.RLock(), True


os.register_at_fork(after_in_child=_after_fork)


@atexit.register
def _at_exit() -> None:
    """Python ends a daemon thread in the middle of what it does, which aborts the process where that is C++."""
    until = time.monotonic() + EXIT_WAIT_S
    stages = [p._stages for p in _pipelines if p._stages is not None]
    for s in stages:
        s.close(drop=True)
    for s in stages:
        s.join(until)


class _Work(threading.local):
    """What the thread that asks is working on, if it is a pipeline's."""

    stages: _Stages | None = None
    first = 0  #: the least number of its entries
    within: frozenset[_Stages] = frozenset()  #: the pipelines whose items those are, or come of


_work = _Work()


class _Result(Future[Any]):
    """A future that refuses a wait that has no end."""

    def __init__(self, stages: _Stages):
        super().__init__()
        self.stages = weakref.ref(stages)  # who keeps a result keeps no model
        self.number = 0

    def result(self, timeout: float | None = None) -> Any:
        self._ends(timeout)
        return super().result(timeout)

    def exception(self, timeout: float | None = None) -> BaseException | None:
        self._ends(timeout)
        return super().exception(timeout)

    def _ends(self, timeout: float | None) -> None:
        stages = self.stages()
        if stages is None or self.done():
            return
        if stages.forked:
            raise RuntimeError(_FORKED)
        if timeout is None and stages is _work.stages and self.number >= _work.first:
            raise RuntimeError("a stage waits for a result of its own pipeline that comes after the item it works on, so for "
                               "itself: wait in a thread of your own, or pass a timeout")  # fmt: skip


class _Dropped(CancelledError):
    """An entry that is not worked on, because it was cancelled or the pipeline is closed."""


@contextmanager
def _reported() -> Iterator[None]:
    """What a future's callbacks raise is not the pipeline's: a thread that ended by it would leave the others waiting."""
    try:
        yield
    except BaseException as e:  # concurrent.futures logs an Exception itself
        threading.excepthook(threading.ExceptHookArgs((type(e), e, e.__traceback__, threading.current_thread())))


class _Entry:
    """An item on its way."""

    def __init__(self, item: Any, index: int | None, result: _Result):
        self.item, self.index, self.result = item, index, result
        self.number = 0  # in the order of submission
        self.within = _work.within
        self.prepared: Future[Any] = Future()
        self.submitted = time.monotonic()

    def finish(self, value: Any) -> None:
        with _reported():
            self.result.set_result(value)

    def fail(self, stage: str, error: BaseException) -> None:
        with _reported():
            if not isinstance(error, _Dropped):
                self.result.set_exception(ItemError(self.number if self.index is None else self.index, stage, error))
            elif not self.result.cancelled():
                self.result.set_exception(CancelledError())

    def cancel(self) -> None:
        with _reported():
            self.result.cancel()


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
        self.results: queue.Queue[tuple[list[_Entry], Any] | None] = queue.Queue(pipeline.depth)
        self.ahead = threading.Semaphore(max(pipeline.depth * (pipeline.max_batch or 1), pipeline.workers))
        self.pending = threading.Semaphore(pipeline.max_pending)
        self.lock = threading.RLock()  # both queues have the same order
        self.submitted = 0
        self.closed = self.dropped = self.forked = False
        self.carried = captured()
        self.flags = eval_mode(pipeline.model)
        self.flags.__enter__()
        release_openmp_threads()  # the model runs in another thread now
        loops = [*[self._prepare] * pipeline.workers, self._compute, self._finish]
        self.threads = [
            threading.Thread(target=self._thread, args=(loop,), name=f"forwardpass{loop.__name__}", daemon=True)
            for loop in loops
        ]
        self.working = len(self.threads)
        for thread in self.threads:
            thread.start()

    def _thread(self, loop: Callable[[], None]) -> None:
        try:
            with self.carried(), torch.inference_mode():
                loop()
        finally:
            with self.lock:
                self.working -= 1
                if not self.working:
                    self.flags.__exit__(None, None, None)

    @property
    def ended(self) -> bool:
        return not any(thread.is_alive() for thread in self.threads)

    def has_this_thread(self) -> bool:
        """Whether the thread that asks is one of these."""
        return threading.current_thread() in self.threads

    def submit(self, item: Any, *, index: int | None = None, timeout: float | None = None) -> Future[Any]:
        if self.forked:
            raise RuntimeError(_FORKED)
        from_stage = self in _work.within
        if not self.pending.acquire(blocking=timeout is not None or not from_stage, timeout=timeout):
            under_way = f"{self.pipeline.max_pending} items are under way"
            if timeout is None:
                raise RuntimeError(f"a stage submits to its own pipeline while {under_way}, and would wait for itself: raise "
                                   f"max_pending, submit in a thread of your own, or pass a timeout")  # fmt: skip
            raise TimeoutError(f"{under_way}, and none ended within {timeout} s: submit less, or raise max_pending")
        result = _Result(self)
        pending = self.pending  # not self: a future keeps its callbacks
        result.add_done_callback(lambda _: pending.release())
        entry = _Entry(item, index, result)
        with self.lock:
            if self.closed:
                result.cancel()
                raise RuntimeError("the pipeline is closed: submit within `with pipeline:`")
            entry.number = result.number = self.submitted
            self.submitted += 1
            self.ordered.put(entry)
            self.inbox.put(entry)
        return result

    def close(self, drop: bool) -> bool:
        """Lets the threads end, with `drop` without beginning anything more; False where that was done before."""
        with self.lock:
            self.dropped |= drop
            if self.closed:
                return False
            self.closed = True
            if self.forked:
                self.flags.__exit__(None, None, None)
            self.ordered.put(None)
            for _ in range(self.pipeline.workers):
                self.inbox.put(None)
            return True

    def join(self, until: float | None = None) -> None:
        if self.has_this_thread():
            raise RuntimeError("a stage begins its own pipeline, which is being closed, and would wait for itself: "
                               "iterate and submit within `with pipeline:`")  # fmt: skip
        for thread in self.threads:
            thread.join(None if until is None else max(0.0, until - time.monotonic()))

    @contextmanager
    def _working(self, entries: list[_Entry]) -> Iterator[None]:
        _work.stages, _work.first = self, entries[0].number
        _work.within = frozenset({self}).union(*(entry.within for entry in entries))
        try:
            yield
        finally:
            _work.stages, _work.within = None, frozenset()

    def _prepare(self) -> None:
        while True:
            self.ahead.acquire()  # before the entry is taken: the first entries always have a place
            entry = self.inbox.get()
            if entry is None:
                self.ahead.release()
                return
            with self._working([entry]):
                self._prepare_one(entry)

    def _prepare_one(self, entry: _Entry) -> None:
        if self.dropped:
            entry.cancel()
        if not entry.result.set_running_or_notify_cancel():
            entry.prepared.set_exception(_Dropped())
            return
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
            if entries:
                with self._working(entries):
                    self._compute_batch(entries)
        self.results.put(None)

    def _compute_batch(self, entries: list[_Entry]) -> None:
        ready = []
        for entry in entries:
            try:
                ready.append((entry, entry.prepared.result()))
            except BaseException as e:
                entry.fail("preprocess", e)
            self.ahead.release()
        if ready:
            self._forward(ready)

    def _gather(self) -> tuple[list[_Entry], bool]:
        """The entries of the next batch, and whether there are more to come."""
        entry = self.ordered.get()
        if entry is None:
            return [], False
        entries, until = [entry], entry.submitted + self.pipeline.max_wait_ms / 1e3
        while len(entries) < (self.pipeline.max_batch or 1):
            wait = until - time.monotonic()
            try:
                entry = self.ordered.get(timeout=wait) if wait > 0 else self.ordered.get_nowait()
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
                raise _Dropped
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
                for member in ready:
                    self._forward([member])
        else:
            self.results.put((entries, moved))

    def _finish(self) -> None:
        while (group := self.results.get()) is not None:
            with self._working(group[0]), named("output", self.device):
                self._finish_batch(*group)

    def _finish_batch(self, entries: list[_Entry], moved: Any) -> None:
        try:
            result = self.transfer.wait(moved)
            rows = _rows(result, len(entries)) if self.pipeline.max_batch else [result]
        except BaseException as e:
            for entry in entries:
                entry.fail("forward", e)
            return
        for entry, row in zip(entries, rows):
            try:
                value = row if self.pipeline.postprocess is None else self.pipeline.postprocess(row)
            except BaseException as e:
                entry.fail("postprocess", e)
            else:
                entry.finish(value)


class _Unlike(ValueError):
    """Samples that do not stack: it is the pipeline that wants another collate, whichever items meet."""


def _stack(samples: list[Any]) -> Any:
    """A batch of samples that are alike: tensors of one shape and dtype are stacked, mappings and sequences member by member."""
    first = samples[0]
    if isinstance(first, Tensor):
        if any(not isinstance(s, Tensor) or s.shape != first.shape for s in samples):
            raise _Unlike("the samples of a batch have tensors of different shapes: pass collate= that pads them")
        # torch.stack makes float32 of int64 beside float32, and 2**24 of 2**24 + 1
        if len(dtypes := dict.fromkeys(str(s.dtype) for s in samples)) > 1:
            raise _Unlike(
                f"the samples of a batch have tensors of {' and '.join(dtypes)}: pass collate= that makes them one dtype"
            )
        return torch.stack(samples)
    if isinstance(first, Mapping):
        if any(s.keys() != first.keys() for s in samples):  # a name that the first lacks would be left out
            raise ValueError("the samples of a batch are mappings of different names: pass collate= that takes them")
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
