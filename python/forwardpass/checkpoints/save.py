"""A swapped model on its way to disk, in one step."""

from __future__ import annotations

import functools
import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..common.files.json_files import write_json
from ..common.files.tensor_files import safetensors_module, shard_bytes, split
from ..common.models.modules import plain_module
from ..integrations import sentence_transformers as sentences
from ..integrations.timesteps import range_of
from ..integrations.transformers import model_config
from ..integrations.transformers.stacks.decoder_stack import DecoderStack
from ..nn import QuantizedModule
from ..swap import keras_layers, originals
from ..swap.attention.attention_modules import bits_of, implementation_before
from ..swap.attention.encoder_layers import stacks_in
from ..swap.attention.kv_cache import kv_cache_of
from ..swap.attention.unpadded_encoders import unpads
from ..swap.methods.saving import register_save
from ..version import __version__
from . import auto_model, card
from .folder import (
    RECORD,
    check_folder,
    put_weights,
    remove_other_weights,
    saving,
)
from .record import SCHEMA, slots, weights_of
from .rewritten import folded, rewritten


def save_pretrained(
    model: nn.Module,
    folder: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    max_shard_size: int | str = "5GB",
    model_card: bool = True,
) -> None:
    """Writes a swapped model to `folder` (made where it is missing); `load_pretrained` reads it without the originals.

    Tied tensors are stored once. Over an older checkpoint it is one step: whenever it is interrupted, the old one or the new one
    is there, whole. `load_pretrained` reads forwardpass.json and the weights that it names; a Hugging Face model's config.json
    and generation_config.json are written beside them for other programs (a tokenizer saved there finds its class), which find
    no weights of theirs. Of a `SentenceTransformer` or a `CrossEncoder` its modules, prompts and other settings are stored, and its
    tokenizer, so that `load_pretrained` gives the same again.

    Args:
        folder: new, empty, or one that holds a checkpoint of forwardpass, which is replaced. While one process saves there,
            another one is refused.
        overwrite: True: any other folder too. Its config.json and generation_config.json are replaced, its other files stay. The
            folder that the model was loaded from (config._name_or_path) is refused all the same.
        max_shard_size: bytes, or a text such as "5GB", of a file of weights, of which there are several where that is not enough; a
            larger tensor has a file of its own.
        model_card: write README.md too, a model card with what the report of the swap says. One that is there, and was not written
            so, stays as it is.

    Raises:
        ValueError: max_shard_size is no size; the model is not swapped, or holds what safetensors cannot, or is of
            sentence-transformers and has other modules than Transformer, Pooling, Normalize and Dense; the folder is not to be
            written to. ImportError: safetensors is missing.

    Example:
        >>> report = fp.swap(model, precision="int8")
        >>> fp.save_pretrained(model, "checkpoint")
    """
    model = plain_module("save_pretrained", model)
    around = sentences.describe(model)
    processor = None if around is None else functools.partial(sentences.save_processor, model)
    write(model, around, folder, overwrite, max_shard_size, model_card, processor)


def write(
    model: nn.Module,
    around: dict[str, Any] | None,
    folder: str | os.PathLike[str],
    overwrite: bool = False,
    max_shard_size: int | str = "5GB",
    model_card: bool = True,
    processor: Callable[[pathlib.Path], object] | None = None,
) -> None:
    """`save_pretrained` of a model that is, or for its names stands for, what `around` describes; `processor` writes its tokenizer
    into the folder."""
    layers, separate = originals.separate_layers(model, on_meta=True)
    if not layers:
        raise ValueError("save_pretrained stores swapped models, and this one holds no quantised layer: call fp.swap "
                         "first, or use the model's own save method")  # fmt: skip
    if range_of(model) is not None:
        raise ValueError("save_pretrained stores no model that was swapped with timesteps=, whose originals run at others: store "
                         "the original model and the plan, report.save_plan(path), and swap it with that")  # fmt: skip
    if keras_layers.roots(model):
        raise ValueError(
            "save_pretrained stores no layers of keras: its own model.save(…) stores the float model, to be swapped anew"
        )
    sources = model_config.sources(model)
    check_folder(folder, sources, overwrite)  # before tensors are gathered
    shard_bytes(max_shard_size)
    safetensors_module()
    tensors: dict[str, Tensor] = {}
    copies: dict[
        str, Callable[[], Tensor]
    ] = {}  #: of tensors that are copied as they are written, on the meta device here
    aliases: dict[str, str] = {}
    stored: dict[Any, str] = {}
    for fqn, module in model.named_modules():
        if type(module).get_extra_state is not nn.Module.get_extra_state:
            raise ValueError(f"{fqn} ({type(module).__name__}) has extra state that is no tensor, which safetensors "
                             f"cannot hold: save that model with its own method")  # fmt: skip
    for name, slot in slots(model, separate):
        t, values = slot.tensor.detach(), getattr(slot.module, "values", None)
        if t.is_meta and values is not None:
            tensors[name], copies[name] = t, functools.partial(values, slot.name)
            continue
        if type(t) is not Tensor or t.is_meta:
            raise ValueError(f"{name} is {'on the meta device' if t.is_meta else f'a {type(t).__name__}'}, and only "
                             f"plain tensors with values can be saved: load or gather it first")  # fmt: skip
        key = (t.untyped_storage()._cdata, t.storage_offset(), t.shape, t.stride(), t.dtype)
        if t.numel() and key in stored:
            aliases[name] = stored[key]
            continue
        stored[key] = name
        tensors[name] = t

    transformer = model if around is None else sentences.transformer_of(model)
    config, generation = model_config.configs(transformer)
    if around is not None and config is None:
        raise ValueError(f"what this {around['class']} is around is a {type(transformer).__name__}, which is no class of "
                         "transformers: save that model with its own method")  # fmt: skip
    record_but_weights = {
        "schema": SCHEMA,
        "forwardpass": __version__,
        "model": {"class": type(transformer).__name__, "attention": implementation_before(transformer),
                  "config": config, "generation_config": generation},
        "layers": [
            {"fqn": fqn, "module": type(m).__name__, "precision": vars(m).get("precision"),
             "version": vars(m).get("precision_version"), "config": m.config()}
            for fqn, m in layers.items()
        ],
        "attention": originals.swapped_attention(model),
        "unpad": unpads(model),
        "kv_cache": kv_cache_of(model),
        "attention_8bit": [{"fqn": fqn, **vars(bits)} for fqn, bits in bits_of(model).items()],
        "aliases": aliases,
        "rewritten": rewritten(model),
        "folded": folded(model),
        "encoders": stacks_in(model),
        "decoders": stacks_in(model, DecoderStack),
        "around": around,
    }  # fmt: skip
    with saving(folder, sources, overwrite) as folder:
        record = {**record_but_weights, "weights": _put_shards(folder, tensors, copies, max_shard_size)}
        write_json(folder / RECORD, record)
        if config is not None:  # which transformers reads where forwardpass is imported: see auto_model.py
            config = config | {"quantization_config": auto_model.entry(record)}
        for name, content in ((model_config.CONFIG, config), (model_config.GENERATION, generation)):
            if content is not None:
                write_json(folder / name, content)
        if model_card:
            stored_bytes = sum(t.nbytes for t in tensors.values())
            card.write(folder, _card(model, layers, transformer if config is not None else None, around, stored_bytes))
        remove_other_weights(folder, weights_of(record))
        if processor is not None:
            processor(folder)


def _put_shards(
    folder: pathlib.Path,
    tensors: dict[str, Tensor],
    copies: Mapping[str, Callable[[], Tensor]],
    max_shard_size: int | str,
) -> str | list[str]:
    """The name of the file of weights, or of the files."""
    save_file = functools.partial(safetensors_module().torch.save_file, metadata={"format": "pt"})
    names = [
        put_weights(folder, lambda path, shard=shard: save_file(_gathered(shard, copies), path))  # type: ignore[misc]
        for shard in split(tensors, max_shard_size)
    ]
    return names[0] if len(names) == 1 else names


def _gathered(tensors: Mapping[str, Tensor], copies: Mapping[str, Callable[[], Tensor]]) -> dict[str, Tensor]:
    """The tensors of one file as safetensors takes them: on the CPU, contiguous, each in a storage of its own."""
    gathered: dict[str, Tensor] = {}
    storages: set[int] = set()
    for name, t in tensors.items():
        t = copies[name]() if name in copies else t
        storage = t.untyped_storage()
        alone = storage.nbytes() == t.nbytes and storage._cdata not in storages
        storages.add(storage._cdata)
        gathered[name] = t.cpu().contiguous() if alone else t.cpu().clone(memory_format=torch.contiguous_format)
    return gathered


def _card(
    model: nn.Module,
    layers: Mapping[str, QuantizedModule],
    transformer: nn.Module | None,
    around: dict[str, Any] | None,
    stored_bytes: int,
) -> str:
    if around is not None:
        library = "sentence-transformers"
        loading = f"A {around['class']}. In this folder, or with its id on the hub in place of the dot:"
        code = 'import forwardpass as fp\nmodel = fp.load_pretrained(".")'
    elif transformer is not None:
        library, name = "transformers", type(transformer).__name__
        loading = "In this folder, or with its id on the hub in place of the dot:"
        code = f'import forwardpass\nfrom transformers import {name}\nmodel = {name}.from_pretrained(".")'
    else:
        library = None
        loading = f"In this folder, where `build()` gives a {type(model).__name__} of floats, which may be on the meta device:"
        code = 'import forwardpass as fp\nmodel = fp.load_pretrained(".", model=build())'
    return card.compose(model, layers, stored_bytes, loading, code, library=library)


register_save(save_pretrained)
