"""What a model is run on to prove a rewriting: batches that a user has given, or inputs made up from what its modules state.

A text model runs on two rows of different lengths, with a mask, and on one row without. If it keeps a cache, a step of one token
that reads the cache follows the first.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from ..common.batches import Forward, device_of, map_tensors, run, tensors
from ..common.models.decoding import CACHE_NAMES
from ..common.models.float32 import in_float32
from ..integrations.sentence_transformers import class_of, transformer_of
from ..nn.linear.quantized_linear import is_conv1d

#: Rows, tokens of a row, and padding of the other one: models run without padding where it is a sixteenth of all or more.
ROWS, TOKENS, PADDING = 2, 7, 3
#: Tokens of the row that comes alone, and of a decoder beside an encoder.
ALONE, DECODED = 5, 4
#: Sides of pictures where nothing states one, and the largest that is run: a transformer of 300 million weights takes a second of a
#: core for 224, 3 for 384.
SIDES, LARGEST = (32, 64, 224), 384
#: Frames of sound: as many as are run at most, and samples of a waveform.
FRAMES, SAMPLES = 512, 4000
MASKS = ("attention_mask", "decoder_attention_mask")


@dataclass(frozen=True)
class Output:
    """A tensor of a result, and which of its first two dimensions' places are no padding; None: all are."""

    value: Tensor
    mask: Tensor | None

    @property
    def rows(self) -> Tensor:
        return self.value if self.mask is None else self.value[self.mask]


@dataclass(frozen=True)
class Call:
    """A call of a model and, where it returns a cache, a step that reads it."""

    batch: Any
    forward: Forward | None = None
    step: Mapping[str, Tensor] | None = None  #: the arguments of the step, without the cache

    def in_float32(self) -> Call:
        """The same for a model whose 16 bits are float32 meanwhile."""
        step = None if self.step is None else map_tensors(self.step, in_float32)
        return Call(map_tensors(self.batch, in_float32), self.forward, step)

    def outputs(self, model: nn.Module) -> list[Output]:
        """The floating tensors that both return. The batch is copied, for models that write into it."""
        batch = self.batch if self.forward is not None else map_tensors(self.batch, Tensor.clone)
        if self.step is None:
            return _outputs(run(model, batch, self.forward), self.batch)
        result = run(model, {**batch, "use_cache": True})
        outputs = _outputs(result, self.batch)
        if (cache := _cache_of(result)) is not None:
            name = next(name for name in CACHE_NAMES if name in _parameters(model))
            step = map_tensors(self.step, Tensor.clone)
            outputs += _outputs(run(model, {**step, name: cache, "use_cache": True}), self.step)
        return outputs


def _outputs(result: Any, batch: Any) -> list[Output]:
    if isinstance(batch, tuple) and len(batch) == 1:  # of sentence-transformers, whose one argument is a mapping
        batch = batch[0]
    masks = [batch.get(name) for name in MASKS] if isinstance(batch, Mapping) else []
    return [Output(t.clone(), _mask_of(t, masks)) for t in tensors(result) if t.is_floating_point()]


def _mask_of(t: Tensor, masks: Iterable[Any]) -> Tensor | None:
    """The one that has a tensor's first two dimensions: an encoder's states are part of a result beside a decoder's."""
    fits = (x for x in masks if isinstance(x, Tensor) and x.dim() == 2 and x.shape == t.shape[:2])
    return next((x.bool() for x in fits), None)


def _cache_of(result: Any) -> Any:
    """By either name. A mapping is asked for all that it has: transformers' warn where they are asked for the older name."""
    entries = (
        dict(result.items()) if isinstance(result, Mapping) else {x: getattr(result, x, None) for x in CACHE_NAMES}
    )
    return next((x for name in CACHE_NAMES if (x := entries.get(name)) is not None), None)


def _parameters(model: Any) -> Mapping[str, inspect.Parameter]:
    """A model's forward has them; peft's hands on whatever it is given, so that those of the model below count."""
    parameters = inspect.signature(model.forward).parameters
    hands_on = all(p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in parameters.values())
    return _parameters(model.get_base_model()) if hands_on and hasattr(model, "get_base_model") else parameters


def of_batch(batch: Any, forward: Forward | None) -> Iterator[list[Call]]:
    """A user's batch: its first rows, where each of its tensors has as many, else all of it."""
    sizes = {len(t) if t.dim() else 0 for t in tensors(batch)}
    if forward is None and len(sizes) == 1 and max(sizes) > ROWS:
        yield [Call(map_tensors(batch, lambda t: t[:ROWS]))]
    yield [Call(batch, forward)]


def made_up(model: Any) -> Iterator[list[Call]]:
    """Lists of calls, in the order in which they are tried. A model may take none of them."""
    if device_of(model).type == "meta":
        return
    if class_of(model) is not None:
        yield [Call((call.batch,)) for call in _texts(transformer_of(model))]
    elif hasattr(getattr(model, "config", None), "get_text_config"):
        yield from _of_transformers(model)
    else:
        if "input_ids" in _parameters(model):
            yield _texts(model)
        if isinstance(getattr(model, "config", None), Mapping) and "timestep" in _parameters(model):
            yield from _of_diffusers(model)
        yield from _of_shapes(model)


# ---- models of transformers


def _of_transformers(model: Any) -> Iterator[list[Call]]:
    main = getattr(model, "main_input_name", None)
    texts = _texts(model) if "input_ids" in _parameters(model) else []
    if main == "input_ids" and texts:
        yield texts
    decoded = {"decoder_input_ids": _ids(model, ROWS, DECODED)[:1]} if _has_encoder(model) else {}
    for name, x in _media(model):
        if name == main:
            batch = {name: x, **decoded}
            yield [Call(batch, step=batch if decoded else None)]
    for name, x in _media(model):  # CLIP and BLIP take both
        if texts:
            yield [Call({**call.batch, name: x.expand(len(call.batch["input_ids"]), *x.shape[1:])}) for call in texts]


def _texts(model: Any) -> list[Call]:
    ids, parameters = _ids(model, ROWS, TOKENS), _parameters(model)
    mask = torch.ones_like(ids)
    left = _is_causal(model) and not _has_encoder(model)  # as prompts are padded, and texts are on the right
    mask[-1, :PADDING] = 0
    mask = mask if left else mask.flip(1)
    batch = {"input_ids": ids, **({"attention_mask": mask} if "attention_mask" in parameters else {})}
    alone = _with_step(model, {"input_ids": ids[:1, :ALONE]})
    return [_with_step(model, batch), Call(alone.batch)]


def _with_step(model: Any, batch: dict[str, Tensor]) -> Call:
    ids = batch["input_ids"]
    if _has_encoder(model):
        batch = {**batch, "decoder_input_ids": ids[:, :DECODED]}
        step = {**batch, "decoder_input_ids": ids[:, -1:]}
    else:
        step = {"input_ids": ids[:, :1]}
        if "attention_mask" in batch:
            step["attention_mask"] = torch.cat([batch["attention_mask"], torch.ones_like(ids[:, :1])], 1)
    return Call(batch, step=None if set(CACHE_NAMES).isdisjoint(_parameters(model)) else step)


def _ids(model: Any, rows: int, tokens: int) -> Tensor:
    """Tokens behind the first three, which stand for padding and the ends of texts."""
    config: Any = getattr(model, "config", None)
    stated = getattr(config.get_text_config(), "vocab_size", None) if hasattr(config, "get_text_config") else None
    size = stated or next((m.num_embeddings for m in model.modules() if isinstance(m, nn.Embedding)), 2)
    return torch.arange(3, 3 + rows * tokens, device=device_of(model)).view(rows, tokens) % size


def _has_encoder(model: Any) -> bool:
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


def _is_causal(model: nn.Module) -> bool:
    return any(getattr(m, name, None) is True for m in model.modules() for name in ("is_causal", "is_decoder"))


def _media(model: Any) -> Iterator[tuple[str, Tensor]]:
    """Pictures and sounds, by the names of their arguments."""
    config, parameters = model.config, _parameters(model)
    for part in (config, getattr(config, "vision_config", None)):
        side = getattr(part, "image_size", None)
        sides: list[Any] = [*side] if isinstance(side, list | tuple) else [side, side]
        if "pixel_values" not in parameters or part is None:
            continue
        for height, width in [sides] if side is not None else zip(SIDES, SIDES):
            if isinstance(height, int) and max(height, width) <= LARGEST:
                yield "pixel_values", _noise(model, 1, getattr(part, "num_channels", 3), height, width)
    bins, frames = getattr(config, "num_mel_bins", None), 2 * getattr(config, "max_source_positions", 0)
    if "input_features" in parameters and isinstance(bins, int) and frames <= FRAMES:
        yield "input_features", _noise(model, 1, bins, frames) if frames else _noise(model, 1, FRAMES, bins)
    if "input_values" in parameters:
        yield "input_values", _noise(model, 1, SAMPLES)


def _noise(model: nn.Module, *shape: int) -> Tensor:
    """Normal, the same each time, of the model's dtype."""
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    return x.to(device_of(model), dtype)


def made_up_weight(n: int, k: int, dtype: torch.dtype, device: torch.device, seed: int) -> Tensor:
    """[n, k], random, of the size that a layer is initialised with, in the memory of one short vector: rows are parts of it, of
    which each begins one element after the one before."""
    vector = torch.empty(n + k).normal_(std=k**-0.5, generator=torch.Generator().manual_seed(seed))
    return vector.to(device, dtype).as_strided((n, k), (1, 1))


# ---- models of diffusers


def _of_diffusers(model: Any) -> Iterator[list[Call]]:
    """Latent pictures, as small as the model takes them, or tokens of them; steps, and what pictures are conditioned on."""
    config, parameters = model.config, _parameters(model)
    channels, patch = config.get("in_channels"), config.get("patch_size") or 1

    def of(*shape: int) -> Tensor:
        return _noise(model, *shape)

    context = next(
        (n for name in ("joint_attention_dim", "cross_attention_dim", "caption_channels") if (n := config.get(name))), 1
    )
    steps = torch.arange(ROWS, device=device_of(model))
    others = {
        "timestep": steps + 3,
        "class_labels": steps,
        "guidance": of(ROWS).abs(),
        "encoder_hidden_states": of(ROWS, TOKENS, context),
        "pooled_projections": of(ROWS, config.get("pooled_projection_dim") or 1),
        "txt_ids": of(TOKENS, 3).abs(),
    }
    if not isinstance(channels, int) or not isinstance(patch, int):
        return
    if not config.get("guidance_embeds"):
        del others["guidance"]
    batch = {name: x for name, x in others.items() if name in parameters}
    if "img_ids" in parameters:
        grid = torch.cartesian_prod(*[torch.arange(4.0)] * 2).to(device_of(model))
        ids = torch.cat([torch.zeros(len(grid), 1, device=grid.device), grid], 1)
        yield [Call({**batch, "hidden_states": of(ROWS, len(ids), channels), "img_ids": ids})]
        return
    for side in dict.fromkeys((4 * patch, config.get("sample_size"))):
        if isinstance(side, int) and side <= LARGEST:
            yield [Call({**batch, "hidden_states": of(ROWS, channels, side, side)})]


# ---- other models


def _of_shapes(model: nn.Module) -> Iterator[list[Call]]:
    """By the first of the layers that state what they take."""
    first = next(
        (m for m in model.modules() if isinstance(m, nn.Embedding | nn.Linear | _ConvNd) or is_conv1d(m)), None
    )
    if first is not None:
        for inputs in _inputs_of(model, first):
            yield [Call(arguments(model, x)) for x in inputs]


def arguments(module: nn.Module, x: Tensor) -> tuple[Any, ...]:
    """x for the first argument and, as tensors that are added or attended to often are alike, for others without a default."""
    required = [
        p for p in _parameters(module).values()
        if p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
    ]  # fmt: skip
    return (x,) * max(len(required), 1)


def _inputs_of(model: Any, layer: Any) -> Iterable[list[Tensor]]:
    if isinstance(layer, nn.Embedding):
        ids = torch.arange(3, 3 + ROWS * TOKENS, device=device_of(model)).view(ROWS, TOKENS) % layer.num_embeddings
        return ([ids, ids[:1, :ALONE]],)
    if isinstance(layer, _ConvNd):
        dims, sides = len(layer.kernel_size), _sides(model)
        return ([_noise(model, ROWS if n <= SIDES[0] else 1, layer.in_channels, *(n,) * dims)] for n in sides)
    features = layer.nx if is_conv1d(layer) else layer.in_features
    return features_in(model, features)


def features_in(model: nn.Module, features: int) -> Iterable[list[Tensor]]:
    """Rows of tokens, else rows alone."""
    x = _noise(model, ROWS, TOKENS, features)
    return [x, x[:1, :ALONE]], [x.flatten(0, 1), x[0, :ALONE]]


def pictures_in(model: nn.Module, channels: int) -> Iterable[list[Tensor]]:
    """Two small pictures."""
    return ([_noise(model, ROWS, channels, SIDES[0], SIDES[0])],)


def _sides(model: Any) -> list[int]:
    """Sides of pictures, first the one that a model of timm or torchvision states."""
    stated = (getattr(model, name, None) for name in ("pretrained_cfg", "default_cfg"))
    sizes = [x["input_size"][-1] for x in stated if isinstance(x, Mapping) and x.get("input_size")]
    sizes += [n for n in (getattr(model, "image_size", None),) if isinstance(n, int)]
    return [n for n in (*sizes, *SIDES) if n <= LARGEST]
