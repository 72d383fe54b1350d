"""Which norm a module computes, in the words of `norm_quantize`: of models' classes by their code, of torch's by name."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

from torch import nn

from .. import patches
from ..class_source import body_of, dump, is_as_written, named, owner_of_forward, tree_of_module


@dataclass(frozen=True)
class NormFormula:
    """Along the last dimension, with the module's `weight` and `bias`, if any."""

    kind: str  #: "rms" or "layer"
    eps: str  #: the attribute that is added to the mean square
    offset: float = 0.0  #: what is added to the weight


_LLAMA = dump(
    """
    input_dtype = hidden_states.dtype
    hidden_states = hidden_states.to(torch.float32)
    variance = hidden_states.pow(2).mean(-1, keepdim=True)
    hidden_states = hidden_states * torch.rsqrt(variance + self.variance_epsilon)
    return self.weight * hidden_states.to(input_dtype)
    """
)
_T5 = dump(
    """
    variance = hidden_states.to(torch.float32).pow(2).mean(-1, keepdim=True)
    hidden_states = hidden_states * torch.rsqrt(variance + self.variance_epsilon)
    if self.weight.dtype in [torch.float16, torch.bfloat16]:
        hidden_states = hidden_states.to(self.weight.dtype)
    return self.weight * hidden_states
    """
)
_GEMMA = dump(
    """
    output = self._norm(x.float())
    output = output * (1.0 + self.weight.float())
    return output.type_as(x)
    """
)
_GEMMAS_NORM = dump("return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)")

_CLASSES = {
    "torch.nn.modules.normalization.LayerNorm": NormFormula("layer", "eps"),
    "torch.nn.modules.normalization.RMSNorm": NormFormula("rms", "eps"),
    "timm.layers.norm.LayerNorm": NormFormula("layer", "eps"),
}


def written_formula(norm: nn.Module) -> NormFormula | None:
    """That of a module whose class's code is one of the forms that models have, else None."""
    owner = owner_of_forward(type(norm))
    return _written_formula(owner, patches.below(owner, "forward"), vars(owner).get("_norm"))


@functools.lru_cache(maxsize=1024)
def _written_formula(owner: Any, forward: Any, _norm: Any) -> NormFormula | None:
    """By what the class has now, as somebody may put other functions into it."""
    tree = named(tree_of_module(owner), owner.__name__)
    code = body_of(named(tree, "forward"))
    if not is_as_written(owner, "forward"):
        return None
    if code in (_LLAMA, _T5):
        return NormFormula("rms", "variance_epsilon")
    if code == _GEMMA and body_of(named(tree, "_norm")) == _GEMMAS_NORM and is_as_written(owner, "_norm"):
        return NormFormula("rms", "eps", 1.0)
    return None


def norm_formula(norm: nn.Module) -> NormFormula | None:
    """That of a module of either kind, where it is along the last dimension alone and epsilon is a number; else None."""
    cls = type(norm)
    named = _CLASSES.get(f"{cls.__module__}.{cls.__qualname__}")
    formula = named if named and is_as_written(owner_of_forward(cls), "forward") else written_formula(norm)
    if formula is None or not isinstance(getattr(norm, formula.eps, None), float):
        return None
    return formula if len(getattr(norm, "normalized_shape", (0,))) == 1 else None
