"""What sentence-transformers has around a model of transformers: read from its folders and models, built around another one.

A description is JSON: the class (SentenceTransformer or CrossEncoder), its modules in their order, each with its configuration, and
what belongs to no module. It names no Python class by its path and no code: modules and activations are of the lists below.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import json
import pathlib
import sys
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any, NoReturn, cast

import torch
from torch import nn

from ..common.files.forms import AtMost, misfit
from ..common.files.json_files import MAX_JSON_BYTES

CLASSES = ("SentenceTransformer", "CrossEncoder")
MODULES, SETTINGS = "modules.json", "config_sentence_transformers.json"
#: The modules that are known, and of what type their configuration is; an entry that is missing has the library's default.
_CONFIGS: dict[str, dict[str, Any]] = {
    "Transformer": {"transformer_task": str, "modality_config": dict, "module_output_name": str,
                    "max_seq_length": int | None, "do_lower_case": bool, "unpad_inputs": bool | None},
    "Pooling": {"embedding_dimension": int, "pooling_mode": str | list, "include_prompt": bool},
    "Normalize": {"module_input_name": str, "module_output_name": str | None},
    "Dense": {"in_features": int, "out_features": int, "bias": bool, "activation_function": str, "module_input_name": str,
              "module_output_name": str | None, "use_residual": bool},
}  # fmt: skip
_SETTINGS: dict[str, dict[str, Any]] = {
    "SentenceTransformer": {"similarity_fn_name": str | None, "truncate_dim": int | None},
    "CrossEncoder": {"activation_fn": str, "keep_in_fp32_modules": list | None},
}
_PROMPTS: dict[str, Any] = {"prompts": dict, "default_prompt_name": str | None}
_DESCRIPTION = {"class": str, "modules": [{"name": str, "module": str, "config": dict}], "settings": dict}
#: Of a module that takes texts alone, whichever of these the library says of it.
_MODALITIES = ("text", "message")
_TASKS = {"SentenceTransformer": "feature-extraction", "CrossEncoder": "sequence-classification"}
#: How an older version wrote a Pooling.
_RENAMED = {"word_embedding_dimension": "embedding_dimension"}
_FLAGS = {"cls_token": "cls", "max_tokens": "max", "mean_tokens": "mean", "weightedmean_tokens": "weightedmean"}


def module_configs(description: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The configuration of each kind of module that it has; of one that is there twice, that of the last."""
    return {x["module"]: x["config"] for x in description["modules"]}


def read(folder: pathlib.Path) -> dict[str, Any] | None:
    """The description of a folder that sentence-transformers wrote, None of any other.

    Raises:
        ValueError: in one sentence: it holds what is not known here, or cannot be read.
    """
    modules = json_of(folder / MODULES)
    if not modules:
        return None
    settings = json_of(folder / SETTINGS)
    kind = settings.get("model_type") or "SentenceTransformer"
    try:
        entries = []
        for i, x in enumerate(modules):
            package, _, module = str(x["type"]).rpartition(".")
            if package.partition(".")[0] != "sentence_transformers":
                raise ValueError(f"it has a module {str(x['type'])[:80]}, which is none of sentence-transformers")
            place = folder / str(x["path"])
            if not place.resolve().is_relative_to(folder.resolve()):
                raise ValueError(f"the path {str(x['path'])[:80]!r} leads out of it")
            content = json_of(place / ("sentence_bert_config.json" if module == "Transformer" else "config.json"))
            name = str(x.get("name", i))
            entries.append({"name": name, "module": module, "config": _current(module, content)})
        names = {**_PROMPTS, **_SETTINGS.get(kind, {})}
        known = {name: x for name, x in settings.items() if name in names and x is not None}
        description = {"class": kind, "modules": entries, "settings": known}
        check(description)
    except (KeyError, TypeError, AttributeError) as e:
        raise ValueError(f"cannot read {folder / MODULES} ({type(e).__name__}): save the model again") from None
    except ValueError as e:
        raise ValueError(f"{folder} is not read as a model of sentence-transformers ({e}): use fp.swap in Python on "
                         "the model that the library loads") from None  # fmt: skip
    return description


def json_of(file: pathlib.Path) -> Any:
    """Empty where there is none. ValueError, in one sentence, where there is no JSON in it."""
    try:
        with open(file, encoding="utf-8") as opened:
            return json.loads(opened.read(MAX_JSON_BYTES))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as e:
        raise ValueError(f"cannot read {file} ({type(e).__name__}): save the model again") from None


def _current(module: str, config: dict[str, Any]) -> dict[str, Any]:
    """As it is written now, without what says nothing."""
    config = {_RENAMED.get(name, name): x for name, x in config.items() if x not in (None, {}, [])}
    if module == "Pooling":
        flags = {n.removeprefix("pooling_mode_"): config.pop(n) for n in list(config) if n.startswith("pooling_mode_")}
        modes = [_FLAGS.get(name, name) for name, is_on in flags.items() if is_on is True]
        if "pooling_mode" not in config and modes:
            config["pooling_mode"] = modes[0] if len(modes) == 1 else modes
    return config


def check(description: Mapping[str, Any]) -> None:
    """ValueError, in part of a sentence, where it is none, or names what is not in the lists above."""
    _require(misfit(description, _DESCRIPTION))
    kind, modules, settings = description["class"], description["modules"], description["settings"]
    if kind not in CLASSES:
        raise ValueError(f"it is a {kind[:60]}, and what is known is {' and '.join(CLASSES)}")
    if not modules:
        raise ValueError("it has no modules")
    for i, x in enumerate(modules):
        if x["module"] not in _CONFIGS or (x["module"] == "Transformer") != (i == 0):
            raise ValueError(f"it has a module {x['module'][:60]} in place {i}, and what is known is a Transformer, then any "
                             f"of {', '.join(list(_CONFIGS)[1:])}")  # fmt: skip
        _require(misfit(x["config"], AtMost(_CONFIGS[x["module"]]), f"its {x['module']}"))
        if "activation_function" in x["config"]:
            _activation(x["config"]["activation_function"])
    names = [x["name"] for x in modules]
    if not all(name and "." not in name for name in names) or len({*names}) < len(names):
        raise ValueError("a module has no name of its own")
    _require(misfit(settings, AtMost({**_PROMPTS, **_SETTINGS[kind]}), "its settings"))
    if not all(isinstance(x, str) for prompt in settings.get("prompts", {}).items() for x in prompt):
        raise ValueError("a prompt is no text")
    if "activation_fn" in settings:
        _activation(settings["activation_fn"])
    transformer = modules[0]["config"]
    if (task := transformer.get("transformer_task", _TASKS[kind])) != _TASKS[kind]:
        raise ValueError(f"its Transformer is for {task[:60]}, and a {kind} that is known for {_TASKS[kind]}")
    for modality, x in transformer.get("modality_config", {}).items():
        if modality not in _MODALITIES or not isinstance(x, dict) or x.get("method") != "forward":
            raise ValueError(f"it takes {str(modality)[:60]} by another way than the model's forward on texts")


def _require(problem: str | None) -> None:
    if problem is not None:
        raise ValueError(problem)


def _activation(name: str) -> nn.Module:
    """One of torch's, without arguments."""
    package, _, last = name.rpartition(".")
    cls = getattr(nn, last, None)
    if (
        not isinstance(cls, type)
        or not (cls is nn.Identity or cls.__module__ == "torch.nn.modules.activation")
        or not (package + ".").startswith(("torch.nn.", "."))
    ):
        raise ValueError(f"the activation {name[:60]} is none of torch.nn")
    try:
        return cast(nn.Module, cls())
    except TypeError:
        raise ValueError(f"the activation {name[:60]} takes arguments") from None


def class_of(model: nn.Module) -> str | None:
    """The name of its class, of a SentenceTransformer or CrossEncoder."""
    library = sys.modules.get("sentence_transformers")
    return next((name for name in CLASSES if library and type(model) is getattr(library, name, None)), None)


def describe(model: nn.Module) -> dict[str, Any] | None:
    """The description of a SentenceTransformer or CrossEncoder, None of any other model. ValueError, in one sentence, where it
    holds what is not known here, or would not come back.
    """
    kind = class_of(model)
    if kind is None:
        return None
    live: Any = model
    settings = {"prompts": dict(live.prompts), "default_prompt_name": live.default_prompt_name}
    try:
        modules = [
            {"name": name, "module": type(m).__name__, "config": _config(m)} for name, m in model.named_children()
        ]
        if kind == "CrossEncoder":
            settings |= {"activation_fn": _activation_name(live.activation_fn),
                         "keep_in_fp32_modules": list(live.keep_in_fp32_modules or ())}  # fmt: skip
        else:
            settings |= {"similarity_fn_name": live.similarity_fn_name, "truncate_dim": live.truncate_dim}
        description = {"class": kind, "modules": modules, "settings": settings}
        check(description)
    except ValueError as e:
        _refuse(kind, str(e))
    return description


def _refuse(kind: str, why: str) -> NoReturn:
    raise ValueError(f"this {kind} cannot be saved whole ({why}): save the model of transformers in it, "
                     "fp.save_pretrained(model[0].model, folder), and build the rest anew around it")  # fmt: skip


def _config(module: Any) -> dict[str, Any]:
    kind = type(module).__name__
    if kind not in _CONFIGS or type(module).__module__.partition(".")[0] != "sentence_transformers":
        raise ValueError(f"it has a module {kind}, and what is known is {', '.join(_CONFIGS)}")
    config = _current(kind, module.get_config_dict())
    if kind == "Transformer":
        if module.backend != "torch":
            raise ValueError(f"its backend is {module.backend}")
        config |= {"max_seq_length": module.max_seq_length, "do_lower_case": module.do_lower_case}
    if kind == "Pooling" and isinstance(config["pooling_mode"], tuple):
        config["pooling_mode"] = list(config["pooling_mode"])
    if kind == "Dense":
        config["activation_function"] = _activation_name(module.activation_function)
    return config


def _activation_name(function: Any) -> str:
    name = type(function).__name__
    if type(function).__module__.partition(".")[0] != "torch" or repr(_activation(name)) != repr(function):
        raise ValueError(f"the activation {str(function)[:60]} is none of torch.nn as it is by default")
    return name


def transformer_of(model: nn.Module) -> nn.Module:
    """The model of transformers in one that `describe` describes, or that `bare` made."""
    return cast(nn.Module, next(model.children()).model)


def caller_of(model: nn.Module, transformer: nn.Module) -> nn.Module | None:
    """The module that calls a model of transformers by its forward, past the hooks on it."""
    package = "sentence_transformers."
    modules = (m for m in model.modules() if type(m).__module__.startswith(package) and hasattr(m, "modality_config"))
    return next((m for m in modules if getattr(m, "model", None) is transformer), None)


def save_processor(model: nn.Module, folder: pathlib.Path) -> None:
    """Its tokenizer, as transformers writes it."""
    first: Any = next(model.children())
    first.processor.save_pretrained(str(folder))


class Bare(nn.Module):
    """A model of transformers in the place that a Transformer has for it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model


def bare(description: Mapping[str, Any], transformer: nn.Module) -> nn.Module:
    """The names that the described model has for its tensors, without the library. ValueError where other modules have some."""
    if any(x["module"] == "Dense" for x in description["modules"]):
        raise ValueError("it has a Dense, which needs sentence-transformers: use fp.load_pretrained in Python")
    return nn.Sequential(OrderedDict([(description["modules"][0]["name"], Bare(transformer))]))


def build(description: Mapping[str, Any], transformer: nn.Module, folder: str) -> nn.Module:
    """The described model around one of transformers on the meta device; its tokenizer is read from the folder.

    Raises:
        ImportError: sentence-transformers is missing. ValueError: its version cannot build it.
    """
    if importlib.util.find_spec("sentence_transformers") is None:
        raise ImportError(f"{folder} holds a {description['class']}: pip install sentence-transformers")
    package: Any = importlib.import_module("sentence_transformers")
    library: Any = importlib.import_module("sentence_transformers.sentence_transformer.modules")

    class Around(library.Transformer):
        """The library's, with the model that is there already."""

        def _load_config(self, *args: Any, **kwargs: Any) -> tuple[Any, bool]:
            return cast(Any, transformer).config, False

        def _load_model(self, *args: Any, **kwargs: Any) -> nn.Module:
            return transformer

    def module(kind: str, config: dict[str, Any]) -> nn.Module:
        if kind == "Transformer":
            options = {"transformer_task": _TASKS[description["class"]], **config}
            safe = {"trust_remote_code": False, "local_files_only": True}
            around = Around(folder, processor_kwargs=safe, **options)
            around.__class__ = library.Transformer
            return cast(nn.Module, around)
        if "activation_function" in config:
            config = {**config, "activation_function": _activation(config["activation_function"])}
        with torch.device("meta"):
            return cast(nn.Module, getattr(library, kind)(**config))

    settings = dict(description["settings"])
    if "activation_fn" in settings:
        settings["activation_fn"] = _activation(settings["activation_fn"])
    try:
        modules = OrderedDict((x["name"], module(x["module"], x["config"])) for x in description["modules"])
        built = getattr(package, description["class"])(
            modules=modules, device="meta", local_files_only=True, **settings
        )
    except Exception as e:  # the library and transformers raise many kinds
        version = importlib.metadata.version("sentence-transformers")
        why = f"{type(e).__name__}: {e}".splitlines()[0][:160]
        raise ValueError(f"sentence-transformers {version} cannot build the model of {folder} ({why}): install the version that it "
                         "was saved with, or build the model and pass it as model=") from None  # fmt: skip
    return cast(nn.Module, built.eval())
