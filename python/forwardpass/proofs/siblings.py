"""Which layers are called with one input, one after another: read from the code of the module that calls them.

    q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)

Calls of one run are in one block of statements, each is made whenever that block runs, and between the first and the last nothing
is done with the variable but to ask for its shape, and nothing that is written there is changed in place.
"""

from __future__ import annotations

import ast
import weakref
from collections import Counter
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import groupby
from typing import Any, TypeVar

from torch import nn
from torch.utils.hooks import RemovableHandle

from ..common.models.exchange import Replaced
from ..common.models.modules import tensor_bytes
from ..dispatch import Reason
from ..nn import FloatConv2d, Int8Conv2d, QuantizedLinear, QuantizedModule
from ..nn.folded import SharedActivation
from ..nn.guard import InEpilogue
from ..nn.linear.joined import Joined, why_apart
from .code import CONTAINERS, definition, functions_in, is_attribute_of, self_of
from .convolution import stand_ins
from .mlp_formulas import MLPs
from .norms import AdaptiveNorm, Deferrals
from .walker import ConvolutionLeaf, Leaf

#: What is asked of a tensor without reading or writing it.
_ASKED = ("shape", "size", "dtype", "device", "dim", "ndim")
#: What may be run not at all, or more than once.
_PERHAPS = (ast.IfExp, ast.BoolOp, ast.Lambda, ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp, ast.NamedExpr)
#: Statements that have no others in them.
_SIMPLE = (ast.Assign, ast.AnnAssign, ast.Return, ast.Expr)

L = TypeVar("L", bound=Leaf)
_NONE = Deferrals()


def siblings(leaves: Iterable[L]) -> list[tuple[L, ...]]:
    """The layers of each run of two and more, in the order of their calls."""
    holders: dict[int, dict[str, L]] = {}
    for leaf in leaves:
        if len(leaf.places) == 1 and not leaf.is_experts and not leaf.is_convolution:
            holders.setdefault(id(leaf.parent), {})[leaf.name] = leaf
    groups = []
    for members in holders.values():
        holder = next(iter(members.values())).parent
        if len(members) > 1 and not isinstance(holder, CONTAINERS) and "forward" not in vars(holder):
            for run in runs_of(type(holder)):
                groups += [tuple(members[name] for name in part) for part in _parts(run, members)]
    return groups


def _parts(run: Iterable[str], members: Container[str]) -> list[tuple[str, ...]]:
    """What of a run is these alone: what else is called in between (an activation) may change its input in place."""
    parts = (tuple(names) for is_member, names in groupby(run, members.__contains__) if is_member)
    return [part for part in parts if len(part) > 1]


def runs_of(cls: type[nn.Module]) -> tuple[tuple[str, ...], ...]:
    """The names of the members that a class's forward calls with one variable, one after another, each once."""
    base = next(base for base in cls.__mro__ if "forward" in vars(base))
    return _runs_of(base, vars(base)["forward"])


@lru_cache(maxsize=1024)
def _runs_of(base: type[nn.Module], function: Any) -> tuple[tuple[str, ...], ...]:
    """By the function, as somebody may put another into the class."""
    written = [definition(f.__code__) for f in functions_in(function, base) if f.__name__ == "forward"]
    if len(written) != 1 or not isinstance(forward := written[0], ast.FunctionDef):
        return ()
    mentions = Counter(node.attr for node in ast.walk(forward) if isinstance(node, ast.Attribute))
    once = {name for name, n in mentions.items() if n == 1}
    return tuple(part for run in _runs(forward.body, self_of(forward)) for part in _parts(run, once))


def _runs(block: Sequence[ast.stmt], self_name: str | None) -> Iterator[list[str]]:
    runs: dict[str, list[str]] = {}  # by variable
    for statement in block:
        if not isinstance(statement, _SIMPLE) or _changes_in_place(statement):
            yield from runs.values()
            runs = {}
            for part in ("body", "orelse", "finalbody"):
                yield from _runs(getattr(statement, part, ()), self_name)
            for handler in getattr(statement, "handlers", ()):
                yield from _runs(handler.body, self_name)
            continue
        calls, other = _calls(statement, self_name)
        for variable in other:
            yield runs.pop(variable, [])
        for name, variable in calls:
            runs.setdefault(variable, []).append(name)
        for variable in {x.id for x in ast.walk(statement) if isinstance(x, ast.Name) and isinstance(x.ctx, ast.Store)}:
            yield runs.pop(variable, [])
    yield from runs.values()


def _calls(statement: ast.stmt, self_name: str | None) -> tuple[list[tuple[str, str]], set[str]]:
    """((member, variable) of every `self.<member>(<variable>)` in the order in which they are made, variables that are used in
    another way)."""
    calls: list[tuple[int, int, str, str]] = []
    harmless: set[int] = set()
    perhaps = {id(x) for node in ast.walk(statement) if isinstance(node, _PERHAPS) for x in ast.walk(node)}
    for node in ast.walk(statement):
        if isinstance(node, ast.Attribute) and node.attr in _ASKED:
            harmless.add(id(node.value))
        if (
            isinstance(node, ast.Call)
            and id(node) not in perhaps
            and len(node.args) == 1
            and not node.keywords
            and isinstance(argument := node.args[0], ast.Name)
            and isinstance(member := node.func, ast.Attribute)
            and is_attribute_of(member, self_name)
        ):
            harmless.add(id(argument))
            calls.append((node.lineno, node.col_offset, member.attr, argument.id))
    other = {x.id for x in ast.walk(statement)
             if isinstance(x, ast.Name) and isinstance(x.ctx, ast.Load) and id(x) not in harmless}  # fmt: skip
    return [(name, variable) for _, _, name, variable in sorted(calls) if variable not in other], other


def _changes_in_place(statement: ast.stmt) -> bool:
    """Whether it may write into a tensor that is there: by a method like `add_`, through an index or an attribute."""
    return any(
        (isinstance(x, ast.Attribute) and x.attr.endswith("_") and not x.attr.endswith("__"))
        or (isinstance(x, ast.Subscript | ast.Attribute) and isinstance(x.ctx, ast.Store))
        or (isinstance(x, ast.keyword) and x.arg == "out")
        for x in ast.walk(statement)
    )


def _deferred(layers: Mapping[str, tuple[Leaf, QuantizedModule]], deferrals: Deferrals) -> list[AdaptiveNorm]:
    """Has the layers defer whose results go into sums; the norms that quantise for all that read them."""
    for fqn in deferrals.layers & layers.keys():
        layer = layers[fqn][1]
        if isinstance(layer, QuantizedLinear) and layer.takes_residual:
            layer.defers = True

    def quantises(fqn: str) -> bool:
        layer = layers[fqn][1] if fqn in layers else None
        return isinstance(layer, QuantizedLinear) and layer.row_quantization() is not None

    return [norm for norm, readers in deferrals.norms if all(map(quantises, readers))]


def in_floats(leaf: ConvolutionLeaf) -> FloatConv2d:
    """What computes what is behind it."""
    new = FloatConv2d(leaf.module, leaf.formula)
    new.fold(None if leaf.norm is None else leaf.norm.module)
    return new


class JoinedSwap:
    """Swapped layers in the places of originals, those that belong together as one product: `build` before they are in the model,
    `put` after. Holds no layer that `build` copies into another: where nothing else does, it is freed at once.
    """

    def __init__(
        self,
        layers: Mapping[str, tuple[Leaf, QuantizedModule]],
        apart: Mapping[str, Reason] | None = None,
        deferrals: Deferrals = _NONE,
        folded: Sequence[ConvolutionLeaf] = (),
    ) -> None:
        """apart: what is no product, by the name of its first layer, and why. folded: convolutions that stay in floats, and compute
        what is behind them."""
        apart = apart or {}
        self._mlps = MLPs(layers)
        self.mlps = self._mlps.names
        self.apart = [*self._mlps.apart, *(x for x in apart.items() if x not in self._mlps.apart)]
        self._adaptive = _deferred(layers, deferrals)
        self.norms = [*(x.fqn for x in self._mlps.norms), *(x.fqn for x in self._adaptive)]
        self._folded = folded
        within = self._mlps.members
        self._alone = {fqn: layer for fqn, layer in layers.items() if fqn not in within}
        self._runs = [
            (run, members)
            for run in siblings(leaf for leaf, _ in self._alone.values())
            if run[0].fqn not in apart and why_apart(members := [self._alone[leaf.fqn][1] for leaf in run]) is None
        ]
        #: modules that call such layers, and what puts hooks around their forwards
        self._holders: list[tuple[weakref.ref[nn.Module], Callable[[nn.Module], Iterable[RemovableHandle]]]] = []
        self._handles: list[RemovableHandle] = []

    @property
    def names(self) -> list[tuple[str, ...]]:
        """Those of each product."""
        return [*(tuple(leaf.fqn for leaf in run) for run, _ in self._runs), *self._mlps.joined]

    @property
    def peak(self) -> int:
        """Bytes that are held twice while one product after another is made."""
        return max((self._mlps.peak, *(tensor_bytes(members) for _, members in self._runs)))

    def build(self) -> tuple[tuple[Replaced, ...], tuple[Replaced, ...]]:
        """(layers and MLPs, activations that they compute and norms before them): what is to be put in place."""
        alone = [*self._alone.values()]
        # It stands in the table of originals, and may neither keep these nor the model.
        for run, members in self._runs:
            holder = run[0].parent
            joined = Joined(members, type(holder))  # type: ignore[arg-type]
            self._holders.append((weakref.ref(holder), joined.watch))
        self._runs, self._alone = [], {}
        layers = (Replaced(leaf.fqn, leaf.module, new) for leaf, new in alone)
        mlps, norms = self._mlps.build()
        adaptive = [norm.replaced() for norm in self._adaptive]
        folded = [(leaf, in_floats(leaf)) for leaf in self._folded]
        floats = (Replaced(leaf.fqn, leaf.module, new) for leaf, new in folded)
        return (*layers, *mlps), (*floats, *self._in_epilogues([*alone, *folded]), *norms, *adaptive)

    def _in_epilogues(self, layers: Iterable[tuple[Leaf, QuantizedModule | FloatConv2d]]) -> list[Replaced]:
        """For the norms and activations that the replacements of these layers compute themselves."""
        replaced: list[Replaced] = []
        shared: dict[str, SharedActivation] = {}
        for leaf, new in layers:
            if isinstance(leaf, ConvolutionLeaf) and isinstance(new, Int8Conv2d | FloatConv2d):
                for behind, begins, begin in stand_ins(leaf, new, shared):
                    replaced += [] if behind is None else [behind]
                    self._holders.append((begins, _before(begin)))
                continue
            if leaf.activation is None or new.activation is None:
                continue
            chain, path = [m for _, m in leaf.ancestors], [name for name, _ in leaf.ancestors]
            while len(chain) > 1 and type(chain[-1]) in CONTAINERS:
                chain.pop()
            holder, name = chain[-1], leaf.activation.fqn.rpartition(".")[2]
            instead = InEpilogue(
                leaf.activation.module, new, (leaf.name, name), type(holder), tuple(path[len(chain) :])
            )
            replaced.append(Replaced(leaf.activation.fqn, leaf.activation.module, instead))
            self._holders.append((weakref.ref(holder), _before(instead.begin)))
        return replaced

    def put(self) -> None:
        holders = ((holder(), watch) for holder, watch in self._holders)
        self._handles = [handle for h, watch in holders if h is not None for handle in watch(h)]

    def undo(self) -> None:
        while self._handles:
            self._handles.pop().remove()


def _before(hook: Callable[..., None]) -> Callable[[nn.Module], Iterable[RemovableHandle]]:
    """What puts a hook before a module's forward."""
    return lambda holder: (holder.register_forward_pre_hook(hook),)
