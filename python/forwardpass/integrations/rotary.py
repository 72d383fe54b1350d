"""Rotary embedding of a step's queries and keys in the launch that appends the keys to the cache (`append_kv`).

Models of transformers rotate by a function of their Python module, `apply_rotary_pos_emb`, and give the keys to the cache in the
next statement. Where the code says just that, a hook on the attention marks the cosines if its layer of the cache appends in place;
the function, wrapped once for each Python module, then leaves the work to that layer's `update`. Without a mark it does as before.
"""

from __future__ import annotations

import ast
import functools
import inspect
import sys
import textwrap
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

NAME = "apply_rotary_pos_emb"
#: Attributes: of cosines, that the next rotation by them is left to the cache, and of the function that looks at it; of keys, what
#: is yet to be done to them.
_DEFERS, _PENDING = "forwardpass_defers_rotation", "forwardpass_rotary"

#: What the operation does, as models write it: of all columns, and of the first.
_ROTATIONS = frozenset(
    ast.dump(ast.parse(textwrap.dedent(code)))
    for code in (
        """
        cos = cos.unsqueeze(unsqueeze_dim)
        sin = sin.unsqueeze(unsqueeze_dim)
        q_embed = (q * cos) + (rotate_half(q) * sin)
        k_embed = (k * cos) + (rotate_half(k) * sin)
        return q_embed, k_embed
        """,
        """
        cos = cos.unsqueeze(unsqueeze_dim)
        sin = sin.unsqueeze(unsqueeze_dim)
        rotary_dim = cos.shape[-1]
        q_rot, q_pass = q[..., :rotary_dim], q[..., rotary_dim:]
        k_rot, k_pass = k[..., :rotary_dim], k[..., rotary_dim:]
        q_embed = (q_rot * cos) + (rotate_half(q_rot) * sin)
        k_embed = (k_rot * cos) + (rotate_half(k_rot) * sin)
        q_embed = torch.cat([q_embed, q_pass], dim=-1)
        k_embed = torch.cat([k_embed, k_pass], dim=-1)
        return q_embed, k_embed
        """,
    )
)
_HALVES = ast.dump(
    ast.parse("x1 = x[..., : x.shape[-1] // 2]\nx2 = x[..., x.shape[-1] // 2 :]\nreturn torch.cat((-x2, x1), dim=-1)")
)
#: In the forward of attention, one right behind the other.
_CALL = ast.dump(ast.parse(f"query_states, key_states = {NAME}(query_states, key_states, cos, sin)").body[0])
_UPDATE = "key_states, value_states = cache.update(key_states, value_states, self.layer_idx, kwargs=kwargs)"
_APPEND = ast.dump(ast.parse(f"if cache is not None:\n    {_UPDATE}").body[0])


def pending(key: Tensor) -> tuple[Tensor | None, ...]:
    """(cos, sin, q, q_out), as `append_kv` has them, where k [B, Hk, S, D] is yet to be rotated, else None in their places. The
    mark goes."""
    nothing = None, None, None, None
    return nothing if torch.compiler.is_compiling() else vars(key).pop(_PENDING, nothing)


def why_apart(attention: nn.Module) -> str | None:
    """None where the code of an attention module says that its queries and keys can be rotated later, else what it lacks."""
    cls: Any = type(attention)  # mypy takes type[nn.Module] for unhashable
    return _why_apart(cls)


@functools.lru_cache(maxsize=1024)
def _why_apart(cls: Any) -> str | None:
    owner = _owner_of_forward(cls)
    module = sys.modules.get(owner.__module__)
    try:
        tree = ast.parse(inspect.getsource(module)) if module is not None else ast.parse("")
    except (OSError, TypeError):
        return "its code is not at hand"
    if _body(_named(tree, NAME)) not in _ROTATIONS or _body(_named(tree, "rotate_half")) != _HALVES:
        return f"its module has another {NAME}"
    forward = _named(_named(tree, owner.__name__), "forward")
    statements = [ast.dump(x) for x in forward.body] if isinstance(forward, ast.FunctionDef) else []
    calls = [i for i, x in enumerate(statements) if x == _CALL]
    if len(calls) != 1 or statements[calls[0] + 1 : calls[0] + 2] != [_APPEND]:
        return "its forward does something else between rotation and cache"
    return None


def _owner_of_forward(cls: Any) -> Any:
    """The class, of those that it derives from or itself, whose forward it has."""
    return next(c for c in cls.__mro__ if "forward" in vars(c))  # nn.Module has one


def _named(tree: ast.AST | None, name: str) -> ast.AST | None:
    """The function or class of a name in the body of another."""
    return next((x for x in getattr(tree, "body", ()) if getattr(x, "name", None) == name), None)


def _body(function: ast.AST | None) -> str:
    """Without its docstring."""
    if not isinstance(function, ast.FunctionDef):
        return ""
    first = 1 if ast.get_docstring(function, clean=False) is not None else 0
    return ast.dump(ast.Module(body=function.body[first:], type_ignores=[]))


def defer(attention: nn.Module) -> Any:
    """Rotates a module's queries and keys in its cache, where that appends in place; returns the handle of a hook that does so."""
    module: Any = sys.modules[_owner_of_forward(type(attention)).__module__]
    if not hasattr(vars(module)[NAME], _DEFERS):
        setattr(module, NAME, _deferring(vars(module)[NAME]))
    return attention.register_forward_pre_hook(_mark, with_kwargs=True)


def _mark(attention: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    if torch.compiler.is_compiling():  # which fuses the rotation into its neighbours, and knows no marks
        return
    embeddings, layers = kwargs.get("position_embeddings"), getattr(kwargs.get("cache"), "layers", ())
    index: Any = attention.layer_idx
    if embeddings is not None:
        layer: Any = layers[index] if index < len(layers) else None
        setattr(embeddings[0], _DEFERS, hasattr(layer, "appends_in_place") and layer.appends_in_place())


def _deferring(rotate: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(rotate)
    def deferred(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling() or not vars(cos).pop(_DEFERS, False) or not _fits(q, k, cos):
            return rotate(q, k, cos, sin, *args, **kwargs)
        rows = q.transpose(1, 2)
        q_out = torch.empty(rows.shape, dtype=q.dtype, device=q.device)
        setattr(k, _PENDING, (cos, sin, rows, q_out))
        return q_out.transpose(1, 2), k

    setattr(deferred, _DEFERS, True)
    return deferred


def _fits(q: Tensor, k: Tensor, cos: Tensor) -> bool:
    """Whether append_kv takes them."""
    return (
        q.dtype == k.dtype
        and cos.dtype in (k.dtype, torch.float32)
        and q.stride(3) == k.stride(3) == cos.stride(-1) == 1
        and cos.dim() == 3
        and cos.shape[0] in (1, k.shape[0])
    )
