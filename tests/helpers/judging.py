"""Swaps a made-up module and judges it: beside the float model, patched after the swap, copied, in threads, restored.

The bound is what quantisation explains: the error of the same model with the weights of the swapped layers quantised here, by
formulas of this file, and their inputs too, and nothing rewritten.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import linecache
import operator
import tempfile
import threading
import types
import warnings
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from made_up_blocks import D
from made_up_modules import Case
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

import forwardpass as fp
from forwardpass.common.printing import quiet


def _doubling(forward: Any) -> Any:
    @functools.wraps(forward)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        return 2 * forward(*args, **kwargs)

    return wrapped


def _doubling_input(forward: Any) -> Any:
    @functools.wraps(forward)
    def wrapped(self: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
        return forward(self, 2 * x, *args, **kwargs)

    return wrapped


def _twice(forward: Any) -> Any:
    @functools.wraps(forward)
    def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
        return forward(self, *args, **kwargs) + forward(self, *args, **kwargs)

    return wrapped


def _elsewhere(forward: Any) -> Any:
    """A function without a text."""
    scope: dict[str, Any] = {"forward": forward}
    exec("def patched(self, *args, **kwargs):\n    return forward(self, *args, **kwargs) * 2", scope)
    return scope["patched"]


class TwiceLinear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class TwiceGELU(nn.GELU):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Twice(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


class Undo:
    """What `prepare` and `after` change outside of the model, taken back in the end."""

    def __init__(self) -> None:
        self.stack = contextlib.ExitStack()
        self._done: set[str] = set()
        self.is_first = True

    def begin(self, what: str) -> None:
        """What is done to classes is done once, though there are several models."""
        self.is_first = what not in self._done
        self._done.add(what)

    def patch(self, owner: Any, name: str, new: Any) -> None:
        if not self.is_first:
            return
        if name in vars(owner):
            self.stack.callback(setattr, owner, name, vars(owner)[name])
        else:
            self.stack.callback(lambda: name in vars(owner) and delattr(owner, name))
        setattr(owner, name, new)

    def patch_instance(self, module: nn.Module, new: Any) -> None:
        forward = module.forward
        self.patch_on(module, lambda *args, **kwargs: new(module, lambda x: forward(x), *args, **kwargs))

    def patch_on(self, module: nn.Module, forward: Any) -> None:
        before = vars(module).get("forward")
        vars(module)["forward"] = forward
        self.stack.callback(
            lambda: vars(module).pop("forward", None) if before is None else vars(module).update(forward=before)
        )

    def hook(self, handle: Any) -> None:
        self.stack.callback(handle.remove)


def _change(tensors: list[Tensor]) -> None:
    for t in tensors:
        t.mul_(2)


def _change_numpy(t: Tensor) -> None:
    if t.dtype == torch.float32:
        array = t.detach().numpy()
        array *= 2
    else:
        t.mul_(2)


class Built:
    """A case's classes, compiled from its text, which is at hand for `inspect` as a file's is."""

    def __init__(self, case: Case) -> None:
        self.case, self.text = case, case.text()
        self.filename = f"<made up {case.seed}>"
        linecache.cache[self.filename] = (len(self.text), None, self.text.splitlines(True), self.filename)
        from transformers.pytorch_utils import Conv1D

        self.scope: dict[str, Any] = {
            "__name__": "made_up", "torch": torch, "nn": nn, "F": F, "functools": functools, "operator": operator, "copy": copy,
            "types": types, "Conv1D": Conv1D, "parametrize": parametrize, "parametrizations": parametrizations, "prune": prune,
            "doubling": _doubling, "doubling_input": _doubling_input, "twice": _twice, "elsewhere": _elsewhere,
            "as_it_is": lambda f: f, "TwiceLinear": TwiceLinear, "TwiceGELU": TwiceGELU, "Twice": Twice, "change": _change,
            "change_numpy": _change_numpy, "weight_of": lambda f: f.weight, "call": lambda f, t: f(t),
        }  # fmt: skip
        exec(compile(self.text, self.filename, "exec", dont_inherit=True), self.scope)

    def model(self, undo: Undo) -> nn.Module:
        """The same values each time."""
        torch.manual_seed(self.case.seed)
        model: nn.Module = self.scope["Model"]().eval()
        for p in model.parameters():
            if p.dim() == 1:
                nn.init.normal_(p, 0.3, 0.3)
        if self.case.options["dtype"] == "bfloat16":
            model.bfloat16()
        self.act("prepare", model, undo)
        return model

    def act(self, what: str, model: nn.Module, undo: Undo) -> None:
        undo.begin(what)
        self.scope.update(patch=undo.patch, patch_instance=undo.patch_instance, hook=undo.hook)
        with torch.no_grad():
            self.scope[what](model, model.b)

    def close(self) -> None:
        linecache.cache.pop(self.filename, None)


def inputs(case: Case) -> list[Tensor]:
    """Of few rows, which a CPU computes as one product, and of many."""
    g = torch.Generator().manual_seed(case.seed + 1)
    shapes = [(2, 5, D), (3, 17, D)]
    made = [torch.randn(*shape, generator=g) for shape in shapes]
    if case.options["input"] == "transposed":
        made = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in made]
    if case.options["input"] == "sliced":
        made = [torch.cat([x, x], -1)[..., :D] for x in made]
    return [x.to(getattr(torch, case.options["dtype"])) for x in made]


def _call(model: nn.Module, x: Tensor, case: Case) -> tuple[Tensor, Tensor]:
    """(the result, what is in x then)"""
    x = x.clone(memory_format=torch.preserve_format)
    mode = getattr(torch, case.options["mode"])
    torch.manual_seed(case.seed)
    with mode(), torch.autocast("cpu", dtype=torch.bfloat16, enabled=case.options["autocast"]):
        x = x.clone()  # of that mode
        y = model(x)
    return y.detach().clone(), x.detach().clone()


def _quantised(t: Tensor, precision: str) -> Tensor:
    """What a row of 8 bits says of the values, by the formulas of the precisions."""
    wide = t.detach().float()
    if precision == "bf16":
        return wide.bfloat16().to(t.dtype)
    most = wide.abs().amax(-1, keepdim=True).clamp(min=1e-12)
    if precision == "fp8":
        return ((wide * (448 / most)).to(torch.float8_e4m3fn).float() * (most / 448)).to(t.dtype)
    return ((wide * (127 / most)).round() * (most / 127)).to(t.dtype)


def _quantised_inputs(quantises: Any, layer: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
    return tuple(map(quantises, args)), {name: quantises(t) for name, t in kwargs.items()}


def quantised_alone(model: nn.Module, names: list[str], precision: str) -> None:
    """These layers with quantised weights and inputs, and nothing rewritten."""
    for name in names:
        layer: Any = functools.reduce(
            lambda m, part: m._modules[part], name.split("."), model
        )  # whatever it says of itself
        weight: Any = layer.weight
        transposed = type(layer).__name__ == "Conv1D"
        q = _quantised(weight.t() if transposed else weight, precision)
        weight.data.copy_(q.t() if transposed else q)
        quantises = functools.partial(_quantised, precision="bf16" if precision == "w8a16" else precision)
        layer.register_forward_pre_hook(functools.partial(_quantised_inputs, quantises), with_kwargs=True)


def _errors(y: Tensor, expected: Tensor) -> tuple[float, float]:
    """(relative error of the whole, of the worst row by the mean row)"""
    if y.shape != expected.shape or y.dtype != expected.dtype:
        return float("inf"), float("inf")
    if not y.numel():
        return 0.0, 0.0
    a, b = y.double().flatten(0, -2), expected.double().flatten(0, -2)
    if bool((a.isfinite() != b.isfinite()).any()):
        return float("inf"), float("inf")
    a, b = a.nan_to_num(0, 0, 0), b.nan_to_num(0, 0, 0)
    norms = b.norm(dim=-1)
    wrong = (a - b).norm(dim=-1)
    return float((a - b).norm() / b.norm().clamp(min=1e-12)), float(wrong.max() / norms.mean().clamp(min=1e-12))


#: Of the error that quantisation alone makes, and beside it: rounding to 16 bits, another order of sums, a row's own luck.
TIMES, BESIDE = 3.0, {torch.float32: 3e-3, torch.bfloat16: 3e-2}
#: The same of layers that were calibrated on other inputs than code gives them since: 4.2 times, rewritten and one by one alike.
TIMES_CALIBRATED_BEFORE = 6.0


def _too_far(y: Tensor, expected: Tensor, alone: Tensor, times: float) -> str | None:
    """What is wrong, beyond what quantisation alone explains."""
    beside = BESIDE[torch.bfloat16 if y.dtype == torch.bfloat16 else torch.float32]
    for i, (error, bound) in enumerate(zip(_errors(y, expected), _errors(alone, expected))):
        what, bound = ("error", "error of a row")[i], min(times * bound, 1e9) + (1 + i) * beside
        if not error <= bound:
            return f"{what} {error:.3g}, quantisation explains {bound:.3g}"
    return None


@dataclass(frozen=True)
class Verdict:
    """What came of a case: "right", "refused" (right: layers stay, for a reason of their own), "raised" or "wrong"."""

    outcome: str
    text: str = ""
    rewritings: int = 0


def judge(case: Case) -> Verdict:
    """Swaps a made-up model, compares it, patches it, restores it."""
    undo, built = Undo(), Built(case)
    quiet.warn_once.cache_clear()
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            return _judge(case, built, undo, caught)
    finally:
        undo.stack.close()
        built.close()


def _state(model: nn.Module) -> dict[str, Any]:
    return {"calls": getattr(model.b, "calls", 0), "seen": getattr(model.b, "seen", torch.zeros(1)).clone()}


def _same_state(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return a["calls"] == b["calls"] and torch.equal(a["seen"], b["seen"])


def _judge(case: Case, built: Built, undo: Undo, caught: list[Any]) -> Verdict:
    xs, o = inputs(case), case.options
    precision = o["precision"]
    calibrates = o["calibrate"] and precision == "int8" and not _counts(case)
    try:
        model, float_model, alone = built.model(undo), built.model(undo), built.model(undo)
        expected = [_call(float_model, x, case) for x in xs]
    except Exception as e:  # a module that does not run is none
        return Verdict("no module", f"{type(e).__name__}: {e}")
    before = _state(model)
    try:
        report = fp.swap(
            model,
            {"b.**": precision, "head": precision},
            calibrate=[xs[1].clone(), xs[0].clone()] if calibrates else None,
            attention=False,
        )
    except Exception as e:
        return Verdict("raised", f"at the swap, {type(e).__name__}: {e}")
    if not calibrates and not _same_state(before, _state(model)):
        return Verdict("wrong", "the swap ran the model, and left traces")
    names = [s.fqn for s in report.swapped if not s.fqn.endswith("in_proj")]
    rewritings = len(report.joined) + len(report.mlps) + sum(s.activation is not None for s in report.swapped)
    quantised_alone(alone, names, precision)
    refused = any(s.reason.code not in ("too_small", "lm_head") for s in report.skipped)

    def compare(when: str) -> Verdict | None:
        times = TIMES_CALIBRATED_BEFORE if calibrates and when != "swapped" else TIMES
        for x, (y, after_x) in zip(xs, expected):
            y_alone, _ = _call(alone, x, case)
            try:
                got, got_x = _call(model, x, case)
            except Exception as e:
                return Verdict("raised", f"{when}, {type(e).__name__}: {e}", rewritings)
            if text := _too_far(got, y, y_alone, times):
                said = [str(w.message) for w in caught if issubclass(w.category, UserWarning)]
                if any("nn.Linear.forward is another function" in s for s in said):
                    return Verdict("said", "", rewritings)
                return Verdict("wrong", f"{when}: {text}; said: {[s[:90] for s in said]}", rewritings)
            if not torch.equal(got_x, after_x) and (got_x - after_x).norm() > 0.1 * after_x.norm():
                return Verdict("wrong", f"{when}: its input is another one then", rewritings)
        return None

    if verdict := compare("swapped"):
        return verdict
    if not _same_state(_state(float_model), _state(model)):
        return Verdict("wrong", "what it counts is something else", rewritings)
    if case.after:
        for each in (float_model, alone, model):
            try:
                built.act("after", each, undo)
            except Exception as e:
                if each is model:
                    return Verdict("raised", f"what is done after the swap, {type(e).__name__}: {e}", rewritings)
                return Verdict("no module", f"after, {type(e).__name__}: {e}")
        try:
            expected[:] = [_call(float_model, x, case) for x in xs]
        except Exception as e:
            return Verdict("no module", f"after, {type(e).__name__}: {e}")
        if verdict := compare("after the swap"):
            return verdict
    if verdict := _then(case, model, xs) or _loaded(case, built, undo, model, xs):
        return verdict
    return _restored(case, built, undo, model, float_model, xs) or Verdict(
        "refused" if refused else "right", "", rewritings
    )


def _counts(case: Case) -> bool:
    """Whether a call leaves something behind."""
    return any("counter" in d or "buffer" in d for d in case.did)


def _then(case: Case, model: nn.Module, xs: list[Tensor]) -> Verdict | None:
    how = case.options.get("then")
    if how == "deepcopy":
        other = copy.deepcopy(model)
        for x in xs:
            if not torch.equal(_call(other, x, case)[0], _call(model, x, case)[0]):
                return Verdict("wrong", "a copy gives something else")
    if how == "threads" and not model.training:
        mode = getattr(torch, case.options["mode"])
        expected, wrong = [], []
        with mode():
            expected = [model(x.clone()) for x in xs]

        def run(x: Tensor, y: Tensor) -> None:
            with mode():
                for _ in range(5):
                    if not torch.equal(model(x.clone()), y):
                        wrong.append(x)

        if not case.options["autocast"] and not _counts(case):
            threads = [threading.Thread(target=run, args=pair) for pair in zip(xs, expected) for _ in range(2)]
            for t in threads:
                t.start()
            for t in threads:
                t.join()
        if wrong:
            return Verdict("wrong", "threads mix")
    return None


def _loaded(case: Case, built: Built, undo: Undo, model: nn.Module, xs: list[Tensor]) -> Verdict | None:
    """What is saved, and loaded into a model of the same classes, gives what it gave."""
    if case.seed % 3 or case.after or _counts(case):
        return None
    with tempfile.TemporaryDirectory() as folder:
        try:
            fp.save_pretrained(model, folder, model_card=False)
            other = fp.load_pretrained(folder, model=built.model(undo))
        except (ValueError, RuntimeError):  # refused, in a sentence
            return None
    for x in xs:
        y, expected = (_call(m, x, case)[0] for m in (other, model))
        if max(_errors(y, expected)) > BESIDE[torch.bfloat16 if y.dtype == torch.bfloat16 else torch.float32]:
            return Verdict("wrong", "loaded from a folder, it gives something else")
    return None


def _restored(
    case: Case, built: Built, undo: Undo, model: nn.Module, float_model: nn.Module, xs: list[Tensor]
) -> Verdict | None:
    """As the float model is, to the bit."""
    try:
        fp.restore(model)
    except RuntimeError as e:
        if "is not swapped" in str(e):
            return None
        return None if case.undo is None or case.after else Verdict("wrong", f"restore: {e}")
    if case.after or _counts(case):
        return None
    for x in xs:
        y, got = _call(float_model, x, case)[0], _call(model, x, case)[0]
        if not (
            torch.equal(y, got) or ((y.isnan() == got.isnan()).all() and torch.equal(y.nan_to_num(), got.nan_to_num()))
        ):
            return Verdict("wrong", "restored, it gives other bits")
    return None


def table(verdicts: list[tuple[Case, Verdict]]) -> str:
    """Counts by what was done to the modules, and by what came of it."""
    outcomes = ("right", "refused", "said", "raised", "wrong", "no module")
    counts: dict[str, Counter[str]] = {}
    for case, verdict in verdicts:
        of_kind = counts.setdefault(case.kind.partition(":")[0], Counter())
        of_kind[verdict.outcome] += 1
        of_kind["rewritten"] += verdict.rewritings > 0
    lines = [f"{'':16}" + "".join(f"{o:>11}" for o in ("modules", *outcomes, "rewritten"))]
    total: Counter[str] = sum(counts.values(), Counter())
    for kind, of_kind in [*sorted(counts.items()), ("all", total)]:
        row = (sum(of_kind[o] for o in outcomes), *(of_kind[o] for o in outcomes), of_kind["rewritten"])
        lines.append(f"{kind:16}" + "".join(f"{n:>11}" for n in row))
    return "\n".join(lines)
