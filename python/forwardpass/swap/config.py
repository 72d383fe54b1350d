"""`quantization_config=fp.Config("int8")`: a model of floats that `from_pretrained` of transformers swaps as it is loaded."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import nn

from ..common.batches import check_several
from ..common.patterns import patterns
from .plan import Plan
from .precision import STORED, ByHand, Presets, find_precision
from .report import Report
from .swapping import check_options, swap

#: `quant_method` of models that forwardpass swaps as they load, and of folders that it wrote.
METHOD = "forwardpass"


class Config:
    """What `fp.swap` does to a model of floats, as its class in transformers loads it.

    The arguments are those of `fp.swap`, checked when this is made; only `keep` is False by default: the originals are freed. The
    model is then one that fp.swap has swapped: `fp.report(model)` is the report, and it is saved as one. Calibration batches run
    once every weight is there. A model over several devices, or with weights on a disk, is refused.

    Args:
        precision, plan, attention, unpad, kv_cache, include, exclude, strict, calibrate, forward: as `fp.swap` has them. An
            iterator as calibrate= serves one load.
        keep: False, or as fp.swap has it, for `fp.restore`.

    Raises:
        ValueError, TypeError, FileNotFoundError: an argument is none that fp.swap takes, or it asks for bytes of another library
            ("stored"), which are there after a load without this.

    Example:
        >>> config = fp.Config("int8", exclude="mlp")
        >>> model = AutoModelForCausalLM.from_pretrained("floats", quantization_config=config)
        >>> {layer.precision for layer in fp.report(model).swapped}
        {'int8'}
    """

    quant_method = METHOD

    def __init__(
        self,
        precision: ByHand | None = None,
        plan: Plan | Mapping[str, Any] | str | os.PathLike[str] | None = None,
        *,
        attention: str | bool = "auto",
        unpad: bool = True,
        kv_cache: str | None = None,
        include: str | Iterable[str] = (),
        exclude: str | Iterable[str] = (),
        strict: bool = False,
        calibrate: Iterable[Any] | None = None,
        keep: str | bool = False,
        forward: Callable[[nn.Module, Any], Any] | None = None,
    ) -> None:
        check_options("Config", precision, plan, attention=attention, unpad=unpad, kv_cache=kv_cache, keep=keep)
        if precision is not None:
            _check_precision(precision, calibrate is not None)
        if not isinstance(strict, bool):
            raise TypeError(f"strict is True or False, not {strict!r}")
        if calibrate is not None:
            check_several("calibrate", calibrate)
        if forward is not None and not callable(forward):
            raise TypeError(f"forward is a function of a model and a batch, not {forward!r}")
        self._options: dict[str, Any] = {
            "precision": precision,
            "plan": None if plan is None else Plan.load(plan),
            "attention": attention,
            "unpad": unpad,
            "kv_cache": kv_cache,
            "include": tuple(p.text for p in patterns("include", include)),
            "exclude": tuple(p.text for p in patterns("exclude", exclude)),
            "strict": strict,
            "calibrate": calibrate,
            "keep": keep,
            "forward": forward,
        }

    def swap(self, model: nn.Module) -> Report:
        """`fp.swap(model, …)` with these arguments. Where the originals go, so does the mapped file that they are in."""
        loaded = {t.untyped_storage()._cdata: t.untyped_storage() for t in model.parameters() if t.device.type == "cpu"}
        report = swap(model, **self._options)
        if self._options["keep"] is False:
            for t in (*model.parameters(), *model.buffers()):
                if t.untyped_storage()._cdata in loaded:  # each tensor of a mapped file keeps all of it
                    t.data = t.data.clone()
        return report

    def to_dict(self) -> dict[str, Any]:
        """For transformers, which prints it."""
        shown = {
            name: value if isinstance(value, str | bool | None) else repr(value)
            for name, value in self._options.items()
        }
        return {"quant_method": METHOD, **shown}

    def __deepcopy__(self, memo: object) -> Config:
        """Itself: transformers copies it with the model's config, and batches may be an iterator."""
        return self

    def __repr__(self) -> str:
        return f"Config({', '.join(f'{name}={value!r}' for name, value in self._options.items())})"


def _check_precision(precision: ByHand, calibrated: bool) -> None:
    Presets(precision)
    names = (
        [precision] if isinstance(precision, str) else [*precision.values()] if isinstance(precision, Mapping) else []
    )
    if STORED.name in names:
        raise ValueError(f"the precision {STORED.name!r} is for what another library has stored: load without this, and call "
                         "fp.swap(model)")  # fmt: skip
    if calibrated and names and not any(find_precision(name).takes_calibration for name in names):
        raise ValueError(f'{", ".join(names)} takes no calibration: drop calibrate=, or use precision="int8"')
