"""The table of a plan: it fits, and what is alike is in one row."""

import pytest

from forwardpass.common.printing.printed import as_text
from forwardpass.swap.plan_evidence import describe


def minilm_like():
    """Evidence of a plan with layers of MiniLM's names and forms, each choice in it, and a layer left alone."""
    forms = {"attention.self.query": (384, 384), "attention.self.key": (384, 384), "attention.output.dense": (384, 384),
             "intermediate.dense": (384, 1536), "output.dense": (1536, 384)}  # fmt: skip
    names = ("fp8", "int8", "int8+calibrated", "w8a16", "bf16")
    ms = {"before": 1.13, "int8": 0.262, "int8+calibrated": 0.247, "w8a16": 1.34, "bf16": 0.478}
    timing = {name: {"median": t, "low": t, "high": t, "rounds": 9} for name, t in ms.items()}

    def candidate(name):
        refused = {"fp8": ("reference", "there is no kernel"), "w8a16": ("slower", "it is no gain: 1.34 ms, 1.13")}.get(
            name
        )
        return {
            "refused": refused and dict(zip(("code", "text"), refused)),
            "ms": timing.get(name),
            "bytes": 1000 if name in timing else 0,
            "error": 1e-2,
            "quantisation": None,
            "kernel": None,
            "output": None if refused else {"mean": 5.9e-06, "worst": 1e-5},
        }

    layers = []
    for i in range(6):
        for part, (k, n) in forms.items():
            choice = "int8+calibrated" if part != "output.dense" else ("bf16" if i % 2 else None)
            why = (
                f"4.56 times as fast: 0.247 ms, {i} as it is" if choice else "left alone: the error buys more elsewhere"
            )
            layers.append({
                "fqn": f"encoder.layer.{i}.{part}", "in_features": k, "out_features": n, "calls": {"forward": [[8, 128, k]]},
                "before": {"ms": timing["before"], "bytes": 4000}, "candidates": {name: candidate(name) for name in names},
                "choice": choice, "reason": why,
            })  # fmt: skip
    block = {"before": 12.5, "after": 3.1, "error": 1e-5, "candidates": {**dict.fromkeys(names, 1e-5), "fp8": None}}
    return {
        "result": "lowest cosine >= 0.9995: 0.999524 with the whole plan; 2.87 times as fast as the model as it is; layers 43 MB",
        "criterion": {"kind": "min_cosine", "bound": 0.9995}, "target": "latency", "candidates": list(names),
        "predicted": {"before": 82.31, "after": 17.8, "gap": 0.0093, "error": 2.14e-4}, "attempts": [{}], "seconds": 115.0,
        "layers": layers, "blocks": {f"encoder.layer.{i}": block for i in range(6)},
    }  # fmt: skip


@pytest.mark.parametrize("width", [80, 100])
def test_the_table_fits_a_terminal(monkeypatch, width):
    monkeypatch.setenv("COLUMNS", str(width))
    text = as_text(describe(minilm_like()))
    assert max(map(len, text.splitlines())) <= width
    assert text.count("0.247") == 6 and text.count("0.478") == 6  # the columns that do not fit follow


@pytest.mark.parametrize("target", ["latency", "memory"])
def test_the_table_has_what_is_alike_in_one_row(target):
    text = as_text(describe({**minilm_like(), "target": target}))
    lines = text.splitlines()
    assert "1 plan verified" in " ".join(text.split())
    rows = [line.split()[0] for line in lines if line.startswith("  encoder")]
    assert rows == [f"encoder.layer.{{0-5}}.{part}" for part in ("attention.self.query", "attention.self.key",
                    "attention.output.dense", "intermediate.dense")] + ["encoder.layer.{0,2,4}.output.dense",
                                                                        "encoder.layer.{1,3,5}.output.dense"]  # fmt: skip
    assert [lines.count(s) for s in ("left alone: the error buys more elsewhere", "fp8: there is no kernel")] == [1, 1]
    if target == "latency":
        first = next(i for i, line in enumerate(lines) if line.startswith("int8+calibrated: 4.57 times as fast"))
        assert lines[first + 1].split()[1:] == ["1.13", "0.262", "0.247", "1.34", "0.478"]
        assert lines[first + 2].split()[-4:] == ["5.9e-06", "5.9e-06", "-", "5.9e-06"]
