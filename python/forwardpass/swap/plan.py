"""The plan: which layer runs at which precision, whose attention is swapped. A JSON file that replays on the same model."""

from __future__ import annotations

import hashlib
import json
import os
import typing
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from ..common.files.forms import OneOf, misfit
from ..common.files.json_files import read_json, write_json
from ..common.printing.printed import Block, Printed, Table
from ..common.printing.text import count, together
from ..integrations.timesteps import Timesteps, check_timesteps
from ..integrations.timesteps import describe as described
from ..integrations.transformers.kv_scales import KV_CACHES
from ..nn import MultiheadAttention
from ..nn.eight_bits import EightBits
from ..proofs.walker import ConvolutionLeaf, Leaf
from .plan_evidence import check, describe
from .precision import LayerPrecision, find_precision

SCHEMA = "forwardpass.plan/2"
#: How much of an encoder runs without padding: all but attention, or attention too.
UNPAD = ("layers", "attention")
#: What older plans do not say.
_OPTIONAL = ("evidence", "unpad", "kv_cache", "attention_8bit", "timesteps", "folded")
_FIX = "write one with fp.plan or report.save_plan(path)"


@dataclass(frozen=True)
class PlannedLayer:
    """A layer and its precision; the shapes tell whether a model is the one that was planned for. `calibrated`: the layer
    takes part in the calibration.
    """

    fqn: str
    in_features: int
    out_features: int
    bias: bool
    precision: str
    version: int
    calibrated: bool


@dataclass(frozen=True)
class PlannedAttention:
    """Attention that computes in 8 bits, as `EightBits` has it."""

    fqn: str
    dtype: str
    crossover: int | None


#: The form of one in JSON.
ATTENTION_8BIT = typing.get_type_hints(PlannedAttention)


_FORM = {
    "model": str,
    "linear_layers": str,
    "layers": [typing.get_type_hints(PlannedLayer)],
    "attention": [str],
    "calibration": str | None,
    "forwardpass": str,
    "unpad": OneOf(None, *UNPAD),
    "kv_cache": OneOf(None, *KV_CACHES),
    "attention_8bit": (None, [ATTENTION_8BIT]),
    "timesteps": (None, [(int, float, None)]),
    "folded": (None, [str]),
    "evidence": dict | None,
}


@dataclass(frozen=True, repr=False)
class Plan(Printed):
    """Which layer runs at which precision; layers that it does not name stay as they are.

    The effect of calibration batches is not in the file (a checkpoint holds it), so replaying a plan with calibrated
    layers takes the same batches again, as `calibrate=`: `calibration` tells whether they are the same.
    """

    model: str  #: the class of the model, for messages
    linear_layers: (
        str  #: `layers_of` the model: how many Linear-like layers, and a fingerprint of their names and shapes
    )
    layers: tuple[PlannedLayer, ...]
    attention: tuple[str, ...]  #: names of the modules whose attention is swapped
    calibration: str | None  #: `fingerprint` of the batches; None: any will do
    forwardpass: str  #: the version that wrote it
    #: what of its encoders runs without padding: "layers", "attention" too, or nothing, as before there was a choice
    unpad: str | None = None
    kv_cache: str | None = None  #: what its caches become, one of KV_CACHES; None: they stay what they are
    attention_8bit: tuple[PlannedAttention, ...] = ()  #: those of `attention` that compute in 8 bits
    timesteps: Timesteps | None = None  #: at which all of it counts, as `fp.Config` has them
    #: convolutions that stay in floats, and compute the norm and the activation behind them
    folded: tuple[str, ...] = ()
    #: how `fp.plan` came to it: kept with the plan, and not looked at when it is replayed
    evidence: Mapping[str, Any] | None = field(default=None, compare=False, repr=False)

    @property
    def calibrated(self) -> bool:
        return any(layer.calibrated for layer in self.layers)

    def bits(self) -> dict[str, EightBits]:
        """The attention that computes in 8 bits, by name."""
        return {x.fqn: EightBits(x.dtype, x.crossover) for x in self.attention_8bit}

    def precisions(self) -> dict[str, LayerPrecision]:
        """That of each layer, by its name."""
        return {x.fqn: LayerPrecision(find_precision(x.precision, x.version), x.calibrated) for x in self.layers}

    def _blocks(self) -> Iterator[Block]:
        """The table that `fp.plan` chose from, or the layers alone."""
        if self.evidence is not None:
            yield from describe(self.evidence)
            return
        rows: list[tuple[str, ...] | str] = [("layer", "precision", "calibrated")]
        alike = together(self.layers, lambda x: x.fqn, lambda x: (x.precision, x.version, x.calibrated))
        rows += [(name, f"{x.precision} v{x.version}", "yes" if x.calibrated else "no") for name, (x, *_) in alike]
        where = "" if self.timesteps is None else f", at {described(self.timesteps)}"
        yield f"{count(len(self.layers), 'layer')} of a {self.model}{where}"
        if self.layers:
            yield from ("", Table(rows))

    def to_json(self) -> dict[str, Any]:
        return {
            "schema": SCHEMA,
            **{name: value for name, value in vars(self).items() if name != "evidence"},
            "layers": [dict(vars(layer)) for layer in self.layers],
            "attention": list(self.attention),
            "attention_8bit": [dict(vars(x)) for x in self.attention_8bit],
            "timesteps": None if self.timesteps is None else list(self.timesteps),
            "folded": list(self.folded),
            **({} if self.evidence is None else {"evidence": dict(self.evidence)}),
        }

    def save(self, path: str | os.PathLike[str]) -> None:
        write_json(path, self.to_json())

    @staticmethod
    def from_json(content: Mapping[str, Any], source: str = "the plan") -> Plan:
        """Refuses, with a ValueError, whatever `to_json` would not have written."""

        def fail(text: str) -> ValueError:
            return ValueError(f"{source} is not a plan ({text}): {_FIX}")

        if not isinstance(content, Mapping) or "schema" not in content:
            raise fail("it has no schema")
        if content["schema"] != SCHEMA:
            raise ValueError(f"{source} has the schema {str(content['schema'])[:60]!r}, and this version reads "
                             f"{SCHEMA!r}: make the plan again, or install the version that wrote it")  # fmt: skip
        entries: dict[str, Any] = dict.fromkeys(_OPTIONAL) | {k: v for k, v in content.items() if k != "schema"}
        if problem := misfit(entries, _FORM):
            raise fail(problem)
        if entries["evidence"] is not None:
            try:
                check(entries["evidence"])
            except ValueError as e:
                raise fail(f"its evidence: {e}") from None
        layers = tuple(PlannedLayer(**row) for row in entries["layers"])
        for i, layer in enumerate(layers):
            if layer.calibrated and not find_precision(layer.precision, layer.version).takes_calibration:
                raise fail(f"layers.{i} is calibrated, and {layer.precision} takes no calibration")
        if len({layer.fqn for layer in layers}) != len(layers):
            raise fail("it names a layer twice")
        attention, in_8_bits = tuple(entries["attention"]), attention_8bit_of(entries)
        timesteps = None if entries["timesteps"] is None else tuple(entries["timesteps"])
        lists = {"layers": layers, "attention": attention, "attention_8bit": in_8_bits, "timesteps": timesteps,
                 "folded": tuple(entries["folded"] or ())}  # fmt: skip
        plan = Plan(**{**entries, **lists})
        try:
            bits = plan.bits()
            check_timesteps(timesteps)
        except (TypeError, ValueError) as e:
            raise fail(str(e)) from None
        if others := bits.keys() - {*attention}:
            raise fail(f"{min(others)[:80]} is to compute in 8 bits, and is not among its attention")
        return plan

    @staticmethod
    def load(source: Plan | Mapping[str, Any] | str | os.PathLike[str]) -> Plan:
        """A plan as `fp.swap` takes it: itself, its JSON, or the path of its file."""
        if isinstance(source, Plan):
            return source
        if isinstance(source, Mapping):
            return Plan.from_json(source)
        if not isinstance(source, str | os.PathLike):
            raise TypeError(f"plan takes a Plan, a dict or a path, not {type(source).__name__}: {_FIX}")
        return Plan.from_json(read_json(source, "plan", _FIX), str(source))

    def check_fits(self, leaves: Mapping[str, Leaf], model: str) -> None:
        """ValueError where the model has other Linear-like layers than the one that was planned: others of the plan first."""
        for layer in self.layers:
            leaf = leaves.get(layer.fqn)
            if leaf is None:
                raise self._misfit(model, f"it has no Linear layer, convolution or experts {layer.fqn}")
            has = (leaf.in_features, leaf.out_features, leaf.has_bias)
            if has != (layer.in_features, layer.out_features, layer.bias):
                raise self._misfit(model, f"{layer.fqn} has (in_features, out_features, bias) {has}, not "
                                          f"{(layer.in_features, layer.out_features, layer.bias)}")  # fmt: skip
        for fqn in self.folded:
            if not isinstance(leaf := leaves.get(fqn), ConvolutionLeaf):
                raise self._misfit(model, f"it has no convolution {fqn}")
            if leaf.norm is None and leaf.activation is None:
                raise self._misfit(
                    model, f"there is neither a norm nor an activation behind {fqn} that it could compute"
                )
        linear = [leaf for leaf in leaves.values() if not (leaf.is_experts or leaf.is_convolution)]
        if (has_layers := layers_of(linear)) != self.linear_layers:
            raise self._misfit(model, f"it has {has_layers}, not {self.linear_layers[:100]}")

    def _misfit(self, model: str, text: str) -> ValueError:
        return ValueError(
            f"the plan is for another model ({self.model}) than this {model}: {text}; plan this model instead"
        )


def attention_8bit_of(content: Mapping[str, Any]) -> tuple[PlannedAttention, ...]:
    """What a plan or a checkpoint says of attention in 8 bits; older ones say nothing."""
    return tuple(PlannedAttention(**row) for row in content["attention_8bit"] or ())


def layers_of(leaves: Iterable[Leaf]) -> str:
    """Says of which Linear-like layers a model consists, planned or not: a plan may leave all of them as they are.

    Without the in_proj of attention, which is a layer while the model is looked at alone: older plans do not know it."""
    modules = (leaf for leaf in leaves if not isinstance(leaf.parent, MultiheadAttention) or leaf.name != "in_proj")
    shapes = sorted((leaf.fqn, leaf.in_features, leaf.out_features, leaf.has_bias) for leaf in modules)
    return f"{len(shapes)} Linear layers, sha256:{hashlib.sha256(json.dumps(shapes).encode()).hexdigest()[:16]}"
