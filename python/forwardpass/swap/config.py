"""`fp.Config`: all that a swap can be told, in one object that does not change."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import KW_ONLY, dataclass
from typing import TYPE_CHECKING, Any, TypedDict

from torch import nn

from ..common.batches import check_several
from ..common.models.patterns import Pattern, patterns
from ..integrations.timesteps import Timesteps, check_timesteps
from .attention.choices import Attention, Choice, check_choice, is_asked_for
from .attention.kv_cache import check_kv_cache
from .attention.unpadded_encoders import check_unpad
from .plan import Plan
from .precision import ByHand, Presets

if TYPE_CHECKING:
    from typing_extensions import Unpack

#: `quant_method` of models that forwardpass swaps as they load, and of folders that it wrote.
METHOD = "forwardpass"
KEEP = ("auto", "device", "cpu", False)


class Options(TypedDict, total=False):
    """The fields of `Config` that are passed by name, as `fp.swap` and `fp.plan` take them without one."""

    attention: str | bool | Mapping[str, Choice] | Iterable[str]  #: several of `fp.plan` alone
    crossover: int | None
    unpad: str | bool
    encoder: bool
    decoder: bool
    kv_cache: str | Iterable[str] | None  #: of `fp.plan` alone, several
    include: str | Iterable[str]
    exclude: str | Iterable[str]
    strict: bool
    calibrate: Iterable[Any] | None
    keep: str | bool
    forward: Callable[[nn.Module, Any], Any] | None
    timesteps: Timesteps | None


@dataclass(frozen=True, eq=False)
class Config:
    """What a swap does to a model. `fp.swap` takes one, or its fields as arguments, and `fp.plan` those that it has a use for.

    As `quantization_config=` of transformers' `from_pretrained` it makes of a model of floats one that fp.swap has swapped: its
    report is `fp.report(model)`, and it is saved as one. Each layer is quantised as it is read, so that floats are never all in
    memory, unless calibrate= or keep= needs them. A model over several devices, or with weights on a disk, is refused there.

    Args:
        precision: a preset, "int8", "int8_rotated", "fp8", "w8a16" or "bf16" (none, and attention=True: attention alone), or a
            `fp.Precision`, as `fp.Precision("int8", rotate=128)`; or
            "stored", for a model that another library has loaded in 8 bits (transformers' FP8Linear and
            CompressedTensorsFP8Linear, bitsandbytes' Linear8bitLt): these layers' bytes are taken over, which they are in
            other presets too. Such a model needs neither precision nor plan. By hand: a dict of patterns, as include has
            them, and presets, of which the first that matches a layer decides, {"*.mlp": "int8", "o_proj": "bf16"}; or a
            function of a layer's name and module that returns a preset, or None for one that stays.
        plan: a Plan, its JSON as a dict, or the path of its file; refused where it does not fit the model. One that was
            calibrated takes the same batches again as calibrate=.
        attention: "auto": swapped where a GPU has a kernel for it, and on a CPU where ours is faster than torch's: with AVX2, in
            models of transformers with head dims that are multiples of 16, in float32 up to 128 and in encoders alone, in
            16 bits up to 256 and on a CPU without AMX. True: wherever it can be. False: left alone. "int8", or what else
            `fp.ops.attention_8bit` takes: wherever it can be, and calls of many keys are computed in 8 bits. In the place of
            `nn.MultiheadAttention` stands `fp.nn.MultiheadAttention`, whose projections are layers like others, in_proj and
            out_proj; models of transformers run theirs through the AttentionInterface, where their configs name it. Attention
            that is called by name elsewhere takes `with fp.sdpa():`. By name: a dict of patterns, as include has them, of which
            the first that matches a module decides, {"layers.0": None, "**": "int8"}; None: it stays, and so does what no
            pattern names. A plan decides itself.
        crossover: of attention in 8 bits: calls with fewer keys than this, or fewer rows of all query heads that share keys, are
            computed in the model's dtype. None: what is measured on CPUs and modelled for GPUs; the report says it. 0: all calls
            are in 8 bits, except a decoder's steps, which read a cache.
        unpad: "auto": text encoders of transformers run without the rows of padding where the model's result does not show it
            (heads that pool or pick a token, SentenceTransformer); a model that returns last_hidden_state stays padded. True: it
            runs without them too, and last_hidden_state is zero at padding; at tokens it is what it is with padding, but for the
            order of sums. Either is proven by a run. Compiled, exported and captured models, and calls that ask for hidden
            states or attention weights, stay padded. False: always padded. With plan=, "auto" is what the plan says.
        encoder: on a CPU the layers of a text encoder of transformers (BERT and its like, DistilBERT) in int8 run as one
            operation, `fp.ops.encoder_layer`, where a run in floats proves it. They stay in the model, and run one by one where a
            hook, a gradient, hidden states or attention weights are asked of them, or torch.compile. False: always one by one.
        decoder: on a CPU the layers of a decoder of transformers (Llama and models with its code) in int8 or w8a16, with
            kv_cache="auto", run as one operation, `fp.ops.decoder_layer`, in prompts and in steps, under the same conditions.
            False: always one by one.
        kv_cache: what a decoder's caches of keys and values become as they come to its forward: "auto", of the model's dtype, in
            place of transformers' dynamic ones, which copy themselves for every token; "int8" or "fp8" (e4m3), static ones too,
            with a scale for each token and head. Attention is then swapped wherever it can be. None: as a plan says, or they stay.
        include, exclude: patterns of names, of layers and attention: globs over whole components ("layer.1" is not
            "layer.11"; "**" crosses dots) or "re:…". A name spelled out under include ("lm_head") overrides that
            layer's default skips.
        strict: raise `fp.Unsupported` where a layer is skipped for a reason of its own: not one that include, exclude
            or the defaults (lm_head, MoE routers, too small) give.
        calibrate: batches (see `forwardpass.common.batches`) to calibrate on, of int8 and its rotated forms: a few dozen samples
            of real input. They run through the model in eval mode; one K x K float32 matrix is held for each layer of K inputs.
            A layer that no batch reaches stays as it is. What is read from the model's code is run on the first of them. None:
            uncalibrated, weights are rounded to nearest and outliers not smoothed, which loses more (all-MiniLM-L6-v2: a
            lowest cosine of .9984 to .9988, calibrated .9994). The command line calibrates these by default.
        keep: where the originals stay: "device", "cpu", "auto" (cpu where the layer is on a GPU), or False: freed
            once all is in place, and `fp.restore` cannot bring them back, which is also what "auto" means of a model that
            from_pretrained loads. Layers of keras hold theirs, on the device.
        forward: forward(model, batch) for batches that are no mapping, tuple, list or tensor.
        timesteps: of a diffusion model: (least, greatest) timestep at which the swap counts, both included, on the model's own
            scale, None for no bound. At others the model runs on its originals, which stay beside it on the device. A call says its
            timestep by its argument timestep, timesteps or t, or is made within `fp.timestep(t)`. None: at every one, and of models
            without. With plan=, the plan says it.

    Raises:
        ValueError, TypeError, FileNotFoundError: a field is none that a swap takes, or two do not go together.

    Example:
        >>> config = fp.Config("int8", exclude="mlp")
        >>> model = AutoModelForCausalLM.from_pretrained("floats", quantization_config=config)
        >>> {layer.precision for layer in fp.report(model).swapped}
        {'int8'}
    """

    precision: ByHand | None = None
    plan: Plan | Mapping[str, Any] | str | os.PathLike[str] | None = None
    _: KW_ONLY
    attention: Attention = "auto"
    crossover: int | None = None
    unpad: str | bool = "auto"
    encoder: bool = True
    decoder: bool = True
    kv_cache: str | None = None
    include: str | Iterable[str] = ()
    exclude: str | Iterable[str] = ()
    strict: bool = False
    calibrate: Iterable[Any] | None = None
    keep: str | bool = "auto"
    forward: Callable[[nn.Module, Any], Any] | None = None
    timesteps: Timesteps | None = None

    def __post_init__(self) -> None:
        if self.keep not in KEEP or self.keep is True:
            raise ValueError(f"keep is one of {', '.join(map(repr, KEEP))}, not {self.keep!r}")
        if self.precision is not None and self.plan is not None:
            raise ValueError(f"either precision= or plan= says what is swapped, and both were given: {_PASS_ONE}")
        check_choice(self.attention, self.crossover, self.plan is not None)
        check_unpad(self.unpad)
        check_kv_cache(self.kv_cache, self.attention)
        if self.precision is not None:
            Presets(self.precision)
        for name in ("encoder", "decoder"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} is True or False, not {getattr(self, name)!r}")
        if not isinstance(self.strict, bool):
            raise TypeError(f"strict is True or False, not {self.strict!r}")
        if self.calibrate is not None:
            check_several("calibrate", self.calibrate)
        if self.forward is not None and not callable(self.forward):
            raise TypeError(f"forward is a function of a model and a batch, not {self.forward!r}")
        for name in ("include", "exclude"):
            object.__setattr__(self, name, tuple(p.text for p in patterns(name, getattr(self, name))))
        check_timesteps(self.timesteps)
        if self.plan is not None:
            object.__setattr__(self, "plan", Plan.load(self.plan))
        self._check_range()

    def _check_range(self) -> None:
        """ValueError where something does not go with a swap at some timesteps alone."""
        if self.plan is not None and self.timesteps is not None:
            raise ValueError(f"timesteps={self.timesteps!r} does not go with plan=, which says it: drop it")
        if self.range is None:
            return
        if self.keep not in ("auto", "device"):
            raise ValueError(f"keep={self.keep!r} does not go with timesteps=, at others of which the originals run on the device: "
                             "drop it")  # fmt: skip
        if self.kv_cache is not None:
            raise ValueError(
                f"kv_cache={self.kv_cache!r} is for decoders, and timesteps= for diffusion models: drop one"
            )

    @property
    def range(self) -> Timesteps | None:
        """The timesteps at which the swap counts, as this or the plan says."""
        return self.timesteps if self.stored_plan is None else self.stored_plan.timesteps

    @staticmethod
    def of(config: Config | ByHand | None, plan: Any = None, **options: Unpack[Options]) -> Config:
        """The one of this precision and these fields; of a Config, the same but for the fields that are given."""
        if isinstance(config, Config):
            fields = {**({} if plan is None else {"plan": plan}), **options}
            return _replace(config, fields) if fields else config
        return _replace(Config(), {"precision": config, "plan": plan, **options})

    @property
    def included(self) -> tuple[Pattern, ...]:
        return patterns("include", self.include)

    @property
    def excluded(self) -> tuple[Pattern, ...]:
        return patterns("exclude", self.exclude)

    @property
    def presets(self) -> Presets | None:
        """Which precision each layer gets; None where a plan says it, or nothing."""
        return None if self.precision is None else Presets(self.precision)

    @property
    def stored_plan(self) -> Plan | None:
        return self.plan  # type: ignore[return-value]  # loaded in __post_init__

    def check_complete(self) -> None:
        """ValueError where nothing would be swapped."""
        asks = is_asked_for(self.attention) or self.kv_cache is not None
        if self.precision is None and self.plan is None and not asks:
            raise ValueError(f"either precision= or plan= says what is swapped, and neither was given: {_PASS_ONE}")

    @property
    def quant_method(self) -> str:
        """For transformers, which finds the quantizer by it."""
        return METHOD

    def to_dict(self) -> dict[str, Any]:
        """For transformers, which prints it."""
        fields = ((field.name, getattr(self, field.name)) for field in dataclasses.fields(self))
        shown = {name: value if isinstance(value, str | bool | None) else repr(value) for name, value in fields}
        return {"quant_method": METHOD, **shown}

    def __deepcopy__(self, memo: object) -> Config:
        """Itself: transformers copies it with the model's config, and batches may be an iterator."""
        return self


_PASS_ONE = 'pass one, e.g. precision="int8"'


def _replace(config: Config, fields: Mapping[str, Any]) -> Config:
    names = {field.name for field in dataclasses.fields(config)}
    if unknown := [name for name in fields if name not in names]:
        raise TypeError(f"a swap has no option {unknown[0]!r}: it has {', '.join(sorted(names))}")
    return dataclasses.replace(config, **fields)
