"""Modules as other people write them, made up from a seed: layers, activations, norms, MLPs, q/k/v products, and one thing or two
that code does to a layer besides calling it. Each is a text, so that a failure is a file to run. `judging` runs them.
"""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from made_up_blocks import BLOCKS, Block, D

# ---- what other people's code does to a layer


@dataclass
class Case:
    """A made-up model: the text of its classes, of what happens to it before and after the swap, and how it is called."""

    seed: int
    block: Block
    did: list[str] = field(default_factory=list)  #: what was done, by kind: the words of the report
    prepare: list[str] = field(default_factory=list)  #: statements about `model` and `m`, its block
    after: list[str] = field(default_factory=list)  #: the same once it is swapped
    undo: list[str] | None = field(default_factory=list)  #: of `after`; None: it cannot be undone
    outer: list[str] = field(default_factory=list)
    around: str = "x = x + self.b(self.norm(x))"
    options: dict[str, Any] = field(default_factory=dict)

    def text(self) -> str:
        outer = ["class Model(nn.Module):", "    def __init__(self):", "        super().__init__()",
                 f"        self.norm, self.b, self.head = nn.LayerNorm({D}), B(), nn.Linear({D}, {D})",
                 "    def forward(self, x):", f"        {self.around}"]  # fmt: skip
        outer += [f"        {line}" for line in self.outer] + ["        return self.head(x)"]
        parts = [self.block.text("B"), "\n".join(outer)]
        for name, lines in (("prepare", self.prepare), ("after", self.after), ("undo", self.undo or [])):
            parts.append("\n".join([f"def {name}(model, m):", *(f"    {x}" for x in lines), "    pass"]))
        return (
            f"# seed {self.seed}: {self.block.kind}, {', '.join(self.did) or 'plain'}; {self.options}\n"
            + "\n\n".join(parts)
        )

    @property
    def kind(self) -> str:
        return self.did[0] if self.did else "plain"


def _layer(rng: random.Random, block: Block) -> str:
    return rng.choice(block.layers)


def _replace_call(block: Block, target: str, to: str) -> bool:
    """In the block's body, `self.<target>(v)` by `to`, of {f} and {v}; False where there is no such call."""
    pattern = re.compile(rf"self\.{re.escape(target)}\((\w+)\)")
    for i, statement in enumerate(block.body):
        if pattern.search(statement):
            block.body[i] = pattern.sub(lambda m: to.format(f=f"self.{target}", v=m.group(1)), statement)
            return True
    return False


READS = {
    "weight": "self.{L}.weight", "getattr": 'getattr(self.{L}, "weight")', "data": "self.{L}.weight.data",
    "detach": "self.{L}.weight.detach()", "state_dict": 'self.{L}.state_dict()["weight"]',
    "named_parameters": 'dict(self.{L}.named_parameters())["weight"]', "parameters": "next(self.{L}.parameters())",
    "_parameters": 'self.{L}._parameters["weight"]', "helper method": "self.weight_of(self.{L})",
    "helper function": "weight_of(self.{L})", "lambda": "(lambda f: f.weight)(self.{L})",
    "attrgetter": 'operator.attrgetter("weight")(self.{L})', "walrus": "(layer := self.{L}).weight",
    "list": "[w.weight for w in (self.{L},)][0]", "named_modules": "self.found(self.{L}).weight",
    "clone": "self.{L}.weight.clone()", "half": "self.{L}.weight.half()", "view": "self.{L}.weight.view(-1)",
    "transposed": "self.{L}.weight.t()", "rows": "self.{L}.weight[:8]", "chunk": "self.{L}.weight.chunk(2)[1]",
    "index": "self.{L}.weight[torch.tensor([1, 3, 5])]", "unbind": "self.{L}.weight.unbind()[2]",
    "LoRA": "(self.{L}.weight + torch.ones_like(self.{L}.weight) * 0.01)", "Parameter": "nn.Parameter(self.{L}.weight)",
}  # fmt: skip
USES = ("{W}.float().norm()", "{W}.float().abs().mean()", "{W}.float().flatten()[:7].sum()", "{W}.float().std()", "{W}.max()",
        "({W} * {W}).float().mean()", "torch.linalg.vector_norm({W}.float())", "torch.stack([{W}.float().sum()])[0]")  # fmt: skip


def read(rng: random.Random, case: Case) -> str | None:
    block = case.block
    name, form = rng.choice([*READS.items()])
    layer = _layer(rng, block)
    weight = form.format(L=layer)
    if "weight_of(self" in form:
        block.extra.append("def weight_of(self, f):\n    return f.weight")
    if "found" in form:
        block.extra.append("def found(self, f):\n    return [m for m in self.modules() if m is f][0]")
    if rng.random() < 0.35 and name not in ("rows", "chunk", "index", "unbind", "view", "half", "transposed"):
        t = "" if block.kind != "Conv1D" else ".t()"
        if _replace_call(block, layer, "F.linear({v}, " + weight + t + ", {f}.bias)"):
            return f"read: {name}, F.linear"
    if rng.random() < 0.3 and "self.{L}" in form and "(self.{L})" not in form:  # by what holds the block
        case.outer.append(f"x = x + 0.1 * {rng.choice(USES).format(W=weight.replace('self.', 'self.b.'))}.to(x.dtype)")
        return f"read: {name}, by the model"
    block.body.append(f"y = y + 0.1 * {rng.choice(USES).format(W=weight)}.to(y.dtype)")
    return f"read: {name}"


def read_bias(rng: random.Random, case: Case) -> str | None:
    layer = _layer(rng, case.block)
    case.block.body.append(f"y = y if self.{layer}.bias is None else y + self.{layer}.bias.sum()")
    return "read: bias"


def asked(rng: random.Random, case: Case) -> str | None:
    layer = _layer(rng, case.block)
    text = rng.choice([
        "y = y.to(self.{L}.weight.dtype)", "y = y + self.{L}.weight.shape[0] / 1000", "y = y.to(self.{L}.weight.device)",
        "y = y + torch.zeros_like(self.{L}.weight).sum()", "y = y.to(next(self.parameters()).dtype)",
        "y = y + self.{L}.weight.new_ones(1)", "y = y + self.{L}.weight.numel() / 1e5",
        "y = y + len(list(self.{L}.children()))",
        "y = y * (1 + isinstance(self.{L}, nn.Module))", "y = y + self.{L}.weight.is_floating_point()",
    ])  # fmt: skip
    case.block.body.append(text.format(L=layer))
    return "read: what it is"


IN_PLACE = {
    "mul_": "{v}.mul_(1.5)", "augmented": "{v} += 1", "setitem": "{v}[..., 0] = 0", "out": "torch.add({v}, 1, out={v})",
    "inplace=True": "F.relu({v}, inplace=True)", "view": "{v}.view(-1).mul_(2)", "of a view": "F.relu({v}.view(-1), inplace=True)",
    "data": "{v}.data.mul_(0.5)", "transposed": "{v}.transpose(0, -1).add_(1)",
    "foreach": "torch._foreach_mul_([{v}], 2.0)",
    "helper method": "self.change([{v}])", "helper function": "change([{v}])", "another name": "other = {v}; other.mul_(2)",
    "module": "self.in_place({v})", "copy_": "{v}.copy_({v} * 2)", "numpy": "change_numpy({v})",
    "lambda": "(lambda t: t.neg_())({v})",
    "getattr": 'getattr({v}, "mul_")(2)', "iadd": "operator.iadd({v}, 1)", "list": "[t.add_(1) for t in ({v},)]",
    "set": "{v}[0].zero_()", "fill": "{v}[..., ::2].fill_(0.1)", "resize": "torch.nn.init.ones_({v})",
    "relu_": "torch.relu_({v})", "dropout": "F.dropout({v}, 0.0, inplace=True)",
    "index_fill": "{v}.index_fill_(0, torch.tensor([0]), 0.5)",
}  # fmt: skip


def _variables(block: Block, i: int) -> list[str]:
    """What holds a tensor before the i-th statement."""
    names = ["x"]
    for statement in block.body[:i]:
        if match := re.match(r"(\w+(?:, \w+)*) = ", statement):
            names += match.group(1).split(", ")
    return names


def in_place(rng: random.Random, case: Case) -> str | None:
    block = case.block
    i = rng.randrange(len(block.body) + 1)
    v = rng.choice(_variables(block, i))
    if v == "w":
        return None
    name, form = rng.choice([*IN_PLACE.items()])
    if v == "x" and rng.random() < 0.5:
        block.body.insert(0, "x = x.clone()")
        i += 1
    if form.startswith("self.change"):
        block.extra.append("def change(self, tensors):\n    for t in tensors:\n        t *= 2")
    if form.startswith("self.in_place"):
        block.inits["in_place"] = "nn.ReLU(inplace=True)"
    block.body.insert(i, form.format(v=v))
    return f"in place: {name}"


ALIASES = {
    "a view": ("flat = x.view(-1)", "F.relu(flat, inplace=True)"),
    "a list": ("keep = [x]", "change(keep)"),
    "an attribute": ("self.kept = x", "self.change_kept()"),
    "a part": ("part = x[..., :32]", "F.leaky_relu(part, inplace=True)"),
    "a chunk": ("part = x.chunk(2, 0)[0]", "change((part,))"),
    "a dict": ("keep = dict(t=x)", "F.hardtanh(keep['t'], -0.1, 0.1, True)"),
    "another name": ("again = x", "F.silu(again, inplace=True)"),
    "a module": ("view = x.unsqueeze(0)", "self.in_place(view)"),
    "a transposed": ("turned = x.transpose(0, 1)", "_ = self.in_place(turned)"),
    "numpy": ("detached = x.detach()", "change_numpy(detached)"),
    "a closure": ("later = lambda: F.relu(x, inplace=True)", "later()"),
    "nothing": ("flat = x.view(-1)", "seen = F.relu(flat)"),
    "a function": ("again = x", "_ = F.threshold(again, 0.1, 0.5, True)"),
    "a generator": ("keep = (t for t in [x])", "change(list(keep))"),
}


def in_place_elsewhere(rng: random.Random, case: Case) -> str | None:
    """By another name for the input, bound before the layers are called."""
    block = case.block
    if block.kind not in ("q/k/v", "gated") and rng.random() < 0.8:
        return None
    name, (bind, change) = rng.choice([*ALIASES.items()])
    if "change_kept" in change:
        block.extra.append("def change_kept(self):\n    F.relu(self.kept, inplace=True)")
    if "in_place" in change:
        block.inits["in_place"] = "nn.ReLU(inplace=True)"
    i = rng.choice((1, 1, 2, len(block.body)))  # between two calls with one input, where there are two
    block.body.insert(min(i, len(block.body)), change)
    block.body.insert(0, f"x = x.contiguous().clone()\n{bind}" if rng.random() < 0.7 else f"x = x.contiguous()\n{bind}")
    return f"in place: by {name}"


def buffer_changed(rng: random.Random, case: Case) -> str | None:
    block = case.block
    block.extra.append("calls = 0")
    i = rng.randrange(len(block.body) + 1)
    block.body.insert(i, "self.calls = self.calls + 1")
    block.body.append("y = y * (1 + self.calls / 10)")
    return "in place: a counter"


def registered_buffer_changed(rng: random.Random, case: Case) -> str | None:
    block = case.block
    block.inits["seen"] = "nn.Buffer(torch.zeros(1))"
    block.body.insert(rng.randrange(len(block.body) + 1), "self.seen += 1")
    block.body.append("y = y * (1 + self.seen / 10).to(y.dtype)")
    return "in place: a buffer"


VIEWS = ("{f}({v}.transpose(0, 1)).transpose(0, 1)", "{f}({v}.view(-1, {v}.shape[-1])).view(*{v}.shape[:-1], -1)",
         "{f}({v}.flip(0)).flip(0)", "torch.cat([{f}(part) for part in {v}.split(1)])", "{f}({v}[:])", "{f}({v}.contiguous())",
         "{f}({v}.view_as({v}))", "torch.stack([{f}(part) for part in {v}.unbind()])", "{f}({v}.mT.mT)",
         "{f}({v}.unsqueeze(0).expand(2, *{v}.shape))[1]", "{f}({v}.float()).to({v}.dtype)", "{f}({v}.clone())", "{f}({v} + 0)",
         "{f}({v}.detach())", "{f}({v}.as_strided({v}.shape, {v}.stride()))", "{f}({v}).contiguous()", "{f}({v}).clone()",
         "{f}({v}.to(torch.float64).to({v}.dtype))", "{f}({v}[..., :])", "({f}(2 * {v}) / 2)")  # fmt: skip
FLOW = ("(({f}({v}) + {f}({v})) / 2)", "{f}(input={v})", "{f}.forward({v})", "{f}.__call__({v})", "nn.Linear.forward({f}, {v})",
        "type({f}).forward({f}, {v})", "torch.utils.checkpoint.checkpoint({f}, {v}, use_reentrant=False)",
        "functools.partial({f})({v})", "[g({v}) for g in [{f}]][0]", "(lambda t: {f}(t))({v})", "call({f}, {v})",
        "self.run({f}, {v})", "copy.deepcopy({f})({v})", "next(iter([{f}]))({v})", "torch.vmap({f})({v})",
        "torch.func.functional_call({f}, {{}}, ({v},))", "({f} if True else None)({v})", "({f}({v}), {f}({v} * 2))[0]",
        "(callee := {f})({v})", "{f}(*[{v}])", "{f}(*({v},))", "list(map({f}, [{v}]))[0]", "self._call_impl_of({f}, {v})",
        "functools.reduce(lambda t, g: g(t), [{f}], {v})", "{f}({f}.weight.new_zeros({v}.shape) + {v})")  # fmt: skip
ACT_FLOW = ("{f}({v}) + {v}", "{f}({f}({v}))", "{f}.forward({v})", "{f}({v}.clone())", "({f}({v}) + {f}(-{v}))", "{f}(input={v})",
            "{f}({v} * 2)", "{v} * torch.sigmoid({f}({v}))", "({f} if {v}.shape[0] else None)({v})", "call({f}, {v})",
            "self.run({f}, {v})", "{f}({v}) if {v}.sum() > -1e9 else {v}", "{v} if {v}.sum() > -1e9 else {f}({v})")  # fmt: skip


def _helpers(block: Block, text: str) -> None:
    if "self.run(" in text:
        block.extra.append("def run(self, f, t):\n    return f(t)")
    if "_call_impl_of" in text:
        block.extra.append("def _call_impl_of(self, f, t):\n    return f._call_impl(t)")


def views(rng: random.Random, case: Case) -> str | None:
    form = rng.choice(VIEWS)
    if not _replace_call(case.block, _layer(rng, case.block), form):
        return None
    return "view: of an input or output"


def flow(rng: random.Random, case: Case) -> str | None:
    block = case.block
    is_act = block.acts and rng.random() < 0.4
    form, target = rng.choice(ACT_FLOW if is_act else FLOW), rng.choice(block.acts) if is_act else _layer(rng, block)
    if "nn.Linear.forward" in form and block.kind == "Conv1D":
        return None
    if not _replace_call(block, target, form):
        return None
    _helpers(block, form)
    return f"flow: {'an activation' if is_act else 'a layer'} called in another way"


OUTPUTS = ("{v} = {v} * 1.5", "kept = {v}\ny0 = kept", "self.last = {v}", "{v}.as_strided({v}.shape, {v}.stride())",
           "assert {v}.shape[-1] > 0", "flat = {v}.view(*{v}.shape[:-1], -1)", "flat = {v}.reshape(-1).sum()",
           "{v} = {v}.as_strided({v}.shape, torch.empty({v}.shape).stride()) if {v}.is_contiguous() else {v}",
           "{v} = torch.as_strided({v}, {v}.shape, torch.empty({v}.shape).stride(), {v}.storage_offset())")  # fmt: skip


def outputs(rng: random.Random, case: Case) -> str | None:
    block = case.block
    i = rng.randrange(1, len(block.body) + 1)
    names = [v for v in _variables(block, i) if v not in ("w", "y0")]
    v = rng.choice(names)
    text = rng.choice(OUTPUTS).format(v=v)
    block.body.insert(i, text)
    if "kept" in text:
        block.body.append("y = y + kept.float().mean().to(y.dtype)")
    if "self.last" in text:
        case.outer.append("x = x + self.b.last.float().mean().to(x.dtype)")
    if "flat" in text:
        block.body.append("y = y + flat.float().mean().to(y.dtype)")
    return "view: a result is kept, or looked at"


WRAPS = ("if {v}.sum() > -1e9:\n    {s}\nelse:\n    {s}", "try:\n    {s}\nfinally:\n    pass", "for _ in range(2):\n    {s}",
         "with torch.no_grad():\n    {s}", "if self.training or True:\n    {s}", "for _ in range(1):\n    {s}",
         "try:\n    raise ValueError\nexcept ValueError:\n    {s}", "{s}\n{s}", "if {v}.shape[0] >= 0: {s}",
         "with torch.autocast(\"cpu\", enabled=False):\n    {s}", "while True:\n    {s}\n    break")  # fmt: skip


def wraps(rng: random.Random, case: Case) -> str | None:
    block = case.block
    i = rng.randrange(len(block.body))
    s = block.body[i]
    if "\n" in s:
        return None
    block.body[i] = rng.choice(WRAPS).format(s=s, v="x")
    return "flow: branches and loops"


def signatures(rng: random.Random, case: Case) -> str | None:
    block = case.block
    block.signature = rng.choice(
        ["self, x, /", "self, x, *args", "self, x, scale=1.0", "self, *args", "self, x, **kwargs", "this, x"]
    )
    if block.signature == "self, *args":
        block.body.insert(0, "x, = args")
    if block.signature == "self, x, scale=1.0":
        block.body.append("y = y * scale")
        case.around = case.around.replace("self.b(self.norm(x))", "self.b(self.norm(x), scale=2.0)")
    if block.signature.startswith("this"):
        block.body = [re.sub(r"\bself\b", "this", s) for s in block.body]
    return "flow: signature"


def decorated(rng: random.Random, case: Case) -> str | None:
    case.block.decorator = rng.choice(["@doubling", "@doubling_input", "@torch.no_grad()", "@as_it_is", "@twice"])
    return "patch: a decorator"


def after_super(rng: random.Random, case: Case) -> str | None:
    block = case.block
    how = rng.choice(
        ["y = super().__call__(x) * 2\nreturn y", "return super().__call__(x * 2)", "return super().__call__(x)"]
    )
    block.extra.append("def __call__(self, x):\n    " + how.replace("\n", "\n    "))
    return "patch: __call__"


def got_elsewhere(rng: random.Random, case: Case) -> str | None:
    """__getattr__ and properties that give something else."""
    block = case.block
    names = [x for x in (*block.layers, *block.acts) if "[" not in x]
    if not names:
        return None
    target = rng.choice(names)
    block.extra.append("def __getattr__(self, name):\n    got = super().__getattr__(name)\n"
                       f"    return (lambda t: 2 * got(t)) if name == {target!r} else got")  # fmt: skip
    return "patch: __getattr__"


def subclassed(rng: random.Random, case: Case) -> str | None:
    block = case.block
    for name, made in block.inits.items():
        if rng.random() < 0.5 and "nn.Linear(" in made and "[" not in made and "Sequential" not in made:
            block.inits[name] = made.replace("nn.Linear(", "TwiceLinear(")
            return "patch: a subclass of Linear"
        if rng.random() < 0.5 and "nn.GELU(" in made:
            block.inits[name] = made.replace("nn.GELU(", "TwiceGELU(")
            return "patch: a subclass of GELU"
    return None


def _members(block: Block) -> list[str]:
    return [f"m.{x}" for x in (*block.layers, *block.acts)]


PATCHES = {
    "instance": "patch_instance({M}, lambda self, forward, x: 2 * forward(x))",
    "instance, tanh": "patch_instance({M}, lambda self, forward, x: forward(x).tanh())",
    "class": "patch(B, 'forward', doubling(B.forward))",
    "class, input": "patch(B, 'forward', doubling_input(B.forward))",
    "block": "patch_instance(m, lambda self, forward, x: forward(x * 2))",
    "block, alike": "patch_instance(m, lambda self, forward, x: forward(x))",
    "class of activation": "patch(nn.GELU, 'forward', lambda self, x: x.tanh())",
    "class of activation, silu": "patch(nn.SiLU, 'forward', lambda self, x: 3 * F.relu(x))",
    "class of Linear": "patch(nn.Linear, 'forward', doubling(nn.Linear.forward))",
    "class by setattr": "patch(B, 'forward', elsewhere(B.forward))",
    "__call__": "patch(B, '__call__', doubling(B.__call__))",
}  # fmt: skip
HOOKS = {
    "forward": "hook({M}.register_forward_hook(lambda f, a, y: y * 1.5))",
    "forward, silent": "hook({M}.register_forward_hook(lambda f, a, y: None))",
    "pre": "hook({M}.register_forward_pre_hook(lambda f, a: (a[0] * 1.5,)))",
    "pre, in place": "hook({M}.register_forward_pre_hook(lambda f, a: (a[0].mul_(1.5), None)[1]))",
    "kwargs": "hook({M}.register_forward_hook(lambda f, a, k, y: y + a[0].mean(), with_kwargs=True))",
    "pre, kwargs": "hook({M}.register_forward_pre_hook(lambda f, a, k: ((a[0] + 1,), k), with_kwargs=True))",
    "backward": "hook({M}.register_full_backward_hook(lambda f, a, y: None))",
    "keeps": "hook({M}.register_forward_hook(lambda f, a, y: setattr(model, 'kept', y.mean()) or y + a[0].mean()))",
}  # fmt: skip


def patched_before(rng: random.Random, case: Case) -> str | None:
    name, form = rng.choice([*PATCHES.items()])
    case.prepare.append(form.format(M=rng.choice(_members(case.block))))
    return f"patch before: {name}"


def hooked_before(rng: random.Random, case: Case) -> str | None:
    name, form = rng.choice([*HOOKS.items()])
    case.prepare.append(form.format(M=rng.choice([*_members(case.block), "m", "model", "model.norm"])))
    return f"hook before: {name}"


def patched_after(rng: random.Random, case: Case) -> str | None:
    name, form = rng.choice([*PATCHES.items()])
    case.after.append(form.format(M=rng.choice(_members(case.block))))
    return f"patch after: {name}"


def hooked_after(rng: random.Random, case: Case) -> str | None:
    name, form = rng.choice([*HOOKS.items()])
    case.after.append(form.format(M=rng.choice([*_members(case.block), "m", "model", "model.norm"])))
    return f"hook after: {name}"


def changed_after(rng: random.Random, case: Case) -> str | None:
    block = case.block
    layer = _layer(rng, block)
    forms = {
        "a bias": f"_ = m.{layer}.bias is None or m.{layer}.bias.data.add_(0.5)",
        "a bias, in place": f"_ = m.{layer}.bias is None or m.{layer}.bias.add_(0.5)",
        "a bias, by index": f"_ = m.{layer}.bias is None or m.{layer}.bias.data[:4].fill_(0.5)",
        "a weight": f"m.{layer}.weight.data.mul_(2)",
        "train": "model.train()",
        "bfloat16": "model.to(torch.bfloat16)",
        "requires_grad": "model.requires_grad_(False)",
        "apply": "model.apply(lambda f: None)",
    }
    if block.acts and "[" not in block.acts[0]:
        act = block.acts[0]
        forms |= {
            "another activation": f"m.{act} = nn.Tanh()",
            "an activation's attribute": f"m.{act}.approximate = 'tanh'",
        }
    if "[" not in layer and block.kind != "Conv1D":
        made = block.inits[layer].replace("TwiceLinear", "nn.Linear")
        forms |= {"another layer": f"torch.manual_seed(7); m.{layer} = {made}.eval().to(model.head.bias.dtype)"}
    name = rng.choice([*forms])
    case.after.append(forms[name])
    case.undo = None
    return f"changed after: {name}"


def copied_after(rng: random.Random, case: Case) -> str | None:
    how = rng.choice(["deepcopy", "threads", "restore and swap"])
    case.options["then"] = how
    return f"after: {how}"


PREPARED = {
    "twice under names": "m.again = m.{L}",
    "in vars": "vars(m)['again'] = m.{L}",
    "in a list": "m.again = [m.{L}]",
    "in a closure": "m.again = lambda: m.{L}",
    "its method": "m.again = m.{L}.forward",
    "in a partial": "m.again = functools.partial(m.{L})",
    "shared with another model": "o = nn.Linear(*m.{L}.weight.shape[::-1]); o.weight = m.{L}.weight; vars(model)['o'] = (o,)",
    "tied": "m.tied = nn.Embedding(*m.{L}.weight.shape); m.tied.weight = m.{L}.weight",
    "tied by a view": "m.tied = nn.Parameter(m.{L}.weight.data[:8])",
    "tied in a list": "vars(m)['tied'] = [m.{L}.weight]",
    "parametrised": "parametrize.register_parametrization(m.{L}, 'weight', Twice())",
    "weight_norm": "parametrizations.weight_norm(m.{L})",
    "spectral_norm": "parametrizations.spectral_norm(m.{L})",
    "pruned": "prune.l1_unstructured(m.{L}, 'weight', 0.3)",
    "old weight_norm": "torch.nn.utils.weight_norm(m.{L})",
    "transposed": "m.{L}.weight = nn.Parameter(m.{L}.weight.t().contiguous().t())",
    "float64": "m.{L}.double()",
    "zeros": "nn.init.zeros_(m.{L}.weight)",
    "outliers": "m.{L}.weight.data[0, 0] = 30",
    "dtype mix": "m.bfloat16()",
    "frozen": "m.requires_grad_(False)",
    "train": "model.train()",
}  # fmt: skip
AGAIN = {"twice under names": "self.again({v})", "in vars": "self.again({v})", "in a list": "self.again[0]({v})",
         "in a closure": "self.again()({v})", "its method": "self.again({v})", "in a partial": "self.again({v})"}  # fmt: skip


def prepared(rng: random.Random, case: Case) -> str | None:
    block = case.block
    name, form = rng.choice([*PREPARED.items()])
    layer = _layer(rng, block)
    if block.kind == "Conv1D" and name in ("shared with another model", "weight_norm", "float64", "dtype mix"):
        return None
    if name in ("float64", "dtype mix"):  # converted around, as such models are
        if name == "float64" and not _replace_call(block, layer, "{f}({v}.double()).to({v}.dtype)"):
            return None
        if name == "dtype mix":
            case.around = case.around.replace("self.b(self.norm(x))", "self.b(self.norm(x).bfloat16()).to(x.dtype)")
    case.prepare.append(form.format(L=layer))
    if name in AGAIN and rng.random() < 0.7:
        if rng.random() < 0.5:
            _replace_call(block, layer, AGAIN[name])
        elif "[" not in layer and block.kind != "Conv1D" and "64, 64" in block.inits[layer]:
            block.body.append(f"y = y + {AGAIN[name].format(v='x')}")
    if name in ("tied", "tied by a view", "tied in a list"):
        tied = {"tied": "self.tied.weight", "tied by a view": "self.tied", "tied in a list": "self.tied[0]"}[name]
        block.body.append(f"y = y + {tied}.float().mean().to(y.dtype)")
    return f"{'alias' if name in AGAIN or 'tied' in name or 'shared' in name else 'weights'}: {name}"


def none(rng: random.Random, case: Case) -> str | None:
    return "plain"


DISTURBANCES: tuple[Callable[[random.Random, Case], str | None], ...] = (
    *(read,) * 5, read_bias, asked, *(in_place,) * 4, *(in_place_elsewhere,) * 3, buffer_changed,
    registered_buffer_changed, *(views,) * 2, *(flow,) * 4,
    *(outputs,) * 2, wraps, wraps, signatures, decorated, after_super, got_elsewhere, subclassed, *(patched_before,) * 3,
    *(hooked_before,) * 3, *(patched_after,) * 3, *(hooked_after,) * 3, *(changed_after,) * 3, copied_after, *(prepared,) * 4, none,
)  # fmt: skip

AROUND = ("x = x + self.b(self.norm(x))", "x = self.norm(x)\n        x = x + self.b(x)",
          "h = self.b(x)\n        x = self.norm(x + h)",
          "x = self.b(self.norm(x)) + x", "x = x + self.b(x)")  # fmt: skip


def made_up(seed: int) -> Case:
    """The case of a seed: one block, one thing done to it, in a quarter of them two."""
    rng = random.Random(seed)
    block = rng.choice(BLOCKS)(rng)
    case = Case(seed, block)
    for _ in range(1 + (rng.random() < 0.25)):
        for _ in range(20):
            if did := rng.choice(DISTURBANCES)(rng, case):
                case.did.append(did)
                break
    if "self.b(self.norm(x))" in case.around and rng.random() < 0.6 and case.around == Case.around:
        case.around = rng.choice(AROUND)
    case.options |= {
        "precision": rng.choice(["int8"] * 6 + ["w8a16", "bf16", "fp8"]),
        "mode": rng.choice(["no_grad", "inference_mode"]),
        "dtype": rng.choice(["float32"] * 5 + ["bfloat16"]),
        "autocast": rng.random() < 0.08,
        "calibrate": rng.random() < 0.06,
        "input": rng.choice(["3d", "3d", "3d", "transposed", "sliced"]),
    }
    return case


def cases(first: int, count: int) -> Iterator[Case]:
    """So many of different texts, from a seed on."""
    texts: set[str] = set()
    for seed in itertools.count(first):
        case = made_up(seed)
        text = case.text().partition("\n")[2] + str(sorted(case.options.items()))
        if text not in texts:
            texts.add(text)
            yield case
        if len(texts) == count:
            return
