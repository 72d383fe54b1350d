"""What is printed: tables that fit, and names of layers that are alike as one."""

import pytest

from forwardpass.common.printing import text as texts
from forwardpass.common.printing.printed import SCREEN, Printed, Table
from forwardpass.common.printing.text import (
    WIDTH,
    count,
    shortened,
    span,
    table,
    together,
    with_numbers,
    without_numbers,
    wrapped,
)


def labels(names, kind=lambda name: None):
    return {label: members for label, members in together(names, lambda name: name, kind)}


def test_names_that_differ_in_numbers_are_one():
    names = [f"layer.{i}.{part}" for i in (0, 1, 2, 11) for part in ("key", "output")]
    assert labels([*names, "pooler"]) == {
        "layer.{0-2,11}.key": names[::2], "layer.{0-2,11}.output": names[1::2], "pooler": ["pooler"]
    }  # fmt: skip
    experts = [f"{i}.experts.{j}.up" for i in range(2) for j in range(3)]
    assert list(labels(experts)) == ["{0-1}.experts.{0-2}.up"]
    assert list(labels(["conv1", "conv2", "1", "1.2"])) == ["conv1", "conv2", "1", "1.2"]
    assert list(labels([f"layers.encoder_layer_{i}.mlp.{j}" for i in range(12) for j in (0, 3)])) == [
        "layers.encoder_layer_{0-11}.mlp.{0,3}"
    ]


def test_a_name_for_several_stands_for_no_other():
    assert list(labels(["a.0.b.1", "a.0.b.2", "a.1.b.1"])) == ["a.0.b.{1-2}", "a.1.b.1"]
    odd = labels([f"layer.{i}" for i in range(6)], lambda name: int(name[-1]) % 2)
    assert list(odd) == ["layer.{0,2,4}", "layer.{1,3,5}"]


def test_a_table_fits():
    names = [f"{'a_module_with_a_long_name.' * 6}{i}.key" for i in range(2)]
    prose = "because " * 30
    rows = [("layer", "of\nlimit", "why"), (names[0], "5 %", prose), f"left alone: {prose}", (names[1], "12 %", "no")]
    made = table(rows, right=(1,))
    assert max(map(len, made)) <= WIDTH
    assert [line.split() for line in made[:2]] == [["of"], ["layer", "limit", "why"]]
    text = "\n".join(made)
    assert " ".join(text.split()).count("because") == 60  # nothing is lost
    assert "0.key" in text and "1.key" in text and text.count("…") == 2  # the ends tell them apart
    caption = next(i for i, line in enumerate(made) if line.startswith("left alone"))
    assert made[-1].startswith("  a_module") and not made[caption + 1].startswith(" ")
    assert table([("a", "b")], heading=False) == ["a  b"]


def test_what_fits_is_left_as_it_is():
    rows = [("layer", "ms"), ("encoder.layer.0.attention.self.key", "1.0")]
    assert table(rows, right=(1,)) == [
        "layer                                ms",
        "----------------------------------  ---",
        "encoder.layer.0.attention.self.key  1.0",
    ]
    assert wrapped("a short text") == ["a short text"]


@pytest.mark.parametrize("width", [20, 21, 40])
def test_a_shortened_name_is_as_wide_as_it_may_be(width):
    assert len(shortened("encoder.layer.3.attention.output.dense.and.more", width)) == width


def test_counts_and_spans():
    assert [count(n, "batch") for n in (0, 1, 2)] == ["0 batches", "1 batch", "2 batches"]
    assert [count(2, noun) for noun in ("layer", "policy", "pass")] == ["2 layers", "2 policies", "2 passes"]
    assert (span([1.131, 1.128], ".3g"), span([2.0, 1.0, 3.0], ".2f")) == ("1.13", "1.00-3.00")


@pytest.mark.parametrize(
    ("given", "columns"), [("80", 80), ("120", WIDTH), ("20", 60), ("", WIDTH), ("wide", WIDTH), ("0", WIDTH)]
)
def test_lines_are_as_wide_as_the_terminal(monkeypatch, given, columns):
    monkeypatch.setenv("COLUMNS", given)
    monkeypatch.setattr(texts.os, "get_terminal_size", lambda file: (_ for _ in ()).throw(OSError))
    assert texts.columns() == columns
    assert max(map(len, wrapped("because " * 60))) in range(columns - 8, columns + 1)


def test_a_terminal_on_stderr_counts_where_stdout_is_a_file(monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)

    def size(file):
        if file == texts.sys.__stderr__.fileno():
            return texts.os.terminal_size((72, 24))
        raise OSError("no terminal")

    monkeypatch.setattr(texts.os, "get_terminal_size", size)
    assert texts.columns() == 72


@pytest.mark.parametrize("width", [60, 80, 100])
def test_columns_without_room_follow_with_the_same_names(monkeypatch, width):
    monkeypatch.setenv("COLUMNS", str(width))
    heads = [f"candidate\n{i}" for i in range(9)]
    rows = [
        ("layer", *heads),
        "why:",
        *((f"encoder.layer.{n}.attention.output.dense", *["1.25-1.50"] * 9) for n in range(2)),
    ]
    made = table(rows, right=range(1, 10))
    assert max(map(len, made)) <= width
    text = "\n".join(made)
    assert text.count("1.25-1.50") == 18 and text.count("layer ") == text.count("why:") == made.count("") + 1 > 1


def test_texts_that_differ_in_numbers_are_one():
    sizes = [f"{n} x 384 is below 65536" for n in (2, 3, 4, 12)]
    assert {without_numbers(t) for t in sizes} == {"# x # is below #"}
    assert with_numbers(sizes) == "{2-4,12} x 384 is below 65536" and with_numbers(sizes[:1]) == sizes[0]
    assert with_numbers(["no numbers"] * 2) == "no numbers"


class Result(Printed):
    def __init__(self, n):
        self.n = n

    def _blocks(self):
        rows = [("name", "ms"), "why <so>", *((f"n{i}", "1") for i in range(self.n))]
        yield from ("a <sentence> of words", "", Table(rows, (1,)))


def test_a_result_is_text_one_screen_and_html():
    assert str(Result(1)).splitlines() == ["a <sentence> of words", "", "name  ms", "----  --", "why <so>", "  n0   1"]
    assert repr(Result(1)) == str(Result(1))
    shown = repr(Result(100)).splitlines()
    more = len(str(Result(100)).splitlines()) - SCREEN + 1
    assert len(shown) == SCREEN and shown[-1] == f"… and {more} lines more: print it to see all"
    html = Result(2)._repr_html_()
    assert html.count("<tr>") == 4 and "<p>a &lt;sentence&gt; of words</p>" in html and "why &lt;so&gt;" in html
    assert (
        '<td style="text-align: right; white-space: nowrap">1</td>' in html
        and '<th style="text-align: left">name</th>' in html
    )
