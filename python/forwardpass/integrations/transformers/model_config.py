"""The config of a Hugging Face model in a checkpoint, and the model that is built from it, without values.

A config can name what transformers downloads and runs: kernels of attention, code of a repository, a backbone of timm's hub.
None of these is stored, and a config that names one is refused.
"""

from __future__ import annotations

import importlib.util
import json
import pathlib
import re
import sys
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from ...common.extras import pip_install
from ...common.files.json_files import write_json
from ...common.printing.quiet import quiet_libraries

CONFIG, GENERATION = "config.json", "generation_config.json"
#: Attention that needs no download: transformers takes flash_attention_2 from its hub where flash-attn is not installed.
LOCAL_ATTENTION = ("eager", "sdpa", "flex_attention")
_CODE = re.compile(
    r"auto_map|custom_pipelines|quantization_config|kernel_config|\w*(attn|attention|experts)_implementation\w*"
)
_HUB = re.compile(r"(.*_)?(backbone|architecture)")
#: What a model has many of: a config is asked for it before the model, whose lists of them would fill the memory.
_COUNTS = re.compile(r"(.*_)?n?(layers?|blocks?|depths?|labels|experts|stages?|stacks?|groups?|repeats)")


def stored(config: Any) -> dict[str, Any]:
    """A config of transformers as JSON has it, without what names code."""

    def clean(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: clean(v) for k, v in value.items() if not _CODE.fullmatch(k)}
        return [clean(v) for v in value] if isinstance(value, list) else value

    return dict(clean(json.loads(config.to_json_string())))


def _entries(content: Any, is_config: bool = True) -> Iterator[tuple[str, Any, bool]]:
    """Every entry of the objects in JSON, however deep, and whether the object is a config: label2id and vocabularies are none."""
    if isinstance(content, list):
        for value in content:
            if isinstance(value, dict | list):
                yield from _entries(value, is_config)
        return
    for key, value in content.items():
        yield key, value, is_config
        if isinstance(value, dict | list):
            yield from _entries(value, key.endswith("config") or "model_type" in value)


def check(content: Mapping[str, Any], tensors: int) -> None:
    """ValueError where a config names code, or asks for more parts than a file of so many tensors can fill."""
    limit = max(1000, tensors)
    for key, value, is_config in _entries(content):
        named = _CODE.fullmatch(key) or (_HUB.fullmatch(key) and isinstance(value, str) and re.search("[:/]", value))
        if named and value is not None:
            raise ValueError(f"{key[:40]}={str(value)[:60]!r} names code, and nothing that a checkpoint names is run")
        counts = [x for x in (value if isinstance(value, list) else [value]) if isinstance(x, int)]
        if is_config and _COUNTS.fullmatch(key) and max(counts, default=0) > limit:
            raise ValueError(f"it asks for {key[:40]}={max(counts)}, and the file holds {tensors} tensors")


def check_attention(config: Any) -> None:
    """ValueError where a config of transformers, or one within it, names attention or experts that would be downloaded."""
    for name in ("_attn_implementation", "_experts_implementation"):
        implementation = getattr(config, name, None)
        if implementation not in (None, "batched_mm", "grouped_mm", *LOCAL_ATTENTION):
            raise ValueError(f"its config names the code {name.removeprefix('_')}={str(implementation)[:60]!r}, which may have "
                             "to be downloaded: remove it from config.json")  # fmt: skip
    for name in getattr(config, "sub_configs", ()):
        check_attention(getattr(config, name, None))


def read(cls: Any, file: str, content: Mapping[str, Any], **options: Any) -> Any:
    """What a class of transformers makes of that content of its file, from a folder with nothing else."""
    with tempfile.TemporaryDirectory() as folder:
        write_json(pathlib.Path(folder, file), dict(content))
        return cls.from_pretrained(folder, local_files_only=True, **options)


def sources(model: nn.Module) -> set[str]:
    """What a model, or parts of it, were loaded from: folders and hub ids."""
    names = (getattr(getattr(m, "config", None), "_name_or_path", None) for m in model.modules())
    return {name for name in names if isinstance(name, str)}


def configs(model: nn.Module) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
    """The config of a model of transformers, and its settings for generation, as JSON has them; None of another model."""
    if model_class(type(model).__name__) is not type(model):
        return None, None
    # transformers loads a model in the dtype that its config says, and a model may have another one since.
    written = {"architectures": [type(model).__name__], "dtype": str(model.dtype).removeprefix("torch.")}
    config = dict(sorted({**stored(model.config), **written}.items()))
    generation = getattr(model, "generation_config", None)
    return config, None if generation is None else stored(generation)


def model_class(name: Any) -> type[nn.Module] | None:
    """The model class of that name in transformers, where transformers is loaded."""
    transformers = sys.modules.get("transformers")
    with quiet_libraries():  # transformers imports torchao with its first model
        cls = (
            getattr(transformers, name, None)
            if transformers and isinstance(name, str) and name.isidentifier()
            else None
        )
    return cls if isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel) else None  # type: ignore[union-attr]


def build(
    name: str, attention: str | None, config: dict[str, Any], generation: Any, tensors: int, source: str
) -> nn.Module:
    """The model of a config as `stored` made it, on the meta device, in eval mode.

    Args:
        name: its class in transformers; attention: what its config called its implementation.
        tensors: how many the file holds.
        source: the folder, which becomes the model's name_or_path.

    Raises:
        ValueError: the config names code, or transformers cannot build it. ImportError: transformers is missing.
    """
    if importlib.util.find_spec("transformers") is None:
        raise ImportError(f"this checkpoint needs transformers: {pip_install('hf')}")
    import transformers

    fix = "save it again with fp.save_pretrained(model, folder), or build the model and pass it as model="
    try:
        check(config, tensors)
    except (ValueError, RecursionError) as e:
        raise ValueError(f"the config of {source} is refused ({e}): {fix}") from None
    cls = model_class(name)
    if cls is None:
        raise ValueError(f"transformers {transformers.__version__} has no model class {name[:60]!r}: install the version "
                         "it was saved with, or build the model and pass it as model=")  # fmt: skip
    try:
        built_config = read(transformers.AutoConfig, CONFIG, config, trust_remote_code=False)
        if generation is not None:
            generation = read(transformers.GenerationConfig, GENERATION, generation)
        built_config._name_or_path = source
        if attention in LOCAL_ATTENTION:
            built_config._attn_implementation = attention
        with torch.device("meta"):
            built = cls(built_config)
        if generation is not None:
            built.generation_config = generation
    except Exception as e:  # transformers raises many kinds
        why = f"{type(e).__name__}: {e}".splitlines()[0][:160]
        raise ValueError(f"transformers cannot build the model of {source} ({why}): {fix}") from None
    if attention is not None and attention not in LOCAL_ATTENTION:
        in_use = built.config._attn_implementation  # type: ignore[union-attr]
        warnings.warn(f"the model was saved with attention {attention[:60]!r}, which may have to be downloaded, and runs "
                      f"{in_use!r}: model.set_attn_implementation changes that", stacklevel=4)  # fmt: skip
    return built.eval()
