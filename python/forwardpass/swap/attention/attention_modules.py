"""Which attention modules of a model are swapped, and how: torch's are told to be fused, those of transformers are named anew.

Attention has no weights of its own in 8 bits: what changes is the code that computes softmax(q k) v. In the place of a module of
torch stands one of ours by then (`projections`); a module of transformers stays, and its config names `huggingface`'s
implementation.
"""

from __future__ import annotations

import enum
import functools
import itertools
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from ...dispatch import Reason, gpu_takes
from ...integrations.sdpa import forward_within
from ...integrations.transformers import attention as huggingface
from ...integrations.transformers.attention import NAMES, PLACE, Place
from ...nn import MultiheadAttention
from ...nn.eight_bits import EightBits, why_no_kernel
from ...ops.attention import ATTENTION, faster_than_torch
from ...ops.attention_8bit import DTYPES
from ...ops.common.quantized_rows import FLOATS
from ...proofs.walker import Leaf, leaves
from .. import rules
from ..originals import is_swapped_attention, living
from ..report import Skipped, SwappedAttention
from .choices import Attention, AttentionChoices, Choice
from .projections import why_not_replaced

NOT_PLANNED = Reason("not_planned", "the plan leaves it as it is", "plan again to change that")


def attention_like(model: nn.Module) -> list[Leaf]:
    """Modules that compute attention: torch's, those that transformers dispatches, and others that are called Attention and
    have no attention below. Not what is swapped already."""
    has_attention_below: set[int] = set()
    looks_like_attention = leaves(model, _by_its_looks, Leaf)
    for leaf in looks_like_attention:
        has_attention_below.update(id(ancestor) for _, ancestor in leaf.ancestors)
    return [
        leaf
        for leaf in looks_like_attention
        if (_swappable(leaf.module) or id(leaf.module) not in has_attention_below)
        and not is_swapped_attention(leaf.module)
    ]


def _swappable(module: nn.Module) -> bool:
    return isinstance(module, nn.MultiheadAttention) or huggingface.dispatches(module)


def _by_its_looks(module: nn.Module) -> bool:
    return _swappable(module) or type(module).__name__.endswith(("Attention", "Attention2d"))


@dataclass(frozen=True)
class AttentionDecision:
    """What becomes of each attention of a model."""

    leaves: tuple[Leaf, ...]  #: every module that computes attention
    swapped: tuple[Leaf, ...]
    skipped: tuple[Skipped, ...]  #: the others, each with its reason
    bits: Mapping[str, EightBits] = field(default_factory=dict)  #: of those of `swapped` that compute in 8 bits

    @property
    def in_floats(self) -> AttentionDecision:
        """The same without 8 bits."""
        return replace(self, bits={})


def decide_attention(
    context: rules.Context,
    attention: Attention,
    planned: Collection[str] | None = None,
    crossover: int | None = None,
    bits: Mapping[str, EightBits] | None = None,
) -> AttentionDecision:
    """attention, crossover: of `fp.swap`; planned, bits: the names in a plan, which decides itself, and its 8 bits."""
    leaves, swapped, skipped = attention_like(context.model), [], []
    units, choices = holders_of_configs(context.model), AttentionChoices(attention)
    for leaf in leaves:
        if planned is not None and leaf.fqn not in planned:
            reason: Reason | None = NOT_PLANNED
        else:
            reason = _why_skip(leaf, context, choices.find(leaf.fqn) if planned is None else True, units)
        if reason is None:
            swapped.append(leaf)
            continue
        if planned is not None and leaf.fqn in planned and rules.KINDS.get(reason.code) != "user":
            name = type(context.model).__name__
            raise ValueError(f"the plan does not fit this {name}: it names attention {leaf.fqn}, and {reason}")
        skipped.append(Skipped(leaf.fqn, reason))
    missing = set(planned or ()) - {leaf.fqn for leaf in leaves}
    if missing:
        raise ValueError(f"the plan is for another model than this {type(context.model).__name__}: it has no attention "
                         f"{min(missing)[:80]}; plan this model instead")  # fmt: skip
    if any(choice in DTYPES for choice in choices.all):
        names = ((leaf.fqn, choices.find(leaf.fqn)) for leaf in swapped)
        bits = {fqn: EightBits(str(choice), crossover) for fqn, choice in names if choice in DTYPES}
    stays_swapped = {leaf.fqn for leaf in swapped}
    bits = {fqn: x for fqn, x in (bits or {}).items() if fqn in stays_swapped}
    return AttentionDecision(tuple(leaves), tuple(swapped), tuple(skipped), bits)


def _why_skip(
    leaf: Leaf, context: rules.Context, attention: Choice, units: dict[int, list[nn.Module]]
) -> Reason | None:
    module = leaf.module
    for name_rule in (rules.excluded, rules.not_included):
        if finding := name_rule(leaf, context, None):
            return Reason(name_rule.__name__, *finding)
    if attention is False:
        return Reason("attention_off", "attention=False leaves it as it is", "drop it")
    if attention is None:
        return Reason("attention_off", "the patterns of attention= leave it as it is", "name it there to swap it")
    named = any(p.spells_out(leaf.fqn) for p in context.include)
    no_kernel = _why_no_kernel(module, context.model) if attention == "auto" and not named else None
    if not _swappable(module) and not _calls_sdpa(module):
        text = f"{type(module).__name__} computes attention in its own code"
        if no_kernel is not None and no_kernel.code == "attention_on_cpu":
            return Reason(no_kernel.code, no_kernel.text, "leave it")  # attention=True would not swap it
        return no_kernel or Reason("own_attention", text, "leave it")
    if no_kernel is not None:
        return no_kernel
    if not _swappable(module):
        return _CALLS_ITSELF if attention == "auto" and not named else None
    if isinstance(module, nn.MultiheadAttention):
        return None if isinstance(module, MultiheadAttention) else why_not_replaced(leaf, context)
    return why_not_named(module, units[id(module.config)])


def _calls_sdpa(module: nn.Module) -> bool:
    """Whether its code, or that of its processor, which diffusers' have, calls torch's function."""
    classes: list[Any] = [huggingface.class_of(module), type(getattr(module, "processor", None))]
    return any(call in huggingface.source_of(cls) for call in _CALLS_SDPA for cls in classes)


#: On a GPU, where it was not measured.
_CALLS_ITSELF = Reason(
    "calls_sdpa", "it calls torch's scaled_dot_product_attention itself", "pass attention=True to swap it"
)
#: Torch's function, and that of diffusers which calls it where no other backend is set.
_CALLS_SDPA = ("scaled_dot_product_attention", "dispatch_attention_fn")

#: Texts of fewer tokens do not take the time of a model's run.
ENCODER_ROWS = 4

#: What modules call it. Where none is there, a head dim without a kernel shows in the first call.
_HEAD_DIM = ("head_dim", "attention_head_size", "key_value_proj_dim")


def _operands(module: nn.Module, model: nn.Module) -> tuple[torch.device, torch.dtype, int | None]:
    """Device, dtype and head dim of a module's queries, as far as they can be known."""
    device = next((t.device for t in (*module.parameters(), *module.buffers())), torch.device("cpu"))
    # Layers of 8 bits have no dtype that queries are of: other weights of the model have.
    parameters = itertools.chain(module.parameters(), model.parameters())
    dtype = next((p.dtype for p in parameters if p.dtype in FLOATS), torch.get_default_dtype())
    return device, dtype, next((d for name in _HEAD_DIM if isinstance(d := getattr(module, name, None), int)), None)


def _why_no_kernel(module: nn.Module, model: nn.Module) -> Reason | None:
    """Why torch's own attention is left where it is, unless it is asked for."""
    device, dtype, dim = _operands(module, model)
    if not gpu_takes(device):
        # A decoder's steps have one row.
        rows = 1 if getattr(module, "is_causal", True) else ENCODER_ROWS
        if dim and huggingface.dispatches(module) and faster_than_torch(device, dtype, dim, rows):
            return None
        return Reason("attention_on_cpu", "on a CPU torch's attention stays where ours is not measured to be faster",
                      "pass attention=True to swap it all the same")  # fmt: skip
    q = torch.empty((0, 0, 0, dim) if dim else 0, dtype=dtype, device="meta")
    known = (q,) if q.dim() == 1 else (q, q, q)
    reasons = [ATTENTION.why_not_on(backend, device, *known) for backend in ("cuda", "triton")]
    return None if None in reasons else reasons[0]


def holders_of_configs(model: nn.Module) -> dict[int, list[nn.Module]]:
    """The modules that hold each config, by its id."""
    units: dict[int, list[nn.Module]] = {}
    for module in model.modules():
        config = getattr(module, "config", None)
        if hasattr(config, "_attn_implementation"):
            units.setdefault(id(config), []).append(module)
    return units


def why_not_named(module: nn.Module, unit: list[nn.Module]) -> Reason | None:
    """Why the config of an attention module cannot name our implementation; unit: the modules that hold it."""
    if reason := huggingface.register():
        return reason
    config: Any = module.config
    if _is_named(config):
        return Reason("shared_config", "another model that is swapped holds the same config object",
                      "give each its own, copy.deepcopy(config)")  # fmt: skip
    if getattr(config, "output_attentions", False):
        return Reason("output_attentions", "its config asks every call for attention weights, which fused attention does not have",
                      "set config.output_attentions = False, and pass output_attentions=True to the calls that need "
                      "them")  # fmt: skip
    name = huggingface.replaced_by(config._attn_implementation)
    for other in unit:
        if line := huggingface.asks_for_a_name(type(other).__module__):
            return Reason("asks_for_a_name", f"the code of {type(other).__name__} asks for an implementation by name ({line})",
                          "leave it")  # fmt: skip
    if name not in ("sdpa", "eager") and huggingface.eager_function(module) is None:
        return Reason("no_eager", f"it runs {name} and has nothing to go back to for calls that fused attention does not take",
                      'load the model with attn_implementation="sdpa"')  # fmt: skip
    return None


@dataclass(frozen=True)
class _Attribute:
    """A value that a swap set, and what was there before."""

    owner: Any
    name: str
    before: Any
    after: Any


class _Nothing(enum.Enum):
    """An object that stays itself in copies and pickles."""

    ABSENT = enum.auto()


_ABSENT = _Nothing.ABSENT
#: The attribute of a config that holds the name; its property would name all configs within as well.
_INTERNAL = "_attn_implementation_internal"


class AttentionSwap:
    """What swapping attention changes in a model, where ours stand in the places of torch's modules."""

    def __init__(self, model: nn.Module, decision: AttentionDecision, named: Iterable[nn.Module] = ()):
        """Builds; changes nothing. named: attention that is not swapped, and whose config names us all the same."""
        leaves, swapped = decision.leaves, decision.swapped
        fused = [x.module for x in swapped if isinstance(x.module, MultiheadAttention)]
        bits = {id(x.module): decision.bits.get(x.fqn) for x in swapped}
        self.attributes = [
            *_names(model, leaves, bits, named),
            *(_Attribute(m, "fused", False, True) for m in fused),
            *(_Attribute(m, "bits", vars(m).get("bits", _ABSENT), x) for m in fused if (x := bits[id(m)]) is not None),
            *(a for x in swapped if not _swappable(x.module) for a in _within_sdpa(x.module, bits[id(x.module)])),
        ]
        self.report = [_entry(x.fqn, x.module, model, bits[id(x.module)]) for x in swapped]

    def put(self) -> None:
        for a in self.attributes:
            vars(a.owner)[a.name] = a.after

    def undo(self) -> None:
        for a in self.attributes:
            if a.before is _ABSENT:
                vars(a.owner).pop(a.name, None)
            else:
                vars(a.owner)[a.name] = a.before


def _within_sdpa(module: nn.Module, bits: EightBits | None) -> Iterable[_Attribute]:
    """A forward around that of a module which calls torch's function itself, and its Place."""
    before = vars(module).get("forward", _ABSENT)
    forward = functools.partial(forward_within, module, bits, None if before is _ABSENT else before)
    yield _Attribute(module, "forward", before, forward)
    yield _Attribute(module, PLACE, vars(module).get(PLACE, _ABSENT), Place(True, "sdpa", None, bits))


def _is_named(config: Any) -> bool:
    """Whether a swap that is not undone has named this config. Copies of it, and of its model, have the name as well."""
    changes = (change for swap in living() for change in swap.changes)
    return any(a.owner is config for change in changes if isinstance(change, AttentionSwap) for a in change.attributes)


def _entry(fqn: str, module: nn.Module, model: nn.Module, bits: EightBits | None) -> SwappedAttention:
    computes = None if bits is None else bits.describe(*operands_in_8_bits(module, model))
    if isinstance(module, nn.MultiheadAttention):
        return SwappedAttention(fqn, type(module).__name__, "torch", computes)
    if not _swappable(module):
        return SwappedAttention(fqn, type(module).__name__, "sdpa", computes)
    config: Any = module.config
    before = huggingface.replaced_by(config._attn_implementation)
    return SwappedAttention(fqn, type(module).__name__, before, computes)


#: Of modules that do not say theirs.
_USUAL_HEAD_DIM = 64


def operands_in_8_bits(module: nn.Module, model: nn.Module) -> tuple[torch.device, torch.dtype, int]:
    """Device, dtype and head dim by which calls of a module are decided, as far as it can be known."""
    device, dtype, dim = _operands(module, model)
    return device, dtype, dim or _USUAL_HEAD_DIM


def notes_on_8_bits(model: nn.Module, decision: AttentionDecision) -> list[str]:
    """Where attention is asked for in 8 bits and never is, or by the reference alone."""
    notes = []
    for leaf in decision.swapped:
        if (bits := decision.bits.get(leaf.fqn)) is None:
            continue
        device, dtype, dim = operands_in_8_bits(leaf.module, model)
        name = str(dtype).removeprefix("torch.")
        if reason := bits.why_none(device, dtype, dim):
            notes.append(f"attention={bits.dtype!r} computes in {name} in every call: {reason}")
        elif reason := why_no_kernel(bits.dtype, device, dtype, dim, dim):
            notes.append(f"attention={bits.dtype!r} runs through the plain-torch reference, which is slower than what it replaces: "
                         f"{reason}")  # fmt: skip
    return [*dict.fromkeys(notes)]


def bits_of(model: nn.Module) -> dict[str, EightBits]:
    """The modules whose attention computes in 8 bits, by name."""
    named = (
        (fqn, m.bits if isinstance(m, MultiheadAttention) else getattr(vars(m).get(PLACE), "bits", None))
        for fqn, m in model.named_modules()
    )
    return {fqn: bits for fqn, bits in named if bits is not None}


def _names(
    model: nn.Module, leaves: Iterable[Leaf], bits: Mapping[int, EightBits | None], named: Iterable[nn.Module]
) -> Iterable[_Attribute]:
    """The configs' names, and a Place in every module that asks them. bits: of each that is swapped, by its id."""
    ids = {*bits}
    dispatching = [x.module for x in leaves if huggingface.dispatches(x.module)]
    configs: dict[int, Any] = {}
    holders = holders_of_configs(model)
    for config, group in _groups(dispatching, ids | {id(m) for m in named}):
        before = config._attn_implementation
        configs[id(config)] = (config, before, huggingface.name_of(group, holders[id(config)], before))
        for module in group:
            eager = huggingface.eager_function(module)
            place = Place(id(module) in ids, huggingface.replaced_by(before), eager, bits.get(id(module)))
            yield _Attribute(module, PLACE, vars(module).get(PLACE, _ABSENT), place)
    if not configs:
        return
    # A config above, whose attention is all in parts that are named: what model.config says is then true as well.
    for module in model.modules():
        config = getattr(module, "config", None)
        below = [m for m in module.modules() if huggingface.dispatches(m)] if hasattr(config, "sub_configs") else []
        if below and id(config) not in configs and all(id(m.config) in configs for m in below):
            before = config._attn_implementation  # type: ignore[union-attr]
            configs[id(config)] = (config, before, huggingface.name_in_place_of(before))
    for config, before, after in configs.values():
        yield _Attribute(config, _INTERNAL, before, after)


def _groups(dispatching: list[nn.Module], named: set[int]) -> list[tuple[Any, list[nn.Module]]]:
    """Each config that is to name us, and all modules that ask it."""
    groups: dict[int, tuple[Any, list[nn.Module]]] = {}
    for module in dispatching:
        groups.setdefault(id(module.config), (module.config, []))[1].append(module)
    return [(config, group) for config, group in groups.values() if any(id(m) in named for m in group)]


def implementation_before(model: nn.Module) -> str | None:
    """What the config of a Hugging Face model names where it is not swapped."""
    name = getattr(getattr(model, "config", None), "_attn_implementation", None)
    places = [vars(m)[PLACE] for m in model.modules() if PLACE in vars(m)] if name in NAMES else []
    return places[0].before if places else name and huggingface.replaced_by(name)
