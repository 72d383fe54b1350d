"""`forwardpass.json`, checked entry by entry when it is read, and the names of a model's tensors."""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..common.files.forms import OneOf, misfit
from ..common.files.json_files import read_json
from ..integrations import sentence_transformers as sentences
from ..integrations.transformers.kv_scales import KV_CACHES
from ..swap.plan import ATTENTION_8BIT, UNPAD
from ..swap.precision import modules
from .folder import (
    RECORD,
    WEIGHTS,
)

SCHEMA = "forwardpass.checkpoint/3"
#: Its files have integers under the name `weight`.
EARLIER = "forwardpass.checkpoint/2"
FIX = "save it again with fp.save_pretrained(model, folder)"
_LAYER = {"fqn": str, "module": str, "precision": str | None, "version": int | None, "config": dict}
_FORM = {
    "schema": str,
    "forwardpass": str,
    "model": {"class": str, "attention": str | None, "config": dict | None, "generation_config": dict | None},
    "weights": (str, [str]),  # of several files, their names
    "layers": [_LAYER],
    "attention": [str],
    "unpad": OneOf(None, *UNPAD),
    "kv_cache": OneOf(None, *KV_CACHES),
    "attention_8bit": [ATTENTION_8BIT],
    "aliases": {"*": str},
    "rewritten": (
        [str],
        None,
    ),  # first layers of products and of MLPs that are one unit, and norms that quantise for these
    "folded": [str],  # convolutions in floats that compute what is behind them
    "encoders": [str],  # lists of layers that are one operation on a CPU
    "decoders": [str],
    "around": dict | None,
}


@dataclass(frozen=True)
class Slot:
    """Where a parameter or buffer is held."""

    module: nn.Module
    name: str
    tensor: Tensor

    @property
    def is_parameter(self) -> bool:
        return self.name in self.module._parameters

    @property
    def holder(self) -> dict[str, Any]:
        return self.module._parameters if self.is_parameter else self.module._buffers


def slots(model: nn.Module, instead: Mapping[int, nn.Module], prefix: str = "") -> Iterator[tuple[str, Slot]]:
    """Every parameter and buffer under every name; buffers that state_dict leaves out (rotary frequencies) too, as a
    model built without values cannot compute them. `instead`: modules that stand for others, by id.
    """
    module = instead.get(id(model), model)
    for tensors in (module._parameters, module._buffers):
        for name, tensor in tensors.items():
            if tensor is not None and tensor is not getattr(module, "anchor", None):
                yield prefix + name, Slot(module, name, tensor)
    for name, child in module._modules.items():
        if child is not None:
            yield from slots(child, instead, f"{prefix}{name}.")


def read_record(folder: pathlib.Path) -> dict[str, Any]:
    """forwardpass.json, every entry of the type that `save_pretrained` writes."""
    if not folder.is_dir():
        raise FileNotFoundError(
            f"there is no folder {folder}: give load_pretrained a folder that fp.save_pretrained wrote"
        )
    return checked(read_json(folder / RECORD, "checkpoint of forwardpass", FIX), folder / RECORD)


def checked(content: Mapping[str, Any], path: str | pathlib.Path) -> dict[str, Any]:
    """A record with every entry of the type that `save_pretrained` writes. Raises ValueError, which names its place."""
    # older ones do not say these
    record: dict[str, Any] = {"unpad": None, "kv_cache": None, "attention_8bit": [], "around": None, "rewritten": None,
                              "folded": [], "encoders": [], "decoders": [], **content}  # fmt: skip
    if record.get("schema") not in (SCHEMA, EARLIER):
        raise ValueError(
            f"{path} has the schema {str(record.get('schema'))[:60]!r}, and this version reads {SCHEMA!r}: {FIX}"
        )

    def require(holds: bool, problem: str) -> None:
        if not holds:
            raise ValueError(f"{path} is damaged ({problem}): {FIX}")

    problem = misfit(record, _FORM)
    require(problem is None, str(problem))
    weights = weights_of(record)
    named = all(WEIGHTS.fullmatch(name) for name in weights) and len({*weights}) == len(weights) > 0
    require(named, "the name of its weights")
    if record["around"] is not None:
        try:
            sentences.check(record["around"])
        except (ValueError, TypeError, AttributeError) as e:
            require(False, str(e))
    fqns = set()
    for i, layer in enumerate(record["layers"]):
        require(layer["module"] in modules(), f"layers.{i} is of an unknown module")
        require(layer["fqn"] not in fqns, f"layers.{i} is there twice")
        fqns.add(layer["fqn"])
    others = {x["fqn"] for x in record["attention_8bit"]} - {*record["attention"]}
    require(not others, f"{min(others, default='')[:80]} is to compute in 8 bits, and is not among its attention")
    return record if record["schema"] == SCHEMA else _as_now(record)


def _as_now(record: dict[str, Any]) -> dict[str, Any]:
    """An earlier record, which does not say of layers without a bias what dtype they stand for."""
    of_model = record["model"]["config"] or {}
    dtype = of_model.get("dtype") or of_model.get("torch_dtype")
    for layer in record["layers"]:
        if dtype is not None and layer["config"].get("bias") is False:
            layer["config"]["dtype"] = dtype
    now = names_now(record)
    aliases = {now(name): now(stored) for name, stored in record["aliases"].items()}
    return {**record, "aliases": aliases}


def names_now(record: Mapping[str, Any]) -> Callable[[str], str]:
    """What gives the name that a tensor of a record's files has now."""
    layers = {layer["fqn"] for layer in record["layers"]} if record["schema"] == EARLIER else ()

    def now(name: str) -> str:
        fqn, _, tensor = name.rpartition(".")
        return f"{fqn}.qweight" if tensor == "weight" and fqn in layers else name

    return now


def weights_of(record: Mapping[str, Any]) -> list[str]:
    """The names of a record's files of weights."""
    weights = record["weights"]
    return weights if isinstance(weights, list) else [weights]
