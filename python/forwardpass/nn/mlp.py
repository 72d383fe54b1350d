"""MLP and GatedMLP: an MLP as two products, the activation in the epilogue of the first, which may write 8 bits for the second."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..dispatch import gpu_takes, use_backend
from ..ops.common.activations import GATED, PLAIN, interleave_gate_up, separate_gate_up
from ..ops.fp8_gemm import BLOCK
from .joined import why_apart
from .layer import Quantized, QuantizedLinear, QuantizedModule

L = TypeVar("L", bound=QuantizedLinear)
_NONE: Mapping[str, nn.Module] = {}


class TwoProducts(QuantizedModule):
    """Base of the MLPs: a first layer with the activation in its epilogue, and a second one.

    On a GPU, where the second layer's scales do not depend on what a row holds (static and symmetric int8; static e4m3; on Hopper
    also e4m3 with block scales), the first writes its output in 8 bits as the second quantises it: a half or a fourth of the
    bytes, and a launch less. The second layer's channel_scale is in what the first one divides by. On a CPU each layer quantises
    its own input, a block of rows at a time in cache, and 8 bits between them gain nothing: two layers of 384 x 1536 and 1024 x
    4096, 1, 16 and 512 rows, one core of Zen 4: 0.96 to 1.06 times as fast with VNNI, with AVX2, whose weight would be packed
    anew, 0.78 to 0.95 of 512 rows.

    Args:
        layers: the two by their names.
        between, behind: modules that are called on what each gives, by name: nn.Dropout.
    """

    def __init__(
        self,
        layers: Mapping[str, QuantizedLinear],
        between: Mapping[str, nn.Module] = _NONE,
        behind: Mapping[str, nn.Module] = _NONE,
    ) -> None:
        super().__init__()
        self.activation, self.training = None, next(iter(layers.values())).training
        for name, module in (*layers.items(), *between.items(), *behind.items()):
            self.add_module(name, module)
        self._first, self._second = layers
        self._between, self._behind = tuple(between), tuple(behind)

    @property
    def layers(self) -> tuple[QuantizedLinear, QuantizedLinear]:
        """The one that has the activation, and the other."""
        return self._modules[self._first], self._modules[self._second]  # type: ignore[return-value]

    def separate(self) -> dict[str, QuantizedLinear]:
        """The layers as they were given, by the names that a checkpoint has for them."""
        raise NotImplementedError

    def _hands_over(self, x: Tensor | Quantized) -> bool:
        """Whether the first layer quantises for the second."""
        first, second = self.layers
        device = x.values.device if isinstance(x, Quantized) else x.device
        if not (gpu_takes(device) and first.quantizes_for(second, device)):
            return False
        return not any(self._modules[name].training for name in self._between)  # type: ignore[union-attr]

    def forward(self, x: Tensor | Quantized) -> Tensor:
        """x: of a `QuantizingNorm` before it, quantised."""
        modules, (first, second) = self._modules, self.layers
        h = first(x, second) if self._hands_over(x) else first(x)
        if not isinstance(h, Quantized):
            for name in self._between:
                h = modules[name](h)  # type: ignore[misc]
        y: Tensor = second(h)
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
    """

    @classmethod
    def from_layers(
        cls,
        up: QuantizedLinear,
        down: QuantizedLinear,
        *,
        names: tuple[str, str] = ("up", "down"),
        between: Mapping[str, nn.Module] = _NONE,
        behind: Mapping[str, nn.Module] = _NONE,
    ) -> MLP:
        """The two as they are.

        Args:
            up: with its activation, as `Int8Linear.from_torch(linear, activation="gelu")` makes it.
            down: any quantised layer of as many inputs as up has outputs.
            names: of the two as attributes.
            between, behind: modules that are called on the activated up and on the result, by name: nn.Dropout.

        Raises:
            ValueError: they do not fit, and how.
        """
        if up.activation not in PLAIN:
            raise ValueError(f"MLP.from_layers: up computes one of {', '.join(PLAIN)}, and not {up.activation}")
        _check_fit("MLP", "up", up.out_features, down)
        return cls(dict(zip(names, (up, down))), between, behind)

    def separate(self) -> dict[str, QuantizedLinear]:
        return dict(zip((self._first, self._second), self.layers))


class GatedMLP(TwoProducts):
    """`down(activation(gate(x)) * up(x))`, from three quantised layers: gate and up are one product, which reads and quantises x
    once and writes the product of the two alone, a fourth of what it reads and writes as three steps.

    Made by `from_layers`, or `from_halves` where gate and up are one layer. Inference only.

    Shapes: input [..., K], output [..., N]. Modules: gate_up, a layer of the same class with activation "silu_mul" or its like,
    weight [2 I, K] by `interleave_gate_up`; down, [N, I].
    """

    gate_up: QuantizedLinear
    down: QuantizedLinear

    def __init__(
        self,
        gate_up: QuantizedLinear,
        down: QuantizedLinear,
        members: tuple[str, ...] = ("gate_proj", "up_proj", "down_proj"),
        between: Mapping[str, nn.Module] = _NONE,
        behind: Mapping[str, nn.Module] = _NONE,
    ) -> None:
        super().__init__({"gate_up": gate_up, "down": down}, between, behind)
        #: names of the layers in the module that it stands for: three, or two where gate and up were one
        self.members = members

    @classmethod
    def why_not(cls, gate: QuantizedLinear, up: QuantizedLinear) -> str | None:
        """None where `from_layers` takes these two, else the reason."""
        if reason := _why_no_gate(gate.activation):
            return reason
        if up.activation is not None or gate.out_features != up.out_features:
            return "gate and up have other sizes, or up has an activation"
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
    ) -> GatedMLP:
        """Copies of gate and up as one layer, and down as it is.

        Args:
            gate: with its activation, as `Int8Linear.from_torch(linear, activation="silu")` makes it.
            up: of the same class and form; I % 8 == 0, weights with scales by row.
            down: any quantised layer of I inputs.
            names: of the three in a checkpoint.
            between, behind: modules that are called on the product of gate and up and on the result, by name: nn.Dropout.

        Raises:
            ValueError: they do not fit, and how.
        """
        if reason := cls.why_not(gate, up):
            raise ValueError(f"GatedMLP.from_layers: {reason}")
        _check_fit("GatedMLP", "gate", gate.out_features, down)
        halves = {name: (t, up._buffers[name]) for name, t in _by_output(gate).items()}
        gate_up = _like(gate, 2 * gate.out_features, f"{gate.activation}_mul", _together(gate, halves))
        return cls(_settled(gate_up), down, names, between, behind)

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
    ) -> GatedMLP:
        """The same of gate and up as one layer, the first half of whose outputs is the gate's: a copy of it, and down as it is.

        Raises:
            ValueError: they do not fit, and how.
        """
        if reason := cls.why_no_halves(gate_up, activation):
            raise ValueError(f"GatedMLP.from_halves: {reason}")
        _check_fit("GatedMLP", "gate_up", gate_up.out_features // 2, down)
        halves = {name: separate_gate_up(t, layout="halves") for name, t in _by_output(gate_up).items()}
        interleaved = _like(gate_up, gate_up.out_features, f"{activation}_mul", _together(gate_up, halves))
        return cls(_settled(interleaved), down, names, between, behind)

    def separate(self) -> dict[str, QuantizedLinear]:
        first, n = self.gate_up, self.gate_up.out_features
        assert first.activation is not None
        blocks = _of_blocks(first)
        halves = {name: t.unbind() if name in blocks else separate_gate_up(t) for name, t in _by_output(first).items()}
        if len(self.members) == 2:
            layers = [_like(first, n, None, {name: torch.cat(both) for name, both in halves.items()})]
        else:
            layers = [
                _like(first, n // 2, activation, {name: both[i] for name, both in halves.items()})
                for i, activation in enumerate((first.activation.removesuffix("_mul"), None))
            ]
        for layer in layers:
            layer.adopt(first)
        return dict(zip(self.members, (*layers, self.down)))


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


def _settled(layer: L) -> L:
    layer._apply(lambda t: t)  # rows of 16 bytes
    layer.settle()
    return layer
