"""A layer and its activation are fused only where nothing else gets at either: every way to is tried, and outputs compared."""

import functools
import types
import weakref

import pytest
import torch
from fusion_models import WIDTH, AlsoUsed, Mlp, behind
from small_models import outputs
from torch import nn

import forwardpass as fp


class Net(nn.Module):
    """As many vision models hold their MLPs."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(WIDTH, 128), nn.GELU(), nn.Linear(128, WIDTH))

    def forward(self, x):
        return self.net(x)


class Indexed(Net):
    def forward(self, x):
        return self.net(x) + self.net[0](x)[:, :WIDTH]


class Sliced(Net):
    def forward(self, x):
        return self.net[:1](x)


class Iterated(Net):
    def forward(self, x):
        seen = []
        for layer in self.net:
            x = layer(x)
            seen.append(x)
        return seen[0]


class Unpacked(Net):
    def forward(self, x):
        first, *_ = self.net
        return first(x)


class Counted(Net):
    def forward(self, x):
        return self.net[len(self.net) - 3](x)


class ByConstant(Net):
    def forward(self, x):
        return getattr(self, "net")[0](x)  # noqa: B009


class ByVariable(Net):
    def forward(self, x):
        return getattr(self, "".join("net"))[0](x)


class ByDict(Net):
    def forward(self, x):
        return self._modules["net"][0](x)


class ByChildren(Net):
    def forward(self, x):
        return next(self.children())[0](x)


class ByDottedName(Net):
    def forward(self, x):
        return self.get_submodule("net.0")(x)


def first_of(sequential, x):
    return sequential[0](x)


class Passed(Net):
    def forward(self, x):
        return first_of(self.net, x)


def first_of_net(holder, x):
    return holder.net[0](x)


class HandsItselfOver(Net):
    def forward(self, x):
        return first_of_net(self, x)


class Property(Net):
    @property
    def first(self):
        return self.net[0]

    def forward(self, x):
        return self.first(x)


class Within(Net):
    def forward(self, x):
        first = lambda y: self.net[0](y)  # noqa: E731
        return first(x)


class Listed(Net):
    def __init__(self):
        super().__init__()
        self.layers = {"all": [self.net[0]]}

    def forward(self, x):
        return self.layers["all"][0](x)


class Aliased(Net):
    def __init__(self):
        super().__init__()
        self.again = (self.net,)

    def forward(self, x):
        (net,) = self.again
        return net[0](x)


class Registered(Net):
    def __init__(self):
        super().__init__()
        self.again = self.net

    def forward(self, x):
        return self.again[0](x)


class Closure(Net):
    def __init__(self):
        super().__init__()
        net = self.net
        self.first = lambda x: net[0](x)

    def forward(self, x):
        return self.first(x)


class Bound(Net):
    def __init__(self):
        super().__init__()
        self.first = self.net[0].forward

    def forward(self, x):
        return self.first(x)


KNOWN = []


class Global(Net):
    def __init__(self):
        super().__init__()
        KNOWN[:] = [self.net[0]]

    def forward(self, x):
        return KNOWN[0](x)


class Collecting(nn.Sequential):
    def forward(self, x):
        return self[0](x) + super().forward(x).mean()


class Subclassed(Net):
    def __init__(self):
        super().__init__()
        self.net = Collecting(*self.net)


class ListOfThem(nn.Module):
    def __init__(self):
        super().__init__()
        self.nets = nn.ModuleList([Net().net])

    def forward(self, x):
        return sum(net[0](x) for net in self.nets)


class Outer(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = Net()

    def forward(self, x):
        return self.inner.net[0](x)


class OuterByFunction(Outer):
    def forward(self, x):
        return first_of_net(self.inner, x)


class Wrapper(Outer):
    def __getattr__(self, name):
        return super().__getattr__(name) if name == "inner" else getattr(self.inner, name)

    def forward(self, x):
        return self.net[0](x)


class OuterOfMlp(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = Mlp()

    def forward(self, x):
        return self.inner.act(x)


class Child(nn.Module):
    def __init__(self, parent):
        super().__init__()
        self.parent = weakref.ref(parent)

    def forward(self, x):
        return self.parent().act(x)


class WithChild(Mlp):
    def __init__(self):
        super().__init__()
        self.child = Child(self)

    def forward(self, x):
        x = self.child(x)
        x = self.fc1(x)
        x = self.act(x)
        return self.fc2(x)


class Runner:
    def __init__(self, holder):
        self.holder = holder

    def __call__(self, x):
        return self.holder.act(x)


class WithRunner(Mlp):
    def __init__(self):
        super().__init__()
        self.run = Runner(self)

    def forward(self, x):
        x = self.run(x)
        x = self.fc1(x)
        x = self.act(x)
        return self.fc2(x)


class Finally(Mlp):
    def forward(self, x):
        seen = []
        try:
            y = self.fc1(x)
            return self.act(y)
        finally:
            seen.append(y)
            return seen[0]  # noqa: B012, SIM107


class Captured(Mlp):
    def forward(self, x):
        y = x

        def run():
            nonlocal y
            y = self.fc1(x)
            return self.act(y)

        run()
        return y


class Rebound(Mlp):
    def __init__(self):
        super().__init__()
        self.other = Mlp(nn.GELU("tanh"))

    def forward(self, x):
        y = self.fc1(x)
        self = self.other
        return self.act(y)


def instead(forward):
    def run(self, x):
        return self.fc1(x)

    return functools.wraps(forward)(run)


class Decorated(Mlp):
    @instead
    def forward(self, x):
        x = self.fc1(x)
        x = self.act(x)
        return self.fc2(x)


class AskedFor(Mlp):
    def forward(self, x):
        x = self.fc1(x)
        x = self.act(x)
        return self.fc2(x) * hasattr(self, "act")


class ReadsWeight(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = Mlp()

    def forward(self, x):
        return self.inner(x) * (self.inner.fc1.weight.dim() == 2)


def hooked_sequence(register):
    model = Net()
    getattr(model.net, register)(lambda net, *args: net[0](args[0][0])[:, :WIDTH])
    return model


def hooked_holder():
    model = Net()
    model.register_forward_hook(lambda m, args, y: m.net[0](args[0]))
    return model


def with_a_method():
    model = Net()
    model.forward = types.MethodType(lambda m, x: m.net[0](x), model)
    return model


UNPROVEN = [
    Indexed, Sliced, Iterated, Unpacked, Counted, ByConstant, ByVariable, ByDict, ByChildren, ByDottedName, Passed, HandsItselfOver,
    Property, Within, Listed, Aliased, Registered, Closure, Bound, Global, Subclassed, ListOfThem, Outer, OuterByFunction, Wrapper,
    OuterOfMlp, WithChild, WithRunner, Finally, Captured, Rebound, Decorated, AskedFor, ReadsWeight, hooked_holder, with_a_method,
    lambda: hooked_sequence("register_forward_hook"), lambda: hooked_sequence("register_forward_pre_hook"),
    lambda: nn.ModuleList([Net().net]),
]  # fmt: skip


@pytest.mark.every(2)
@pytest.mark.parametrize("make", UNPROVEN, ids=lambda make: make.__name__)
@pytest.mark.filterwarnings("ignore")
def test_what_is_not_proven_is_not_fused(make):
    model, x = make().eval(), torch.randn(30, WIDTH)
    exact = None if isinstance(model, nn.ModuleList) else outputs(model, x)
    assert behind(model) == {}
    report = fp.swap(model, "bf16", include="**")
    assert all(s.activation is None for s in report.swapped)
    if exact is not None:
        assert (outputs(model, x) - exact).norm() < 0.01 * exact.norm()


class Proven(nn.Module):
    """Lists and sequences of sequences, called whole; and what may be done to a Sequential while it is made."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(WIDTH, WIDTH))
        self.net.append(nn.GELU())
        for m in self.net:
            m.tag = "made"
        self.net[0].weight.data.mul_(2)
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU()) for _ in range(2)])
        self.deep = nn.Sequential(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.SiLU()), Mlp())

    def forward(self, x):
        x = self.net(x) / len(self.blocks)
        for block in self.blocks:
            x = block(x)
        return self.deep(x) + self.blocks[0](x)

    @torch.no_grad()
    def features(self, x):
        return getattr(self, "tag", self.net(x))


def test_what_is_proven_is_fused():
    model, x = Proven().eval(), torch.randn(30, WIDTH)
    exact = outputs(model, x)
    expected = {"net.0": "gelu", "blocks.0.0": "relu", "blocks.1.0": "relu", "deep.0.0": "silu", "deep.1.fc1": "gelu"}
    assert behind(model) == expected
    fp.swap(model, "bf16")
    assert (outputs(model, x) - exact).norm() < 0.01 * exact.norm()


def test_a_class_that_is_changed_later_is_read_anew(monkeypatch):
    model = Mlp()
    assert behind(model) == {"fc1": "gelu"}
    monkeypatch.setattr(Mlp, "forward", AlsoUsed.forward)
    assert behind(model) == {}


@pytest.mark.every(2)
@pytest.mark.parametrize(
    ("library", "model"), [("timm", "vit_tiny_patch16_224"), ("torchvision.models", "convnext_tiny")]
)
def test_vision_libraries(library, model):
    models = pytest.importorskip(library)
    make = models.create_model if library == "timm" else models.get_model
    assert len(behind(make(model))) == {"timm": 12}.get(library, 18)


class ByEnd(nn.Module):
    """As rotary embeddings ask for a table of a kind of layer, which no name of a layer ends like, or does."""

    def __init__(self):
        super().__init__()
        self.mlp, self.full_table, self.kind = Mlp(), 1, "full"

    def forward(self, x):
        return self.mlp(x) * getattr(self, f"{self.kind}_table")


class ByEndOfALayer(ByEnd):
    def forward(self, x):
        return self.mlp(x) + getattr(self.mlp, f"{self.kind[0]}c1")(x)[:, :WIDTH]


class ByBeginning(ByEnd):
    def forward(self, x):
        return self.mlp(x) + getattr(self.mlp, f"fc{len(self.kind) - 3}")(x)[:, :WIDTH]


@pytest.mark.parametrize(("cls", "expected"), [(ByEnd, {"mlp.fc1": "gelu"}), (ByEndOfALayer, {}), (ByBeginning, {})])
def test_names_of_which_the_end_is_known(cls, expected):
    assert behind(cls()) == expected
