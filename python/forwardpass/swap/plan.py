"""The plan: which layer runs at which precision, whose attention is swapped. A JSON file that replays on the same model."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .files import read_json, write_json
from .precision import find_precision
from .walker import Leaf

SCHEMA = "forwardpass.plan/1"
_FIX = "write one with report.save_plan(path)"


@dataclass(frozen=True)
class PlannedLayer:
    """A layer and its precision; the shapes tell whether a model is the one that was planned for."""

    fqn: str
    in_features: int
    out_features: int
    bias: bool
    precision: str
    version: int


@dataclass(frozen=True)
class Plan:
    """Which layer runs at which precision; layers that it does not name stay as they are.

    `calibrated`: the layers were calibrated on batches. The batches' effect is not in the file (a checkpoint holds
    it), so replaying such a plan takes `calibrate=` again.
    """

    model: str  #: the class of the model, for messages
    layers: tuple[PlannedLayer, ...]
    attention: tuple[str, ...]  #: names of the modules whose attention is swapped
    calibrated: bool
    forwardpass: str  #: the version that wrote it

    def to_json(self) -> dict[str, Any]:
        return {
            "schema": SCHEMA,
            **vars(self),
            "layers": [dict(vars(layer)) for layer in self.layers],
            "attention": list(self.attention),
        }

    def save(self, path: str | os.PathLike[str]) -> None:
        write_json(path, self.to_json())

    @staticmethod
    def from_json(content: Mapping[str, Any], source: str = "the plan") -> Plan:
        """Refuses, with a ValueError, whatever `to_json` would not have written."""

        def fail(text: str) -> ValueError:
            return ValueError(f"{source} is not a plan ({text}): {_FIX}")

        def fields(cls: type, given: Any, where: str, **special: Any) -> dict[str, Any]:
            if not isinstance(given, Mapping):
                raise fail(f"{where} is not an object")
            expected = {
                n: special.get(n) or {"str": str, "int": int, "bool": bool}[t] for n, t in cls.__annotations__.items()
            }
            if set(given) != set(expected):
                raise fail(f"{where} has the entries {_few(given)}, not {_few(expected)}")
            for name, kind in expected.items():
                if type(given[name]) is not kind:  # exact: True is not a size
                    raise fail(f"{name} of {where} is {str(given[name])[:40]!r}, not of type {kind.__name__}")
            return dict(given)

        if not isinstance(content, Mapping) or "schema" not in content:
            raise fail("it has no schema")
        if content["schema"] != SCHEMA:
            raise ValueError(f"{source} has the schema {str(content['schema'])[:60]!r}, and this version reads "
                             f"{SCHEMA!r}: make the plan again, or install the version that wrote it")  # fmt: skip
        entries = {"attention": []} | {k: v for k, v in content.items() if k != "schema"}  # older plans swap none
        plan = fields(Plan, entries, "the plan", layers=list, attention=list)
        if not all(isinstance(name, str) for name in plan["attention"]):
            raise fail("a name in attention is no string")
        layers = tuple(PlannedLayer(**fields(PlannedLayer, x, f"layer {i}")) for i, x in enumerate(plan["layers"]))
        names = {layer.fqn for layer in layers}
        if len(names) != len(layers):
            raise fail("it names a layer twice")
        for layer in layers:
            find_precision(layer.precision, layer.version)
        return Plan(**{**plan, "layers": layers, "attention": tuple(plan["attention"])})

    @staticmethod
    def load(given: Plan | Mapping[str, Any] | str | os.PathLike[str]) -> Plan:
        """A plan as `fp.swap` takes it: itself, its JSON, or the path of its file."""
        if isinstance(given, Plan):
            return given
        if isinstance(given, Mapping):
            return Plan.from_json(given)
        if not isinstance(given, str | os.PathLike):
            raise TypeError(f"plan takes a Plan, a dict or a path, not {type(given).__name__}: {_FIX}")
        return Plan.from_json(read_json(given, "plan", _FIX), str(given))

    def check_fits(self, leaves: Mapping[str, Leaf], model: str) -> None:
        """ValueError where a planned layer is not in the model, or has another shape there."""
        for layer in self.layers:
            leaf = leaves.get(layer.fqn)
            if leaf is None:
                raise self._misfit(model, f"it has no Linear layer {layer.fqn}")
            has = (leaf.in_features, leaf.out_features, leaf.has_bias)
            if has != (layer.in_features, layer.out_features, layer.bias):
                raise self._misfit(model, f"{layer.fqn} has (in_features, out_features, bias) {has}, not "
                                          f"{(layer.in_features, layer.out_features, layer.bias)}")  # fmt: skip

    def _misfit(self, model: str, text: str) -> ValueError:
        return ValueError(
            f"the plan is for another model ({self.model}) than this {model}: {text}; plan this model instead"
        )


def _few(names: Any) -> str:
    names = sorted(map(str, names))
    return ", ".join(n[:40] for n in names[:8]) + (", …" if len(names) > 8 else "")
