"""What `fp.plan` measured, as a plan keeps it in JSON: checked when it is read, and printed as a table."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from ..common.files.forms import AtLeast, misfit
from ..common.printing.printed import Block, Table
from ..common.printing.text import count, span, together
from ..integrations.timesteps import describe as described

#: how the reason of a layer begins for which no candidate is faster
NO_GAIN = "left alone: no candidate is faster"

#: What tables and plots read of it.
_NUMBER = (int, float)
_MS = (None, AtLeast({"low": _NUMBER}))
_FORM: Any = AtLeast({
    "candidates": [str],
    "target": str,
    "result": str,
    "seconds": _NUMBER,
    "layers": [AtLeast({
        "fqn": str, "choice": (None, str), "reason": str, "before": AtLeast({"ms": _MS, "bytes": int}),
        "candidates": {"*": AtLeast({
            "refused": (None, AtLeast({"code": str, "text": str})), "ms": _MS, "bytes": int, "error": (None, *_NUMBER),
            "output": (None, AtLeast({"mean": _NUMBER})),
        })},
    })],
    "blocks": {"*": AtLeast(
        {"before": _NUMBER, "after": _NUMBER, "error": _NUMBER, "candidates": {"*": (None, *_NUMBER)}}
    )},
    "predicted": AtLeast({"before": _NUMBER, "after": _NUMBER, "gap": _NUMBER, "error": _NUMBER}),
    "attempts": [AtLeast({"cost": _NUMBER, "predicted": _NUMBER, "holds": bool})],
    "frontier": [[_NUMBER]],
})  # fmt: skip

#: Of a loop over timesteps; older plans, and those of other models, have none.
_LOOP: Any = AtLeast({
    "parts": [AtLeast({"timesteps": [(None, *_NUMBER)], "share": _NUMBER, "error": (None, *_NUMBER)})],
    "tried": (None, [(None, *_NUMBER)]),
    "chosen": (None, [(None, *_NUMBER)]),
})  # fmt: skip


def check(evidence: Any) -> None:
    """ValueError, in part of a sentence, where it is nothing that `describe` and the plot of a plan can show."""
    if problem := misfit(evidence, _FORM):
        raise ValueError(problem)
    if (loop := evidence.get("timesteps")) is not None:
        problem = misfit(loop, _LOOP, "timesteps")
        ranges = [] if problem else [loop["tried"], loop["chosen"], *(x["timesteps"] for x in loop["parts"])]
        if problem or any(x is not None and len(x) != 2 for x in ranges):
            raise ValueError(problem or "a range of timesteps is no pair")
    if any(len(point) != 2 for point in evidence["frontier"]):
        raise ValueError("a point of the frontier is no pair of cost and error")
    names = set(evidence["candidates"])
    for entry in ("layers", "blocks"):
        rows = evidence[entry]
        for key, x in rows.items() if entry == "blocks" else enumerate(rows):
            if set(x["candidates"]) != names:
                raise ValueError(f"{entry}.{str(key)[:40]} has other candidates than {', '.join(sorted(names))[:80]}")


def describe(evidence: Mapping[str, Any]) -> Iterator[Block]:
    """The plan in words, and as tables: what every candidate takes on each layer and the error that it brings at the output,
    layers that are alike in one row, by what was chosen or why nothing was; and the same by block.
    """
    predicted, target = evidence["predicted"], evidence["target"]
    unit, total = ("ms", "{:.4g} ms") if target == "latency" else ("MB", "{} bytes")
    before, after = (total.format(predicted[when]) for when in ("before", "after"))
    yield from evidence["result"].split("; ")
    yield (f"layers: {before} before, {after} planned, within {predicted['gap']:.2g} of the least for an error of "
           f"{predicted['error']:.2e}; {count(len(evidence['attempts']), 'plan')} verified; "
           f"{evidence['seconds']:.0f} s in all")  # fmt: skip
    layers = evidence["layers"]
    tried = [n for n in evidence["candidates"] if any(_cost(x["candidates"][n], target) is not None for x in layers)]
    sections: dict[str, list[Mapping[str, Any]]] = {}
    for x in layers:
        sections.setdefault(_section(x), []).append(x)
    rows: list[tuple[str, ...] | str] = [("layers", f"as it is\n{unit}", *(_heading(name) for name in tried))]
    for section, members in sections.items():
        rows.append(f"{section}{_gain(members, target)}")
        for name, group in together(members, lambda x: x["fqn"], lambda x: (x["in_features"], x["out_features"])):
            rows.append((name, _costs([x["before"] for x in group], target),
                         *(_costs([x["candidates"][n] for x in group], target) for n in tried)))  # fmt: skip
            for phase in _phases(group) if target == "latency" else ():
                rows.append((f"  {phase}", _costs([x["before"] for x in group], target, phase),
                             *(_costs([x["candidates"][n] for x in group], target, phase) for n in tried)))  # fmt: skip
            errors = [_errors([x["candidates"][n] for x in group]) for n in tried]
            if set(errors) != {"-"}:
                rows.append(("  error at the output", "", *errors))
    yield from ("", Table(rows, right=range(1, 2 + len(tried))))
    yield from (block for text in _caches(evidence.get("kv_cache", {})) for block in ("", text))
    yield ""
    yield (f"{unit}: of one layer; error: {_MEANING[evidence['criterion']['kind']]}, the largest of a row; "
           "-: no gain, not measured")  # fmt: skip
    for name in evidence["candidates"]:
        if name not in tried:
            reasons = dict.fromkeys(x["candidates"][name]["refused"]["text"] for x in layers)
            yield f"{name}: {'; '.join(reasons)}"
    if evidence["blocks"]:
        rows = [("blocks", "as it is", "planned", "error", *(f"all in\n{_heading(name)}" for name in tried))]
        rows += [
            (fqn, *(total.format(x[when]) for when in ("before", "after")), f"{x['error']:.1e}",
             *("-" if (error := x["candidates"][name]) is None else f"{error:.1e}" for name in tried))
            for fqn, x in evidence["blocks"].items()
        ]  # fmt: skip
        yield from ("", Table(rows, right=range(1, 4 + len(tried))))
    if evidence.get("timesteps") is not None:
        yield from _steps(evidence["timesteps"])


def _steps(loop: Mapping[str, Any]) -> Iterator[Block]:
    """The parts of a loop, what each brings with the fastest candidates, and where the plan counts."""
    errors = [x["error"] for x in loop["parts"]]
    total = sum(e for e in errors if e is not None)
    rows: list[tuple[str, ...] | str] = [
        ("timesteps", "share of\nthe time", "error there\nalone", "share of\nthe error")
    ]
    for x, error in zip(loop["parts"], errors):
        of_all = "-" if error is None or None in errors or not total else f"{error / total:.0%}"
        name = described(x["timesteps"]).removeprefix("timesteps ")
        rows.append((name, f"{x['share']:.0%}", "not finite" if error is None else f"{error:.1e}", of_all))
    yield from ("", Table(rows, right=range(1, 4)))
    if loop["chosen"]:
        yield f"the plan counts at {described(loop['chosen'])}; at others the model runs as it is"
    elif loop["tried"]:
        yield f"the plan counts at all of them: at {described(loop['tried'])} alone none that was tried is faster"
    else:
        yield "the plan counts at all of them: no part brings much more than its share of the error"


def _caches(results: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """What each cache of keys and values came to."""
    lines = []
    for name, x in results.items():
        steps = (
            "" if x["step"] is None else f"; steps take {x['step']:.2f} of the model's own, {x['without']:.2f} without"
        )
        outcome = "planned" if x["chosen"] else "no gain" if x["holds"] else "not within the budget"
        change = "not finite" if x["value"] is None else f"{x['value']:+.2%}"
        lines.append(f"cache {name}, {outcome}: perplexity {change}{steps}")
    return lines


#: What errors at the output are, by the kind of criterion.
_MEANING = {
    "min_cosine": "mean of 1 - cosine",
    "max_error": "mean of the squared relative error",
    "metric": "mean of the metric",
    "min_psnr": "mean squared error of a pixel",
    "min_ssim": "mean of 1 - SSIM",
    "max_perplexity_increase": "squared relative error of the tokens' losses",
}


def _heading(name: str) -> str:
    return name.replace("+", "+\n")


def _section(x: Mapping[str, Any]) -> str:
    """What was chosen, or why nothing was: without the times, which are in the row."""
    if x["choice"]:
        return str(x["choice"])
    return NO_GAIN if x["reason"].startswith(NO_GAIN) else str(x["reason"]).replace(repr(x["fqn"]), "its name")


def _gain(members: list[Mapping[str, Any]], target: str) -> str:
    pairs = [(_cost(x["before"], target), _cost(x["candidates"][x["choice"]], target)) for x in members if x["choice"]]
    gains = [before / after for before, after in pairs if before and after]
    unit = "times as fast" if target == "latency" else "times as small"
    return f": {span(gains, '.2f')} {unit}" if gains else ""


def _phases(group: list[Mapping[str, Any]]) -> list[str]:
    """Those of a decoder, a prefill and a step of decode, where it was timed in them."""
    return [
        name for name in dict.fromkeys(n for x in group for n in x["before"].get("phases") or ()) if name != "forward"
    ]


def _cost(x: Mapping[str, Any], target: str, phase: str | None = None) -> float | None:
    """Milliseconds or megabytes, of a layer as it is or of a candidate; of all, or of one phase."""
    if target == "memory":
        return x["bytes"] / 1e6 if x["bytes"] else None
    ms = x["ms"] if phase is None else (x.get("phases") or {}).get(phase)
    return ms["low"] if ms else None


def _costs(candidates: list[Mapping[str, Any]], target: str, phase: str | None = None) -> str:
    costs = [cost for x in candidates if (cost := _cost(x, target, phase)) is not None]
    return span(costs, ".3g") if costs else "-"


def _errors(candidates: list[Mapping[str, Any]]) -> str:
    errors = [x["output"]["mean"] for x in candidates if x["output"]]
    return f"{max(errors):.1e}" if errors else "-"
