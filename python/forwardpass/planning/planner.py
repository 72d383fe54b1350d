"""`fp.plan`: for each layer the fastest precision that is measured to be safe and measured to be faster."""

from __future__ import annotations

import math
import os
import time
from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch import nn

from ..common import environment
from ..common.batches import Fingerprint, Output, device_of, evaluating, several
from ..common.models.decoding import Decoding
from ..common.models.modules import hooked, plain_module, tensor_bytes
from ..common.printing.text import megabytes
from ..common.timing import Timing, Track, interleave, untracked
from ..dispatch import Reason
from ..integrations.tensor_parallel import refuse_divided
from ..integrations.timesteps import Timesteps
from ..proofs.walker import all_leaves
from ..swap import keras_layers, originals
from ..swap.attention.attention_modules import decide_attention
from ..swap.attention.kv_cache import decide_kv_cache
from ..swap.attention.projections import Projections
from ..swap.attention.unpadded_encoders import decide_unpadding
from ..swap.config import Config, Options
from ..swap.decision import Decision, SwappedBefore, refuse_model
from ..swap.plan import Plan
from ..swap.precision import LayerPrecision
from ..swap.rules import Context, may_fold
from ..swap.swapping import planned
from ..swap.verdicts import prove
from . import evidence
from .candidates import by_step
from .candidates.attention_rows import NOT_OF_LAYERS, Attention, AttentionLayer, attention_candidates
from .candidates.caches import kv_cache_candidates, with_cache
from .candidates.eligible import eligible
from .candidates.measure import (
    CALIBRATED,
    ROUNDS,
    WARMUP,
    Arguments,
    Candidate,
    Layer,
    Measurements,
    Measurer,
    Subject,
    Workload,
    calibrated_arguments,
    find_candidate,
    identity,
)
from .candidates.together import Saved, options_of, pairs_of, time_pairs, units_of
from .choose import Choice, Frontier, Option
from .criterion import PSNR, SSIM, Criterion, Metric
from .pictures import Images, drawing, refuse_others
from .verify import Verdict, Verifier

if TYPE_CHECKING:
    from typing_extensions import Unpack

#: Rotated ones are tried in the layers where outliers show (`_refuse_rotation`), with calibration where there is one.
CANDIDATES = ("fp8", "int8", f"int8{CALIBRATED}", "int8_rotated", f"int8_rotated{CALIBRATED}", "w8a16", "bf16")
TARGETS = ("latency", "memory")
#: Whole plans that are run before the best of those that held the budget is taken; and changes of one layer that are tried on it.
ATTEMPTS, CHANGES = 10, 8
#: Of a decoder, whose turn is a prompt and all its steps.
DECODING_ROUNDS = 5
#: A change of one layer is tried where the predicted error is at most so many times what a plan was seen to hold.
BEYOND = 1.25
#: The search ends where the next plan to be tried could save no more than this share of the layers' cost.
WORTH = 0.002
_NOT_REACHED = Reason(
    "not_reached", "no batch of `batches` reaches it, so that nothing would hold it to the budget", ""
)
_NEVER_CALLED = Reason("never_called", "no batch of `shapes` reaches it", "")


def plan(
    model: nn.Module,
    batches: Iterable[Any],
    config: Config | None = None,
    *,
    candidates: Iterable[str] | None = None,
    max_error: float | None = None,
    min_cosine: float | None = None,
    metric: Metric | None = None,
    tolerance: float | None = None,
    max_perplexity_increase: float | None = None,
    min_psnr: float | None = None,
    min_ssim: float | None = None,
    images: Images | None = None,
    target: str = "latency",
    shapes: Iterable[Any] | None = None,
    output: Output | None = None,
    resume: str | os.PathLike[str] | None = None,
    progress: Track = untracked,
    **options: Unpack[Options],
) -> Plan:
    """Measures what every candidate precision costs and brings on every layer, and plans the fastest model within a budget.

    Every candidate is timed on every form of layer, at the shapes it has in `shapes`, quantisation included, and compared with
    every layer on its input; one that is not faster is refused, whatever its error, and so is one with a larger error than another
    that takes no longer. The fastest of the others are run together, on all of `batches`; the samples that come out worst are those
    that bind the budget, and on them each is put into its layer, alone, for the error at the model's output. A plan is then the
    least total time whose predicted error, the sum of the squared errors of its layers, is within the budget; it is run on all of
    `batches` and tightened, or loosened, until the fastest that holds is found, and changed layer by layer where that still holds.

    Args:
        model: not swapped. It is left as it was, after errors and interrupts too; one layer is replaced at a time, and in the
            end all of the plan's: the originals and their 8- or 16-bit replacements are the most there is at any time.
        batches: real input to hold the budget on (see `forwardpass.common.batches`), other than calibrate's. Their outputs are
            kept on the host. Errors of single layers are measured on some of them, of 32 samples or a batch the worst quarter.
            A layer that none of them reaches stays as it is: nothing would hold it to the budget.
        candidates: of "fp8", "int8", "int8+calibrated", "int8_rotated", "int8_rotated+calibrated", "w8a16", "bf16"; None: all, the
            calibrated ones with calibrate= alone. A rotated one is timed in layers in which outliers show: where it errs less on
            the layer's own input than the same without rotation.
        max_error: the most relative L2 error of the output, worst of the batches; or
        min_cosine: the least cosine of an output sample with the model's own; or
        metric, tolerance: metric(output, reference, batch) is at most tolerance in every batch; or
        max_perplexity_increase: of a decoder, the share by which the perplexity of all batches together may rise: 0.005 is half a
            per cent; or
        min_psnr, min_ssim: of what images= draws, the least PSNR of a picture, in dB, or the least SSIM. Exactly one of the six.
        images: images(model, batch), as `fp.parity` takes it: draws pictures with the model, which are then the output that any
            criterion bounds. `batches`, `shapes` and `calibrate` are what it draws from; swaps of the plan take it as forward=.
        target: "latency" or "memory": what is minimised; a candidate that does not reduce it is refused.
        shapes: batches of the shapes to time on, and of decoders also `fp.Decoding`s: prompts of a length, then steps of some
            tokens, each timed apart, steps with weights from memory. A candidate that makes steps slower is refused, whatever it
            makes of prompts. None: the first of `batches`, of a decoder one prompt and its steps.
        attention: "auto", True or False, as `fp.Config` has it; or what attention may be computed in, one or several of "int8" and
            what else `fp.ops.attention_8bit` takes. Each module's is then a layer of the plan, timed on the calls of `shapes`.
        crossover: of such attention, as `fp.Config` has it; None: that of the shortest call of `shapes` from which on all gain, or
            fewer keys where those are known to be enough. The plan has the number.
        kv_cache: what a decoder's cache of keys and values may become, one or several of "auto", "int8" and "fp8" (see
            `fp.Config`): each is tried with the chosen layers, by the perplexity of steps that read it. The one whose steps are
            fastest is planned; None: it stays.
        output: output(result), where the default does not fit.
        resume: a file that measurements are written to as they are made, and read from where it exists: after an interrupt, or
            for another budget.
        config, options: a `fp.Config`, or its fields unpad, include, exclude, calibrate, forward, and those above: calibrate has
            the batches for the calibrated candidate, and replaying the plan takes the same again. Layers are timed on the rows that
            `shapes` have, padding included, and whole plans as they run. Layers too small for a swap to touch by default are
            measured here.
        progress: progress(what, steps) is called as each step begins, and what it returns after each part of it.

    Returns:
        the plan, with its `evidence`; `print` shows the table. Where nothing holds the budget, or nothing is faster, it has no
        layers and says why: the model as it is.

    Raises:
        TypeError: `model` is no nn.Module, or `batches` is one batch and no iterable of them.
        ValueError: not exactly one criterion is given, or one of pictures without images=; images= as in `fp.parity`; an unknown
            candidate, target or attention=; no batch; a file at `resume` of another measurement; the model is of keras; attention
            is to be weighed in 8 bits, and fp.swap can swap none.
        RuntimeError: the model is swapped already.

    Example:
        >>> plan = fp.plan(model, batches, min_cosine=0.99)
        >>> plan.save("plan.json")
        >>> report = fp.swap(model, plan="plan.json")
    """
    began = time.perf_counter()
    criterion = Criterion.of(max_error, min_cosine, metric, tolerance, max_perplexity_increase, min_psnr, min_ssim)
    if criterion.kind in (PSNR, SSIM) and images is None:
        raise ValueError(f"{criterion.kind}= bounds pictures, and nothing draws them: pass images=fn(model, batch)")
    if target not in TARGETS:
        raise ValueError(f"target is one of {', '.join(TARGETS)}, not {target!r}")
    model = plain_module("plan", model)
    kv_cache = options.pop("kv_cache", config.kv_cache if config else None)
    config, in_8_bits, crossover = _config_of(config, **options)
    attention, calibrate, forward = config.attention, config.calibrate, config.forward
    if images is not None:
        forward, output = drawing(images, forward, output)
    if keras_layers.roots(model):
        raise ValueError(
            "plan measures no layers of keras: choose a precision for them, as fp.swap(model, precision) takes it"
        )
    refuse_divided("plan", model, "plan for the whole model, in one process")
    with Projections(model):
        leaves = all_leaves(model)
        SwappedBefore.of(model).refuse()
        refuse_model(model, leaves)
        samples = list(several("batches", batches))
        default = Decoding.default_of(model)
        timed = list(several("shapes", shapes)) if shapes is not None else [default] if default else samples[:1]
        calibration = [] if calibrate is None else list(several("calibrate", calibrate))
        tried = _candidates(candidates, calibrate is not None)
        caches = kv_cache_candidates(kv_cache, criterion, any(isinstance(x, Decoding) for x in timed))
        context = Context(model, config.included, config.excluded)
        attending = decide_attention(context, attention)
        everywhere, caching = attending, decide_kv_cache(model, attending, None)
        if caches or in_8_bits:
            everywhere = decide_attention(Context(model, context.include, context.exclude), True)
        if caches:
            caching = decide_kv_cache(model, everywhere, caches[0])  # refuses
        cached = tuple(leaf.fqn for leaf in everywhere.swapped) if caches else ()
        precisions = tuple((leaf, next(iter(tried.values()))) for leaf in leaves)
        unpadding = decide_unpadding(context, leaves, attending, config.unpad)
        decision = Decision(context, tuple(leaves), precisions, everywhere, unpadding, caching, (), ())
        verdicts = prove(decision, config.unpad, samples[0], forward)
        decision = verdicts.applied(decision)
        leaves, unpads = [leaf for leaf, _ in decision.swapped], decision.unpadding.planned
        attending = attending if verdicts.attention is None else decision.attention
        swapped = [leaf.fqn for leaf in attending.swapped]
        if in_8_bits and not decision.attention.swapped:
            reason = next((s.reason for s in decision.attention.skipped), "it has none")
            raise ValueError(f"attention={in_8_bits[0]!r} weighs attention that fp.swap can swap, and this {type(model).__name__} "
                             f"has none: {reason}; plan it without")  # fmt: skip
        eights = Attention(decision.attention.swapped, in_8_bits, crossover, tried)

        device = environment.device(device_of(model))
        asked = (*in_8_bits, crossover) if in_8_bits else ()
        identity_of_run = identity(model, leaves, tried, criterion, context, asked, device, samples, timed, calibration)
        measurements = Measurements(resume, identity_of_run)

        subject = Subject(model, criterion, forward, output, verdicts)
        workload = Workload(subject, timed)
        reached: set[str] = set()
        loop = by_step.Loop()
        reaching = hooked(((leaf.fqn, leaf.module) for leaf in leaves), before=lambda fqn, *_: reached.add(fqn))
        with reaching, loop.noted(model):
            references = subject.reference(samples, progress)
        if images is not None:
            refuse_others(references[0], next(subject.outputs(samples[:1])))
        calls = workload.calls(leaves)
        never = {
            x.fqn: _NEVER_CALLED if not calls[x.fqn] else _NOT_REACHED if x.fqn not in reached else None for x in leaves
        }
        layers = [
            Layer(leaf, calls[leaf.fqn], tensor_bytes([leaf.module]), {
                **{name: Candidate(never[leaf.fqn] or eligible(leaf, context, p)) for name, p in tried.items()},
                **{name: Candidate(NOT_OF_LAYERS) for name in in_8_bits if name not in tried},
            }, folds=any(may_fold(leaf, context, p.precision) for p in tried.values()))
            for leaf in leaves
        ]  # fmt: skip
        arguments = calibrated_arguments(subject, layers, tried, calibration, progress)
        measurer = Measurer(subject, tried, arguments, measurements, workload)
        measurer.local_errors(layers, samples[0], progress)
        for layer in layers:
            _refuse_rotation(layer, tried)
        measurer.time(layers, progress)
        if eights.layers:
            all_swapped = planned(model, [], [x.leaf.fqn for x in eights.layers], None, unpads)
            with subject.swapped(all_swapped, {}):
                eights.measure(measurer, samples[0], progress)
        layers += eights.layers
        pairs = pairs_of(layers) if target == "latency" else []
        units = units_of(layers, pairs, time_pairs(pairs, measurer, progress))
        for layer, saved in ((layer, saved) for unit, saved in units for layer in unit):
            _refuse_costly(layer, target, saved, workload)
            _refuse_dominated(layer, target)
        by_fqn = {leaf.fqn: leaf for leaf in leaves}

        specifications = {x.leaf.fqn: x.bits for x in eights.layers}

        def plan_of(names: Mapping[str, str | None], timesteps: Timesteps | None = None) -> Plan:
            pairs = [(by_fqn[fqn], tried[name]) for fqn, name in names.items() if name and fqn in by_fqn]
            bits = {fqn: specifications[fqn][name] for fqn, name in names.items() if name and fqn in specifications}
            batches_fingerprint = Fingerprint().add(calibration).value if any(p.calibrated for _, p in pairs) else None
            if not (pairs or bits):
                return planned(model, [], [], None, None)
            attention = dict.fromkeys((*swapped, *bits))
            folded = [x.leaf.fqn for x in layers if x.folds and not names.get(x.leaf.fqn)]
            return planned(model, pairs, attention, batches_fingerprint, unpads, None, bits, timesteps, folded)

        def alone(layer: Layer, name: str) -> Plan:
            fqn = layer.leaf.fqn
            if isinstance(layer, AttentionLayer):
                names, bits = dict.fromkeys((*swapped, fqn)), {fqn: layer.bits[name]}
                return planned(model, [], names, None, unpads, bits=bits)
            return planned(model, [(layer.leaf, tried[name])], swapped, None, unpads)

        verifier = Verifier(subject, arguments, samples, references)
        fastest = {
            x.leaf.fqn: min(x.open(), key=lambda n: _cost(x.candidates[n], target), default=None) for x in layers
        }
        if any(fastest.values()):
            verifier.run(plan_of(fastest), to_the_end=True)
        indices, worst = verifier.binding()
        surroundings = planned(model, [], swapped, None, unpads)
        measurer.output_errors(layers, [samples[i] for i in indices], worst, surroundings, alone, progress)
        layer_options = {
            layer.leaf.fqn: [
                (None, Option(_cost(layer, target), 0.0)),
                *(
                    (name, Option(_cost(c, target), c.output_mean))
                    for name in layer.open()
                    for c in [layer.candidates[name]]
                ),
            ]
            for layer in layers
        }
        together = [
            options_of(unit, layer_options, {n: workload.sum_of(p) for n, p in saved.items()}) for unit, saved in units
        ]
        options_of_units = [[option for _, option in by_names] for by_names in together]
        front = Frontier(options_of_units)

        def names_of(choice: Choice) -> dict[str, str | None]:
            names_of_units = (by_names[o][0] for by_names, o in zip(together, choice.options))
            names = {
                x.leaf.fqn: name for (unit, _), names in zip(units, names_of_units) for x, name in zip(unit, names)
            }
            return {layer.leaf.fqn: names[layer.leaf.fqn] for layer in layers}

        as_it_is = Choice((0,) * len(together), sum(_cost(layer, target) for layer in layers), 0.0, 0.0)
        choice, attempts = _search(front, as_it_is, criterion, lambda c: verifier.run(plan_of(names_of(c))), progress)
        timesteps, tried_range = None, None
        quickest = front.choice(len(front) - 1)
        slower_than_it = target == "latency" and choice.options != quickest.options
        if parts := loop.parts(len(samples)) if slower_than_it else []:
            plans = [plan_of(names_of(quickest), part.timesteps) for part in parts]
            few, their_own = ([x[i] for i in indices] for x in (samples, references))
            by_step.measure(parts, plans, measurer, few, their_own, worst, progress)
            tried_range = by_step.range_of(parts)
        if tried_range is not None:
            within = Frontier(tried_range.scaled(options_of_units))
            in_range, more = _search(
                within,
                as_it_is,
                criterion,
                lambda c: verifier.run(plan_of(names_of(c), tried_range.timesteps)),
                progress,
            )
            attempts += more
            if in_range.cost < choice.cost:
                choice, front, timesteps = in_range, within, tried_range.timesteps
    latency, phases = _latency(subject, plan_of(names_of(choice), timesteps), arguments, workload, progress)
    slower = target == "latency" and _is_slower(latency, phases)
    if slower:
        choice, timesteps = as_it_is, None
    names = names_of(choice)
    without, result = {} if slower else phases, plan_of(names, timesteps)
    result, cache_results = with_cache(
        result, without, cached, caches, verifier, lambda p: _latency(subject, p, arguments, workload, progress)[1]
    )
    after = sum(x.candidates[name].bytes if (name := names[x.leaf.fqn]) else x.bytes for x in layers)
    sizes = (sum(x.bytes for x in layers), after) if any(names.values()) else None
    return replace(
        result,
        evidence={
            "versions": environment.versions(),
            "device": device,
            "criterion": {"kind": criterion.kind, "bound": criterion.bound},
            "target": target,
            "candidates": list(dict.fromkeys((*tried, *in_8_bits))),
            "batches": {"verified": len(samples), "measured": len(indices), "calibrated": len(calibration)},
            "result": _result(layers, criterion, attempts, latency, phases, sizes, slower),
            "layers": [evidence.row(layer, name, target) for layer, name in zip(layers, names.values())],
            "kv_cache": cache_results,
            "timesteps": by_step.evidence(parts, tried_range, timesteps),
            "pairs": [{"layers": [x.leaf.fqn for x in u], "saved_ms": saved} for u, saved in units if len(u) > 1],
            "blocks": evidence.blocks(layers, names, lambda x: _cost(x, target)),
            "predicted": {"before": as_it_is.cost, "after": choice.cost, "gap": choice.gap, "error": choice.error},
            "attempts": attempts,
            "frontier": evidence.thinned(front),
            "latency_ms": {name: t.to_json() for name, t in latency.items()},
            "phases_ms": {name: {p: t.to_json() for p, t in x.items()} for name, x in phases.items()},
            "seconds": time.perf_counter() - began,
            "measured": ["layers", "pairs", "attempts", "latency_ms", "phases_ms", "seconds"],
        },
    )


def _config_of(config: Config | None, **options: Unpack[Options]) -> tuple[Config, tuple[str, ...], int | None]:
    """(the config without them, the dtypes of attention in 8 bits that are weighed, their crossover). ValueError where it says what
    a plan is there to find."""
    defaults = config or Config()
    attention = options.pop("attention", defaults.attention)
    crossover = options.pop("crossover", defaults.crossover)
    in_8_bits = attention_candidates(attention)
    Config(attention=in_8_bits[0] if in_8_bits else "auto", crossover=crossover)  # refuses
    options |= {"attention": "auto" if in_8_bits else attention, "crossover": None}
    config = Config.of(config, **options)
    for name in ("precision", "plan", "strict", "keep", "timesteps"):
        if getattr(config, name) != getattr(Config(), name):
            raise ValueError(f"plan takes no {name}=: it belongs to the fp.swap that carries the plan out")
    return config, in_8_bits, crossover


def _candidates(names: Iterable[str] | None, calibrates: bool) -> dict[str, LayerPrecision]:
    if isinstance(names, str):
        names = [names]
    known = (
        [n for n in CANDIDATES if n != "int8_rotated"] if calibrates else [n for n in CANDIDATES if CALIBRATED not in n]
    )
    selection = known if names is None else list(names)
    if not selection or not all(isinstance(n, str) for n in selection):
        raise ValueError(f"candidates names at least one of {', '.join(CANDIDATES)}, and is {names!r}")
    tried = {name: find_candidate(name) for name in selection}
    if calibrates != any(p.calibrated for p in tried.values()):
        raise ValueError(f"none of the candidates {', '.join(tried)} takes calibration: drop calibrate=, or add int8{CALIBRATED}"
                         if calibrates else f"a candidate {CALIBRATED} takes batches to calibrate on: pass calibrate=, or leave "
                         "it out")  # fmt: skip
    return tried


def _cost(x: Layer | Candidate, target: str) -> float:
    """The lower quartile of the time: what else runs on the machine only adds to it."""
    if target == "memory":
        return float(x.bytes)
    return x.ms.low if x.ms else 0.0


def _refuse_costly(layer: Layer, target: str, saved: Saved, workload: Workload) -> None:
    """saved: by the layer and another one as one product; half of it is the layer's."""
    for name, c in layer.candidates.items():
        half = {phase: max(ms, 0.0) / 2 for phase, ms in saved.get(name, {}).items()}
        if c.refusal is None and _cost(c, target) - workload.sum_of(half) >= _cost(layer, target):
            code = "slower" if target == "latency" else "larger"
            c.refusal = Reason(
                code, f"it is no gain: {_cost_text(c, target)}, {_cost_text(layer, target)} as it is", ""
            )
        for phase, ms in layer.phases.items() if target == "latency" and c.refusal is None else ():
            if phase.startswith("decode") and c.phases[phase].low - half.get(phase, 0.0) >= ms.low:
                text = f"it makes a step slower: {c.phases[phase].low:.3g} ms, {ms.low:.3g} as it is"
                c.refusal = Reason("slower_step", text, "")


def _refuse_rotation(layer: Layer, tried: Mapping[str, LayerPrecision]) -> None:
    """Where no outliers show: the same kind of layer errs no more without the rotation, which takes time besides."""
    open_candidates = [(layer.candidates[name], tried[name]) for name in layer.open()]
    for c, p in open_candidates:
        plain = [
            other.error
            for other, q in open_candidates
            if q.rotate is None and q.precision.module is p.precision.module and other.error is not None
        ]
        if p.rotate is not None and c.error is not None and plain and min(plain) <= c.error:
            c.refusal = Reason("no_outliers", "no outliers show at its input: without rotation it errs no more", "")


def _refuse_dominated(layer: Layer, target: str) -> None:
    """A candidate beside which another one errs less at the layer and takes no longer, as far as their quartiles tell, as int8
    calibrated does beside int8. It would cost a pass of the model to know what it brings at the output.
    """
    for name in layer.open():
        c = layer.candidates[name]
        for other in layer.open():
            o = layer.candidates[other]
            alike = o.ms.low <= c.ms.median if target == "latency" and o.ms and c.ms else o.bytes <= c.bytes
            if alike and o.error is not None and c.error is not None and o.error < c.error:
                c.refusal = Reason(
                    "dominated", f"{other} takes no longer and errs less: {o.error:.1e}, not {c.error:.1e}", ""
                )


def _cost_text(x: Layer | Candidate, target: str) -> str:
    return f"{_cost(x, target):.3g} ms" if target == "latency" else f"{x.bytes} bytes"


def _search(
    front: Frontier, as_it_is: Choice, criterion: Criterion, run: Callable[[Choice], Verdict], progress: Track
) -> tuple[Choice, list[dict[str, Any]]]:
    """The cheapest choice that is seen to hold the budget, and all that were run.

    The predicted error is a mean over samples and the budget bounds the worst, measured: the ratio of the two, from the last
    choice that was run, says which to run next; after each that fails in a row it is aimed a tenth lower.
    """
    holds, fails, best = (-1 if any(front.choice(0).options) else 0), len(front), as_it_is
    ratio, aim = math.nan, criterion.budget
    attempts: list[dict[str, Any]] = []
    advance = progress("verifying plans", ATTEMPTS + CHANGES)

    def hold(choice: Choice) -> bool:
        nonlocal ratio, best
        verdict = run(choice)
        ok = verdict.worst <= criterion.budget  # False for NaN
        attempts.append({
            "cost": choice.cost,
            "predicted": choice.error,
            "measured": verdict.mean if math.isfinite(verdict.mean) else None,
            "value": criterion.shown(verdict.worst) if math.isfinite(verdict.worst) else None,
            "batches": verdict.batches,
            "holds": ok,
        })  # fmt: skip
        if verdict.worst > 0 and choice.error > 0:
            ratio = verdict.worst / choice.error
        if ok:
            best = choice
        advance()
        return ok

    while len(attempts) < ATTEMPTS and fails - holds > 1:
        if attempts and front.bounds[max(holds, 0)] - front.bounds[fails - 1] < WORTH * as_it_is.cost:
            break
        i = bisect_right(front.errors, aim / ratio) - 1 if ratio > 0 else fails - 1
        if not holds < i < fails:  # this side of what holds, or beyond what fails
            i = (holds + fails) // 2 if len(attempts) > 1 else min(max(i, holds + 1), fails - 1)
        if hold(front.choice(i)):
            holds, aim = i, criterion.budget
        else:
            fails, aim = i, 0.9 * aim
    # What the worst sample comes to differs by tens of per cent between plans of one predicted error.
    predictions = [a["predicted"] for a in attempts if a["holds"]]
    tried: set[tuple[int, ...]] = set()
    for _ in range(CHANGES if predictions else 0):
        changes = [
            c
            for c in front.changes(best)
            if c.options not in tried
            and c.error <= BEYOND * max(predictions)
            and best.cost - c.cost > WORTH * as_it_is.cost
        ]
        if not changes:
            break
        choice = min(changes, key=lambda c: (c.error - best.error) / (best.cost - c.cost))
        tried.add(choice.options)
        hold(choice)
    return best, attempts


def _latency(
    subject: Subject, plan: Plan, arguments: Arguments, workload: Workload, progress: Track
) -> tuple[dict[str, Timing], dict[str, dict[str, Timing]]]:
    """The model as it is and under the plan, in turn: `before`, and `after` where there are layers; of decoders also by phase."""
    model, device = subject.model, device_of(subject.model)
    records: dict[str, dict[str, list[float]]] = {"before": {}}
    rounds, warmup = (DECODING_ROUNDS, 1) if workload.decodings else (ROUNDS, WARMUP)
    advance = progress("timing the model", rounds + warmup)

    def timed(calls: Mapping[str, Callable[[], None]]) -> tuple[dict[str, Timing], dict[str, dict[str, Timing]]]:
        latency = interleave(calls, device, rounds=rounds, warmup=warmup, on_round=advance)
        # the first call of a turn is not timed, and is no slower than the others but in the first turns
        phases = {n: {p: Timing.of(ms[len(ms) // 4 :]) for p, ms in x.items()} for n, x in records.items()}
        return latency, phases

    if not plan.layers and not plan.attention_8bit and plan.kv_cache is None:
        with evaluating(model):
            return timed({"before": lambda: workload.run(records["before"])})
    records["after"] = {}
    with subject.swapped(plan, arguments, keep="device"), evaluating(model):
        swapped = originals.find(model)
        assert swapped is not None
        in_place = [True]

        def exchanged(after: bool) -> Callable[[], None]:
            def exchange_and_call() -> None:
                if in_place[0] is not after:  # once a turn, in the call that is not timed
                    (swapped.put if after else swapped.undo)(model)
                    in_place[0] = after
                workload.run(records["after" if after else "before"])

            return exchange_and_call

        try:
            return timed({"before": exchanged(False), "after": exchanged(True)})
        finally:
            if not in_place[0]:
                swapped.put(model)


def _is_slower(latency: Mapping[str, Timing], phases: Mapping[str, Mapping[str, Timing]]) -> bool:
    """Whether the whole model, or a step of a decoder, takes no less time under the plan."""
    if "after" not in latency:
        return False
    before, after = ({"": latency[n], **phases[n]} for n in ("before", "after"))
    return any(after[p].low >= t.low for p, t in before.items() if not p.startswith("prefill"))


def _result(
    layers: list[Layer],
    criterion: Criterion,
    attempts: list[dict[str, Any]],
    latency: dict[str, Timing],
    phases: dict[str, dict[str, Timing]],
    planned_bytes: tuple[int, int] | None,
    slower: bool,
) -> str:
    """What came out, in a sentence. `planned_bytes`: of the layers, before and after, where the plan has any."""
    if slower:
        apart = "".join(f", {p} {phases['after'][p].low:.3g} and {t.low:.3g}" for p, t in phases["before"].items())
        return (f"the model as it is: it takes {latency['after'].low:.3g} ms with the best plan and {latency['before'].low:.3g} "
                f"without{apart}, though its layers gain one by one")  # fmt: skip
    if planned_bytes:
        value = next(a["value"] for a in reversed(attempts) if a["holds"])
        gain = latency["before"].low / latency["after"].low
        weights = " -> ".join(map(megabytes, planned_bytes))
        apart = ", ".join(f"{p} {t.low / phases['after'][p].low:.2f}" for p, t in phases["before"].items())
        return (f"{criterion}: {value:.6g} with the whole plan; {gain:.2f} times as fast as the model as it is"
                f"{f' ({apart})' if apart else ''}; layers {weights}")  # fmt: skip
    least = min(
        ((x.candidates[name].output_mean, x.leaf.fqn, name) for x in layers for name in x.open()),
        default=None,
    )
    if least is None:
        return "the model as it is: no candidate is a gain on any layer"
    values = ", ".join(f"{a['value']:.6g}" if a["value"] is not None else "not finite" for a in attempts)
    return (f"the model as it is: no plan that was tried holds {criterion} (found: {values}); the least error of any swap that "
            f"gains is that of {least[1]} in {least[2]}")  # fmt: skip
