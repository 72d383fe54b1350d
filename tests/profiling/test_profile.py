"""fp.profile: phases on a clock of our own, layers and operations counted by hand, advice, reports, and bad input."""

import contextlib
import dataclasses
import html.parser
import json
import statistics

import pytest
import torch
from small_models import block
from torch import nn

import forwardpass as fp
from forwardpass.profiling import advice, phases
from forwardpass.profiling import profile as module
from forwardpass.profiling.layers import Inside, Row, look_inside
from forwardpass.profiling.roofline import Roofline, roofline

CPU = torch.device("cpu")


class Clock:
    """Time passes where it is told to: by the clock, and on how many cores."""

    def __init__(self, monkeypatch):
        self.wall = self.process = self.thread = 0.0
        for name in ("wall", "process", "thread"):
            attribute = "cpu_clock" if name == "process" else f"{name}_clock"
            monkeypatch.setattr(phases, attribute, lambda name=name: getattr(self, name))
        monkeypatch.setattr(phases, "sleep", lambda seconds: self.spend(seconds, 0.0))
        monkeypatch.setattr(phases, "_usage", lambda: None)
        monkeypatch.setattr(phases.os, "sched_getaffinity", lambda _: {0, 1})
        # measured with threads, on a machine as busy as it is
        monkeypatch.setattr(module, "_handover", lambda: 0.0001)

    def spend(self, seconds, cores, thread=None):
        self.wall += seconds
        self.process += seconds * cores
        self.thread += seconds * min(1.0, cores)

    def step(self, seconds, cores=1.0):
        """A function that takes so long and gives its last argument."""

        def call(*args):
            self.spend(seconds, cores)
            return args[-1]

        return call


@pytest.fixture
def clock(monkeypatch):
    return Clock(monkeypatch)


def profiled(clock, **steps):
    return fp.profile(nn.Identity(), [torch.ones(1)] * 4, **steps, rounds=2, layers=False)


def test_the_phases_of_a_known_loop(clock):
    found = profiled(clock, preprocess=clock.step(0.020, 0.0), forward=clock.step(0.030, 2.0),
                     postprocess=clock.step(0.010, 0.5))  # fmt: skip
    by_name = {p.name: p for p in found.phases}
    assert list(by_name) == ["input", "transfer", "forward", "output"]
    assert [p.share for p in found.phases] == pytest.approx([1 / 3, 0, 1 / 2, 1 / 6])
    assert [p.median_ms for p in found.phases] == pytest.approx([20, 0, 30, 10])
    assert [p.p99_ms for p in found.phases] == pytest.approx([20, 0, 30, 10])
    assert [p.cpu_ms for p in found.phases] == pytest.approx([0, 0, 60, 5])
    assert [p.waiting for p in found.phases] == pytest.approx([1, 0, 0, 0.5])
    assert found.wall_ms == pytest.approx(8 * 60)
    assert found.unaccounted == pytest.approx(0)
    assert found.largest is by_name["forward"]
    assert by_name["transfer"].details["bytes"] == 0
    assert "nothing is transferred: the model is on the CPU" in by_name["transfer"].details["reason"]
    assert (found.items, found.rounds, len(found.samples)) == (4, 2, 8)


def test_time_of_no_phase_is_said(clock, monkeypatch):
    measure_bytes = phases.bytes_of
    monkeypatch.setattr(phases, "bytes_of", lambda tree: clock.spend(0.005, 1.0) or measure_bytes(tree))
    found = profiled(clock, forward=clock.step(0.030))
    assert found.wall_ms == pytest.approx(8 * 40)
    assert found.unaccounted == pytest.approx(0.25)


def test_the_slowest_items_are_in_p99(clock):
    took = iter(
        [0.01] * 5 + [0.01, 0.01, 0.05, 0.01, 0.01, 0.01, 0.01, 0.03]
    )  # the first pass, one forward, two rounds
    found = profiled(clock, forward=lambda model, x: clock.spend(next(took), 1.0) or x)
    forward = found.phases[2]
    assert forward.median_ms == pytest.approx(10)
    assert forward.p99_ms == pytest.approx(statistics.quantiles([10] * 6 + [30, 50], n=100, method="inclusive")[98])


def test_one_slow_round_does_not_change_the_prediction(clock):
    took = iter([0.01, 0.01, 0.01, 0.1, 0.01])  # the first pass, one forward, three rounds of an item
    forward = lambda model, x: clock.spend(next(took), 1.0) or x  # noqa: E731
    found = fp.profile(nn.Identity(), [torch.ones(1)], forward=forward, rounds=3, layers=False)
    assert found.overlap.plain_ms == pytest.approx(10)


def test_threads_that_spin_after_a_forward_compute_nothing(clock):
    """As OpenMP's do, here for 4 ms, whatever runs meanwhile."""
    left = 0.0

    def forward(model, x):
        nonlocal left
        clock.spend(0.030, 2.0)
        left = 0.004
        return x

    def spin(seconds):
        nonlocal left
        clock.process += min(seconds, left)
        left -= min(seconds, left)

    def output(x):
        clock.spend(0.001, 1.0)
        spin(0.001)
        return x

    def preprocess(x):
        clock.spend(0.020, 0.0)
        spin(0.020)
        return x

    phases.sleep = lambda seconds: (clock.spend(seconds, 0.0), spin(seconds))  # the fixture puts the clock's back
    found = profiled(clock, preprocess=preprocess, forward=forward, postprocess=output)
    assert [p.cpu_ms for p in found.phases] == pytest.approx([0, 0, 60, 1])


@pytest.mark.parametrize(
    ("wall", "cpu", "cores", "workers", "period", "bound"),
    [
        ((20, 0, 30, 10), (0, 0, 60, 0), 2, 1, 30, "forward"),  # the others wait: free
        ((40, 0, 30, 10), (0, 0, 60, 0), 2, 1, 40, "input"),
        ((40, 0, 30, 10), (0, 0, 60, 0), 2, 2, 30, "forward"),
        ((10, 0, 30, 0), (10, 0, 30, 0), 2, 1, 30, "forward"),  # a forward of one thread leaves a core free
        ((10, 0, 30, 0), (10, 0, 60, 0), 2, 1, 40, "cores"),  # one that takes both cores is delayed
        ((10, 0, 30, 0), (10, 0, 60, 0), 16, 1, 30, "forward"),
        ((10, 0, 30, 5), (10, 0, 30, 5), 1, 1, 45, "cores"),  # one core has nothing to overlap
        ((10, 0, 30, 0), (5, 0, 50, 0), 2, 1, 30, "forward"),
        ((25, 0, 10, 0), (50, 0, 10, 0), 2, 1, 30, "cores"),
        ((5, 50, 30, 5), (5, 1, 30, 5), 4, 1, 50, "transfer"),
        ((0, 0, 0, 0), (0, 0, 0, 0), 2, 1, 0, "input"),
    ],
)
def test_what_overlapping_gives(wall, cpu, cores, workers, period, bound):
    found = phases.predict([w / 1e3 for w in wall], [c / 1e3 for c in cpu], cores, workers)
    assert found.plain_ms == pytest.approx(sum(wall))
    assert found.period_ms == pytest.approx(period)
    assert found.bound_by == bound
    assert found.speedup == pytest.approx(sum(wall) / period if period else 1)
    if period:
        assert found.speedup_of(1) == pytest.approx(1)
        assert found.speedup_of(10**6) == pytest.approx(found.speedup, rel=1e-4)


def test_handing_over_costs_what_it_costs():
    found = phases.predict([0, 0, 1e-5, 0], [0, 0, 1e-5, 0], 2, handover=1e-4)
    assert (found.bound_by, found.period_ms) == ("handover", pytest.approx(0.11))
    assert "takes longer than what is done with it" in found.reason


def test_cores_that_others_use_are_not_ours(clock, monkeypatch):
    usage = iter([(100.0, 5.0), (100.0 + 8 * 0.03 * 1.5, 5.0 + 8 * 0.03 * 1.0)])
    monkeypatch.setattr(phases, "_usage", lambda: next(usage))
    assert profiled(clock, forward=clock.step(0.030, 1.0)).overlap.cores == pytest.approx(1.5)


def test_cores_that_a_phase_had_were_ours(clock, monkeypatch):
    usage = iter([(0.0, 0.0), (100.0, 0.0)])
    monkeypatch.setattr(phases, "_usage", lambda: next(usage))
    assert profiled(clock, forward=clock.step(0.030, 1.8)).overlap.cores == pytest.approx(1.8)


def test_an_input_that_waits_is_to_be_overlapped_by_more_threads(clock):
    found = profiled(clock, preprocess=clock.step(0.090, 0.0), forward=clock.step(0.030, 2.0))
    best = found.advice[0]
    assert best.action == "overlap"
    assert "workers=3" in best.text
    assert best.speedup == pytest.approx(120 / 30.1)
    assert found.overlap.speedup == pytest.approx(120 / 90.1)


def test_nothing_is_advised_where_nothing_is_gained(clock):
    assert profiled(clock, preprocess=clock.step(0.010, 1.0), forward=clock.step(0.030, 2.0)).advice == []


class Attention(nn.Module):
    def forward(self, q, k, v):
        return nn.functional.scaled_dot_product_attention(q, k, v)


@pytest.fixture(scope="module")
def looked():
    """A Block on 256 rows, by hand: first [64 -> 128], second [128 -> 64] without a bias, head [64 -> 3]."""
    model = block()
    with torch.inference_mode():
        inside = look_inside(phases.Request(model, CPU), [torch.randn(256, 64)] * 2, passes=3)
    return inside


def test_layers_are_counted_as_by_hand(looked):
    rows = {row.name: row for row in looked.layers}
    assert set(rows) == {"", "first", "second", "head"}
    for name, (k, n, bias) in {"first": (64, 128, True), "second": (128, 64, False), "head": (64, 3, True)}.items():
        row = rows[name]
        assert (row.kind, row.calls, row.dtype) == ("Linear", 1, "float32")
        assert row.flops == 2 * 256 * k * n
        assert row.bytes == 4 * (256 * k + k * n + 256 * n + (n if bias else 0))
    assert rows[""].flops == 0
    assert rows[""].bytes == 4 * 2 * (256 * 128 + 256 * 64)  # two relus: read and written
    assert sum(row.share for row in looked.layers) == pytest.approx(1, abs=1e-6)
    kinds = {row.name: row for row in looked.kinds}
    assert kinds["Linear"].flops == sum(row.flops for row in looked.layers)
    assert kinds["Linear"].calls == 3


def test_operations_are_counted_as_by_hand(looked):
    rows = {row.name: row for row in looked.operations}
    assert rows["aten::relu"].calls == 2
    assert rows["aten::addmm"].calls + rows["aten::mm"].calls == 3
    assert rows["aten::addmm"].flops + rows["aten::mm"].flops == 2 * 256 * (64 * 128 + 128 * 64 + 64 * 3)
    assert rows["aten::t"].bytes == 0  # a view
    assert 0 < sum(row.share for row in looked.operations) < 1
    assert all(row.ms > 0 for row in looked.operations)


def test_attention_lookups_and_expanded_operands_are_counted_as_by_hand():
    q, k = torch.randn(2, 3, 10, 16), torch.randn(2, 3, 20, 16)
    with torch.inference_mode():
        rows = look_inside(phases.Request(Attention(), CPU), [(q, k, k)], passes=1).operations
    assert sum(row.flops for row in rows) == 2 * 2 * 3 * 10 * 20 * (16 + 16)

    table = nn.Embedding(1000, 8)
    with torch.inference_mode():
        rows = look_inside(phases.Request(table, CPU), [torch.arange(5)], passes=1).operations
    assert {row.name: row.bytes for row in rows}["aten::embedding"] == 2 * 5 * 8 * 4

    def add(model, x):
        return x.expand(100, 8) + 1

    with torch.inference_mode():
        rows = look_inside(phases.Request(nn.Identity(), CPU, forward=add), [torch.ones(1, 8)], passes=1).operations
    assert {row.name: row.bytes for row in rows}["aten::add"] == 8 * 4 + 100 * 8 * 4


def test_a_layer_that_raises_where_the_model_goes_on_is_left():
    class Tolerant(nn.Module):
        def __init__(self):
            super().__init__()
            self.bad, self.good = nn.Linear(3, 3), nn.Linear(4, 4)

        def forward(self, x):
            with contextlib.suppress(RuntimeError):
                self.bad(x)
            return self.good(x) + 1

    with torch.inference_mode():
        rows = {r.name: r for r in look_inside(phases.Request(Tolerant(), CPU), [torch.ones(2, 4)], passes=1).layers}
    assert rows["good"].flops == 2 * 2 * 4 * 4
    assert rows[""].bytes == 2 * 4 * 2 * 4  # the addition is the model's


def test_swapped_layers_are_counted_in_their_precision():
    model = block(256)
    fp.swap(model, precision="int8")
    with torch.inference_mode():
        rows = {r.name: r for r in look_inside(phases.Request(model, CPU), [torch.randn(32, 256)], passes=1).layers}
    assert (rows["first"].kind, rows["first"].dtype, rows["first"].flops) == ("Int8Linear", "int8", 2 * 32 * 256 * 512)


def test_the_model_is_as_it_was_also_after_an_interrupt():
    model = block().train()
    model.second.eval()

    def hooks():
        return [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]

    before = hooks()
    fp.profile(model, [torch.randn(2, 64)], rounds=1)
    assert model.training and not model.second.training and hooks() == before

    calls = 0

    def interrupted(model, x):
        nonlocal calls
        calls += 1
        if calls == 5:  # the first pass, one forward, a round, the counted pass, and here under the profiler
            assert hooks() != before
            raise KeyboardInterrupt
        return model(x)

    with pytest.raises(KeyboardInterrupt):
        fp.profile(model, [torch.randn(2, 64)], rounds=1, forward=interrupted)
    assert calls == 5
    assert model.training and not model.second.training and hooks() == before
    with torch.profiler.profile() as again:  # the profiler was let go
        torch.ones(2) + 1
    assert again.events()


def test_items_that_fail_are_listed_and_the_others_measured():
    good = torch.randn(2, 64)
    found = fp.profile(block(), [good, torch.randn(2, 63), good, "no tensor"], rounds=1, layers=False)
    assert found.items == 2
    assert [(f.index, f.phase) for f in found.failed] == [(1, "forward"), (3, "forward")]
    assert "RuntimeError" in found.failed[0].error
    assert "failed: item 1 in forward: RuntimeError" in str(found)
    assert "pass forward=fn(model, batch)" in found.failed[1].error


def test_nan_is_said():
    found = fp.profile(block(), [torch.randn(2, 64), torch.full((2, 64), torch.nan)], rounds=1, layers=False)
    assert found.warnings == ["NaN in the results of 1 of 2 items, the first is item 1"]


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ((3, []), TypeError, "profile takes a torch.nn.Module, not int"),
        ((nn.Identity(), []), ValueError, "batches holds no batch"),
        ((nn.Identity(), torch.ones(2)), TypeError, "an iterable of batches, not a Tensor: pass \\[batch\\]"),
        ((nn.Identity(), {"x": 1}), TypeError, "an iterable of batches, not a dict"),
        ((nn.Linear(2, 2), [torch.ones(3), torch.ones(4)]), ValueError, "none of the 2 items runs; the first fails in forward"),
    ],
)  # fmt: skip
def test_bad_input(arguments, error, words):
    with pytest.raises(error, match=words):
        fp.profile(*arguments)


def test_bad_options():
    with pytest.raises(ValueError, match="rounds is a number of passes of 1 or more, not 0"):
        fp.profile(nn.Identity(), [torch.ones(1)], rounds=0)
    with pytest.raises(ValueError, match="profile with layers=True"):
        fp.profile(nn.Identity(), [torch.ones(1)], layers=False).save_trace("never.json")


class Page(html.parser.HTMLParser):
    """Whether every tag is closed in its turn; what it loads; its text."""

    def __init__(self, page):
        super().__init__()
        self.open, self.text, self.tags = [], [], []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        assert not {"src", "href"} & dict(attributes).keys()
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


@pytest.fixture(scope="module")
def found():
    class Odd(type(block())):
        """A name that HTML would read otherwise."""

    Odd.__name__ = "Odd<script>"
    model = Odd()
    return fp.profile(model, [torch.randn(64, 64)] * 3, preprocess=lambda x: x, rounds=2)


def test_json_holds_everything(found):
    content = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert content["schema"] == "forwardpass.profile/1"
    assert list(content["phases"]) == ["input", "transfer", "forward", "output"]
    for phase in content["phases"].values():
        assert {"share", "total_ms", "median_ms", "p99_ms", "cpu_ms", "waiting"} <= phase.keys()
    assert "nothing is transferred" in content["phases"]["transfer"]["reason"]
    total = sum(p["total_ms"] for p in content["phases"].values())
    assert total == pytest.approx(content["wall_ms"] * (1 - content["unaccounted"]))
    assert 0 <= content["unaccounted"] < 1
    assert {row["name"] for row in content["layers"]} >= {"first", "second", "head"}
    assert content["operations"][0]["ms"] >= content["operations"][-1]["ms"]
    assert {"flops_per_s", "bytes_per_s", "bound", "roofline"} <= content["layers"][0].keys()
    assert all(s.startswith("measured") for s in content["roofline"]["sources"].values())
    assert set(content["measured"]) | set(content["modelled"]) <= content.keys()
    assert {"overlap", "advice"} <= set(content["modelled"])
    assert content["versions"]["torch"] == torch.__version__


def test_the_report_is_one_page_that_loads_nothing(found, tmp_path):
    found.save_html(tmp_path / "report.html")
    page = Page((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert page.open == []
    text = " ".join(page.text)
    assert "Odd<script>: where the time goes" in text
    assert "script" not in page.tags and "link" not in page.tags and "img" not in page.tags
    assert page.tags.count("svg") == 2
    for words in ("input", "transfer", "nothing is transferred", "aten::relu", "first", "measured: torch.mm"):
        assert words in text
    assert page.tags.count("rect") >= len(found.samples)


def test_a_report_without_layers(tmp_path):
    fp.profile(nn.Identity(), [torch.ones(1)], rounds=1, layers=False).save_html(tmp_path / "report.html")
    page = Page((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert page.open == [] and page.tags.count("svg") == 1


def test_the_trace_has_phases_and_layers_by_name(found, tmp_path):
    found.save_trace(tmp_path / "trace.json")
    names = {e.get("name") for e in json.loads((tmp_path / "trace.json").read_text())["traceEvents"]}
    assert {"input", "forward", "output", "layer first", "layer second", "aten::addmm"} <= names


def test_the_table_has_phases_layers_and_advice(found):
    text = str(found)
    for words in ("forward", "nothing is transferred", "first (Linear)", "aten::relu", "fp.Pipeline, modelled"):
        assert words in text
    assert max(map(len, text.splitlines())) <= 100


def test_layers_that_are_alike_are_one_row_of_the_table_alone(found):
    rows = [row(f"encoder.layer.{i}.attention.output.dense", ms=i + 1.0, share=0.1, roofline=0.5 * i) for i in range(6)]
    rows.append(row(f"{'backbone.' * 12}proj", ms=1.0, share=0.1))
    inside = Inside([], rows, [], 30.0, Roofline(CPU, 1e11, {"float32": 1e12}, {}), "")
    text = str(dataclasses.replace(found, inside=inside))
    assert max(map(len, text.splitlines())) <= 100
    line = next(
        line for line in text.splitlines() if line.startswith("encoder.layer.{0-5}.attention.output.dense (Linear)")
    )
    reached = sum(0.5 * i * (i + 1) for i in range(6)) / 21  # by time
    assert line.split()[2:] == ["60.0%", "21.000", "285.7", "0.3", f"{reached:.0%}", "compute"]
    assert "Beyond 100 % of a limit: data came from a cache" in " ".join(text.split())
    assert "Beyond" not in str(found) or any(r.roofline > 1 for r in (*found.inside.layers, *found.inside.operations))


def test_what_moves_and_computes_nothing_has_no_limit():
    def views(model, x):
        y = torch.ops.aten._unsafe_view(x, [8, 32])  # its schema says nothing of a view
        return torch.ops.aten._reshape_alias(y, [256], [1]).relu_()

    with torch.inference_mode():
        inside = look_inside(phases.Request(nn.Identity(), CPU, forward=views), [torch.ones(16, 16)], passes=1)
    moved = {r.name: r.bytes for r in inside.operations}
    assert moved["aten::_unsafe_view"] == moved["aten::_reshape_alias"] == 0
    assert moved["aten::relu_"] == 2 * 256 * 4  # in place: read and written
    view = next(r for r in inside.operations if r.name == "aten::_unsafe_view")
    assert view.roofline == 0 and module._cells(view)[-2] == "-"


def row(name, **values):
    base = {"kind": "Linear", "share": 0.5, "ms": 1.0, "calls": 1, "flops": 1e9, "bytes": 1e6, "dtype": "float32",
            "roofline": 0.5, "bound": "compute"}  # fmt: skip
    return Row(name, **base | values)


def advised(layers, operations, int8=4e12, monkeypatch=None):
    limits = Roofline(CPU, 1e11, {"float32": 1e12}, {})
    inside = Inside([], layers, operations, 2.0, limits, "")
    monkeypatch.setattr(advice, "roofline", lambda device, dtypes: Roofline(CPU, 1e11, {"int8": int8}, {}))
    measured = [phases.Phase(n, 1.0 if n == "forward" else 0.0, n == "forward", 1, 1, 1, 0) for n in phases.PHASES]
    still = phases.predict([0, 0, 1, 0], [0, 0, 2, 0], 2)
    return {a.action: a for a in advice.advise(None_request(), None, measured, lambda workers: still, inside)}


def None_request():
    return phases.Request(nn.Identity(), CPU)


def test_advice_on_arithmetic_memory_and_neither(monkeypatch):
    gelu = row("aten::gelu", kind="", flops=0.0, share=0.4, roofline=0.25, bound="memory")
    got = advised([row("a"), row("b")], [gelu], monkeypatch=monkeypatch)
    assert got["lower precision"].speedup == pytest.approx(4.0)  # all of the forward, by int8's limit
    assert "int8" in got["lower precision"].text and "2 linear layers take 100%" in got["lower precision"].text
    assert got["fuse"].speedup == pytest.approx(1 / (1 - 0.4 * 0.75))
    assert "batch" not in got

    got = advised([row("a", bound="memory", bytes=1e9)], [gelu], monkeypatch=monkeypatch)
    assert "w8a16" in got["lower precision"].text
    assert got["lower precision"].speedup == pytest.approx(1 / (1 - 0.5 * 0.75))
    assert "up to 10 times as large" in got["batch"].text

    got = advised([row("a", bound="overhead", roofline=0.01)], [], monkeypatch=monkeypatch)
    assert list(got) == ["batch"]  # 8 bits would be no faster
    assert "reaches 1% of the device's limits" in got["batch"].text
    assert "lower precision" not in advised([row("a")], [], int8=0.9e12, monkeypatch=monkeypatch)
    assert "lower precision" not in advised([row("a", kind="Int8Linear", dtype="int8")], [], monkeypatch=monkeypatch)


def test_the_limits_of_this_machine():
    found = roofline(CPU, {"float32", "int8"})
    assert found.bytes_per_s > 1e8 and min(found.flops.values()) > 1e8
    assert all(s.startswith("measured") for s in found.sources.values())
    limits = Roofline(CPU, 10.0, {"float32": 100.0}, {})
    assert limits.least_seconds(200.0, 10.0, "float32") == (2.0, "compute")
    assert limits.least_seconds(50.0, 10.0, "float32") == (1.0, "memory")
    assert limits.least_seconds(0.0, 5.0, "int64") == (0.5, "memory")


def test_limits_of_a_gpu_are_those_of_its_data_sheet(monkeypatch):
    class H100:
        major, minor, multi_processor_count = 9, 0, 132

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: H100)
    found = roofline(torch.device("cuda"), {"float16", "int8"})
    assert found.bytes_per_s == pytest.approx(3352e9)
    assert found.flops["float16"] == pytest.approx(989.4e12, rel=1e-3)
    assert found.flops["int8"] == pytest.approx(1979e12, rel=1e-3)
    assert found.sources["float16"].startswith("datasheet")


@pytest.mark.gpu
def test_on_a_gpu_transfer_is_measured():
    model = nn.Linear(1024, 1024).cuda()
    found = fp.profile(model, [torch.randn(4096, 1024)] * 3)
    transfer = found.phases[1]
    assert transfer.details["bytes"] == 4096 * 1024 * 4
    assert transfer.details["pinned"] is False
    assert transfer.details["gpu_ms"] > 0
    assert found.inside.operations[0].ms > 0
    assert fp.profile(model, [torch.randn(8, 1024).pin_memory()], layers=False).phases[1].details["pinned"] is True
