"""GatedMLP: an MLP with a gate as two products, the gated activation in the epilogue of the first."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..dispatch import use_backend
from ..ops.common.activations import GATED, PLAIN, interleave_gate_up, separate_gate_up
from .joined import why_apart
from .layer import QuantizedLinear, QuantizedModule


class GatedMLP(QuantizedModule):
    """`down(activation(gate(x)) * up(x))`, from three quantised layers: gate and up are one product, which reads and quantises x
    once and writes the product of the two alone, a fourth of what it reads and writes as three steps.

    Made by `from_layers`. Inference only.

    Shapes: input [..., K], output [..., N]. Modules: gate_up, a layer of the same class with activation "silu_mul" or its like,
    weight [2 I, K] by `interleave_gate_up`; down, [N, I].
    """

    gate_up: QuantizedLinear
    down: QuantizedLinear

    def __init__(self, gate_up: QuantizedLinear, down: QuantizedLinear) -> None:
        super().__init__()
        self.gate_up, self.down, self.activation = gate_up, down, None
        #: names of the three layers in the module that it stands for
        self.members = ("gate_proj", "up_proj", "down_proj")

    @classmethod
    def why_not(cls, gate: QuantizedLinear, up: QuantizedLinear) -> str | None:
        """None where `from_layers` takes these two, else the reason."""
        if gate.activation is None or f"{gate.activation}_mul" not in GATED:
            return f"a gate's activation is one of {', '.join(a for a in PLAIN if f'{a}_mul' in GATED)}, not {gate.activation}"
        if up.activation is not None or gate.out_features != up.out_features:
            return "gate and up have other sizes, or up has an activation"
        return why_apart((gate, up), but_activation=True)

    @classmethod
    def from_layers(cls, gate: QuantizedLinear, up: QuantizedLinear, down: QuantizedLinear) -> GatedMLP:
        """Copies of gate and up as one layer, and down as it is.

        Args:
            gate: with its activation, as `Int8Linear.from_torch(linear, activation="silu")` makes it.
            up: of the same class and form; I % 8 == 0, weights with scales by row.
            down: any quantised layer of I inputs.

        Raises:
            ValueError: they do not fit, and how.
        """
        if reason := cls.why_not(gate, up):
            raise ValueError(f"GatedMLP.from_layers: {reason}")
        if down.in_features != gate.out_features:
            raise ValueError(
                f"GatedMLP.from_layers: gate has {gate.out_features} outputs, and down {down.in_features} inputs"
            )
        config = gate.config() | {"out_features": 2 * gate.out_features, "activation": f"{gate.activation}_mul"}
        gate_up = type(gate)(**config, device="meta")
        for name, t in gate._buffers.items():
            if t is not None:
                beside = up._buffers[name]
                assert beside is not None
                both = interleave_gate_up(t, beside) if name in gate.output_buffers else t.clone()
                setattr(gate_up, name, both)
        gate_up._apply(lambda t: t)  # rows of 16 bytes
        gate_up.settle()
        return cls(gate_up.train(gate.training), down).train(gate.training)

    def separate(self) -> dict[str, QuantizedLinear]:
        """The three layers by the names in `members`, gate and up as copies: what a checkpoint holds."""
        first, activation = self.gate_up, self.gate_up.activation
        assert activation is not None
        config = first.config() | {"out_features": first.out_features // 2}
        gate = type(first)(**config | {"activation": activation.removesuffix("_mul")}, device="meta")
        up = type(first)(**config | {"activation": None}, device="meta")
        for name, t in first._buffers.items():
            if t is not None:
                halves = separate_gate_up(t) if name in first.output_buffers else (t, t.clone())
                for layer, half in zip((gate, up), halves):
                    setattr(layer, name, half.contiguous())
        for layer in (gate, up):
            layer.adopt(first)
        return dict(zip(self.members, (gate, up, self.down)))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down(self.gate_up(x))
        return y

    def exact(self, *args: Tensor) -> Tensor:
        """By the reference of each operation, in float64; what is between the two products is rounded as in forward."""
        with use_backend("reference"):
            y: Tensor = self.down.exact(self.gate_up.product(*args))
        return y

    def config(self) -> dict[str, Any]:
        return {"gate_up": self.gate_up.config(), "down": self.down.config()}
