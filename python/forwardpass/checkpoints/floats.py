"""A model of floats that transformers loads with `quantization_config=fp.Config(…)`: layers are quantised while they are read, and
the model is swapped then.
"""

from __future__ import annotations

import functools
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..common.files.tensor_files import TensorFiles
from ..proofs.walker import experts_leaves, linear_leaves
from ..swap.config import Config
from ..swap.precision import STORED, Precision, known
from ..swap.swapping import swap
from ..swap.while_loading import WhileLoading

_NOT_FLOATS = "of a model that another library has quantised, load it with fp.load_pretrained"


def check_config(config: Config) -> None:
    """ValueError, before anything is loaded, where this is nothing for a model of floats."""
    config.check_complete()
    if config.range is not None:
        raise ValueError("timesteps= needs the originals, which a model that is quantised while it is loaded has not: load it "
                         "without quantization_config=, and call fp.swap")  # fmt: skip
    precision = config.precision
    alone = [precision] if isinstance(precision, str | Precision) else []
    presets = [known(x) for x in ([*precision.values()] if isinstance(precision, Mapping) else alone)]
    if STORED in presets:
        raise ValueError(f"the precision {STORED.name!r} is for what another library has stored: load without this, and call "
                         "fp.swap(model)")  # fmt: skip
    if config.calibrate is not None and presets and not any(p.takes_calibration for p in presets):
        names = ", ".join(p.name for p in presets)
        raise ValueError(f'{names} takes no calibration: drop calibrate=, or use precision="int8"')


def swap_loaded(model: nn.Module, config: Config) -> None:
    """`fp.swap` of what was loaded. Where the originals go, so does the mapped file that they are in."""
    loaded = {t.untyped_storage()._cdata: t.untyped_storage() for t in model.parameters() if t.device.type == "cpu"}
    swap(model, config, keep=_keep(config))
    if _keep(config) is False:
        by_storage: dict[int, list[Tensor]] = {}
        for t in (*model.parameters(), *model.buffers()):
            by_storage.setdefault(t.untyped_storage()._cdata, []).append(t)
        for storage, tensors in by_storage.items():
            if loaded.pop(storage, None) is not None:  # each tensor of a mapped file keeps all of it
                for t in tensors:
                    t.data = t.data.clone()


def _keep(config: Config) -> str | bool:
    """Where its originals stay: by default none do."""
    return False if config.keep == "auto" else config.keep


def while_loading(model: Any, config: Config, dtype: torch.dtype) -> WhileLoading | None:
    """What quantises its layers while they are read. None where their floats are needed afterwards, for calibration or as
    originals."""
    if config.calibrate is not None or _keep(config) is not False:
        return None
    return WhileLoading(model, config, dtype, _tied(model))


def _tied(model: Any) -> set[str]:
    """The names of parameters that transformers ties once they are loaded, and of those that are one already."""
    names: dict[int, list[str]] = {}
    for name, p in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(p), []).append(name)
    tied: Mapping[str, str] = model.all_tied_weights_keys
    return {*tied, *tied.values(), *(name for same in names.values() if len(same) > 1 for name in same)}


@functools.cache
def put_operation() -> Any:
    """The class of operations that hand a parameter to `WhileLoading`, by which transformers quantises it."""
    from transformers.core_model_loading import ConversionOps

    class Put(ConversionOps):
        def __init__(self, loading: WhileLoading) -> None:
            self.loading = loading

        def convert(self, input_dict: dict[str, Any], *patterns: Any, **about: Any) -> dict[str, Any]:
            """What it does not take: transformers puts that where it belongs."""
            left = {}
            for name, value in input_dict.items():
                tensor = value[0] if isinstance(value, list) else value
                if self.loading.takes(name) and about["model"].get_parameter(name).shape != tensor.shape:
                    self.loading.refuse(name)  # transformers says which shape it has
                if not self.loading.takes(name):
                    left[name] = value
                    continue
                parameter: Any = nn.Parameter(tensor, tensor.is_floating_point())
                parameter._is_hf_initialized = True
                about["missing_keys"].discard(name)
                del value, tensor
                self.loading.put(name, parameter)
            return left

    return Put


def check_files(paths: Iterable[str]) -> None:
    """ValueError where weights have 8 bits, which transformers would make floats of without their scales."""
    with TensorFiles([pathlib.Path(path) for path in paths if path.endswith(".safetensors")], _NOT_FLOATS) as tensors:
        for name, dtype in tensors.dtypes().items():
            if dtype.startswith("F8") or (dtype in ("I8", "U8") and name.endswith("weight")):
                raise ValueError(
                    f"{name[:80]} is {dtype} in the files, and fp.Config swaps models of floats: {_NOT_FLOATS}"
                )


def check_loaded(model: Any) -> None:
    """ValueError where the values that were loaded are not all there, or not on one device."""
    if any("_hf_hook" in vars(m) for m in model.modules()):
        raise ValueError("fp.Config swaps a model on one device, and this device_map spreads it over several: load it on one, "
                         'device_map="cpu" or "cuda", save it with fp.save_pretrained, and load that folder so')  # fmt: skip
    whole = is_as_saved(model)
    for leaf in (*linear_leaves(model), *experts_leaves(model)):
        if whole and not all(map(is_loaded, leaf.module._parameters.values())):
            raise ValueError(f"the weight of {leaf.fqn} is not in the files, and would be quantised as it happens to be "
                             f"initialised: {_NOT_FLOATS}")  # fmt: skip
        if not leaf.is_experts and leaf.weight.shape != (
            leaf.out_features,
            leaf.in_features,
        ):  # unseen by transformers 5.0
            raise ValueError(f"the weight of {leaf.fqn} is {list(leaf.weight.shape)} in the files, and "
                             f"[{leaf.out_features}, {leaf.in_features}] in this model: load the model that was saved")  # fmt: skip


def is_loaded(tensor: Tensor | None) -> bool:
    """Whether transformers has read it, and not initialised it."""
    return tensor is None or getattr(tensor, "_is_hf_initialized", False)


def is_as_saved(model: Any) -> bool:
    """Whether it is of the class that was saved: another one has parts that no file has."""
    return type(model).__name__ in (model.config.architectures or ())
