"""Runs calibration batches through a model and turns what its layers are fed into the arguments of `from_torch`.

The maths is in `calibration`; here are the hooks, the masks and the memory. Every chosen layer has its own
statistics, on the host: 4 K^2 bytes each for K inputs, all at the same time (BERT-large 1.1 GB, a Llama of 8 billion
about 40 GB: swap such a model in parts, with include). Layers that share an input (q, k, v) each gather their own:
which layers do is not known before they are called, and inference tensors carry no version that would tell whether an
input was changed in between.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from ..common.batches import Forward, evaluating, padding_mask, run, several
from ..common.models.modules import hooked
from ..nn.conv2d_classes import is_pointwise
from ..nn.linear.quantized_linear import as_multiplied, linear_weight
from ..ops.common.rotation import fitting
from ..proofs.walker import Leaf
from .formulas import Largest, LayerStatistics, rotated_moment, round_weight, smoothing_scale

#: by layer and its `rotate`, arguments of `from_torch` of `Int8Linear` or `Int8Conv2d`
Arguments = dict[str, dict[int | None, dict[str, Any]]]

#: Rows that a layer must have seen: fewer mislead. all-MiniLM-L6-v2 in int8, the relative error of token embeddings on 48 texts,
#: the lowest and highest of three starts in other texts: not calibrated .049; on 1 token 1.27, 4 tokens .099 to .122, 8 tokens
#: .054 to .106, 16 tokens .047 to .050, 32 tokens .041 to .045, 64 tokens .039.
LEAST_ROWS = 32


def calibration_arguments(
    model: nn.Module,
    leaves: list[Leaf],
    batches: Iterable[Any],
    forward: Forward | None,
    rotations: Mapping[str, Iterable[int | None]] | None = None,
) -> tuple[Arguments, list[str], list[str]]:
    """For every leaf of which enough was seen, arguments of `from_torch` of `Int8Linear` by its `rotate`, or of a convolution of
    `Int8Conv2d`; the names of those that no batch reached; and notes on the others.

    rotations: by leaf, what it may be rotated by; None: nothing is rotated.

    Raises ValueError where there is no batch. The model is left as it was, after an error too: its hooks are removed
    and every module's training flag put back.
    """
    statistics = observe(model, leaves, batches, forward)
    arguments: Arguments = {}
    unseen, few, broken = [], [], []
    for leaf in leaves:
        layer_statistics = statistics.pop(leaf.fqn)  # gone as soon as it is used
        if layer_statistics.rows == 0:
            unseen.append(leaf.fqn)
        elif layer_statistics.rows < LEAST_ROWS:
            few.append(leaf.fqn)
        elif not layer_statistics.is_finite():
            broken.append(leaf.fqn)
        elif isinstance(layer_statistics, Largest):
            arguments[leaf.fqn] = {None: {"input_scale": layer_statistics.scale()}}
        else:
            of_leaf = [None] if rotations is None or leaf.is_convolution else rotations[leaf.fqn]
            arguments[leaf.fqn] = {size: _arguments(leaf.module, layer_statistics, size) for size in of_leaf}
    return (
        arguments,
        unseen,
        [
            f"calibration {problem} {len(names)} of {len(leaves)} layers ({names[0]}, …), which are rounded to nearest "
            f"without it"
            for problem, names in (
                (f"saw fewer than {LEAST_ROWS} rows (give it more batches) at the input of", few),
                ("met NaN or infinity at the input of", broken),
            )
            if names
        ],
    )


def observe(
    model: nn.Module, leaves: list[Leaf], batches: Iterable[Any], forward: Forward | None
) -> dict[str, LayerStatistics | Largest]:
    """What each leaf is fed, padding left out."""
    statistics: dict[str, LayerStatistics | Largest] = {
        leaf.fqn: Largest()
        if leaf.is_convolution and not is_pointwise(leaf.module)
        else LayerStatistics(leaf.in_features)
        for leaf in leaves
    }
    batch: Any = None

    def watch(leaf: Leaf, module: nn.Module, x: Tensor) -> None:
        so_far = statistics[leaf.fqn]
        if isinstance(so_far, Largest):
            so_far.update(x)
            return
        if leaf.is_convolution:
            x = x.movedim(-3, -1)
        # the products where the activations are, the sums on the host
        on_device = LayerStatistics(leaf.in_features, x.device)
        so_far.merge(on_device.update(x, padding_mask(batch, x.shape[:-1], leaf.fqn)))

    with hooked(((leaf, leaf.module) for leaf in leaves), before=watch), evaluating(model):
        for batch in several("calibrate", batches):
            run(model, batch, forward)
    return statistics


def _arguments(layer: nn.Module, statistics: LayerStatistics, rotate: int | None) -> dict[str, Any]:
    """Rotation leaves what `smoothing_scale` balances as it is: it keeps the energy of rows of x, from which their steps follow,
    and that of the weight."""
    weight = linear_weight(layer).float().flatten(1)  # of a convolution of 1 x 1 too
    channel_scale = smoothing_scale(statistics, weight)
    smoothed, channel_scale = statistics.scaled(channel_scale), channel_scale.to(weight.device)
    size = fitting(weight.shape[1], rotate)
    moment = smoothed.second_moment if size is None else rotated_moment(smoothed.second_moment, size)
    return {
        "channel_scale": channel_scale,
        "quantized": round_weight(as_multiplied(weight, channel_scale, size), moment),
    }
