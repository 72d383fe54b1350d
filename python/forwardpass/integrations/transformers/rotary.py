"""Rotary embedding of a step's queries and keys in the launch that appends the keys to the cache (`append_kv`).

Models of transformers rotate by a function of their Python module, `apply_rotary_pos_emb`, and give the keys to the cache in the
next statement. Where the code says just that, a hook on the attention marks the cosines if its layer of the cache appends in place;
the function, wrapped once for each Python module, then leaves the work to that layer's `update`. Without a mark it does as before.
Norms of the heads right before it are left to the same launch (`head_norms`).
"""

from __future__ import annotations

import ast
import functools
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ...common.models.modules import forward_replaced
from ...common.printing.quiet import warn_once
from ...ops.append_kv import PLAIN, WITHOUT_NORMS
from .. import patches
from ..class_source import body_of, dump, is_as_written, named, owner_of_forward, tree_of_module
from . import head_norms

NAME = "apply_rotary_pos_emb"
#: Attributes: of cosines, that the next rotation by them is left to the cache; of keys, what is yet to be done to them.
_DEFERS, _PENDING = "forwardpass_defers_rotation", "forwardpass_rotary"


class Rotation(NamedTuple):
    """What a module's rotation is to `append_kv`."""

    interleaved: bool
    spread: bool = False  #: the first half of the columns of cos and sin counts, each for two columns of q and k


#: The rotation of all columns, Llama's and Cohere's. The operation computes both in float32.
_WHOLE = """
cos = cos.unsqueeze(unsqueeze_dim)
sin = sin.unsqueeze(unsqueeze_dim)
q_embed = (q * cos) + (rotate_half(q) * sin)
k_embed = (k * cos) + (rotate_half(k) * sin)
return q_embed, k_embed
"""
_WHOLE_IN_FLOAT32 = """
dtype = q.dtype
q = q.float()
k = k.float()
cos = cos.unsqueeze(unsqueeze_dim)
sin = sin.unsqueeze(unsqueeze_dim)
q_embed = (q * cos) + (rotate_half(q) * sin)
k_embed = (k * cos) + (rotate_half(k) * sin)
return q_embed.to(dtype=dtype), k_embed.to(dtype=dtype)
"""
#: Of the first columns.
_PART = """
rotary_dim = cos.shape[-1]
q_rot, q_pass = q[..., :rotary_dim], q[..., rotary_dim:]
k_rot, k_pass = k[..., :rotary_dim], k[..., rotary_dim:]
q_embed = (q_rot * cos) + (rotate_half(q_rot) * sin)
k_embed = (k_rot * cos) + (rotate_half(k_rot) * sin)
q_embed = torch.cat([q_embed, q_pass], dim=-1)
k_embed = torch.cat([k_embed, k_pass], dim=-1)
return q_embed, k_embed
"""
_UNSQUEEZE = "cos = cos.unsqueeze(unsqueeze_dim)\nsin = sin.unsqueeze(unsqueeze_dim)"
_SPREAD = """
cos = cos[..., : cos.shape[-1] // 2].repeat_interleave(2, dim=-1)
sin = sin[..., : sin.shape[-1] // 2].repeat_interleave(2, dim=-1)
"""
_HALVES = "x1 = x[..., : x.shape[-1] // 2]\nx2 = x[..., x.shape[-1] // 2 :]\nreturn torch.cat((-x2, x1), dim=-1)"
_COHERE_PAIRS = "x1 = x[..., ::2]\nx2 = x[..., 1::2]\nrot_x = torch.stack([-x2, x1], dim=-1).flatten(-2)\nreturn rot_x"
_GLM_PAIRS = "x1 = x[..., 0::2]\nx2 = x[..., 1::2]\nreturn torch.stack((-x2, x1), dim=-1).flatten(-2)"

#: What the operation does, as models write it: (apply_rotary_pos_emb, rotate_half).
_ROTATIONS = {
    (dump(rotation), dump(half)): form
    for rotation, half, form in (
        (_WHOLE, _HALVES, Rotation(False)),
        (_UNSQUEEZE + _PART, _HALVES, Rotation(False)),
        (_WHOLE_IN_FLOAT32, _COHERE_PAIRS, Rotation(True)),
        (_UNSQUEEZE + _SPREAD + _PART, _GLM_PAIRS, Rotation(True, spread=True)),
    )
}
#: In the forward of attention, one right behind the other.
_CALL = ast.dump(ast.parse(f"query_states, key_states = {NAME}(query_states, key_states, cos, sin)").body[0])
_UPDATE = "key_states, value_states = cache.update(key_states, value_states, self.layer_idx, kwargs=kwargs)"
_APPEND = ast.dump(ast.parse(f"if cache is not None:\n    {_UPDATE}").body[0])


def pending(key: Tensor) -> tuple[Any, ...]:
    """(cos, sin, q, q_out, q_norm, k_norm, norm_eps, interleaved), for `append_kv`, where k [B, Hk, S, D] is yet to be rotated,
    else what stands for nothing. The mark goes."""
    return PLAIN if torch.compiler.is_compiling() else vars(key).pop(_PENDING, PLAIN)


def why_apart(attention: nn.Module) -> str | None:
    """None where the code of an attention module says that its queries and keys can be rotated later, else what it lacks."""
    cls: Any = type(attention)  # mypy takes type[nn.Module] for unhashable
    replaced = "another function stands in the place of its forward" if forward_replaced(attention) else None
    return replaced or _why_apart(cls) or _why_replaced(cls)


def _why_replaced(cls: Any) -> str | None:
    replaced = _replaced(cls)
    return None if replaced is None else f"another function stands in the place of {replaced}"


def _replaced(cls: Any) -> str | None:
    """Which of the functions that rotate for an attention class is not the one in its file."""
    owner, module = owner_of_forward(cls), _module(cls)
    for place, name in ((owner, "forward"), (module, NAME), (module, "rotate_half")):
        if not is_as_written(place, name):
            return f"{place.__name__}.{name}"
    return None


@functools.lru_cache(maxsize=1024)
def _why_apart(cls: Any) -> str | None:
    owner = owner_of_forward(cls)
    tree = tree_of_module(owner)
    if tree is None:
        return "its code is not at hand"
    if _rotation(tree) is None:
        return f"its module has another {NAME}"
    statements = _statements(owner, tree)
    dumped = [ast.dump(x) for x in statements]
    calls = [i for i, x in enumerate(dumped) if x == _CALL]
    if len(calls) != 1 or dumped[calls[0] + 1 : calls[0] + 2] != [_APPEND]:
        return "its forward does something else between rotation and cache"
    return None


def _rotation(tree: ast.Module) -> Rotation | None:
    return _ROTATIONS.get((body_of(named(tree, NAME)), body_of(named(tree, "rotate_half"))))


def _statements(owner: Any, tree: ast.Module) -> list[ast.stmt]:
    forward = named(named(tree, owner.__name__), "forward")
    return forward.body if isinstance(forward, ast.FunctionDef) else []


@functools.lru_cache(maxsize=1024)
def norms_precede(cls: Any) -> bool:
    """Whether norms of the heads come right before the rotation, of a class with no `why_apart`."""
    owner = owner_of_forward(cls)
    tree = tree_of_module(owner)
    assert tree is not None
    statements = _statements(owner, tree)
    return head_norms.precede(statements[: [ast.dump(x) for x in statements].index(_CALL)])


def defer(attention: nn.Module) -> tuple[Any, ...]:
    """Rotates a module's queries and keys in its cache, where that appends in place, their norms before it; returns the handles of
    the hooks that do so."""
    cls: Any = type(attention)
    tree = tree_of_module(owner_of_forward(cls))
    form = None if tree is None else _rotation(tree)
    assert form is not None  # there is no why_apart
    rotation = patches.put(_module(cls), NAME, functools.partial(_deferring, form=form))
    if not norms_precede(cls) or not (norms := head_norms.wrap(attention)):
        return rotation, attention.register_forward_pre_hook(mark, with_kwargs=True)
    return (
        rotation,
        *norms,
        attention.register_forward_pre_hook(_mark_with_norms, with_kwargs=True),
        attention.register_forward_hook(_forget, always_call=True),  # also after one that failed before its norms
    )


@functools.lru_cache(maxsize=1024)
def _module(cls: Any) -> Any:
    """The Python module whose rotation an attention class calls."""
    return sys.modules[owner_of_forward(cls).__module__]


def mark(attention: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], has_norms: bool = False) -> None:
    if torch.compiler.is_compiling():  # which fuses the rotation into its neighbours, and knows no marks
        return
    embeddings, layers = kwargs.get("position_embeddings"), getattr(kwargs.get("cache"), "layers", ())
    index: Any = attention.layer_idx
    if embeddings is not None:
        layer: Any = layers[index] if index < len(layers) else None
        defers = hasattr(layer, "appends_in_place") and layer.appends_in_place() and why_changed(attention) is None
        norms = head_norms.skip(attention) if defers and has_norms else None
        setattr(embeddings[0], _DEFERS, (norms,) if defers else ())


def _mark_with_norms(attention: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    mark(attention, args, kwargs, has_norms=True)


def _forget(*args: Any) -> None:
    if not torch.compiler.is_compiling():
        head_norms.forget()


def _deferring(rotate: Callable[..., Any], form: Rotation) -> Callable[..., Any]:
    @functools.wraps(rotate)
    def deferred(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *args: Any, **kwargs: Any) -> Any:
        marks = () if torch.compiler.is_compiling() else vars(cos).pop(_DEFERS, ())
        if not marks:
            return rotate(q, k, cos, sin, *args, **kwargs)
        norms = marks[0]
        weights = WITHOUT_NORMS if norms is None else head_norms.weights(norms, k)
        if weights is None or not _fits(q, k, cos):
            if norms is not None:
                q, k = norms[0](q), norms[1](k)
            return rotate(q, k, cos, sin, *args, **kwargs)
        rows = q.transpose(1, 2)
        q_out = torch.empty(rows.shape, dtype=q.dtype, device=q.device)
        if form.spread:
            cos, sin = (x[..., : x.shape[-1] // 2].repeat_interleave(2, dim=-1) for x in (cos, sin))
        setattr(k, _PENDING, (cos, sin, rows, q_out, *weights, form.interleaved))
        return q_out.transpose(1, 2), k

    return deferred


def why_changed(attention: nn.Module) -> str | None:
    """What of an attention's code is another one than at the swap: its steps then do as the model does, and one of them says so."""
    changed = _look(attention)[1]
    if "forward" in attention.__dict__ and forward_replaced(attention):
        changed = f"the forward of a {type(attention).__name__}"
    if changed is not None:
        warn_once(f"{changed} is another function than at the swap: steps with a cache no longer rotate as they append")
    return changed


def replaced(attention: nn.Module) -> str | None:
    """Which of the functions that rotate for an attention, its class's forward among them, is not the one in its file by now."""
    return _look(attention)[0]


def _look(attention: nn.Module) -> tuple[str | None, str | None]:
    """`replaced`, and the same of functions that are in their file, but without ours around them.

    Each layer asks in each step. To look anew took ten calls of Python."""
    cls: Any = type(attention)
    names = vars(_module(cls))
    rotate = names.get(NAME)
    functions = cls.forward, rotate, getattr(rotate, "__wrapped__", None), names.get("rotate_half")
    return _looked_up(cls, functions, tuple([getattr(x, "__code__", None) for x in functions]))


@functools.lru_cache(maxsize=1024)
def _looked_up(cls: Any, functions: tuple[Any, ...], codes: tuple[Any, ...]) -> tuple[str | None, str | None]:
    """`_look`, while these functions have this code."""
    module, other = _module(cls), _replaced(cls)
    return other, other or (None if patches.is_there(module, NAME) else f"{module.__name__}.{NAME}")


def _fits(q: Tensor, k: Tensor, cos: Tensor) -> bool:
    """Whether append_kv takes them."""
    return (
        q.dtype == k.dtype
        and cos.dtype in (k.dtype, torch.float32)
        and q.stride(3) == k.stride(3) == cos.stride(-1) == 1
        and cos.dim() == 3
        and cos.shape[0] in (1, k.shape[0])
    )
