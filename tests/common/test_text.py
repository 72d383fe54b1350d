"""What is printed: tables that fit, and names of layers that are alike as one."""

import pytest

from forwardpass.common.text import WIDTH, count, shortened, span, table, together, wrapped


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
