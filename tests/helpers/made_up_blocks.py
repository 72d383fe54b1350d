"""Parts of a model as other people write them, each a class as a text: layers, activations, MLPs, q/k/v products, sequences."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

D, H = 64, 128  #: of every block's input, and of what is inside an MLP
ACTIVATIONS = (
    "nn.GELU()",
    'nn.GELU(approximate="tanh")',
    "nn.ReLU()",
    "nn.SiLU()",
    "nn.ReLU(inplace=True)",
    "nn.Tanh()",
)


# ---- the text of a block


@dataclass
class Block:
    """The class of one part of a model: its forward takes x and ends with `return y`."""

    kind: str
    inits: dict[str, str]  #: attribute: the expression that makes it
    body: list[str]
    layers: list[str]
    acts: list[str] = field(default_factory=list)
    extra: list[str] = field(default_factory=list)  #: methods besides
    signature: str = "self, x"
    decorator: str = ""
    bases: str = "nn.Module"

    def text(self, name: str) -> str:
        lines = [f"class {name}({self.bases}):", "    def __init__(self):", "        super().__init__()"]
        lines += [f"        self.{name} = {made}" for name, made in self.inits.items()]
        if self.decorator:
            lines += [f"    {self.decorator}"]
        lines += [f"    def forward({self.signature}):"]
        lines += [f"        {line}" for statement in self.body for line in statement.split("\n")]
        lines += ["        return y"]
        lines += [f"    {line}" for method in self.extra for line in method.split("\n")]
        return "\n".join(lines)


def _linear(rng: random.Random, k: int, n: int) -> str:
    return f"nn.Linear({k}, {n}, bias={rng.random() < 0.7})"


def activation_block(rng: random.Random) -> Block:
    act, wide = rng.choice(ACTIVATIONS), rng.random() < 0.5
    body = rng.choice([
        ["y = self.act(self.fc(x))"],
        ["y = self.fc(x)", "y = self.act(y)"],
        ["h = self.fc(x)", "h = self.act(h)", "y = h"],
        ["h = self.act(self.fc(x))", "h = self.drop(h)", "y = h"],
    ])  # fmt: skip
    inits = {"fc": _linear(rng, D, H if wide else D), "act": act, "drop": "nn.Dropout(0.1)"}
    layers = ["fc"]
    if wide:
        inits["proj"], layers = _linear(rng, H, D), ["fc", "proj"]
        body = [*body, "y = y + 0.5", "y = self.proj(y)"]
    return Block("activation", inits, body, layers, ["act"])


def mlp_block(rng: random.Random) -> Block:
    inits = {"up": _linear(rng, D, H), "act": rng.choice(ACTIVATIONS), "down": _linear(rng, H, D)}
    if rng.random() < 0.3:
        inits["drop"] = "nn.Dropout(0.1)"
        body = [["h = self.act(self.up(x))", "h = self.drop(h)", "y = self.down(h)"],
                ["y = self.drop(self.down(self.act(self.up(x))))"]][rng.random() < 0.5]  # fmt: skip
    else:
        body = rng.choice([
            ["y = self.down(self.act(self.up(x)))"],
            ["h = self.up(x)", "h = self.act(h)", "h = self.down(h)", "y = h"],
            ["h = self.act(self.up(x))", "y = self.down(h)"],
            ["x = self.up(x)", "x = self.act(x)", "y = self.down(x)"],
        ])  # fmt: skip
    return Block("mlp", inits, body, ["up", "down"], ["act"])


def gated_block(rng: random.Random) -> Block:
    act = rng.choice(ACTIVATIONS[:4])
    if rng.random() < 0.25:
        inits = {"both": _linear(rng, D, 2 * H), "act": act, "down": _linear(rng, H, D)}
        body = ["g, u = self.both(x).chunk(2, dim=-1)", "h = self.act(g) * u", "y = self.down(h)"]
        return Block("gated", inits, body, ["both", "down"], ["act"])
    linear = _linear(rng, D, H)
    inits = {"gate": linear, "up": linear, "act": act, "down": _linear(rng, H, D)}
    body = rng.choice([
        ["y = self.down(self.act(self.gate(x)) * self.up(x))"],
        ["g = self.gate(x)", "u = self.up(x)", "h = self.act(g) * u", "y = self.down(h)"],
        ["g = self.act(self.gate(x))", "u = self.up(x)", "h = u * g", "h = self.down(h)", "y = h"],
        ["u = self.up(x)", "g = self.act(self.gate(x))", "y = self.down(g * u)"],
    ])  # fmt: skip
    return Block("gated", inits, body, ["gate", "up", "down"], ["act"])


def qkv_block(rng: random.Random) -> Block:
    n = rng.choice((D, D // 2, 2 * D))
    bias = rng.random() < 0.6
    inits = {name: f"nn.Linear({D}, {n}, bias={bias})" for name in "qkv"}
    layers = list("qkv")
    body = rng.choice([
        ["q = self.q(x)", "k = self.k(x)", "v = self.v(x)"],
        ["q, k, v = self.q(x), self.k(x), self.v(x)"],
        ["k = self.k(x)", "q = self.q(x)", "v = self.v(x)"],
        ["q = self.q(x).relu()", "k = self.k(x) * 0.5", "v = self.v(x)"],
    ])  # fmt: skip
    body = [*body, f"w = (q @ k.transpose(-2, -1) / {n**0.5}).softmax(-1)" if rng.random() < 0.8 else "w = None"]
    body += ["y = w @ v if w is not None else q * k + v"]
    if n != D or rng.random() < 0.5:
        inits["o"], layers = _linear(rng, n, D), [*"qkvo"]
        body += ["y = self.o(y)"]
    return Block("q/k/v", inits, body, layers)


def sequential_block(rng: random.Random) -> Block:
    act = rng.choice(ACTIVATIONS)
    inits = {"net": f"nn.Sequential({_linear(rng, D, H)}, {act}, {_linear(rng, H, D)})"}
    body = [["y = self.net(x)"], ["for part in self.net:", "    x = part(x)", "y = x"],
            ["y = self.net[2](self.net[1](self.net[0](x)))"]]  # fmt: skip
    chosen = rng.choice(body)
    return Block("Sequential", inits, ["\n".join(chosen)], ["net[0]", "net[2]"], ["net[1]"])


def list_block(rng: random.Random) -> Block:
    inits = {"all": f"nn.ModuleList([{_linear(rng, D, D)}, {_linear(rng, D, D)}])", "act": rng.choice(ACTIVATIONS)}
    body = rng.choice([
        ["for layer in self.all:\n    x = self.act(layer(x))", "y = x"],
        ["y = sum(layer(x) for layer in self.all)", "y = self.act(y)"],
        ["y = self.all[1](self.act(self.all[0](x)))"],
    ])  # fmt: skip
    return Block("list", inits, body, ["all[0]", "all[1]"], ["act"])


def conv1d_block(rng: random.Random) -> Block:
    inits = {"up": f"Conv1D({H}, {D})", "act": rng.choice(ACTIVATIONS), "down": f"Conv1D({D}, {H})"}
    body = rng.choice(
        [["y = self.down(self.act(self.up(x)))"], ["h = self.up(x)", "h = self.act(h)", "y = self.down(h)"]]
    )
    return Block("Conv1D", inits, body, ["up", "down"], ["act"])


def attention_block(rng: random.Random) -> Block:
    inits = {"mha": f"nn.MultiheadAttention({D}, 4, batch_first=True)", "o": _linear(rng, D, D)}
    return Block("attention", inits, ["y = self.mha(x, x, x, need_weights=False)[0]", "y = self.o(y)"], ["o"])


BLOCKS = (activation_block, mlp_block, mlp_block, gated_block, gated_block, qkv_block, qkv_block, sequential_block, list_block,
          conv1d_block, attention_block)  # fmt: skip
