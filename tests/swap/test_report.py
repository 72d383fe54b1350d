"""The report of a swap: in words, in JSON, at a prompt and in a notebook."""

import json

from small_models import block
from torch import nn

import forwardpass as fp


def test_report_has_everything_in_words_and_in_json():
    report = fp.swap(block(), "int8")
    text = str(report)
    assert "2 layers swapped, 1 skipped" in text
    assert "first" in text
    assert "too small to gain" in text
    content = json.loads(json.dumps(report.to_json(), allow_nan=False))
    assert content["schema"] == "forwardpass.report/1"
    assert content["skipped"] == [{"fqn": "head", "code": "too_small", "text": "3 x 64 is too small to gain, below "
                                                                               "4096 weights",
                                   "fix": "add 'head' to include to swap it all the same"}]  # fmt: skip
    assert content["swapped"][0]["precision"] == "int8"
    assert content["swapped"][0]["version"] == 1


def test_a_report_fits_and_gives_each_reason_once():
    layer = nn.TransformerEncoderLayer(64, 4, 128, batch_first=True)
    report = fp.swap(nn.TransformerEncoder(layer, 3).eval(), "int8", exclude="linear1", dry_run=True)
    text = str(report)
    assert max(map(len, text.splitlines())) <= 100
    assert text.count("excluded: ") == 1 and "  layers.{0-2}.linear1" in text
    assert all("\n" not in str(s.reason) for s in report.skipped) and len(report.to_json()["skipped"]) == 6
    model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(3)), nn.Linear(256, 256)).eval()
    text = " ".join(str(fp.swap(model, "int8", dry_run=True)).split())
    assert "1 layer would be swapped" in text
    assert text.count("too_small: 8 x 8 is too small to gain, below 4096 weights; add its name to include") == 1
    assert text.endswith("{0-2}")
    model = nn.Sequential(*(nn.Linear(8 * n, 8) for n in (1, 2, 3)), nn.Linear(256, 256)).eval()
    text = " ".join(str(fp.swap(model, "int8", dry_run=True)).split())
    assert (
        text.count("too_small: ") == 1 and "too_small: 8 x {8,16,24} is too small to gain" in text
    )  # numbers are no other kind


def test_a_report_says_first_what_stays_where_that_is_most():
    convolutions = nn.Sequential(nn.Conv2d(3, 64, 3), nn.Conv2d(64, 256, 3), nn.Flatten(), nn.Linear(256, 64)).eval()
    report = fp.swap(convolutions, "int8", dry_run=True)
    first = str(report).splitlines()[0]
    assert first.startswith("1 layer would be swapped, 2 skipped; 90% of the weights are convolutions and stay")
    linears = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(256, 256)).eval()
    assert "stay" not in str(fp.swap(linears, "int8", dry_run=True)).splitlines()[0]


def test_a_report_at_a_prompt_is_a_screen_and_in_a_notebook_html(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    model = nn.Sequential(*(nn.Linear(256, 64 * n) for n in range(1, 40))).eval()
    report = fp.swap(model, "int8", dry_run=True)
    assert len(str(report).splitlines()) > 40 and max(map(len, str(report).splitlines())) <= 80
    assert len(repr(report).splitlines()) == 20 and repr(report).endswith("print it to see all")
    html = report._repr_html_()
    assert html.startswith("<div><p>39 layers would be swapped") and html.count("<tr>") == 40 and "Skipped(" not in html


def test_a_report_on_a_cpu_speaks_of_no_gpu():
    layer = nn.TransformerEncoderLayer(256, 4, 512, batch_first=True)
    report = fp.swap(nn.TransformerEncoder(layer, 2).eval(), "int8")
    assert report.device == "cpu" and "GPU" not in str(report)
