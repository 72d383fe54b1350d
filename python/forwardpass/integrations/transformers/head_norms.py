"""RMS norms of each head of a step's queries and keys, in the launch that rotates them and appends the keys (`append_kv`).

Models of transformers have them as `self.q_norm` and `self.k_norm`. Where an attention's code does no more with what they return
than rotate it, their class's forward, wrapped once, returns what it is given, for the next call by that attention in its thread.
"""

from __future__ import annotations

import ast
import functools
import threading
from typing import Any

import torch
from torch import Tensor, nn

from ...common.models.modules import is_watched
from .. import patches
from ..class_source import owner_of_forward
from ..patches import Patch
from .norm_formulas import written_formula

_NAMES = {"query_states": "q_norm", "key_states": "k_norm"}
_EMBEDDINGS = ast.dump(ast.parse("cos, sin = position_embeddings").body[0])


class _Skipped(threading.local):
    """Norms that a thread's current attention leaves out."""

    def __init__(self) -> None:
        self.norms: list[nn.Module] = []


_skipped = _Skipped()


def precede(statements: list[ast.stmt]) -> bool:
    """Whether of the statements before the rotation the norms are the last that mention queries and keys, and whether it will be
    by the embeddings that the attention is given."""
    embeddings = [ast.dump(s) for s in _mentioning(statements, "cos")]
    return embeddings == [_EMBEDDINGS] and all(_ends_in_norm(statements, *names) for names in _NAMES.items())


def _mentioning(statements: list[ast.stmt], name: str) -> list[ast.stmt]:
    return [s for s in statements if any(isinstance(x, ast.Name) and x.id == name for x in ast.walk(s))]


def _ends_in_norm(statements: list[ast.stmt], states: str, norm: str) -> bool:
    mentions = _mentioning(statements, states)
    calls = [x for s in statements for x in ast.walk(s) if isinstance(x, ast.Attribute) and x.attr == norm]
    match mentions[-1:]:
        case [ast.Assign(targets=[ast.Name(id=target)], value=ast.Call() as value)] if target == states:
            pass
        case _:
            return False
    match value:
        case ast.Call(
            func=ast.Attribute(value=ast.Call() as inner, attr="transpose"),
            args=[ast.Constant(value=1), ast.Constant(value=2)],
            keywords=[],
        ):
            value = inner
    match value:
        case ast.Call(func=ast.Attribute(value=ast.Name(id="self"), attr=name), args=[_], keywords=[]):
            return name == norm and len(calls) == 1
    return False


def wrap(attention: nn.Module) -> list[Patch]:
    """Lets its norms be left out, until these are removed; none where they are none that the operation computes."""
    norms = [getattr(attention, name, None) for name in _NAMES.values()]
    if not all(isinstance(norm, nn.Module) and written_formula(norm) for norm in norms):
        return []
    return [patches.put(owner_of_forward(type(norm)), "forward", _skipping) for norm in norms]


def _skipping(forward: Any) -> Any:
    @functools.wraps(forward)
    def skipping(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if not torch.compiler.is_compiling() and self in _skipped.norms:
            _skipped.norms.remove(self)
            return args[0]
        return forward(self, *args, **kwargs)

    return skipping


def skip(attention: nn.Module) -> tuple[nn.Module, nn.Module] | None:
    """Leaves out the next calls of its norms in this thread, and returns them; None where something else may look at them."""
    norms: Any = tuple(attention._modules[name] for name in _NAMES.values())
    for norm in norms:
        patched = patches.is_there(owner_of_forward(type(norm)), "forward")
        if is_watched(norm) or not patched or written_formula(norm) is None:
            return None
    _skipped.norms = list(norms)
    return norms


def forget() -> None:
    """Nothing is left out any more in this thread."""
    _skipped.norms.clear()


def weights(norms: tuple[nn.Module, nn.Module], k: Tensor) -> tuple[Tensor, Tensor, float] | None:
    """(q_norm, k_norm, norm_eps), as `append_kv` has them with keys k [..., D]; None where it takes no such ones."""
    parts = []
    for norm in norms:
        formula, weight = written_formula(norm), norm.weight
        assert formula is not None and isinstance(weight, Tensor)
        if weight.dtype not in (torch.float32, k.dtype) or weight.shape != k.shape[-1:] or not weight.is_contiguous():
            return None
        parts.append((weight.float() + formula.offset if formula.offset else weight, getattr(norm, formula.eps)))
    (q_norm, q_eps), (k_norm, k_eps) = parts
    return (q_norm, k_norm, k_eps) if q_eps == k_eps else None
