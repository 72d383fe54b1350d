"""torchao's int8 and float8 tensors: a weight's parts by their names behind `_weight_`, and the rest of it in the file's header.

The header has for each weight its class, and how inputs are quantised: `act_quant_kwargs`, null where weights alone have 8 bits.
`act_quant_scale` is a static scale of them, `act_pre_scale` a factor for each channel before that.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..ops.common.quantized_rows import E4M3
from .recipe import (
    EightBits,
    Header,
    Recipe,
    Refused,
    as_scale,
    check_dtype,
    check_int8_scales,
    check_shape,
    recipe,
    scales_kind,
)

_DTYPES = {"Int8Tensor": torch.int8, "Float8Tensor": E4M3}
_STATIC, _ZERO, _CHANNELS = "_weight_act_quant_scale", "_weight_act_quant_zero_point", "_weight_act_pre_scale"


def layer_recipe(tensors: Mapping[str, Header], config: Mapping[str, Any], name: str) -> Recipe | None:
    if not any(tensor.startswith("_weight_") for tensor in tensors):
        return None
    about = _about(config, f"{name}.weight" if name else "weight")
    if (dtype := _DTYPES.get(about["_type"])) is None:
        raise Refused(f"its weight is a {about['_type'][:40]}, and {' and '.join(_DTYPES)} can be read")
    inputs = about["_data"].get("act_quant_kwargs")
    check_dtype(tensors, "_weight_qdata", dtype)
    n, k = tensors["_weight_qdata"].shape
    kind = scales_kind(n, k, tensors, "_weight_scale")
    if inputs is not None and dtype == torch.int8:
        check_int8_scales(kind)
    for static in {_STATIC, _ZERO} & tensors.keys():
        check_shape(tensors, static, (), (1,), (1, 1))
    if _CHANNELS in tensors:
        check_shape(tensors, _CHANNELS, (k,), (1, k))
    return recipe(
        tensors,
        lambda t: _read(t, kind, inputs),
        ("_weight_qdata", "_weight_scale"),
        ("_weight_zero_point", *((_STATIC, _ZERO, _CHANNELS) if inputs is not None else ())),
    )


def _about(config: Mapping[str, Any], weight: str) -> dict[str, Any]:
    """What the header says of a weight."""
    try:
        about = json.loads(config["header"][weight])
        if isinstance(about["_type"], str) and isinstance(about.setdefault("_data", {}), dict):
            return about
    except (KeyError, TypeError, AttributeError, ValueError, RecursionError):
        pass
    raise Refused("the file's header does not say what its weight is")


def _read(t: Mapping[str, Tensor], kind: str, inputs: Any) -> EightBits:
    if "_weight_zero_point" in t and t["_weight_zero_point"].any():
        raise Refused("its weights have zero points, and there are kernels for symmetric ones")
    zero = t[_ZERO].reshape(1).int() if _ZERO in t and t[_ZERO].any() else None
    static = as_scale(_STATIC, t[_STATIC]).reshape(1) if _STATIC in t else None
    return EightBits(
        t["_weight_qdata"], as_scale("_weight_scale", t["_weight_scale"]), kind, inputs=inputs is not None,
        symmetric=zero is None if static is not None else "ASYMMETRIC" not in json.dumps(inputs),
        input_scale=static, input_zero_point=zero,
        channel_scale=as_scale(_CHANNELS, t[_CHANNELS]).reshape(-1) if _CHANNELS in t else None,
    )  # fmt: skip
