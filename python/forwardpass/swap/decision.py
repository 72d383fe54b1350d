"""What becomes of each layer of a model, and why: decided as a whole before anything is built."""

from __future__ import annotations

from collections.abc import Collection, Container, Mapping
from dataclasses import dataclass, replace

from torch import nn

from ..common.models.modules import tensor_bytes
from ..common.printing.text import count
from ..dispatch import Reason, Unsupported
from ..formats.loaded import is_stored
from ..nn.linear.quantized_linear import is_conv1d
from ..nn.mlp import quantised_layers
from ..proofs.walker import ConvolutionLeaf, Leaf
from . import originals
from .attention.attention_modules import NOT_PLANNED, AttentionDecision, decide_attention
from .attention.choices import Attention, is_asked_for
from .attention.kv_cache import CacheDecision, decide_kv_cache
from .attention.unpadded_encoders import UnpaddingDecision, decide_unpadding
from .config import Config
from .plan import UNPAD, Plan
from .precision import STORED, Early, LayerPrecision, Presets
from .report import Skipped
from .rules import IN_FLOATS, KINDS, Context, fused_experts, may_fold, offloaded, why_skip

_NO_PRECISION = Reason("no_precision", "no precision was given, so layers stay as they are", 'pass one, e.g. "int8"')


@dataclass(frozen=True)
class Decision:
    """What becomes of each Linear-like layer, each module of experts and each attention of a model."""

    context: Context
    layers: tuple[Leaf, ...]  #: every Linear-like layer, every convolution, and every module of experts
    swapped: tuple[tuple[Leaf, LayerPrecision], ...]
    attention: AttentionDecision
    unpadding: UnpaddingDecision
    kv_cache: CacheDecision
    experts: tuple[str, ...]  #: names of the weights of experts of other kinds, which are skipped
    skipped: tuple[Skipped, ...]  #: layers, attention and experts that stay, each with its reason
    #: convolutions that stay in floats, and compute the norm and the activation behind them
    folded: tuple[ConvolutionLeaf, ...] = ()

    @property
    def model(self) -> nn.Module:
        return self.context.model

    @property
    def calibrated(self) -> list[Leaf]:
        return [leaf for leaf, p in self.swapped if p.calibrated]

    def calibrated_as(self, fqns: Container[str]) -> Decision:
        """The same where only these layers turned out to be calibrated: the others are rounded to nearest."""
        swapped = tuple((leaf, replace(p, calibrated=p.calibrated and leaf.fqn in fqns)) for leaf, p in self.swapped)
        return replace(self, swapped=swapped)

    def without(self, fqns: Collection[str], reason: Reason) -> Decision:
        """The same where these layers stay as they are."""
        swapped = tuple((leaf, p) for leaf, p in self.swapped if leaf.fqn not in fqns)
        return replace(self, swapped=swapped, skipped=(*self.skipped, *(Skipped(fqn, reason) for fqn in fqns)))


def decide(
    context: Context,
    layers: list[Leaf],
    plan: Plan | None = None,
    *,
    attention: Attention = "auto",
    crossover: int | None = None,
    unpad: str | bool = True,
    kv_cache: str | None = None,
    calibrated: bool = False,
) -> Decision:
    """What becomes of `layers`, Linear-like ones and experts, of all attention, of padding, and of caches.

    Either of the context's presets and `plan`, or neither: then no layer is swapped. ValueError where the plan does not fit the
    model, or calibration does not go with it.
    """
    modules = plan.attention if plan is not None else None
    if kv_cache is not None:  # attention reads it, whatever a plan says
        attention, modules = attention if is_asked_for(attention) else True, None
    elif plan is not None:
        kv_cache = plan.kv_cache
    bits = plan.bits() if plan is not None else None
    attentions = decide_attention(context, attention, modules, crossover, bits)
    swapped, skipped, folded = _decide_layers(context, layers, plan, calibrated)
    experts = dict(fused_experts(context)) if plan is None else {}
    skipped += attentions.skipped
    skipped += [Skipped(fqn, why) for fqn, why in experts.items() if not any(p.matches(fqn) for p in context.exclude)]
    unpads = UNPAD[1] if plan is None else plan.unpad
    unpadding = decide_unpadding(context, [leaf for leaf, _ in swapped], attentions, unpad, unpads)
    caches = decide_kv_cache(context.model, attentions, kv_cache)
    return Decision(
        context,
        tuple(layers),
        tuple(swapped),
        attentions,
        unpadding,
        caches,
        tuple(experts),
        tuple(skipped),
        tuple(folded),
    )


def _decide_layers(
    context: Context, leaves: list[Leaf], plan: Plan | None, calibrated: bool
) -> tuple[list[tuple[Leaf, LayerPrecision]], list[Skipped], list[ConvolutionLeaf]]:
    name, presets = type(context.model).__name__, context.presets
    if plan is not None:
        plan.check_fits({leaf.fqn: leaf for leaf in leaves}, name)
        if plan.calibrated != calibrated:
            if plan.calibrated:
                raise ValueError("the plan was made with calibration: pass calibrate=batches, or load a checkpoint")
            raise ValueError("the plan was made without calibration: drop calibrate=, or plan again")
    elif calibrated and presets is None:
        raise ValueError('attention takes no calibration: drop calibrate=, or use precision="int8"')
    planned = None if plan is None else plan.precisions()
    precisions = {leaf.fqn: p for leaf in leaves if (p := precision_of(leaf, presets, planned, calibrated)) is not None}
    if (
        plan is None
        and calibrated
        and precisions
        and not any(p.precision.takes_calibration for p in precisions.values())
    ):
        names = ", ".join(dict.fromkeys(p.precision.name for p in precisions.values()))
        raise ValueError(f'{names} takes no calibration: drop calibrate=, or use precision="int8"')
    swapped, skipped, folded = [], [], []
    in_plan = () if plan is None else plan.folded
    for leaf in leaves:
        if leaf.fqn not in precisions:
            skipped.append(Skipped(leaf.fqn, NOT_PLANNED if plan is not None else _NO_PRECISION))
            if isinstance(leaf, ConvolutionLeaf) and leaf.fqn in in_plan:
                folded.append(leaf)
        elif Early.of(leaf.module) is None and (
            reason := why_skip(leaf, context, precisions[leaf.fqn].precision, defaults=plan is None)
        ):
            if plan is not None and KINDS.get(reason.code) != "user":
                raise ValueError(f"the plan does not fit this {name}: it names {leaf.fqn}, and {reason}")
            size = tensor_bytes([leaf.module]) if leaf.is_convolution else None
            skipped.append(Skipped(leaf.fqn, reason, size))
            if reason.code in IN_FLOATS and may_fold(leaf, context, precisions[leaf.fqn].precision):
                folded.append(leaf)
        else:
            swapped.append((leaf, precisions[leaf.fqn]))
    return swapped, skipped, folded


def precision_of(
    leaf: Leaf, presets: Presets | None, planned: Mapping[str, LayerPrecision] | None, calibrated: bool
) -> LayerPrecision | None:
    """What a layer becomes by the presets, or by a plan's precisions, unless a rule is against it; None: it stays."""
    if early := Early.of(leaf.module):
        return early.precision
    if planned is not None:
        return planned.get(leaf.fqn)
    preset = None if presets is None else presets.find(leaf.fqn, leaf.module)
    if preset is None:
        return None
    if is_stored(leaf.module):
        return LayerPrecision(STORED)
    return LayerPrecision(preset, preset.takes_calibration and calibrated and not leaf.is_experts)


@dataclass(frozen=True)
class SwappedBefore:
    """What earlier calls have swapped of a model, by name."""

    layers: tuple[str, ...]
    attention: tuple[str, ...]
    fix: str

    @staticmethod
    def of(model: nn.Module) -> SwappedBefore:
        fix = "call fp.restore(model) first" if originals.find(model) else "start from the original model"
        return SwappedBefore(tuple(quantised_layers(model)), tuple(originals.swapped_attention(model)), fix)

    def __bool__(self) -> bool:
        return bool(self.layers or self.attention)

    def choices(self, config: Config) -> tuple[Attention, str | bool]:
        """attention= and unpad= of a swap: both off where an earlier call has swapped the attention. RuntimeError where they, or
        kv_cache=, are asked for all the same."""
        if not self.attention:
            return config.attention, config.unpad
        if is_asked_for(config.attention) or config.kv_cache is not None:
            asked = config.attention if is_asked_for(config.attention) else True
            self.refuse(f", with their attention, and attention={asked!r} and kv_cache= belong to that call")
        return False, False

    def refuse(self, remaining: str = "") -> None:
        """RuntimeError where something is; remaining: what there is to say of what is not."""
        if self:
            names = (*self.layers, *self.attention)
            text = f"the model already holds {len(names)} swapped layers ({names[0]}, …)"
            raise RuntimeError(f"{text}{remaining}: {self.fix}")


def refuse_model(model: nn.Module, leaves: list[Leaf]) -> None:
    """ValueError where there is nothing to swap in."""
    linears = [leaf for leaf in leaves if not (leaf.is_convolution or leaf.is_experts)]
    if isinstance(model, nn.Linear) or is_conv1d(model):
        raise ValueError("swap replaces layers inside a model, and this model is itself a Linear that nothing holds: "
                         "wrap it in nn.Sequential, or use fp.nn.Int8Linear.from_torch")  # fmt: skip
    if linears and all(p.is_meta for leaf in linears for p in leaf.module.parameters()):
        if finding := offloaded(linears[0], Context(model), None):
            raise ValueError(
                f"of every Linear layer of this model {finding[0].replace(' its weight ', ' the weight ')}: {finding[1]}"
            )
        raise ValueError("every Linear layer of this model is on the meta device, without values: load its weights "
                         "first, or fill it from a checkpoint with fp.load_pretrained(folder, "
                         "model=model)")  # fmt: skip


def refuse_skips(skipped: tuple[Skipped, ...]) -> None:
    reasons = {s.fqn: s.reason for s in skipped if KINDS.get(s.reason.code, "model") == "model"}
    if reasons:
        fqn, reason = next(iter(reasons.items()))
        more = f" (and {count(len(reasons) - 1, 'other layer')})" if len(reasons) > 1 else ""
        raise Unsupported(f"swap(strict=True) would skip {fqn}{more}: {reason}; or name it under exclude", reasons)
