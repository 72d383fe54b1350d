"""`fp.swap`: decides about Linear-like layers, experts and attention, builds the replacements, and puts all in place at once."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd

from ..common.batches import Fingerprint, device_of, first_of
from ..common.models.modules import plain_module, tensor_bytes
from ..common.printing.text import count
from ..dispatch import Reason, only_reference_on
from ..formats.loaded import Decompression, is_stored, note_on, refuse_inference_mode
from ..integrations.tensor_parallel import refuse_divided, sharding_of, whole
from ..integrations.timesteps import Timesteps, TimestepSwap, range_of
from ..nn import Experts, FloatConv2d, Int8Conv2d, QuantizedModule
from ..nn.conv2d_classes import is_pointwise, padding_of
from ..nn.eight_bits import EightBits
from ..nn.quantized_experts import experts_sizes
from ..ops.common.quantized_rows import FLOATS
from ..proofs.siblings import JoinedSwap
from ..proofs.walker import ConvolutionLeaf, Leaf, all_leaves, linear_leaves
from ..version import __version__
from . import originals
from .attention.attention_modules import AttentionSwap, notes_on_8_bits
from .attention.decoder_layers import decide_decoder
from .attention.encoder_layers import EncoderDecision, EncoderSwap, decide_encoder
from .attention.kv_cache import CacheSwap
from .attention.projections import Projections
from .attention.unpadded_encoders import UnpaddingSwap
from .config import Config, Options
from .decision import Decision, SwappedBefore, decide, refuse_model, refuse_skips
from .keras_layers import KerasLinears
from .plan import Plan, PlannedAttention, PlannedLayer, layers_of
from .precision import EARLY, STORED, ByHand, Early, LayerPrecision, Precision
from .report import EncoderLayers, Folded, OtherLayers, Report, Skipped, Swapped, WeightBytes
from .rules import Context, ties
from .verdicts import Verdicts, let_outputs_wait, prove

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from ..calibration.running import Arguments

#: Of a model's bytes, what the layers of a class have at least for the report to speak of them.
WEIGHS = 0.01
_NONE, _NO_STACKS = Verdicts(), EncoderDecision((), None)
_NOT_REACHED = Reason(
    "not_reached",
    "no batch of calibrate= reaches it, and it cannot be told what 8 bits would do to it",
    "add a batch that does, or swap it in a second call without calibrate=",
)


def swap(
    model: nn.Module,
    precision: Config | ByHand | None = None,
    plan: Plan | Mapping[str, Any] | str | os.PathLike[str] | None = None,
    *,
    dry_run: bool = False,
    **options: Unpack[Options],
) -> Report:
    """Replaces the Linear-like layers and the attention of `model` in place by faster ones, and reports on all of them.

    An activation that is applied to a layer's output, and to nothing else (see `proofs.activation`), is computed by the swapped
    layer, and nn.Identity stands in its place: what calls such a layer by itself gets the activated output.

    A model that transformers' tp_plan or torch's `parallelize_module` has divided between processes is swapped by all of them
    together. Each layer is gathered, quantised as in one process, and divided again; what crosses processes is what it was.

    Args:
        precision: a preset, "int8", "int8_rotated", "fp8", "w8a16" or "bf16", a `fp.Precision`, or one by hand, as `fp.Config` has
            it; or a Config.
        plan: a Plan, its JSON as a dict, or the path of its file; refused where it does not fit the model.
        dry_run: report what would be done, change nothing. Batches are not read.
        options: the other fields of `fp.Config`: attention, unpad, kv_cache, include, exclude, strict, calibrate, keep, forward.
            Where precision is a Config, they stand in the place of its own.

    Returns:
        the report; `with fp.swap(…) as report:` restores the model at the end of the block.

    Raises:
        TypeError: `model` is no nn.Module, or is a TorchScript module; calibrate= is one batch and no iterable of them.
        ValueError: not exactly one of precision and plan is given; there is no such precision; the plan is of another model, of
            other calibration batches or damaged; calibration does not go with the precision; the model is itself a Linear, or
            has no values yet; of a model that is divided between processes: calibrate=, keep="cpu", a call under
            `torch.inference_mode()`.
        RuntimeError: the model is swapped already, and nothing is left to swap. A second call swaps what the first left alone,
            with a report and a plan of its own; `fp.restore` undoes both.
        FileNotFoundError: there is no plan file of this name.
        Unsupported: with strict=True, a layer would be skipped.
        After any exception, an interrupt included, the model is as it was.

    Example:
        >>> report = fp.swap(model, precision="int8", exclude="head", calibrate=batches)
        >>> [layer.fqn for layer in report.swapped]
        ['body.0', 'body.2']
        >>> fp.restore(model)
    """
    model = plain_module("swap", model)
    config = Config.of(precision, plan, **options)
    if config.precision is None and config.plan is None and any(map(is_stored, model.modules())):
        config = replace(config, precision=STORED.name)
    config.check_complete()
    timesteps = config.range
    if timesteps is not None:
        config = replace(config, keep="device")  # originals are exchanged for the time of a call
    _refuse_divided(model, config.calibrate is not None, config.keep)
    refuse_inference_mode(model)
    with KerasLinears(model) as keras, Projections(model) as projections:
        config = replace(config, keep=keras.where_kept(config.keep))
        leaves = all_leaves(model)
        refuse_model(model, leaves)
        before = SwappedBefore.of(model)
        attention, unpad = before.choices(config)
        if before and (timesteps or range_of(model)) is not None:
            before.refuse(", and a swap at some timesteps is the only one of a model")
        calibrated = config.calibrate is not None
        context = Context(model, config.included, config.excluded, config.presets, calibrated)
        decision = decide(
            context,
            leaves,
            config.stored_plan,
            attention=attention,
            crossover=config.crossover,
            unpad=unpad,
            kv_cache=config.kv_cache,
            calibrated=calibrated,
        )
        if not (decision.swapped or decision.attention.swapped):
            before.refuse(", and nothing else that would be swapped")
        if timesteps is not None and (keras.is_all or decision.unpadding.stacks):
            kind = "of keras" if keras.is_all else "an encoder of text"
            raise ValueError(f"timesteps= is for diffusion models, and this {type(model).__name__} is {kind}: drop it")
        others = (*keras.skipped(context.exclude), *projections.skipped(context))
        decision = replace(decision, skipped=(*decision.skipped, *others))
        batch, batches = first_of(() if config.calibrate is None or dry_run else config.calibrate)
        swapping = _Swapping(config, decision, projections, keras, first_batch=batch)
        swapping.prove(unpad if config.plan is None else bool(unpad))
        notes = swapping.notes(model.training and not keras.is_all)
        if calibrated and not dry_run:
            notes += swapping.calibrate(batches)
        swapping.stacks = (
            decide_encoder(swapping.decision, config.encoder, batch, config.forward),
            decide_decoder(swapping.decision, config.decoder, batch, config.forward),
        )
        return swapping.carry_out(notes, dry_run)


def _refuse_divided(model: nn.Module, calibrates: bool, keep: str | bool) -> None:
    """ValueError where these are nothing for a model that is divided between processes, and it is."""
    if torch.is_inference_mode_enabled():  # where torch detaches no DTensor
        refuse_divided("swap under torch.inference_mode()", model, "call it outside")
    if calibrates:
        refuse_divided(
            "calibration", model, "swap and fp.save_pretrained it in one process, and divide what is loaded from there"
        )
    if keep == "cpu":
        refuse_divided('keep="cpu"', model, 'pass keep="device", or keep=False')


def swap_planned(
    model: nn.Module,
    plan: Plan,
    arguments: Arguments,
    keep: str | bool = "auto",
    verdicts: Verdicts = _NONE,
) -> Report:
    """`swap(model, plan=plan)` where the calibration is done and the model was run: `arguments` has, for each calibrated layer and
    its rotation, those of its module's `from_torch`. Without the warnings.
    """
    with Projections(model) as projections:
        decision = verdicts.applied(decide(Context(model), all_leaves(model), plan, calibrated=plan.calibrated))
        config = Config(plan=plan, keep="device" if plan.timesteps is not None else keep)
        calibrated = (arguments, plan.calibration)
        return _Swapping(config, decision, projections, verdicts=verdicts, calibrated=calibrated).carry_out([])


@dataclass
class _Swapping:
    """A swap under way: what it was asked, what was decided, and what came of that where the model was run."""

    config: Config
    decision: Decision
    projections: Projections
    keras: KerasLinears | None = None
    verdicts: Verdicts = _NONE
    stacks: tuple[EncoderDecision, EncoderDecision] = (_NO_STACKS, _NO_STACKS)  #: of an encoder, of a decoder
    #: for each calibrated layer the arguments of `from_torch`; the batches' fingerprint
    calibrated: tuple[Arguments, str | None] = field(default_factory=lambda: ({}, None))
    first_batch: Any = None

    @property
    def model(self) -> nn.Module:
        return self.decision.model

    @property
    def leaves(self) -> list[Leaf]:
        return [leaf for leaf, _ in self.decision.swapped]

    def prove(self, unpad: str | bool) -> None:
        """Runs the model as it is to be, and leaves out what that disproves. Unsupported where strict= does not have that."""
        batch, forward = self.first_batch, self.config.forward
        self.verdicts = prove(self.decision, unpad, batch, forward)
        self.decision = self.verdicts.applied(self.decision)
        self._refuse_skips()

    def _refuse_skips(self) -> None:
        if self.config.strict:
            refuse_skips(self.decision.skipped)

    def calibrate(self, batches: Iterable[Any]) -> list[str]:
        """On these; layers that no batch reaches stay. Returns notes."""
        from ..calibration.running import calibration_arguments

        fingerprint, plan = Fingerprint(), self.config.stored_plan
        rotations = {leaf.fqn: (p.rotate,) for leaf, p in self.decision.swapped}
        arguments, unreached, notes = calibration_arguments(
            self.model, self.decision.calibrated, fingerprint.reading(batches), self.config.forward, rotations
        )
        if plan is not None and plan.calibration not in (None, fingerprint.value):
            raise ValueError("the plan was calibrated on other batches than calibrate= gives, and would give other results: "
                             "pass the same ones, or plan again")  # fmt: skip
        self.decision = self.decision.calibrated_as(arguments).without(unreached, _NOT_REACHED)
        self.calibrated = arguments, fingerprint.value if arguments else None
        self._refuse_skips()
        return notes

    def notes(self, training: bool) -> list[str]:
        """What a user should know before it happens. training: whether the model is in training mode."""
        decision = self.decision
        linears = [leaf for leaf in decision.layers if not leaf.is_convolution]
        notes = _unmatched(decision, linears)
        if not decision.layers and not decision.attention.swapped:
            notes.append("the model has no Linear layer and no convolution, so nothing is swapped")
        elif not decision.swapped and not decision.attention.swapped:
            notes.append("no layer is swapped; the report has each one's reason")
        if (decision.swapped or decision.attention.swapped) and training:
            notes.append("the model is in training mode and swapped layers are for inference: call model.eval()")
        notes += notes_on_8_bits(self.model, decision.attention)
        notes += dict.fromkeys(
            note for leaf, p in decision.swapped if p.precision is STORED and (note := note_on(leaf.module))
        )
        if calibrated := decision.kv_cache.calibrated:
            notes.append(f"the calibrated scales of {len(calibrated)} attention modules ({calibrated[0]}, …) are not used: an "
                         "8-bit cache has a scale for each token and head, which is finer")  # fmt: skip
        return notes + _without_kernel(decision)

    def carry_out(self, notes: list[str], dry_run: bool = False) -> Report:
        """Builds the replacements, gives the warnings, and puts the replacements in place."""
        decision, verdicts, (arguments, _) = self.decision, self.verdicts, self.calibrated
        if dry_run:
            replacements = [_empty(leaf, p) for leaf, p in decision.swapped]
        else:
            replacements = [
                build(leaf, p.precision, p.calibration_of(arguments.get(leaf.fqn))) for leaf, p in decision.swapped
            ]
        joined = JoinedSwap(
            {leaf.fqn: (leaf, new) for leaf, new in zip(self.leaves, replacements)},
            verdicts.apart,
            verdicts.deferrals,
            decision.folded,
        )
        attention = AttentionSwap(self.model, decision.attention, decision.unpadding.named)
        report = self._report(replacements, joined, attention, notes, dry_run)
        for note in notes:  # before the model is touched: a filter may turn them into errors
            warnings.warn(f"swap: {note}", stacklevel=3)
        if not dry_run:
            replacements.clear()
            self._put(report, joined, attention)
        return report

    def _report(
        self, replacements: list[QuantizedModule], joined: JoinedSwap, attention: AttentionSwap, notes: list[str], dry_run: bool
    ) -> Report:  # fmt: skip
        model, decision = self.model, self.decision
        convolutions = [*(leaf for leaf in self.leaves if isinstance(leaf, ConvolutionLeaf)), *decision.folded]
        in_report = {
            *(s.fqn for s in decision.skipped),
            *(leaf.fqn for leaf in decision.attention.leaves),
            *(leaf.fqn for leaf in self.leaves),
            *(leaf.norm.fqn for leaf in convolutions if leaf.norm is not None),
        }
        return Report(
            [_swapped(leaf, p.precision, new, decision.context) for (leaf, p), new in zip(decision.swapped, replacements)],
            joined.names,
            joined.mlps,
            [Skipped(fqn, reason) for fqn, reason in joined.apart],
            joined.norms,
            attention.report,
            list(decision.skipped),
            _other_layers(model, in_report),
            decision.unpadding.report(decision.attention),
            decision.kv_cache.kv_cache,
            notes,
            self._weight_bytes(replacements, joined.peak),
            planned(
                model,
                decision.swapped,
                [leaf.fqn for leaf in decision.attention.swapped],
                self.calibrated[1],
                decision.unpadding.planned,
                decision.kv_cache.kv_cache,
                decision.attention.bits,
                self.config.range,
                [leaf.fqn for leaf in decision.folded],
            ),
            device_of(model).type,
            dry_run,
            _one_operation(self.stacks[0]),
            [Folded.of(leaf) for leaf in decision.folded],
            _one_operation(self.stacks[1]),
        )  # fmt: skip

    def _weight_bytes(self, replacements: list[QuantizedModule], joining: int) -> WeightBytes:
        leaves, modules = self.leaves, [*self.model.modules()]
        replaced = {id(leaf.module) for leaf in leaves}
        now, new = tensor_bytes(modules), tensor_bytes(replacements)
        most = max([joining, *(early.float_bytes for leaf in leaves if (early := Early.of(leaf.module)))])
        devices = {_originals_device(leaf.module, self.config.keep) for leaf in leaves} - {None}
        remaining = [m for m in modules if id(m) not in replaced]
        remaining_bytes = tensor_bytes(remaining)
        original_bytes = tensor_bytes([*remaining, *(x.module for x in leaves)]) - remaining_bytes if devices else 0
        device = ", ".join(sorted(map(str, devices))) or None
        return WeightBytes(_float_bytes(modules), remaining_bytes + new, original_bytes, device, now + new + most)

    def _put(self, report: Report, joined: JoinedSwap, attention: AttentionSwap) -> None:
        """Into the model, and what `fp.restore` needs beside the report."""
        model, decision = self.model, self.decision
        layers, around = joined.build()
        changes: tuple[originals.Change, ...] = (
            attention,
            UnpaddingSwap(decision.unpadding),
            CacheSwap(decision.kv_cache),
            joined,
            Decompression(model, [leaf.module for leaf in self.leaves]),
            *map(EncoderSwap, self.stacks),
        )
        if (timesteps := self.config.range) is not None:
            changes = (*changes, TimestepSwap(model, timesteps, (*layers, *around), (attention,)))
        opened: tuple[KerasLinears | Projections, ...] = (self.projections,)
        if self.keras is not None:
            self.keras.narrow(leaf.module for leaf in self.leaves)
            opened = (self.keras, self.projections)
        self.projections.narrow(leaf.module for leaf in (*self.leaves, *decision.attention.swapped))
        changed = originals.Originals(layers, True, changes, around, opened, originals.find(model))
        report.attach(model, self._install(changed, report))
        for x in opened:
            x.stays = True

    def _install(self, changed: originals.Originals, report: Report) -> originals.Originals:
        """The only step that changes the model: all replacements, or none."""
        model, keep = self.model, self.config.keep
        changed.put(model)
        swapped = changed if keep else originals.Originals((), False, changed.changes, earlier=changed.earlier)
        try:
            originals.remember(model, swapped)
            self._let_outputs_wait(report)
            moved = [x.original for x in changed.layers if _originals_device(x.original, keep) == "cpu"]
            # a tied head's weight is the embedding's
            stay = (*model.parameters(), *model.buffers(), *originals.held_elsewhere(moved))
            originals.Moved(moved, torch.device("cpu"), but=stay)
        except BaseException:
            changed.undo(model)
            if changed.earlier is None:
                originals.forget(model)
            else:
                originals.remember(model, changed.earlier)
            raise
        return swapped

    def _let_outputs_wait(self, report: Report) -> None:
        """As `verdicts` has it, and says so in the report."""
        let_outputs_wait(self.model, self.first_batch, self.config.forward)
        modules = dict(self.model.named_modules())
        report.swapped = [replace(s, then=getattr(modules.get(s.fqn), "then", ())) for s in report.swapped]


def _one_operation(decision: EncoderDecision) -> EncoderLayers:
    return EncoderLayers(tuple((fqn, len(x.layers)) for fqn, x in decision.stacks), decision.reason)


def _unmatched(decision: Decision, linears: list[Leaf]) -> list[str]:
    """Notes on patterns that match nothing."""
    context, leaves = decision.context, decision.layers
    also = f" or {count(n, 'convolution')}" if (n := len(leaves) - len(linears)) else ""
    names = [*(leaf.fqn for leaf in leaves), *decision.experts, *(leaf.fqn for leaf in decision.attention.leaves)]
    return [
        f"{argument}={pattern.text!r} matches none of the {len(linears)} Linear layers{also}"
        for argument, patterns in (
            ("include", context.include),
            ("exclude", context.exclude),
            ("precision", context.presets.patterns if context.presets else ()),
        )
        for pattern in patterns
        if not any(pattern.matches(fqn) for fqn in names)
    ]


def _without_kernel(decision: Decision) -> list[str]:
    """Notes on operations that only the reference has here."""
    weights: set[tuple[Any, ...]] = {
        (p.precision.operation(leaf), leaf.weight.device, leaf.weight.dtype) for leaf, p in decision.swapped
    }
    weights |= {
        ("attention", p.device, p.dtype)
        for leaf in decision.attention.swapped
        for p in leaf.module.parameters()
        if p.dtype in FLOATS
    }
    notes = []
    for operation, device, dtype in sorted(weights, key=str):
        if operation and only_reference_on(operation, device, dtype):
            call = f"{str(dtype).removeprefix('torch.')} on {device}"
            notes.append(f"{operation} has no kernel for {call} in this installation, so its layers run through the "
                         "plain-torch reference in float64, which shows their accuracy and is slower than what they "
                         "replace: see `forwardpass doctor`")  # fmt: skip
    return notes


def build(leaf: Leaf, precision: Precision, arguments: Mapping[str, Any]) -> QuantizedModule:
    """The replacement of one layer, with what users set on the original: attributes, the training flag, its
    precision.
    """
    if early := Early.of(leaf.module):
        new = early.take()
        new.activation = new.activation if leaf.is_experts else leaf.formula  # None where a run disproved it
    else:
        new = quantised(leaf, precision, arguments)
    if isinstance(leaf, ConvolutionLeaf) and isinstance(new, Int8Conv2d) and leaf.norm is not None:
        new.fold(leaf.norm.module)
    new.adopt(leaf.module)
    vars(new).pop(EARLY, None)
    vars(new).update(precision=precision.name, precision_version=precision.version)
    return new.train(leaf.module.training)


def quantised(leaf: Leaf, precision: Precision, arguments: Mapping[str, Any]) -> QuantizedModule:
    """The values of one layer in the module of a precision."""
    module: Any = Experts if leaf.is_experts and precision is not STORED else precision.module
    if leaf.is_convolution:
        module = precision.convolution
    sharding = sharding_of(leaf.module)
    try:
        original = leaf.module if sharding is None else whole(leaf.module)
        new: QuantizedModule = module.from_torch(original, **_options(leaf, precision), **arguments)
        if sharding is not None:
            sharding.divide(new)  # type: ignore[arg-type]
    except Exception as e:
        if hasattr(e, "add_note"):
            e.add_note(f"while swapping {leaf.fqn}; the model is as it was")
        raise
    return new


def _options(leaf: Leaf, precision: Precision) -> dict[str, Any]:
    """The arguments of `from_torch`."""
    options = {"kind": precision.experts} if leaf.is_experts and precision is not STORED else precision.options
    return {**({} if leaf.is_convolution else options), **_fused(leaf)}


def _fused(leaf: Leaf) -> dict[str, str]:
    """The one for the activation that the replacement computes itself."""
    return {"activation": leaf.formula} if leaf.formula is not None else {}


def _empty(leaf: Leaf, planned: LayerPrecision) -> QuantizedModule:
    """A replacement without values, for its size; one that takes bytes over has them."""
    if planned.precision is STORED:
        return build(leaf, STORED, {})
    options = _options(leaf, planned.precision)
    if leaf.is_experts:
        experts, intermediate, hidden = experts_sizes(leaf.module)
        sizes = (experts, hidden, intermediate)
        gated, dtype = bool(leaf.module.has_gate), leaf.weight.dtype
        return Experts(*sizes, gated=gated, bias=leaf.has_bias, dtype=dtype, device="meta", **options)
    if isinstance(leaf, ConvolutionLeaf):
        return empty_convolution(leaf, planned.calibrated)
    if planned.calibrated:
        options["channel_scale"] = True
    dtype, bias = leaf.weight.dtype, leaf.has_bias
    empty = planned.precision.module(
        leaf.in_features, leaf.out_features, bias=bias, dtype=dtype, device="meta", **options
    )
    if sharding := sharding_of(leaf.module):
        sharding.divide(empty)
    return empty


def empty_convolution(leaf: ConvolutionLeaf, calibrated: bool) -> Int8Conv2d:
    """The replacement of a convolution without values, on the meta device."""
    m: Any = leaf.module
    padding = padding_of(m)
    assert padding is not None
    options: dict[str, Any] = _fused(leaf)
    if calibrated:
        options["channel_scale" if is_pointwise(m) else "static"] = True
    new = Int8Conv2d(
        m.in_channels, m.out_channels, m.kernel_size, m.stride, padding, m.dilation, m.groups, leaf.has_bias,
        dtype=leaf.weight.dtype, device="meta", **options,
    )  # fmt: skip
    if leaf.norm is not None:
        new.fold(leaf.norm.module)
    return new


def _originals_device(original: nn.Module, keep: str | bool) -> str | None:
    device = device_of(original).type
    stays = keep == "device" or (keep == "auto" and (device == "cpu" or sharding_of(original) is not None))
    return None if keep is False else device if stays else "cpu"


def _float_bytes(modules: Iterable[nn.Module]) -> int:
    """`tensor_bytes`, with what layers had that were quantised while they were loaded."""
    modules = [*modules]
    early = [(m, x.float_bytes) for m in modules if (x := Early.of(m))]
    return tensor_bytes(modules) + sum(size for _, size in early) - tensor_bytes(m for m, _ in early)


#: What takes time whatever it weighs: (class, code, why it stays, what to do).
_COMPUTING: tuple[tuple[Any, str, str, str], ...] = (
    (FloatConv2d, "folded", "an earlier swap left it in floats, with what is behind it", "fp.restore, and swap with include="),
    (_ConvNd, "convolution", "only nn.Conv2d has a kernel here", "write one of 1 x 1 as an nn.Linear to swap it"),
    (nn.ParameterDict, "held", "it holds weights that code elsewhere computes with", "leave it"),
    ((nn.RNNBase, nn.RNNCellBase), "recurrent", "recurrent layers have no kernel here", "leave it"),
    ((nn.Embedding, nn.EmbeddingBag), "embedding", "rows are looked up in it, and nothing is multiplied", "leave it"),
)  # fmt: skip


def _other_layers(model: nn.Module, reported: set[str]) -> list[OtherLayers]:
    """The layers that are neither Linear-like nor attention, by class: those that compute, and those that weigh something."""
    classes: dict[type, list[tuple[str, nn.Module]]] = {}
    for fqn, module in model.named_modules():
        names = {fqn, *(f"{fqn}.{name}" if fqn else name for name in module._parameters)}
        if any(p is not None for p in module._parameters.values()) and names.isdisjoint(reported):
            classes.setdefault(type(module), []).append((fqn, module))
    least, groups = WEIGHS * _float_bytes(model.modules()), []
    for cls, members in classes.items():
        size = tensor_bytes(module for _, module in members)
        reason = next((why for kind, *why in _COMPUTING if issubclass(cls, kind)), None)
        if reason or size >= least > 0:
            why = reason or ("own_weights", "it computes with weights of its own, in code of its own", "leave it")
            groups.append(OtherLayers(cls.__name__, members[0][0], len(members), size, Reason(*why)))
    return sorted(groups, key=lambda x: -x.bytes)


def _swapped(leaf: Leaf, precision: Precision, new: QuantizedModule, context: Context) -> Swapped:
    tied = () if Early.of(leaf.module) else ties(leaf, context)  # the memory of what was quantised early says nothing
    tied_to = next((other.name for _, other in tied), None)
    return Swapped(leaf.fqn, precision.name, precision.version, leaf.in_features, leaf.out_features, _float_bytes([leaf.module]),
                   tensor_bytes([new]), new.activation, tied_to, new.window() if isinstance(new, Int8Conv2d) else None,
                   isinstance(new, Int8Conv2d) and new.folds_norm)  # fmt: skip


def planned(
    model: nn.Module,
    layer_precisions: Iterable[tuple[Leaf, LayerPrecision]],
    attention: Iterable[str],
    calibration: str | None,
    unpad: str | None,
    kv_cache: str | None = None,
    bits: Mapping[str, EightBits] | None = None,
    timesteps: Timesteps | None = None,
    folded: Iterable[str] = (),
) -> Plan:
    """The plan that swaps these layers, and the attention of these names, of which `bits` computes in 8 bits, at `timesteps`;
    `folded` are convolutions that stay in floats and compute what is behind them."""
    layers = (
        PlannedLayer(leaf.fqn, leaf.in_features, leaf.out_features, leaf.has_bias,
                     p.precision.name, p.precision.version, p.calibrated)
        for leaf, p in layer_precisions
    )  # fmt: skip
    model_layers = layers_of(linear_leaves(model))
    name = type(model).__name__
    in_8_bits = tuple(PlannedAttention(fqn, x.dtype, x.crossover) for fqn, x in (bits or {}).items())
    return Plan(
        name,
        model_layers,
        tuple(layers),
        tuple(attention),
        calibration,
        __version__,
        unpad,
        kv_cache,
        in_8_bits,
        timesteps,
        tuple(folded),
    )
