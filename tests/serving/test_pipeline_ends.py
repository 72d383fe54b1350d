"""fp.Pipeline where something ends: the source, a stage, a loop, a process; and where a stage would wait for itself."""

import concurrent.futures
import copy
import gc
import itertools
import os
import pickle
import signal
import subprocess
import sys
import threading
import weakref

import pytest
import torch
from pipelines import TIMEOUT, Double, Held, fails_at, no_thread_stays, number, ours  # noqa: F401
from rotation import in_turn
from torch import nn

import forwardpass as fp


@pytest.mark.parametrize("return_errors", [False, True])
def test_an_error_of_the_source_comes_after_the_results_before_it(return_errors):
    def items():
        yield from range(7)
        raise OSError("torn")

    model, seen = Double().train(), []
    with pytest.raises(OSError, match="torn"):
        seen.extend(fp.Pipeline(model, number, torch.Tensor.item)(items(), return_errors=return_errors))
    assert seen == [2.0 * i for i in range(7)]
    assert not ours()
    assert model.training


def test_an_error_of_an_item_comes_before_that_of_the_source():
    def items():
        yield from (0, 1, 2)
        raise OSError("torn")

    with pytest.raises(fp.types.ItemError, match="item 2 failed in preprocess"):
        list(fp.Pipeline(Double(), *fails_at("preprocess"))(items()))
    seen = []
    with pytest.raises(OSError, match="torn"):
        seen.extend(fp.Pipeline(Double(), *fails_at("preprocess"))(items(), return_errors=True))
    assert seen[:2] == [0.0, 2.0]
    assert (seen[2].index, seen[2].stage) == (2, "preprocess")


@pytest.mark.parametrize("kind", [SystemExit, KeyboardInterrupt, GeneratorExit, StopIteration,
                                  concurrent.futures.CancelledError])  # fmt: skip
@pytest.mark.parametrize("stage", ["preprocess", "forward", "postprocess"])
def test_whatever_a_stage_raises_is_its_items_error(stage, kind):
    def raises(name, value, i):
        if name == stage and i == 1:
            raise kind("end")
        return value

    pipeline = fp.Pipeline(
        nn.Identity(), lambda i: raises("preprocess", number(i), i), lambda x: raises("postprocess", x.item(), x.item()),
        forward=lambda model, x: raises("forward", x, x.item()),
    )  # fmt: skip
    got = list(pipeline(range(3), return_errors=True))
    assert (got[0], got[2]) == (0.0, 2.0)
    assert (got[1].index, got[1].stage, type(got[1].__cause__)) == (1, stage, kind)


@pytest.mark.parametrize("how", ["break", "error"])
def test_an_endless_source_can_be_left(how):
    def loop():
        for y in fp.Pipeline(Double(), number, torch.Tensor.item, workers=2)(itertools.count()):
            if y == 10.0:
                if how == "break":
                    break
                raise OSError("stop")

    if how == "break":
        loop()
    else:
        with pytest.raises(OSError, match="stop"):
            loop()
    assert not ours()


def test_two_threads_iterate_at_the_same_time():
    pipeline, got = fp.Pipeline(Double(), number, torch.Tensor.item, depth=1), {}

    def iterate(start):
        got[start] = list(pipeline(range(start, start + 50)))

    threads = [threading.Thread(target=iterate, args=(start,)) for start in (0, 1000)]
    for t in threads:
        t.start()
    assert list(zip(pipeline(range(5)), pipeline(range(5, 10)))) == [(2.0 * i, 2.0 * i + 10) for i in range(5)]
    for t in threads:
        t.join(TIMEOUT)
    assert got == {start: [2.0 * i for i in range(start, start + 50)] for start in (0, 1000)}
    assert not ours()


def calls_from(stage, call):
    """A pipeline's functions, of which one calls `call(item)` and returns what that gives as a result."""
    found = {}

    def once(name, value, i):
        if name == stage and i not in found:
            try:
                found[i] = call(i)
            except Exception as e:
                found[i] = e
        return value

    return found, dict(
        preprocess=lambda i: once("preprocess", number(i), i),
        forward=lambda model, x: once("forward", model(x), int(x)),
        postprocess=lambda x: once("postprocess", x.item(), int(x.item() / 2)),
    )


@pytest.mark.parametrize("stage", ["preprocess", "forward", "postprocess"])
def test_a_stage_that_submits_to_its_own_full_pipeline_is_refused(stage):
    found, functions = calls_from(stage, lambda i: pipeline.submit(i + 100))
    with fp.Pipeline(Double(), **functions, max_pending=1) as pipeline:
        assert pipeline.submit(0).result(TIMEOUT) == 0.0
    assert isinstance(found[0], RuntimeError)
    assert "raise max_pending" in str(found[0])

    found, functions = calls_from(stage, lambda i: pipeline.submit(100) if i == 0 else None)
    with fp.Pipeline(Double(), **functions, max_pending=2) as pipeline:  # there is a place: it works
        assert pipeline.submit(0).result(TIMEOUT) == 0.0
        assert found[0].result(TIMEOUT) == 200.0

    found, functions = calls_from(stage, lambda i: pipeline.submit(i + 100, timeout=0.01))
    with fp.Pipeline(Double(), **functions, max_pending=1) as pipeline:
        pipeline.submit(0).result(TIMEOUT)
    assert isinstance(found[0], TimeoutError)


@pytest.mark.parametrize("stage", ["preprocess", "forward", "postprocess"])
def test_a_stage_that_would_wait_for_itself_is_refused(stage):
    for call in (lambda i: pipeline.submit(i + 100).result(), lambda i: pipeline.submit(i + 100).exception(),
                 lambda i: list(pipeline([i + 100]))):  # fmt: skip
        found, functions = calls_from(stage, lambda i, call=call: call(i) if i < 100 else None)
        with fp.Pipeline(Double(), **functions, workers=2) as pipeline:
            assert pipeline.submit(0).result(TIMEOUT) == 0.0
        assert isinstance(found[0], RuntimeError), found
        assert "so for itself" in str(found[0])


def test_a_stage_may_wait_for_an_earlier_item():
    futures = []

    def preprocess(i):
        return number(i + (futures[i - 1].result() if i else 0))

    with fp.Pipeline(Double(), preprocess, torch.Tensor.item) as pipeline:
        for i in range(4):
            futures.append(pipeline.submit(i))
        assert [f.result(TIMEOUT) for f in futures] == [0.0, 2.0, 8.0, 22.0]


def test_a_stage_of_a_pipeline_within_does_not_wait_for_the_outer_one():
    found, functions = calls_from("forward", lambda i: outer.submit(i + 100))
    inner = fp.Pipeline(Double(), **functions)
    with inner, fp.Pipeline(Double(), lambda i: inner.submit(i).result() and number(i), max_pending=1) as outer:
        outer.submit(1).result(TIMEOUT)
    assert isinstance(found[1], RuntimeError)
    assert "raise max_pending" in str(found[1])


def test_a_callback_that_raises_fails_nothing(monkeypatch):
    reported = []
    monkeypatch.setattr(threading, "excepthook", lambda args: reported.append(args.exc_type))

    def callback(_):
        raise SystemExit

    held = Held()
    with fp.Pipeline(Double(), *fails_at("postprocess"), forward=held) as pipeline:
        futures = [pipeline.submit(i) for i in range(6)]
        for f in futures:
            f.add_done_callback(callback)
        held.go.set()
        assert [f.result(TIMEOUT) for f in futures if f is not futures[2]] == [0.0, 2.0, 6.0, 8.0, 10.0]
        with pytest.raises(fp.types.ItemError, match="full"):
            futures[2].result(TIMEOUT)
    assert reported == [SystemExit] * 6


def test_a_block_is_left_once():
    model = Double().train()
    pipeline = fp.Pipeline(model, number)
    with pipeline:
        pass
    for _ in range(2):
        with pytest.raises(RuntimeError, match="leave each `with pipeline:` once"):
            pipeline.__exit__(None, None, None)
    with pytest.raises(RuntimeError, match="submit within `with pipeline:`"):
        pipeline.submit(1)
    with pipeline:
        assert pipeline.submit(1).result(TIMEOUT).item() == 2.0
    assert not ours()
    assert model.training


@pytest.mark.parametrize("stage", ["preprocess", "forward", "postprocess"])
def test_a_stage_that_ends_its_own_pipeline_does_not_wait_for_itself(stage):
    model = Double().train()
    found, functions = calls_from(stage, lambda i: None if i else pipeline.__exit__(None, None, None))
    pipeline = fp.Pipeline(model, **functions)
    pipeline.__enter__()
    assert pipeline.submit(0).result(TIMEOUT) == 0.0
    assert found[0] is None
    assert list(pipeline([5])) == [10.0]  # after the threads of before have ended
    assert model.training


def test_a_stage_does_not_begin_its_own_pipeline_again_while_it_is_closed():
    closing = threading.Event()

    def call(i):
        assert closing.wait(TIMEOUT)
        return list(pipeline([1]))

    found, functions = calls_from("forward", call)
    pipeline = fp.Pipeline(Double(), **functions)
    with pipeline:
        pipeline.submit(0)
        stages = pipeline._stages
        end = stages.close
        stages.close = lambda drop: (end(drop), closing.set())[0]
    assert isinstance(found[0], RuntimeError)
    assert "is being closed" in str(found[0])


@pytest.fixture
def interruptible():
    """Also where these tests run in a shell's background, which ignores the signal."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_an_interrupt_while_a_block_ends_drops_what_has_not_begun():
    model, held, futures = Double(), Held(), []

    def interrupt():
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
        threading.Timer(0.2, held.go.set).start()

    def loop():
        with fp.Pipeline(model, number, forward=held) as pipeline:
            futures.extend(pipeline.submit(i) for i in range(50))
            assert held.begun.wait(TIMEOUT)
            threading.Timer(0.2, interrupt).start()

    with pytest.raises(KeyboardInterrupt):
        loop()
    assert futures[0].result(TIMEOUT).item() == 0.0
    with pytest.raises(concurrent.futures.CancelledError):
        futures[49].result(TIMEOUT)
    assert len(model.batches) == 1


def test_a_pipeline_that_was_used_keeps_no_model():
    model = Double()
    pipeline, gone = fp.Pipeline(model, number), weakref.ref(model)
    with pipeline:
        future = pipeline.submit(1)
    gc.collect()
    gc.disable()
    try:
        del model, pipeline
        assert gone() is None
    finally:
        gc.enable()
    assert future.result().item() == 2.0


def test_a_pipeline_does_not_pickle():
    pipeline = fp.Pipeline(Double())
    for take in (pickle.dumps, copy.copy, copy.deepcopy):
        with pytest.raises(TypeError, match="construct it where it runs"):
            take(pipeline)


def in_a_fork(function):
    """What `function()` returns in a forked child, as a string; the child ends without what pytest would do at its exit."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            text = str(function())
        except BaseException as e:
            text = f"{type(e).__name__}: {e}"
        os.write(write, text.encode())
        os._exit(0)
    os.close(write)
    killer = threading.Timer(TIMEOUT, os.kill, (child, signal.SIGKILL))
    killer.start()
    with open(read) as pipe:
        text = pipe.read()
    os.waitpid(child, 0)
    killer.cancel()
    return text or "it hung"


@pytest.mark.every(3)
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_in_a_forked_child_an_open_pipeline_is_refused_and_the_parents_goes_on():
    model, held = Double().train(), Held()
    pipeline = fp.Pipeline(model, number, torch.Tensor.item, forward=held)
    results = pipeline(range(50))

    def iterate():  # what was there before the fork comes
        while True:
            next(results)

    def leave_all():
        results.close()
        pipeline.__exit__(None, None, None)
        assert model.training
        pipeline.forward = None
        return list(pipeline([3]))  # with threads of the child's own

    with pipeline:
        pending = pipeline.submit(7)
        assert held.begun.wait(TIMEOUT)
        refused = "RuntimeError: this process was forked while the pipeline was open"
        for wait in (
            lambda: pipeline.submit(8),
            pending.result,
            lambda: pending.exception(1),
            lambda: next(pipeline([1])),
        ):
            assert in_a_fork(wait).startswith(refused)
        held.go.set()
        assert pending.result(TIMEOUT) == 14.0
        assert next(results) == 0.0
        assert in_a_fork(iterate).startswith(refused)
        assert in_a_fork(leave_all) == "[6.0]"
        assert list(results) == [2.0 * i for i in range(1, 50)]
    assert model.training


SCRIPT = """
import itertools, sys, time, torch, forwardpass as fp
model = torch.nn.Sequential(*(torch.nn.Linear(512, 512) for _ in range(8)))
pipeline = fp.Pipeline(model, lambda i: torch.ones(64, 512), depth=8)
how = sys.argv[1]
if how == "with":
    pipeline.__enter__()
    futures = [pipeline.submit(i) for i in range(1000)]
else:
    results = pipeline(itertools.count())
    next(results)
    cycle = [results]
    cycle.append(cycle)
"""


@pytest.mark.every(3)
@pytest.mark.parametrize("how", in_turn(["with", "cycle"]))
def test_the_interpreter_exits_with_a_pipeline_open(how):
    done = subprocess.run([sys.executable, "-c", SCRIPT, how], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
