"""fp.Pipeline: order, overlap, bounds, errors, batches of single items, and that nothing stays behind."""

import gc
import threading

import pytest
import torch
from pipelines import TIMEOUT, Double, Held, fails_at, no_thread_stays, number, ours  # noqa: F401
from torch import nn

import forwardpass as fp
from forwardpass.dispatch import current_choice


@pytest.mark.parametrize("workers", [1, 3])
def test_results_are_those_of_the_plain_loop_in_order_and_again(workers):
    model = Double()
    pipeline = fp.Pipeline(model, number, torch.Tensor.item, workers=workers)
    for n in (0, 1, 50):
        assert list(pipeline(range(n))) == [2.0 * i for i in range(n)]
        assert not ours()
    assert list(fp.Pipeline(model)([number(3)])) == [torch.tensor([6.0])]


def test_order_is_kept_where_preprocessing_is_not():
    second = threading.Event()

    def preprocess(i):
        if i == 0:
            assert second.wait(TIMEOUT)  # item 1 is ready first
        elif i == 1:
            second.set()
        return number(i)

    assert list(fp.Pipeline(Double(), preprocess, torch.Tensor.item, workers=2)(range(4))) == [0.0, 2.0, 4.0, 6.0]


def test_all_three_stages_run_at_the_same_time():
    meeting = threading.Barrier(3, timeout=TIMEOUT)  # of item 2 in preprocess, 1 in forward, 0 in postprocess

    def preprocess(i):
        if i == 2:
            meeting.wait()
        return number(i)

    def forward(model, x):
        if x.item() == 1:
            meeting.wait()
        return x

    def postprocess(x):
        if x.item() == 0:
            meeting.wait()
        return x.item()

    assert list(fp.Pipeline(Double(), preprocess, postprocess, forward=forward)(range(6))) == [0, 1, 2, 3, 4, 5]


def test_items_are_read_and_prepared_only_a_few_ahead():
    read, prepared, go = [], [], threading.Event()

    def items():
        for i in range(100):
            read.append(i)
            yield i

    def preprocess(i):
        prepared.append(i)
        return number(i)

    def forward(model, x):
        assert go.wait(TIMEOUT)
        return x

    pipeline = fp.Pipeline(Double(), preprocess, forward=forward, depth=2)
    taker = threading.Thread(target=lambda: list(pipeline(items())))
    taker.start()
    while len(prepared) < 3:  # one in forward, two ahead
        assert taker.is_alive()
    taker.join(0.2)
    assert prepared == [0, 1, 2]
    assert len(read) <= 10
    go.set()
    taker.join(TIMEOUT)
    assert len(prepared) == 100


def test_a_slow_postprocess_holds_the_forward_back():
    model, go = Double(), threading.Event()

    def postprocess(x):
        assert go.wait(TIMEOUT)
        return x.item()

    pipeline = fp.Pipeline(model, number, postprocess, depth=1)
    with pipeline:
        futures = [pipeline.submit(i) for i in range(20)]
        while len(model.batches) < 3:  # one in postprocess, one that waits, one that has no place to wait
            assert not futures[0].done()
        threading.Event().wait(0.2)
        assert len(model.batches) == 3
        go.set()
    assert [f.result() for f in futures] == [2.0 * i for i in range(20)]


@pytest.mark.parametrize("stage", ["preprocess", "forward", "postprocess"])
def test_an_error_is_reported_on_its_item(stage):
    cause = {"preprocess": KeyError, "forward": ArithmeticError, "postprocess": OSError}[stage]
    pipeline = fp.Pipeline(Double(), *fails_at(stage))
    got = list(pipeline(range(5), return_errors=True))
    error = got[2]
    assert [g for g in got if g is not error] == [0.0, 2.0, 6.0, 8.0]
    assert isinstance(error, fp.types.ItemError)
    assert (error.index, error.stage, type(error.__cause__)) == (2, stage, cause)
    assert f"item 2 failed in {stage}: {cause.__name__}" in str(error)

    seen = []
    with pytest.raises(fp.types.ItemError, match=f"item 2 failed in {stage}"):
        seen.extend(pipeline(range(5)))
    assert seen == [0.0, 2.0]
    assert not ours()


def test_a_loop_that_is_left_stops_reading_and_ends_the_threads():
    read = []
    results = fp.Pipeline(Double(), number, torch.Tensor.item)(read.append(i) or i for i in range(1000))
    assert next(results) == 0.0
    results.close()
    assert not ours()
    assert len(read) < 20


@pytest.mark.parametrize("where", ["items", "loop"])
def test_an_interrupt_ends_the_threads_and_leaves_the_model_as_it_was(where):
    model = Double().train()

    def items():
        for i in range(100):
            if where == "items" and i == 5:
                raise KeyboardInterrupt
            yield i

    def loop():
        for n, _ in enumerate(fp.Pipeline(model, number)(items())):
            assert not model.training
            if where == "loop" and n == 3:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        loop()
    gc.collect()
    assert not ours()
    assert model.training


def test_a_pipeline_that_nobody_reads_starts_nothing():
    fp.Pipeline(Double(), number)(range(3))
    assert not ours()


def test_what_holds_in_the_thread_that_begins_holds_in_the_stages():
    seen = {}

    def state(stage):
        def look(*args):
            q = torch.zeros(1, 2, 4, 8)
            nn.functional.scaled_dot_product_attention(q, q, q)
            seen[stage] = (current_choice()["backend"], torch.is_inference_mode_enabled(), torch.get_autocast_dtype("cpu"),
                           torch.is_autocast_enabled("cpu"))  # fmt: skip
            return args[-1]

        return look

    pipeline = fp.Pipeline(Double(), state("input"), state("output"), forward=state("forward"))
    with fp.use_backend("reference"), fp.sdpa() as calls, torch.autocast("cpu", torch.bfloat16):
        list(pipeline([number(1)]))
    assert seen == dict.fromkeys(("input", "forward", "output"), ("reference", True, torch.bfloat16, True))
    assert calls.kernel_calls.total() + calls.fallbacks.total() == 3
    seen.clear()
    list(pipeline([number(1)]))
    assert {s[0] for s in seen.values()} == {"auto"}
    assert calls.kernel_calls.total() + calls.fallbacks.total() == 3


def test_mappings_dataclasses_and_tuples_go_through():
    pipeline = fp.Pipeline(nn.Identity(), lambda i: {"input": number(i)}, lambda r: r.item())
    assert list(pipeline(range(3))) == [0.0, 1.0, 2.0]
    pipeline = fp.Pipeline(nn.Identity(), output=lambda r: {"y": (r, r + 1)})
    assert list(pipeline([number(1)])) == [{"y": (torch.tensor([1.0]), torch.tensor([2.0]))}]


def test_single_items_are_gathered_while_the_model_is_busy():
    model, held = Double(), Held()
    with fp.Pipeline(model, number, torch.Tensor.item, forward=held, max_batch=4) as pipeline:
        futures = [pipeline.submit(0)]
        assert held.begun.wait(TIMEOUT)
        futures += [pipeline.submit(i) for i in range(1, 8)]
        held.go.set()
        assert [f.result(TIMEOUT) for f in futures] == [2.0 * i for i in range(8)]
    assert [len(b) for b in model.batches] == [1, 4, 3]


def test_a_batch_waits_for_others_until_it_is_full():
    model, prepared = Double(), threading.Event()

    def preprocess(i):
        prepared.set()
        return number(i)

    with fp.Pipeline(model, preprocess, torch.Tensor.item, max_batch=3, max_wait_ms=1e3 * TIMEOUT) as pipeline:
        futures = [pipeline.submit(0)]
        assert prepared.wait(TIMEOUT)
        threading.Event().wait(0.2)
        assert not model.batches
        futures += [pipeline.submit(i) for i in (1, 2)]
        assert [f.result(TIMEOUT / 2) for f in futures] == [0.0, 2.0, 4.0]
        last = pipeline.submit(3)
    assert last.result(0) == 6.0  # the end of the pipeline ends the wait
    assert [len(b) for b in model.batches] == [3, 1]


def test_a_batch_that_has_waited_long_enough_runs():
    model = Double()
    with fp.Pipeline(model, number, torch.Tensor.item, max_batch=3, max_wait_ms=1) as pipeline:
        assert pipeline.submit(1).result(TIMEOUT) == 2.0
    assert list(fp.Pipeline(model, number, torch.Tensor.item, max_batch=3)(range(10))) == [2.0 * i for i in range(10)]


def test_an_item_does_not_fail_the_others_of_its_batch():
    model, held = Double(), Held()
    with fp.Pipeline(model, number, torch.Tensor.item, forward=held, max_batch=4) as pipeline:
        first = pipeline.submit(0)
        assert held.begun.wait(TIMEOUT)
        futures = [pipeline.submit(i) for i in (1, -1, 3)]
        held.go.set()
    assert (first.result(), futures[0].result(), futures[2].result()) == (0.0, 2.0, 6.0)
    with pytest.raises(fp.types.ItemError, match="item 2 failed in forward: ArithmeticError: negative"):
        futures[1].result()


def test_samples_of_other_shapes_want_a_collate():
    held = Held()
    with fp.Pipeline(Double(), torch.ones, forward=held, max_batch=2) as pipeline:
        pipeline.submit(1)
        assert held.begun.wait(TIMEOUT)
        futures = [pipeline.submit(n) for n in (2, 3)]
        held.go.set()
    with pytest.raises(fp.types.ItemError, match="pass collate="):
        futures[0].result()

    def pad(samples):
        return nn.utils.rnn.pad_sequence(samples, batch_first=True)

    got = list(fp.Pipeline(Double(), torch.ones, collate=pad, max_batch=2)([2, 3, 1]))
    assert [g.sum().item() for g in got] == [4.0, 6.0, 2.0]


@pytest.mark.parametrize("wrapped", [lambda x: x, lambda x: {"x": x}, lambda x: (x,)])
def test_dtypes_are_not_mixed_in_silence(wrapped):
    """torch.stack makes float32 of int64 beside float32: 2**24 + 1 would arrive as 2**24."""
    numbers = [torch.tensor([2**24 + 1]), torch.tensor([0.5])]
    held = Held()
    with fp.Pipeline(nn.Identity(), wrapped, forward=lambda m, x: (held(m, x), x)[1], max_batch=2) as pipeline:
        pipeline.submit(numbers[0])
        assert held.begun.wait(TIMEOUT)
        futures = [pipeline.submit(x) for x in numbers]
        held.go.set()
    with pytest.raises(
        fp.types.ItemError, match=r"tensors of torch.int64 and torch.float32: pass collate= that makes them one dtype"
    ):
        futures[0].result()


def test_a_name_that_another_sample_lacks_is_not_left_out():
    samples = [{"x": torch.ones(1)}, {"x": torch.ones(1), "mask": torch.zeros(1)}]
    held = Held()

    def forward(model, batch):
        held(model, None)
        return batch["x"] * batch.get("mask", 1)

    with fp.Pipeline(nn.Identity(), forward=forward, max_batch=2) as pipeline:
        pipeline.submit(samples[0])
        assert held.begun.wait(TIMEOUT)
        futures = [pipeline.submit(x) for x in samples]
        held.go.set()
    assert [f.result().item() for f in futures] == [1.0, 0.0]


def test_a_result_without_a_row_for_each_item_is_refused():
    with fp.Pipeline(Double(), number, output=torch.sum, max_batch=2) as pipeline:
        future = pipeline.submit(1)
    with pytest.raises(fp.types.ItemError, match="has no row for each of 1 items: pass output="):
        future.result()


def test_submit_waits_where_too_many_are_under_way():
    held = Held()
    with fp.Pipeline(Double(), number, forward=held, max_pending=2) as pipeline:
        futures = [pipeline.submit(i) for i in range(2)]
        with pytest.raises(TimeoutError, match="2 items are under way"):
            pipeline.submit(2, timeout=0.01)
        held.go.set()
        futures.append(pipeline.submit(2, timeout=TIMEOUT))
    assert [f.result().item() for f in futures] == [0.0, 2.0, 4.0]


def test_a_future_that_is_cancelled_is_not_prepared():
    prepared, held = [], Held()
    with fp.Pipeline(Double(), lambda i: prepared.append(i) or number(i), forward=held, depth=1) as pipeline:
        futures = [pipeline.submit(i) for i in range(10)]
        assert held.begun.wait(TIMEOUT)
        assert futures[9].cancel()
        held.go.set()
    assert prepared == list(range(9))
    assert futures[8].result().item() == 16.0


def test_an_error_within_with_drops_what_has_not_begun():
    model, held = Double(), Held()

    def fail(pipeline, futures):
        with pipeline:
            futures += [pipeline.submit(i) for i in range(20)]
            assert held.begun.wait(TIMEOUT)
            threading.Timer(0.2, held.go.set).start()
            raise OSError("stop")

    futures = []
    with pytest.raises(OSError, match="stop"):
        fail(fp.Pipeline(model, number, forward=held), futures)
    assert all(f.done() for f in futures)
    assert futures[0].result().item() == 0.0
    assert futures[19].cancelled() or futures[19].exception()
    assert len(model.batches) < 5


def test_iterating_within_with_uses_the_same_threads():
    with fp.Pipeline(Double(), number, torch.Tensor.item) as pipeline:
        threads = ours()
        assert list(pipeline(range(3))) == [0.0, 2.0, 4.0]
        assert ours() == threads
        assert pipeline.submit(5).result(TIMEOUT) == 10.0


def test_a_loop_that_is_left_within_with_drops_its_items():
    go, prepared = [threading.Event(), threading.Event()], []

    def items():
        for i in range(100):
            if i == 5:
                go[0].set()
            yield i

    def forward(model, x):
        assert go[x.item() > 0].wait(TIMEOUT)
        return model(x)

    with fp.Pipeline(Double(), lambda i: prepared.append(i) or number(i), forward=forward, depth=1) as pipeline:
        results = pipeline(items())
        assert next(results).item() == 0.0  # five more are submitted, of which one is in forward and one ahead
        results.close()
        go[1].set()
        assert pipeline.submit(7).result(TIMEOUT).item() == 14.0
    assert [i for i in prepared if i > 2] == [7]


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"model": 3}, TypeError, "takes a torch.nn.Module, not int"),
        ({"preprocess": 3}, TypeError, "preprocess is a function or None, not int"),
        ({"workers": 0}, ValueError, "workers is a number of 1 or more, not 0"),
        ({"depth": True}, ValueError, "depth is a number"),
        ({"max_batch": 2.5}, ValueError, "max_batch is a number"),
        ({"max_batch": 2, "max_wait_ms": float("nan")}, ValueError, "max_wait_ms is a time"),
        ({"max_wait_ms": 5}, ValueError, "pass max_batch="),
    ],
)
def test_bad_arguments(arguments, error, words):
    with pytest.raises(error, match=words):
        fp.Pipeline(**{"model": Double(), **arguments})


def test_bad_use():
    pipeline = fp.Pipeline(Double(), number)
    with pytest.raises(RuntimeError, match="submit within `with pipeline:`"):
        pipeline.submit(1)
    with pytest.raises(TypeError, match="takes an iterable of items, not int"):
        pipeline(3)


@pytest.mark.gpu
def test_on_a_gpu_copies_are_complete_and_results_are_on_the_host():
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(1024, 1024) for _ in range(8))).cuda()
    items = [torch.randn(256, 1024) for _ in range(40)]
    with torch.inference_mode():
        expected = [model(x.cuda()).cpu() for x in items]
    got = list(fp.Pipeline(model)(items))
    assert all(g.device.type == "cpu" and torch.equal(g, e) for g, e in zip(got, expected))
