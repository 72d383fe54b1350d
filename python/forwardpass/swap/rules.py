"""Which Linear-like layers are left alone, and why: one small function a rule, in the order they are asked. Those that take no
precision hold for attention too.

A rule returns None, or (what is in the way, what to do about it). "user" rules are what include= and exclude= say,
"default" rules what is better left alone unless it is named under include=, "model" rules what cannot be replaced as
it is.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, NamedTuple, TypeGuard

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ..common.environment import cpu_tier, int8_instructions
from ..common.models.modules import (
    accelerate_hooks,
    forward_replaced,
    has_hooks,
    head_of,
    is_compressed,
    moves_nothing_but_inputs,
)
from ..common.models.patterns import Pattern
from ..dispatch import Reason, gpu_takes, only_reference_on, operations
from ..integrations.tensor_parallel import sharding_of, whole
from ..nn import Experts, Int8Linear, MultiheadAttention
from ..nn.conv2d_classes import is_zero_padded
from ..nn.linear.quantized_linear import has_other_forward, is_linear
from ..nn.quantized_experts import experts_operation, is_experts
from ..ops.common.quantized_rows import FLOATS
from ..ops.int8_conv2d import LEAST_GROUP
from ..proofs.adapters import BASE, reads_base
from ..proofs.asked import classes_asked, values_read
from ..proofs.walker import ConvolutionLeaf, Leaf
from .precision import STORED, Precision, Presets


class LeastSize(NamedTuple):
    """The least weight that is quantised."""

    elements: int
    side: int  #: of rows and of columns


#: Smaller weights stay: quantising the input costs more than the smaller product saves.
LEAST_SIZE = LeastSize(64 * 64, 1)

#: The same for int8 on a CPU, by its tier: from here on one row takes no longer than in fp32, nor do more. What gains from some
#: rows on only is left to `fp.plan`, which measures it. Time of nn.Linear in fp32 over that of its Int8Linear, one core of an AMD
#: EPYC (Zen 4) held to each tier by FORWARDPASS_CPU, the least of 480 calls, 2026-11-28:
#:
#:     rows            1     2     8    32   128   512       1     2     8    32   128   512
#:     192 x 192    0.88  1.17  1.29  1.80  2.35  2.67    0.86  1.10  1.06  1.15  1.25  1.30
#:     256 x 256    1.06  1.47  1.66  2.17  2.72  3.02    1.02  1.33  1.30  1.33  1.36  1.38
#:     320 x 320    1.28  1.79  1.99  2.45  2.98  3.25    1.19  1.55  1.43  1.39  1.41  1.45
#:     384 x 384    1.42  2.12  2.37  2.73  3.20  3.28    1.31  1.75  1.55  1.47  1.46  1.45
#:     1024 x 64    1.13  1.45  1.29  1.89  2.19  2.59    1.10  1.37  1.07  0.94  0.97  1.04
#:     64 x 1024    1.00  1.35  2.23  2.27  2.55  2.67    0.95  1.22  1.64  1.35  1.27  1.27
#:     32 x 2048    0.96  1.29  2.07  2.03  2.21  2.32    0.95  1.17  1.53  1.18  1.11  1.08
#:                  avx512_vnni                           avx2
#:
#: AVX-VNNI is within 0.1 of AVX-512 VNNI. AMX was not there to be measured.
_VNNI, _AVX2 = LeastSize(256 * 256, 64), LeastSize(320 * 320, 256)
LEAST_SIZES_ON_CPU = {"avx2": _AVX2, "avx_vnni": _VNNI, "avx512": _AVX2, "avx512_vnni": _VNNI, "amx": _VNNI}

#: The same for convolutions, whose product has K = channels times the pixels of a window, and a row per pixel. Time of torch in
#: fp32, channels_last or not, whichever is faster, with a BatchNorm and a ReLU behind it, over that of the Int8Conv2d that computes
#: all three; and the same where the norm was folded before. One picture, one thread's time on the CPU, the least of 7 calls, a
#: shared machine, 2026-12-01:
#:
#:                                     avx512_vnni         avx2
#:       16 ->   96, 1 x 1, 112 x 112  6.7   0.55      3.1   0.29
#:       96 ->   24, 1 x 1,  56 x 56   0.58  0.60      0.52  0.58
#:       24 ->  144, 1 x 1,  56 x 56   0.95  0.64      0.74  0.43
#:      144 ->   40, 1 x 1,  28 x 28   0.87  0.87      0.72  0.71
#:       40 ->  240, 1 x 1,  28 x 28   1.35  1.07      0.92  0.71
#:       64 ->   64, 1 x 1,  56 x 56   1.71  1.43      0.97  0.80
#:      240 ->   80, 1 x 1,  14 x 14   1.67  1.56      1.10  0.88
#:      320 -> 1280, 1 x 1,   7 x 7    3.19  2.97      1.76  1.55
#:     1024 ->  256, 1 x 1,  14 x 14   3.29  3.43      1.80  1.73
#:       16 ->   16, 3 x 3,  56 x 56   0.95  0.79      0.58  0.47
#:       32 ->   32, 3 x 3,  56 x 56   2.03  1.87      1.10  0.97
#:       64 ->   64, 3 x 3,  56 x 56   3.46  3.21      1.17  1.13
#:      256 ->  256, 3 x 3,  14 x 14   3.68  3.98      1.54  1.51
#:
#: A convolution that stays computes the norm and the ReLU in floats too (FloatConv2d). The time of that over int8's (35 shapes, the
#: least of 25 calls, the same machine): from these sizes on 1.10 to 2.9 on VNNI. On AVX2 .97 to 1.27, and .84 and .88 for two of
#: 7 x 7. Below these sizes .26 to 1.33 on VNNI, .26 to 1.34 on AVX2.
#:
#: AVX-VNNI and AMX were not there to be measured.
_VNNI_CONVOLUTIONS, _AVX2_CONVOLUTIONS = LeastSize(8192, 32), LeastSize(16384, 64)
LEAST_CONVOLUTIONS_ON_CPU = {
    "avx2": _AVX2_CONVOLUTIONS, "avx_vnni": _VNNI_CONVOLUTIONS, "avx512": _AVX2_CONVOLUTIONS,
    "avx512_vnni": _VNNI_CONVOLUTIONS, "amx": _VNNI_CONVOLUTIONS,
}  # fmt: skip

Finding = tuple[str, str]


@dataclass(frozen=True)
class Memory:
    """Where in memory a parameter or buffer lies, and whose it is."""

    owner: nn.Module
    name: str
    begin: int
    end: int


@dataclass
class Context:
    """What the rules know of the model beside the layer, gathered once."""

    model: nn.Module
    include: tuple[Pattern, ...] = ()
    exclude: tuple[Pattern, ...] = ()
    presets: Presets | None = None  #: which precision each layer gets; None where a plan says it, or nothing
    calibrated: bool = False  #: whether there are batches to calibrate with
    memory: dict[int, list[Memory]] = field(init=False)
    output_layers: set[int] = field(init=False)

    def __post_init__(self) -> None:
        self.memory = {}
        self.output_layers = set()
        for fqn, module in self.model.named_modules():
            for name, tensor in _own_tensors(module):
                storage, begin, end = _extent(tensor)
                path = f"{fqn}.{name}" if fqn else name
                self.memory.setdefault(storage, []).append(Memory(module, path, begin, end))
            if (head := head_of(module)) is not None:
                self.output_layers.add(id(head))


def _own_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for tensors in (module._parameters, module._buffers):
        for name, tensor in tensors.items():
            if tensor is not None and type(tensor) in (Tensor, nn.Parameter):
                yield name, tensor


def _extent(t: Tensor) -> tuple[int, int, int]:
    """(storage, first byte, byte after the last)."""
    last = sum((int(n) - 1) * int(stride) for n, stride in zip(t.shape, t.stride())) if t.numel() else -1
    begin = int(t.storage_offset()) * t.element_size()
    return t.untyped_storage()._cdata, begin, begin + (last + 1) * t.element_size()


def excluded(leaf: Leaf, context: Context, precision: Precision | None) -> Finding | None:
    for pattern in context.exclude:
        if pattern.matches(leaf.fqn):
            return f"exclude={pattern.text!r} names it", "drop that pattern to swap it"
    return None


def not_included(leaf: Leaf, context: Context, precision: Precision | None) -> Finding | None:
    if context.include and not any(p.matches(leaf.fqn) for p in context.include):
        return "no include pattern names it", f"add {leaf.fqn!r} to include"
    return None


def uninitialized(leaf: Leaf, context: Context, precision: Precision | None) -> Finding | None:
    if any(p is not None and is_lazy(p) for p in leaf.module._parameters.values()):
        return "it is lazy, and has no weight before its first call", "run the model on a batch first"
    return None


def dotted(leaf: Leaf, context: Context, precision: Precision | None) -> Finding | None:
    for name in (*(name for name, _ in leaf.ancestors[1:]), leaf.name):
        if not name or "." in name:
            return (f"the module name {name!r} is empty or has a dot, so that no path leads to it",
                    "give it another name, with add_module")  # fmt: skip
    return None


def lm_head(leaf: Leaf, context: Context, precision: Precision) -> Finding | None:
    if leaf.outermost.name == "lm_head" or _is_output_layer(leaf, context):
        return ("its outputs are the logits, where the error of 8 bits shows most",
                f"add {leaf.fqn!r} to include to swap it all the same")  # fmt: skip
    return None


def _is_output_layer(leaf: Leaf, context: Context) -> bool:
    return not context.output_layers.isdisjoint((id(leaf.module), id(leaf.outermost.module)))


def moe_router(leaf: Leaf, context: Context, precision: Precision) -> Finding | None:
    names = [name for name, _ in leaf.ancestors[1:]] + [leaf.name]
    for (_, ancestor), below in zip(leaf.ancestors, names):
        if "experts" in ancestor._modules and re.search(r"(^|_)(gate|router)$", below):
            return ("it routes tokens to experts, where a small error sends a token elsewhere",
                    f"add {leaf.fqn!r} to include to swap it all the same")  # fmt: skip
    return None


def _multiplies_int8_on_cpu(leaf: Leaf, precision: Precision) -> bool:
    return precision.module is Int8Linear and _is_on_cpu(leaf)


def _is_on_cpu(leaf: Leaf) -> bool:
    device = next((p.device for p in leaf.module.parameters()), torch.device("cpu"))
    return device.type == "cpu" and not gpu_takes(device)


def too_small(leaf: Leaf, context: Context, precision: Precision) -> Finding | None:
    n, k = leaf.out_features, leaf.in_features
    sizes = LEAST_CONVOLUTIONS_ON_CPU if leaf.is_convolution else LEAST_SIZES_ON_CPU
    on_cpu = _multiplies_int8_on_cpu(leaf, precision) and sizes.get(cpu_tier() or "")
    least = on_cpu or LEAST_SIZE
    if n * k >= least.elements and min(n, k) >= least.side:
        return None
    sides = f" with {least.side} rows and columns" if least.side > 1 else ""
    return (f"{n} x {k} is too small to gain{' on this CPU' if on_cpu else ''}, below {least.elements} weights{sides}",
            f"add {leaf.fqn!r} to include to swap it all the same")  # fmt: skip


def no_int8_instructions(leaf: Leaf, context: Context, precision: Precision) -> Finding | None:
    if _multiplies_int8_on_cpu(leaf, precision) and not int8_instructions():
        return ("this CPU multiplies int8 as fp32 (AVX2, AVX-VNNI, VNNI or AMX would be faster), with a quantisation on top",
                f"add {leaf.fqn!r} to include to swap it all the same")  # fmt: skip
    return None


def depthwise(leaf: Leaf, context: Context, precision: Precision) -> Finding | None:
    module: Any = leaf.module
    if module.groups > 1 and module.groups == module.in_channels:
        return ("it is depthwise: it multiplies each value it reads a few times, and reading binds it",
                f"add {leaf.fqn!r} to include to swap it all the same")  # fmt: skip
    return None


def narrow(leaf: Leaf, context: Context, precision: Precision) -> Finding | None:
    module: Any = leaf.module
    inside, outside = module.in_channels // module.groups, module.out_channels // module.groups
    if min(inside, outside) >= LEAST_GROUP:
        return None
    return (f"it has {inside} channels{' of a group' * (module.groups > 1)} and makes {outside} of them, and below {LEAST_GROUP} "
            "nothing is gained", f"add {leaf.fqn!r} to include to swap it all the same")  # fmt: skip


def unmeasured(leaf: Leaf, context: Context, precision: Precision) -> Finding | None:
    if _is_on_cpu(leaf):
        return None
    return ("no GPU has shown what convolutions gain in 8 bits",
            f"measure it with fp.plan, or add {leaf.fqn!r} to include to swap it all the same")  # fmt: skip


def uncalibrated(leaf: Leaf, context: Context, precision: Precision) -> Finding | None:
    if context.calibrated:
        return None
    return ("without calibration a stack of convolutions loses more than one of linear layers: the lowest cosine of "
            "EfficientNet-Lite0's logits is .991, and .998 with it",
            f"pass calibrate=batches, or add {leaf.fqn!r} to include to swap it all the same")  # fmt: skip


def reference(leaf: Leaf, context: Context, precision: Precision) -> Finding | None:
    operation, w = precision.operation(leaf), leaf.module.weight
    assert operation is not None and isinstance(w, Tensor)
    if not only_reference_on(operation, w.device, w.dtype):
        return None
    return (f"{operation} has no kernel for {str(w.dtype).removeprefix('torch.')} on {w.device} in this installation",
            f"see `forwardpass doctor`; add {leaf.fqn!r} to include to swap it all the same")  # fmt: skip


def shared(leaf: Leaf, context: Context, precision: Precision | None) -> Finding | None:
    if len(leaf.places) > 1:
        return (
            f"one module stands in {len(leaf.places)} places, {', '.join(leaf.places[:3])}",
            "give each place its own copy",
        )
    return None


def adapter(leaf: Leaf, context: Context, precision: Precision | None) -> Finding | None:
    merge = "merge the adapter first (peft: model.merge_and_unload())"
    names = [*(name for name, _ in leaf.ancestors[1:]), leaf.name]
    below_adapters = False
    for (_, holder), name in zip(leaf.ancestors, names):
        kind = f"{type(holder).__module__}.{type(holder).__qualname__}"
        if "original_module" in holder._modules and "modules_to_save" in holder._modules:
            return f"the {kind} around it trains and stores a copy of it", "leave it, or unload the adapter"
        if name == BASE and reads_base(holder):
            return f"the adapter around it, a {kind}, does more than to call it: it may read its weight", merge
        below_adapters = below_adapters or name == BASE
        if name != BASE and (BASE in holder._modules or name.startswith("lora_")):
            return f"it is part of an adapter, of a {kind}", merge
    beside = [*leaf.parent._modules, *leaf.parent._parameters]
    if not below_adapters and any(name.startswith("lora_") for name in beside):
        return "a LoRA adapter wraps it", merge
    return None


def parametrized(leaf: Leaf, context: Context, precision: Precision) -> Finding | None:
    if "weight_packed" in leaf.module._parameters:
        return "compressed-tensors holds its weight in packed integers", "load the folder with fp.load_pretrained"
    if hasattr(leaf.module, "parametrizations") or "weight" not in leaf.module._parameters:
        return ("its weight is computed on each call (a parametrisation, weight or spectral norm, pruning)",
                "remove it, keeping the value (torch.nn.utils.parametrize.remove_parametrizations, …)")  # fmt: skip
    return None


def subclass(leaf: Leaf, context: Context, precision: Precision) -> Finding | None:
    cls = type(leaf.module)
    if has_other_forward(cls):
        return (f"the forward of {cls.__name__} is another function than in its library's file, and may compute something else",
                "undo what replaced it, or swap before it is replaced")  # fmt: skip
    if not is_linear(leaf.module):
        return (f"{cls.__module__}.{cls.__qualname__} derives from Linear and may compute something else",
                "replace it by a plain nn.Linear if it does not")  # fmt: skip
    return None


def tensor_class(leaf: Leaf, context: Context, precision: Precision | None) -> Finding | None:
    if sharding_of(leaf.module):
        return None
    for name, p in leaf.module._parameters.items():
        if p is not None and (type(p) is not nn.Parameter or type(p.data) is not Tensor):
            return (f"its {name} is a {type(p).__name__} of {type(p.data).__name__}, not a plain tensor",
                    "swap before the model is sharded or quantised by another library")  # fmt: skip
    return None


def meta(leaf: Leaf, context: Context, precision: Precision | None) -> Finding | None:
    if any(p.is_meta for p in leaf.module.parameters()):
        return "its weight is on the meta device and has no values", "load the weights first, or use fp.load_pretrained"
    return None


def offloaded(leaf: Leaf, context: Context, precision: Precision | None) -> Finding | None:
    hooks = [
        hook for _, m in leaf.ancestors for hook in accelerate_hooks(m) if getattr(hook, "place_submodules", False)
    ]
    if any(getattr(hook, "offload", False) for hook in (*hooks, *accelerate_hooks(leaf.module))):
        return ("accelerate keeps its weight on the CPU or on disk between calls, and copies it for each",
                "load the model without offloading, swap it, and offload then what is still too large")  # fmt: skip
    return None


def hooks(leaf: Leaf, context: Context, precision: Precision | None) -> Finding | None:
    m = leaf.module
    if sharding_of(m):
        return None
    if has_hooks(m):
        return (
            "hooks are registered on it, and would no longer be called",
            "remove them, and register them after the swap",
        )
    if forward_replaced(m) and not is_compressed(m):
        return "its forward was replaced on the instance", "remove that first"
    for hook in accelerate_hooks(m):
        if not moves_nothing_but_inputs(hook):
            return (
                f"a {type(hook).__name__} of accelerate is on it, which may do more than to move its inputs",
                "remove it first (accelerate.hooks.remove_hook_from_module), and add it after the swap",
            )
    return None


def tied(leaf: Leaf, context: Context, precision: Precision) -> Finding | None:
    for name, other in ties(leaf, context):
        if not (_is_output_layer(leaf, context) and type(other.owner) is nn.Embedding):
            return (f"its {name} is tied to {other.name}, which needs it as it is",
                    "untie them (give the layer its own copy of the weight)")  # fmt: skip
    return None  # a head gets a copy of its own, and the embedding looks its rows up as before


def ties(leaf: Leaf, context: Context) -> Iterator[tuple[str, Memory]]:
    """The layer's tensors that lie in the memory of another module, each with that one."""
    for name, tensor in _own_tensors(leaf.module):
        storage, begin, end = _extent(tensor)
        for other in context.memory.get(storage, ()):
            if other.owner is not leaf.module and other.begin < end and begin < other.end:
                yield name, other


#: Values of a layer's weight or bias: not its dtype, and not what it is.
_READ = r"(?<!isinstance\()\bself\.{}\.(weight|bias)\b(?!\.(dtype|device|shape|ndim)\b)"


def weight_read(leaf: Leaf, context: Context, precision: Precision) -> Finding | None:
    leaf = leaf.outermost  # an adapter has its layer's weight as its own
    parent = leaf.parent
    if isinstance(parent, MultiheadAttention):  # which calls its projections
        return None
    source = _forward_source(type(parent).forward)
    # A class that derives from torch's may call its forward, whatever its own reads.
    of_torch = isinstance(parent, nn.TransformerEncoderLayer | nn.MultiheadAttention)
    if not (of_torch or re.search(_READ.format(re.escape(leaf.name)), source)):
        return None
    fix = "have it call the layer instead"
    if isinstance(parent, nn.TransformerEncoderLayer):  # in its fast path, which is off where its attention is ours
        if not torch.backends.mha.get_fastpath_enabled() or isinstance(parent.self_attn, MultiheadAttention):
            return None
        fix = "make its self_attn a plain nn.MultiheadAttention, or call torch.backends.mha.set_fastpath_enabled(False) first"
    return f"the forward of {type(parent).__name__} reads its weight or bias itself", fix


def parameters_read(leaf: Leaf, context: Context, precision: Precision) -> Finding | None:
    names = (*(name for name, _ in leaf.ancestors[1:]), leaf.name)
    for i, (_, module) in enumerate(leaf.ancestors):
        if any(read.includes(names[i:]) for read in values_read(type(module))):
            return (f"the forward of {type(module).__name__} reads the values of parameters(), which has none of a quantised layer",
                    "have it read the layer's weight")  # fmt: skip
    return None


def class_read(leaf: Leaf, context: Context, precision: Precision) -> Finding | None:
    names = (*(name for name, _ in leaf.ancestors[1:]), leaf.name)
    for i, (_, module) in enumerate(leaf.ancestors):
        if any(names[i:][: len(path)] == path for path in classes_asked(type(module))):
            return (f"the forward of {type(module).__name__} asks whether it is a Linear, and a quantised layer is none",
                    "have it call the layer whatever its class is")  # fmt: skip
    return None


@lru_cache(maxsize=256)
def _forward_source(forward: Callable[..., Any]) -> str:
    try:
        return inspect.getsource(forward)
    except (OSError, TypeError):  # no source at hand: nothing is known, nothing is said
        return ""


def dtype(leaf: Leaf, context: Context, precision: Precision | None) -> Finding | None:
    for name, p in leaf.module._parameters.items():
        if p is not None and p.dtype not in FLOATS:
            return (
                f"its {name} is {p.dtype}, not float32, float16 or bfloat16",
                "convert the model with .to(torch.float32)",
            )
    return None


def not_finite(leaf: Leaf, context: Context, precision: Precision) -> Finding | None:
    module = whole(leaf.module) if sharding_of(leaf.module) else leaf.module  # all processes decide the same
    for name, p in module._parameters.items():
        if p is not None and p.numel() and not all(torch.isfinite(x) for x in torch.aminmax(p.detach())):
            return f"its {name} holds NaN or infinity", "repair the weights: such a row has no scale"
    return None


@dataclass(frozen=True)
class Rule:
    kind: str
    ask: Callable[[Leaf, Context, Precision], Finding | None]

    @property
    def code(self) -> str:
        return self.ask.__name__


_USER = (excluded, not_included)
#: What somebody who names a layer by hand knows.
_OF_SPEED = (too_small, no_int8_instructions, depthwise, narrow, unmeasured, reference, uncalibrated)
#: Without these there is nothing to ask the others about.
_FIRST = (uninitialized, dotted)
_DEFAULT = (lm_head, moe_router, too_small, no_int8_instructions)
_OF_CONVOLUTIONS = (depthwise, narrow, unmeasured, reference)
#: Of what a Linear has alone, or of what it is called by.
_OF_LINEARS = (lm_head, moe_router, parametrized, subclass, weight_read, parameters_read, class_read)
#: Of what is quantised here: a layer that holds 8 bits already is taken over as it is.
_OF_FLOATS = (*_DEFAULT, subclass, tensor_class, dtype, not_finite)
#: The last one reads the weight.
_MODEL = (shared, adapter, parametrized, subclass, tensor_class, offloaded, meta, hooks, tied,
          weight_read, parameters_read, class_read, dtype, not_finite)  # fmt: skip
#: Of the form of a Linear.
_NOT_OF_CONVOLUTIONS = (lm_head, moe_router, subclass)
_KINDS = (
    ("user", _USER),
    ("model", _FIRST),
    ("default", (*_OF_CONVOLUTIONS, *_DEFAULT, uncalibrated)),
    ("model", _MODEL),
)
RULES = tuple(Rule(kind, ask) for kind, rules in _KINDS for ask in rules)
KINDS = {rule.code: rule.kind for rule in RULES} | {
    "attention_off": "user",
    "no_precision": "user",
    "floats": "user",
    "not_planned": "user",
    "attention_on_cpu": "default",
    "calls_sdpa": "default",
    "convolution": "default",
}


def why_skip(leaf: Leaf, context: Context, precision: Precision, defaults: bool) -> Reason | None:
    """The first reason to leave a layer alone, or None. `defaults`: whether the default rules are asked; a plan
    decides itself.
    """
    names = {leaf.fqn, leaf.outermost.fqn}
    by_hand = context.presets.patterns if context.presets is not None else ()
    named = any(p.spells_out(name) for name in names for p in (*context.include, *by_hand))
    if leaf.is_convolution and precision.convolution is None:
        return Reason("convolution", f"there is no {precision.name} for convolutions", "use int8 for them")
    for rule in RULES:
        if leaf.is_experts and rule.ask in _OF_LINEARS:
            continue
        if rule.ask in (_NOT_OF_CONVOLUTIONS if leaf.is_convolution else (*_OF_CONVOLUTIONS, uncalibrated)):
            continue
        if rule.kind == "default" and (named or not defaults):
            continue
        if rule.ask in _OF_SPEED and context.presets is not None and context.presets.names(leaf.fqn):
            continue
        if precision is STORED and rule.ask in _OF_FLOATS:
            continue
        if finding := rule.ask(leaf, context, precision):
            return Reason(rule.code, *finding)
    if leaf.is_convolution and precision.convolution is not None:
        return precision.convolution.why_not(leaf.module)
    if not leaf.is_experts or precision is STORED:
        return precision.module.why_not(leaf.module)
    if precision.experts is None:
        return Reason("experts", f"there is no {precision.name} for experts", "use int8, fp8 or w8a16 for them")
    operation = operations[experts_operation(precision.experts)]
    return Experts.why_not(leaf.module) or operation.too_old(leaf.weight.device)


#: Reasons for which a swap leaves a convolution in floats for good. One that waits for calibration waits for another call.
IN_FLOATS = ("depthwise", "narrow", "too_small", "no_int8_instructions", "padding")


def may_fold(leaf: Leaf, context: Context, precision: Precision) -> TypeGuard[ConvolutionLeaf]:
    """Whether a convolution may compute the norm and the activation behind it in floats, where a swap into this precision leaves it
    there. On CPUs alone: nobody has measured it on a GPU."""
    if not isinstance(leaf, ConvolutionLeaf) or not (leaf.norm or leaf.activation) or precision.convolution is None:
        return False
    if leaf.weight.device.type != "cpu" or not is_zero_padded(leaf.module):
        return False
    asked = (rule for rule in (*_USER, *_MODEL) if rule not in _NOT_OF_CONVOLUTIONS)
    return all(rule(leaf, context, precision) is None for rule in asked)


def fused_experts(context: Context) -> Iterator[tuple[str, Reason]]:
    """Expert weights that are 3-D parameters of a module that is not as transformers 5 has them: most of such a model, and no
    Linear layer.
    """
    for fqn, module in context.model.named_modules():
        named = fqn.rpartition(".")[2] == "experts" or type(module).__name__.endswith("Experts")
        if is_experts(module) or not named:
            continue
        for name, p in module._parameters.items():
            if p is not None and p.dim() == 3 and p.is_floating_point():
                text = f"{type(module).__name__} holds its experts' weights as one parameter, {list(p.shape)}"
                fix = "it stays as it is; exclude it to say that this is meant"
                yield f"{fqn}.{name}", Reason("fused_experts", text, fix)
