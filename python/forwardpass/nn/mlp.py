"""MLP and GatedMLP: an MLP as two products, the activation in the epilogue of the first, which may write 8 bits for the second."""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..common.models.modules import HOOK, OLD_FORWARD, are_watched_by_others
from ..dispatch import gpu_takes, use_backend
from ..ops.common.activations import GATED, PLAIN, interleave_gate_up, separate_gate_up
from ..ops.fp8_gemm import BLOCK
from .guard import CodeGuard, InEpilogue, code_guard
from .linear.dequantized_weight import DequantizedWeight
from .linear.joined import why_apart
from .linear.quantized_inputs import Quantized
from .linear.quantized_linear import QuantizedLinear, QuantizedModule

L = TypeVar("L", bound=QuantizedLinear)
_NONE: Mapping[str, nn.Module] = {}


class TwoProducts(QuantizedModule):
    """Base of the MLPs: a first layer with the activation in its epilogue, and a second one.

    Code that gets at the parts of the module that it stands for finds them by their names, and what they give together is what the
    module gives: members that the unit does not call itself, and which compute only where something calls them.

    On a GPU, where the second layer's scales do not depend on what a row holds (static and symmetric int8; static e4m3; on Hopper
    also e4m3 with block scales), the first writes its output in 8 bits as the second quantises it: a half or a fourth of the
    bytes, and a launch less. The second layer's channel_scale is in what the first one divides by. On a CPU each layer quantises
    its own input, a block of rows at a time in cache, and 8 bits between them gain nothing: two layers of 384 x 1536 and 1024 x
    4096, 1, 16 and 512 rows, one core of Zen 4: 0.96 to 1.06 times as fast with VNNI, with AVX2, whose weight would be packed
    anew, 0.78 to 0.95 of 512 rows.

    Args:
        layers: the two by their names.
        between, behind: modules that are called on what each gives, by name: nn.Dropout.
        uncalled: the other members, by name.
    """

    _written: tuple[nn.Module, ...] = ()  #: in a tuple, which holds no children
    _guard: CodeGuard | None = None

    def __init__(
        self,
        layers: Mapping[str, QuantizedLinear],
        between: Mapping[str, nn.Module] = _NONE,
        behind: Mapping[str, nn.Module] = _NONE,
        uncalled: Mapping[str, nn.Module] = _NONE,
    ) -> None:
        super().__init__()
        self.activation, self.training = None, next(iter(layers.values())).training
        for name, module in (*layers.items(), *between.items(), *behind.items(), *uncalled.items()):
            self.add_module(name, module)
        self._first, self._second = layers
        #: names of the layers in the module that it stands for
        self.members = tuple(layers)
        self._between, self._behind = tuple(between), tuple(behind)

    def stands_for(self, module: nn.Module) -> None:
        """Keeps the class of the module that was replaced, and its attributes, for where its code is another one some day: that
        then runs, on this unit's members."""
        written = object.__new__(type(module))
        attributes = {name: x for name, x in vars(module).items() if name not in ("forward", HOOK, OLD_FORWARD)}
        vars(written).update(attributes, _modules=self._modules)
        self._written = (written,)
        self._guard = code_guard(type(module), *(() if self._guard is None else self._guard.classes))

    @property
    def written(self) -> nn.Module | None:
        """The module that it stands for, on this unit's members."""
        return next(iter(self._written), None)

    @property
    def is_apart(self) -> bool:
        """Whether members are called one by one: something is around one of them, or in its place, or the code that the unit stands
        for is another one."""
        return not torch.compiler.is_compiling() and self._runs_other_code()

    def _runs_other_code(self) -> bool:
        """Whether the code that the unit stands for is another one than when it was made."""
        return self._guard is not None and not self._guard.is_as_proven(self)

    def _one_by_one(self, x: Tensor) -> Tensor:
        """By the code of the module that it stands for, as that is now."""
        written = self._written[0]
        vars(written)["training"] = self.training
        y: Tensor = written(x)
        return y

    @property
    def layers(self) -> tuple[QuantizedLinear, QuantizedLinear]:
        """The one that has the activation, and the other."""
        return self._modules[self._first], self._modules[self._second]  # type: ignore[return-value]

    def separate(self, on_meta: bool = False) -> dict[str, QuantizedLinear]:
        """The layers as they were given, by the names that a checkpoint has for them. on_meta: without copies, those that would be
        copies have `values` instead."""
        raise NotImplementedError

    def _hands_over(self, x: Tensor | Quantized) -> bool:
        """Whether the first layer quantises for the second."""
        device = x.values.device if isinstance(x, Quantized) else x.device
        if not gpu_takes(device):
            return False
        first, second = self.layers
        if not first.quantizes_for(second, device):
            return False
        return not any(self._modules[name].training for name in self._between)  # type: ignore[union-attr]

    def forward(self, x: Tensor | Quantized | None = None, **named: Tensor) -> Tensor:
        """x: of a `QuantizingNorm` before it, quantised. named: x, by the name that the module's own forward has for it."""
        if x is None:
            (x,) = named.values()
        if not isinstance(x, Quantized) and self.is_apart:
            return self._one_by_one(x)
        first = self._modules[self._first]
        h = first(x, self._modules[self._second]) if self._hands_over(x) else first(x)  # type: ignore[misc]
        return self._finished(h)

    def _finished(self, h: Tensor | Quantized) -> Tensor:
        """From what the first layer gives."""
        modules = self._modules
        if not isinstance(h, Quantized):
            for name in self._between:
                h = modules[name](h)  # type: ignore[misc]
        y: Tensor = modules[self._second](h)  # type: ignore[misc]
        for name in self._behind:
            y = modules[name](y)  # type: ignore[misc]
        return y

    def exact(self, x: Tensor | Quantized) -> Tensor:  # type: ignore[override]
        """By the reference of each operation, in float64, without dropouts; what is between the two products is rounded as in
        forward."""
        (first, second), in_8_bits = self.layers, self._hands_over(x)
        with use_backend("reference"):
            return second.exact(first.quantized_product(x, second) if in_8_bits else first.product(x))

    def config(self) -> dict[str, Any]:
        return {name: layer.config() for name, layer in zip((self._first, self._second), self.layers)}


class MLP(TwoProducts):
    """`down(activation(up(x)))`, from two quantised layers, the activation computed by the first of them.

    Made by `from_layers`. Inference only.

    Shapes: input [..., K], output [..., N]. Modules: the two layers, by the names that they were given, up and down.

    Example:
        >>> up = fp.nn.Int8Linear.from_torch(torch.nn.Linear(64, 256), activation="gelu")
        >>> down = fp.nn.Int8Linear.from_torch(torch.nn.Linear(256, 64))
        >>> fp.nn.MLP.from_layers(up, down)(torch.randn(4, 64)).shape
        torch.Size([4, 64])
    """

    _in_epilogue: tuple[InEpilogue, ...] = ()  #: what stands in the place of the activation, if any

    @classmethod
    def from_layers(
        cls,
        up: QuantizedLinear,
        down: QuantizedLinear,
        *,
        names: tuple[str, str] = ("up", "down"),
        between: Mapping[str, nn.Module] = _NONE,
        behind: Mapping[str, nn.Module] = _NONE,
        activation: tuple[str, nn.Module] | None = None,
    ) -> MLP:
        """The two as they are.

        Args:
            up: with its activation, as `Int8Linear.from_torch(linear, activation="gelu")` makes it.
            down: any quantised layer of as many inputs as up has outputs.
            names: of the two as attributes.
            between, behind: modules that are called on the activated up and on the result, by name: nn.Dropout.
            activation: the module of up's activation, with its name, for code that asks for it: an `InEpilogue` stands there, an
                nn.Identity that applies it where up is called apart.

        Raises:
            TypeError: one of them is no quantised layer.
            ValueError: they do not fit, and how.
        """
        _check_layers("MLP", up=up, down=down)
        if up.activation not in PLAIN:
            raise ValueError(f"MLP.from_layers: up computes one of {', '.join(PLAIN)}, and not {up.activation}")
        _check_fit("MLP", "up", up.out_features, down)
        if activation is None:
            return cls(dict(zip(names, (up, down))), between, behind)
        name, module = activation
        instead = InEpilogue(module, up, (names[0], name))
        mlp = cls(dict(zip(names, (up, down))), between, behind, {name: instead})
        mlp._in_epilogue = (instead,)
        return mlp

    @property
    def is_apart(self) -> bool:
        if not self._in_epilogue or torch.compiler.is_compiling():
            return False
        instead = self._in_epilogue[0]
        instead.is_apart = instead.is_between(self._modules) or self._runs_other_code()
        return instead.is_apart

    def separate(self, on_meta: bool = False) -> dict[str, QuantizedLinear]:
        return dict(zip((self._first, self._second), self.layers))


class GatedMLP(TwoProducts):
    """`down(activation(gate(x)) * up(x))`, from three quantised layers: gate and up are one product, which reads and quantises x
    once and writes the product of the two alone, a fourth of what it reads and writes as three steps.

    Made by `from_layers`, or `from_halves` where gate and up are one layer. Inference only.

    Shapes: input [..., K], output [..., N]. Modules: gate_up, a layer of the same class with activation "silu_mul" or its like,
    qweight [2 I, K] by `interleave_gate_up`; the second layer, [N, I], by its name; and, not called, gate and up by their names and
    the activation. `state_dict` has the names of the separate layers.

    Example:
        >>> gate = fp.nn.Int8Linear.from_torch(torch.nn.Linear(64, 256), activation="silu")
        >>> up = fp.nn.Int8Linear.from_torch(torch.nn.Linear(64, 256))
        >>> down = fp.nn.Int8Linear.from_torch(torch.nn.Linear(256, 64))
        >>> fp.nn.GatedMLP.from_layers(gate, up, down)(torch.randn(4, 64)).shape
        torch.Size([4, 64])
    """

    def __init__(
        self,
        gate_up: QuantizedLinear,
        down: QuantizedLinear,
        members: tuple[str, ...] = ("gate_proj", "up_proj", "down_proj"),
        between: Mapping[str, nn.Module] = _NONE,
        behind: Mapping[str, nn.Module] = _NONE,
        activation: tuple[str, nn.Module] | None = None,
    ) -> None:
        self._indices = (0, 1) if len(members) == 3 else (None,)
        uncalled: dict[str, nn.Module] = {
            name: PartOfProduct(gate_up, i) for name, i in zip(members, self._indices)
        } | ({activation[0]: activation[1]} if activation else {})
        name = "gate_up" if "gate_up" not in members else "gate_up_interleaved"
        super().__init__({name: gate_up, members[-1]: down}, between, behind, uncalled)
        self.members = members  # three, or two where gate and up were one
        self._applied = activation[0] if activation else None
        self._uncalled = uncalled
        self._guard = code_guard(type(activation[1])) if activation else None

    @property
    def is_apart(self) -> bool:
        """Whether something is around one of its members, which are then called one by one."""
        if self._applied is None or torch.compiler.is_compiling():
            return False
        modules = self._modules
        for name, module in self._uncalled.items():
            if modules.get(name) is not module:
                return True
        return are_watched_by_others(*self._uncalled.values()) or self._runs_other_code()

    def _one_by_one(self, x: Tensor) -> Tensor:
        if self._written:
            return super()._one_by_one(x)
        parts = [self._modules[name](x) for name in self.members[:-1]]  # type: ignore[misc]
        gate, up = parts if len(parts) == 2 else parts[0].chunk(2, -1)
        return self._finished(self._modules[self._applied](gate) * up)  # type: ignore[index, misc]

    @classmethod
    def why_not(cls, gate: QuantizedLinear, up: QuantizedLinear) -> str | None:
        """None where `from_layers` takes these two, else the reason."""
        if reason := _why_no_gate(gate.activation):
            return reason
        if up.activation is not None:
            return f"up must have no activation, and computes {up.activation}"
        if gate.out_features != up.out_features or gate.out_features % 8:
            return f"gate and up must have the same multiple of 8 of outputs, not {gate.out_features} and {up.out_features}"
        return why_apart((gate, up), but_activation=True, but_buffers=_of_blocks(gate))

    @classmethod
    def why_no_halves(cls, gate_up: QuantizedLinear, activation: str) -> str | None:
        """None where `from_halves` takes this one, else the reason."""
        if reason := _why_no_gate(activation):
            return reason
        if gate_up.activation is not None or gate_up.out_features % 16:
            return "it has an activation, or halves that are no multiple of 8"
        blocks = _of_blocks(gate_up)
        if blocks and gate_up.out_features // 2 % BLOCK:
            return f"a block of {BLOCK} rows with one scale is of gate and up"
        return why_apart((gate_up,), but_buffers=blocks)

    @classmethod
    def from_layers(
        cls,
        gate: QuantizedLinear,
        up: QuantizedLinear,
        down: QuantizedLinear,
        *,
        names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj"),
        between: Mapping[str, nn.Module] = _NONE,
        behind: Mapping[str, nn.Module] = _NONE,
        activation: tuple[str, nn.Module] | None = None,
    ) -> GatedMLP:
        """Copies of gate and up as one layer, and down as it is.

        Args:
            gate: with its activation, as `Int8Linear.from_torch(linear, activation="silu")` makes it.
            up: of the same class and form; I % 8 == 0, weights with scales by row.
            down: any quantised layer of I inputs.
            names: of the three in a checkpoint.
            between, behind: modules that are called on the product of gate and up and on the result, by name: nn.Dropout.
            activation: the module of gate's activation, with its name, for code that asks for it.

        Raises:
            TypeError: one of them is no quantised layer.
            ValueError: they do not fit, and how.
        """
        _check_layers("GatedMLP", gate=gate, up=up, down=down)
        if reason := cls.why_not(gate, up):
            raise ValueError(f"GatedMLP.from_layers: {reason}")
        _check_fit("GatedMLP", "gate", gate.out_features, down)
        halves = {name: (t, up._buffers[name]) for name, t in _by_output(gate).items()}
        gate_up = _like(gate, 2 * gate.out_features, f"{gate.activation}_mul", _together(gate, halves))
        return cls(_settled(gate_up), down, names, between, behind, activation)

    @classmethod
    def from_halves(
        cls,
        gate_up: QuantizedLinear,
        down: QuantizedLinear,
        activation: str,
        *,
        names: tuple[str, str] = ("gate_up_proj", "down_proj"),
        between: Mapping[str, nn.Module] = _NONE,
        behind: Mapping[str, nn.Module] = _NONE,
        module: tuple[str, nn.Module] | None = None,
    ) -> GatedMLP:
        """The same of gate and up as one layer, the first half of whose outputs is the gate's: a copy of it, and down as it is.
        module: as `activation` of `from_layers`.

        Raises:
            TypeError: one of them is no quantised layer.
            ValueError: they do not fit, and how.
        """
        _check_layers("GatedMLP", gate_up=gate_up, down=down)
        if reason := cls.why_no_halves(gate_up, activation):
            raise ValueError(f"GatedMLP.from_halves: {reason}")
        _check_fit("GatedMLP", "gate_up", gate_up.out_features // 2, down)
        halves = {name: separate_gate_up(t, layout="halves") for name, t in _by_output(gate_up).items()}
        interleaved = _like(gate_up, gate_up.out_features, f"{activation}_mul", _together(gate_up, halves))
        return cls(_settled(interleaved), down, names, between, behind, module)

    def separate(self, on_meta: bool = False) -> dict[str, QuantizedLinear]:
        first, second = self.layers
        assert first.activation is not None
        activations = (first.activation.removesuffix("_mul"), None) if len(self._indices) == 2 else (None,)
        layers = [_part(first, i, activation, on_meta) for i, activation in zip(self._indices, activations)]
        return dict(zip(self.members, (*layers, second)))

    def state_dict(self, *args: Any, destination: Any = None, prefix: str = "", keep_vars: bool = False) -> Any:
        """That of the separate layers, of gate and up as copies, by the names that they have in the module that it stands for."""
        destination = OrderedDict() if destination is None else destination
        for name, layer in self.separate().items():
            layer.state_dict(destination=destination, prefix=f"{prefix}{name}.", keep_vars=keep_vars)
        # accelerate offloads what named_parameters() gives, and looks it up here
        destination[f"{prefix}{self._first}.anchor"] = self.layers[0].anchor.detach()
        return destination

    def check_state_dict(self, state_dict: Mapping[str, Any], prefix: str) -> None:
        first, second = self.layers  # gate and up have buffers of the same names and dtypes as the two together
        for name, layer in zip(self.members, (*(first for _ in self._indices), second)):
            layer.check_state_dict(state_dict, f"{prefix}{name}.")

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *others: Any) -> None:
        """Puts gate and up together again, before the layer reads them."""
        names = [f"{prefix}{name}." for name in self.members[:-1]]
        parts = [{key[len(name) :]: t for key, t in state_dict.items() if key.startswith(name)} for name in names]
        if any(parts):
            self.check_state_dict(state_dict, prefix)
            for key in [name + key for name, part in zip(names, parts) for key in part]:
                del state_dict[key]
            first = self.layers[0]
            whole = _of_parts(first, [first._as_now(part, "") for part in parts])
            state_dict.update({f"{prefix}{self._first}.{key}": t for key, t in whole.items()})
        super()._load_from_state_dict(state_dict, prefix, *others)


def _check_layers(cls: str, **layers: nn.Module) -> None:
    for name, layer in layers.items():
        if not isinstance(layer, QuantizedLinear):
            raise TypeError(f"{cls}: {name} must be a quantised layer, such as fp.nn.Int8Linear.from_torch makes, not a "
                            f"{type(layer).__name__}")  # fmt: skip


def _check_fit(cls: str, name: str, outputs: int, down: QuantizedLinear) -> None:
    if down.in_features != outputs:
        raise ValueError(f"{cls}.from_layers: {name} has {outputs} outputs, and down {down.in_features} inputs")


def _why_no_gate(activation: str | None) -> str | None:
    if activation is not None and f"{activation}_mul" in GATED:
        return None
    return f"a gate's activation is one of {', '.join(a for a in PLAIN if f'{a}_mul' in GATED)}, not {activation}"


def _by_output(layer: QuantizedLinear) -> dict[str, Tensor]:
    return {name: t for name in layer.output_buffers if (t := layer._buffers[name]) is not None}


def _of_blocks(layer: QuantizedLinear) -> tuple[str, ...]:
    """Its buffers that have an element for 128 outputs; of gate and up as one, two matrices of those."""
    return ("weight_scale",) if getattr(layer, "scales", None) == "block" else ()


def _together(layer: QuantizedLinear, halves: Mapping[str, tuple[Any, Any]]) -> dict[str, Tensor]:
    blocks = _of_blocks(layer)
    return {name: torch.stack(both) if name in blocks else interleave_gate_up(*both) for name, both in halves.items()}


def _like(layer: L, outputs: int, activation: str | None, by_output: Mapping[str, Tensor]) -> L:
    """A layer of the same form with these rows, and copies of what has none."""
    new = type(layer)(**layer.config() | {"out_features": outputs, "activation": activation}, device="meta")
    for name, t in layer._buffers.items():
        if t is not None:
            setattr(new, name, by_output[name].contiguous() if name in by_output else t.clone())
    new.sharding = layer.sharding
    return new.train(layer.training)


def _part(layer: L, index: int | None, activation: str | None, on_meta: bool = False) -> L:
    """A copy of the gate (0) or of the up (1) of a layer that is both, or of both as halves (None)."""
    outputs = layer.out_features // (1 if index is None else 2)
    device = "meta" if on_meta else None
    part = _like(
        layer, outputs, activation, {name: _values_of(layer, index, name, device) for name in _by_output(layer)}
    )
    part.adopt(layer)
    if on_meta:
        part.values = functools.partial(_values_of, layer, index)
    return part


def _values_of(layer: QuantizedLinear, index: int | None, name: str, device: str | None = None) -> Tensor:
    """A copy of one buffer of such a part, on the layer's device or on another."""
    t = layer._buffers[name]
    assert t is not None
    both = t.to(device or t.device)
    halves = both.unbind() if name in _of_blocks(layer) else separate_gate_up(both)
    return torch.cat(halves) if index is None else halves[index]


def _of_parts(layer: QuantizedLinear, parts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The opposite, of tensors by their names; those that one part has and the other has not are left out."""
    by_output, blocks = _by_output(layer), _of_blocks(layer)
    whole: dict[str, Tensor] = {}
    for name, t in parts[0].items():
        if name not in by_output:
            if any(name in part and not torch.equal(part[name], t) for part in parts):
                raise RuntimeError(f"load_state_dict: {name} differs between a gate and an up projection, which are one "
                                   "product here: load it into the original model (fp.restore(model) brings it back) and "
                                   "swap that")  # fmt: skip
            whole[name] = t
        elif all(name in part for part in parts):
            gate, up = (part[name] for part in parts) if len(parts) == 2 else t.chunk(2)
            whole[name] = torch.stack((gate, up)) if name in blocks else interleave_gate_up(gate, up)
    return whole


class PartOfProduct(nn.Module):
    """In the place of a layer that a `GatedMLP` computes together with another: for code that calls it, or reads its weight.

    A call, as a read of weight or bias, copies the layer out of the other.

    Args:
        product: gate and up as one.
        index: 0, the gate, without its activation; 1, up; None, both as halves.
    """

    def __init__(self, product: QuantizedLinear, index: int | None) -> None:
        super().__init__()
        self._product, self._index = (product,), index  # in a tuple, which holds no children
        self.in_features = product.in_features
        self.out_features = product.out_features // (1 if index is None else 2)

    def layer(self) -> QuantizedLinear:
        """A layer of its own."""
        return _part(self._product[0], self._index, None)

    @property
    def weight(self) -> Tensor:
        return self.layer().weight

    @property
    def bias(self) -> Tensor | None:
        """Computed where it is read, as the weight is: what would write into it is refused."""
        product = self._product[0]
        if product.bias is None:
            return None
        like = torch.empty(self.out_features, dtype=product.bias.dtype, device="meta")
        return DequantizedWeight(lambda: _part(product, self._index, None).bias, like, product.bias.device)  # type: ignore[arg-type, return-value]

    def forward(self, input: Tensor) -> Tensor:
        y: Tensor = self.layer()(input)
        return y

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, computed with others"


def _settled(layer: L) -> L:
    layer._apply(lambda t: t)  # rows of 16 bytes
    layer.settle()
    return layer


def quantised_layers(model: nn.Module) -> dict[str, QuantizedModule]:
    """The quantised layers of forwardpass.nn in a model, its quantised experts, and its MLPs that are one module, by name."""
    modules = {fqn: m for fqn, m in model.named_modules() if isinstance(m, QuantizedModule)}
    within = {id(layer) for m in modules.values() if isinstance(m, TwoProducts) for layer in m.children()}
    return {fqn: m for fqn, m in modules.items() if id(m) not in within}
